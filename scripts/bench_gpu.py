#!/usr/bin/env python
"""What one denoising step costs at real sizes on one GPU: full, probed and skipped, with random weights.

    python scripts/bench_gpu.py --model wan2.1-1.3b --size 480p
    python scripts/bench_gpu.py --model wan2.1-14b hunyuan-video --size 480p 720p --attention native _native_cudnn
    python scripts/bench_gpu.py --model tiny --size tiny --device cpu       # runs anywhere, says nothing

Times are medians of --repeats runs after one warm-up, synchronized. No checkpoint is needed: random weights of the
published shapes take the same time. Prints one JSON object per line. The share of peak uses the dense bfloat16 rate
that the maker states for the GPU; give --peak-tflops for one that is not listed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from cineray.caching.call import StepContext
from cineray.caching.controller import CacheController
from cineray.caching.policies.dicache import DiCacheConfig
from cineray.caching.trace import Trace
from cineray.pipeline.adapters.cache_plan import plan_cache
from cineray.pipeline.caches.enable import attach_cache

# Configurations of the published checkpoints; HunyuanVideo's are diffusers' defaults.
WAN = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "in_channels": 16, "out_channels": 16}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "wan2.1-1.3b": (WanTransformer3DModel, WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan2.1-14b": (WanTransformer3DModel, WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}),
    "hunyuan-video": (HunyuanVideoTransformer3DModel, {"guidance_embeds": True}),
    "tiny": (WanTransformer3DModel, WAN | {"num_attention_heads": 1, "ffn_dim": 64, "num_layers": 3, "text_dim": 32}),
}
SIZES = {"480p": (832, 480), "720p": (1280, 720), "tiny": (64, 48)}  # pixels; all VAEs shrink by 8, by 4 in time
# dense bfloat16 TFLOP/s in the makers' data sheets, by part of the device's name
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
ATTENTION = ("native", "_native_flash", "_native_cudnn", "_native_efficient", "flash", "_flash_3", "sage")


@dataclass(frozen=True, slots=True)
class Subject:
    """A transformer and the arguments of one call."""

    transformer: Any
    inputs: dict[str, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        _, _, frames, height, width = self.inputs["hidden_states"].shape
        return frames * (height // 2) * (width // 2)


def new_subject(model: str, size: str, num_frames: int, device: str) -> Subject:
    """Random weights and inputs in bfloat16; on "meta" nothing is allocated."""
    kind, config = MODELS[model]
    width, height = SIZES[size]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = kind(**config).eval()
            for name, parameter in transformer.named_parameters():  # as from_pretrained keeps them
                if set(name.split(".")) & set(transformer._keep_in_fp32_modules or ()):
                    parameter.data = parameter.data.float()
            inputs = {
                "hidden_states": torch.randn(1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8),
                "timestep": torch.tensor([500.0]),
            }
            if kind is WanTransformer3DModel:
                inputs["encoder_hidden_states"] = torch.randn(1, 512, transformer.config.text_dim)
            else:
                inputs["encoder_hidden_states"] = torch.randn(1, 256, 4096)
                inputs["encoder_attention_mask"] = torch.ones(1, 256)
                inputs["pooled_projections"] = torch.randn(1, 768)
                inputs["guidance"] = torch.tensor([6000.0])
    finally:
        torch.set_default_dtype(torch.float32)
    return Subject(transformer, inputs)


def flops_of_a_step(model: str, size: str, num_frames: int) -> int:
    """Floating-point operations of one forward, counted on tensors without memory."""
    subject = new_subject(model, size, num_frames, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.transformer(**subject.inputs, return_dict=False)
    return counter.get_total_flops()


def median_s(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of a call."""

    def once() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(repeats))


def time_steps(subject: Subject, repeats: int, device: str) -> dict[str, Any]:
    """Seconds of an uncached, a computed and a skipped step, and bytes that the cache held against the forecast."""
    transformer = subject.transformer
    num_steps = 2 * repeats + 8

    # other inputs at each step: residuals that are equal leave nothing to align
    latents = [subject.inputs["hidden_states"] * (1 + 0.1 * i) for i in range(4)]

    def forward(step: int = 0) -> None:
        transformer(**(subject.inputs | {"hidden_states": latents[step % 4]}), return_dict=False)

    def step_s(config: DiCacheConfig, computes: bool) -> tuple[float, Trace]:
        """Two computed steps give two residual pairs; what is timed are the steps after them."""
        plan = plan_cache(config, type(transformer).__name__, transformer.config)
        assert plan is not None
        with attach_cache([transformer], plan, num_branches=1) as cache:
            steps = iter(range(num_steps))

            def one() -> None:
                step = next(steps)
                with transformer.cache_context("cond", step_index=step, num_inference_steps=num_steps):
                    forward(step)

            for _ in range(3):
                one()
            seconds = median_s(one, repeats, device)
            assert all(entry.compute == computes for entry in cache.trace.entries[3:])
            return seconds, cache.trace

    with torch.no_grad():
        plain_s = median_s(forward, repeats, device)
        computed_s, trace = step_s(DiCacheConfig(threshold=1e-30, warmup=1.0), computes=True)
        skipped_s, _ = step_s(DiCacheConfig(threshold=1e30, warmup=3 / num_steps), computes=False)
        run_s, _ = step_s(DiCacheConfig(threshold=1e30, warmup=2 / num_steps, look="run"), computes=False)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return {
        "full_step_s": plain_s,
        "computed_step_s": computed_s,
        "skipped_step_s": skipped_s,
        "skipped_step_in_a_run_s": run_s,
        "held_bytes": trace.held_bytes,
        "forecast_bytes": 5 * subject.num_tokens * width * 2,  # previous probe, two residual pairs, bfloat16
    }


def time_controller(subject: Subject, repeats: int, device: str) -> dict[str, float]:
    """Seconds of the controller's own work in a computed and in a skipped step, apart from the model."""
    transformer = subject.transformer
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    config = DiCacheConfig(threshold=1e30, warmup=0.0)
    trace = Trace(policy="", forecasting=config.forecasting(), num_blocks=2, probe_depth=1)
    controller = CacheController(policy=config.policy(), forecasting=config.forecasting(), trace=trace)
    step, num_steps = iter(range(10**6)), 10**6

    def tokens() -> torch.Tensor:
        return torch.randn(1, subject.num_tokens, width, device=device, dtype=torch.bfloat16)

    blocks_input, probe, blocks_output = tokens(), tokens(), tokens()

    def decide():
        where = StepContext(branch="cond", step_index=next(step), num_steps=num_steps, num_branches=1)
        controller.begin_call(where, blocks_input)
        return controller.decide(where, blocks_input.clone(), probe.clone())

    def computed() -> None:
        plan = replace(decide(), compute_rows=[0], skip_rows=[])
        controller.remember(plan, blocks_input, blocks_output)

    for _ in range(3):
        computed()
    computed_s = median_s(computed, repeats, device)
    skipped_s = median_s(lambda: controller.forecast(decide(), blocks_input), repeats, device)
    return {"controller_computed_s": computed_s, "controller_skipped_s": skipped_s}


def measure(model: str, size: str, num_frames: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per attention backend that runs here."""
    device = arguments.device
    common = {"model": model, "size": size, "frames": num_frames, "device": device_name(device)}
    flops = flops_of_a_step(model, size, num_frames)
    peak = arguments.peak_tflops or next((p for n, p in PEAK_TFLOPS.items() if n in device_name(device)), None)
    rows = []
    subject = new_subject(model, size, num_frames, device)
    for backend in arguments.attention:
        row: dict[str, Any] = {**common, "tokens": subject.num_tokens, "attention": backend, "flops": flops}
        try:
            subject.transformer.set_attention_backend(backend)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row |= time_steps(subject, arguments.repeats, device)
            row |= time_controller(subject, arguments.repeats, device)
        except (RuntimeError, ValueError, ImportError) as error:  # a backend that is not here, out of memory
            rows.append({**row, "error": " ".join(str(error).split())[:200]})
            continue
        row["probe_s"] = row["skipped_step_s"] - row["controller_skipped_s"]  # with what stands around the blocks
        row["controller_share"] = row["controller_computed_s"] / row["full_step_s"]
        row["skipped_over_full"] = row["skipped_step_s"] / row["full_step_s"]
        row["tflops_per_s"] = flops / row["full_step_s"] / 1e12
        row["share_of_peak"] = row["tflops_per_s"] / peak if peak else None
        if device == "cuda":
            row["max_memory_bytes"] = torch.cuda.max_memory_allocated()
        rows.append(row)
    return rows


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["wan2.1-1.3b", "wan2.1-14b", "hunyuan-video"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["480p", "720p"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--attention", nargs="+", default=list(ATTENTION), help="diffusers attention backends to try")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA GPU; --device cpu --model tiny --size tiny tries the script out")
    for model in arguments.model:
        for size in arguments.size:
            rows = measure(model, size, arguments.frames, arguments)
            timed = [row for row in rows if "error" not in row]
            best = min(timed, key=lambda row: row["full_step_s"], default=None)
            for row in rows:
                print(json.dumps(row | {"best": row is best}), flush=True)
            if arguments.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
