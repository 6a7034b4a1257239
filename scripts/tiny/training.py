"""The training loop of the tiny denoisers, whatever they denoise: two optimizers, a moving average, a log, resuming.

The autoencoder of sounds is trained by it too.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# (denoiser, its moving average where it teaches, seed of the step) -> mean loss of a batch
Loss = Callable[[nn.Module, nn.Module | None, int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast.

    Args:
        steps, peak_rate: the first run: warm-up, then a cosine to zero.
        refine_steps, refine_rate: a second run of the same form.
        guided_from: first step that learns embedded guidance; None for a model without.
    """

    steps: int
    batch: int = 24
    peak_rate: float = 1.5e-3
    refine_steps: int = 0
    refine_rate: float = 8e-4
    guided_from: int | None = None
    ema_decay: float = 0.998

    @property
    def total_steps(self) -> int:
        return self.steps + self.refine_steps

    def rate(self, step: int) -> float:
        peak, since, length = self.peak_rate, step, self.steps
        if step >= self.steps:
            peak, since, length = self.refine_rate, step - self.steps, self.refine_steps
        return peak * min((since + 1) / 100, 0.5 * (1 + math.cos(math.pi * since / length)))


def say(work: Path, event: str, **fields: object) -> None:
    """One line to stdout and to the work folder's `run.log.jsonl`."""
    line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%d %H:%M:%S")} | fields)
    print(line, flush=True)
    with (work / "run.log.jsonl").open("a") as file:
        file.write(line + "\n")


def split_by_optimizer(denoiser: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside the transformer's blocks, for Muon; everything else that is trained, for AdamW)."""
    transformer = getattr(denoiser, "transformer", nn.Module())  # an autoencoder has none
    matrices = [
        p
        for name, p in transformer.named_parameters()
        if "blocks." in name and p.ndim == 2 and "norm" not in name and "table" not in name
    ]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in denoiser.parameters() if p.requires_grad and id(p) not in chosen]


def train_denoiser(
    denoiser: nn.Module, loss_of: Loss, work: Path, seed: int, plan: Plan, name: str = "denoiser"
) -> None:
    """Trains in place, a denoiser or an autoencoder, and leaves the moving average of the weights.

    Writes `NAME.log.jsonl`, and `NAME.pt` every 200 steps, from which a second call resumes.
    """
    average = torch.optim.swa_utils.AveragedModel(
        denoiser, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(plan.ema_decay)
    )
    matrices, others = split_by_optimizer(denoiser)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=plan.peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=plan.peak_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4
        )
        optimizers.insert(0, muon)
    parts = {"denoiser": denoiser, "average": average} | {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    saved, step, losses, began = work / f"{name}.pt", 0, [], time.monotonic()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        step = state.pop("step")
        for part_name, part in parts.items():
            part.load_state_dict(state[part_name])
    with (work / f"{name}.log.jsonl").open("a") as log:
        while step < plan.total_steps:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = plan.rate(step)
            is_guided = plan.guided_from is not None and step >= plan.guided_from
            teacher = average.module if is_guided else None
            loss = loss_of(denoiser, teacher, seed * 1_000_003 + step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(denoiser)
            losses.append(loss.item())
            step += 1
            if step % 50 == 0:
                row = {"step": step, "loss": sum(losses) / len(losses), "guided": teacher is not None}
                print(json.dumps(row | {"wall_s": time.monotonic() - began}), file=log, flush=True)
                losses = []
            if step % 200 == 0 or step in (plan.steps, plan.total_steps):
                torch.save({n: p.state_dict() for n, p in parts.items()} | {"step": step}, work / f"{name}.tmp")
                (work / f"{name}.tmp").rename(saved)
    denoiser.load_state_dict(average.module.state_dict())
