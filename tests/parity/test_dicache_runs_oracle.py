"""One look per run of skips, against a small transcription that shares no code with the controller."""

import pytest
import torch
from conftest import build_wan
from every_model import in_double

import cineray

STEPS, THRESHOLD, CLIP, CAP = 24, 0.12, (1.0, 1.5), 4


class Oracle:
    """The blocks of Wan, called in the place of the first one; the others do nothing."""

    def __init__(self, blocks):
        self.blocks, self.step, self.branch, self.log, self.state = blocks, 0, 0, [], [{}, {}]
        self.left = 0  # steps of the run in flight, decided by branch 0

    def __call__(self, x, *rest):
        state, branch, step = self.state[self.branch], self.branch, self.step
        self.branch = 1 - branch
        self.step += branch
        if branch == 0:
            self.skips = self.left > 0
            self.left -= self.skips
            self.looks = not self.skips
        probe = None
        if self.looks:
            probe = self.blocks[0](x, *rest)
            if branch == 0 and not state.get("ended", True) and step < STEPS - 1:
                change = ((probe - state["probe"]).abs().sum() / state["probe"].abs().sum()).item()
                run = 0
                while run < CAP and step + run < STEPS - 1 and change * (run + 1) < THRESHOLD:
                    run += 1
                self.skips, self.left = run > 0, max(run - 1, 0)
            if branch == 0:
                state["ended"] = self.skips  # after a run a step is computed without asking
        if not self.skips:
            y = probe
            for block in self.blocks[1:]:
                y = block(y, *rest)
            state["older"], state["newest"] = state.get("newest"), (probe - x, y - x)
            state["probe"] = probe
            if branch == 0:
                state["ended"] = state["older"] is None or step < 3  # steps 0 to 3 are the warm-up
            self.log.append((True, None))
            return y
        (pb, rb), (pa, ra) = state["older"], state["newest"]
        if self.looks:
            state["gamma"] = ((probe - x - pb).abs().sum() / (pa - pb).abs().sum()).item()
            state["count"] = 0
        gamma = state["gamma"] + state["count"] * (state["gamma"] - 1)
        state["count"] += 1
        gamma = min(max(gamma, CLIP[0]), CLIP[1])
        self.log.append((False, gamma))
        return x + rb + gamma * (ra - rb)


def test_wan():
    pipe = in_double(build_wan())
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "width": 32, "height": 32, "num_frames": 5, "num_inference_steps": STEPS}

    def run():
        return pipe(**call, output_type="latent", guidance_scale=4.0, generator=torch.Generator().manual_seed(3))[0]

    options = f"threshold={THRESHOLD},look=run,profile=none,branches=joint,warmup=0.17,gamma_clip=1:1.5,max_skips={CAP}"
    with cineray.enable_cache(pipe, f"dicache({options})") as handle:
        ours = run()
    oracle = Oracle(list(pipe.transformer.blocks))
    pipe.transformer.blocks = torch.nn.ModuleList([Alone(oracle)])
    theirs = run()
    entries = handle.trace.entries
    assert [e.compute for e in entries] == [computed for computed, _ in oracle.log]
    assert sum(e.reason == "run" for e in entries) > 4
    for entry, (_, gamma) in zip(entries, oracle.log, strict=True):
        assert entry.gamma == (None if gamma is None else pytest.approx(gamma, rel=1e-5))
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


class Alone(torch.nn.Module):
    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle

    def forward(self, *arguments):
        return self.oracle(*arguments)
