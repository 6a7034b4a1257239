"""TeaCache against a transcription of its official rules: same decisions, same latents, over 50 steps.

github.com/ali-vilab/TeaCache at 7c10efc: TeaCache4Wan2.1/teacache_generate.py lines 519-568,
TeaCache4HunyuanVideo/teacache_sample_video.py lines 75-150, TeaCache4FLUX/teacache_flux.py lines 105-140.
"""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_flux, build_hunyuan, build_wan
from every_model import in_double
from oracle_dicache import attach_to_two_lists, attach_to_wan

import cineray

STEPS = 50


class OfficialTeaCache:
    """Counts calls, keeps state by even and odd call for Wan; means, not sums."""

    probe_depth = 0

    def __init__(self, coefficients, threshold, num_branches, ret_calls, cutoff_calls, signal):
        self.poly, self.threshold, self.num_branches = np.poly1d(coefficients), threshold, num_branches
        self.ret_calls, self.cutoff_calls, self.signal = ret_calls, cutoff_calls, signal
        self.cnt = 0
        self.accumulated = [0.0, 0.0]
        self.previous: list[Any] = [None, None]
        self.residual: list[Any] = [None, None]
        self.log = []

    def run(self, x, _probe, _rest, everything):
        which = self.cnt % self.num_branches
        modulated = self.signal(x)
        if self.cnt < self.ret_calls or self.cnt >= self.cutoff_calls:
            should_calc = True
            self.accumulated[which] = 0
        else:
            distance = ((modulated - self.previous[which]).abs().mean() / self.previous[which].abs().mean()).item()
            self.accumulated[which] += self.poly(distance)
            should_calc = not self.accumulated[which] < self.threshold
            if should_calc:
                self.accumulated[which] = 0
        self.previous[which] = modulated.clone()
        self.cnt += 1
        self.log.append(should_calc)
        if not should_calc:
            return x + self.residual[which]
        before = x.clone()
        out = everything(x)[1]
        self.residual[which] = out - before
        return out


def run(pipe, **kwargs):
    generator = torch.Generator("cpu").manual_seed(3)
    call = {"prompt": "a red circle", "width": 32, "height": 32, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**(call | kwargs), generator=generator)[0]


def seen_by(module, pick=lambda output: output):
    """The newest output of a module."""
    kept = {}
    module.register_forward_hook(lambda m, a, output: kept.update(now=pick(output)))
    return lambda: kept["now"]


def compare(pipe, policy, attach, oracle, **kwargs):
    in_double(pipe).set_progress_bar_config(disable=True)
    with cineray.enable_cache(pipe, policy) as handle:
        ours = run(pipe, **kwargs)
    attach(pipe.transformer, oracle)
    theirs = run(pipe, **kwargs)
    assert [e.compute for e in handle.trace.entries] == oracle.log
    assert 0.2 * len(oracle.log) < sum(oracle.log) < 0.8 * len(oracle.log)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


COEFFICIENTS = [40.0, -3.0, 1.5, 0.01]  # of no model: real ones never skip on random weights


# random weights move fast: thresholds at which something happens
@pytest.mark.parametrize(("ret_steps", "threshold"), [(False, 30.0), (True, 2.0)])
def test_wan(ret_steps, threshold):
    pipe = build_wan()
    embedder = pipe.transformer.condition_embedder
    signal = seen_by(embedder.time_proj if ret_steps else embedder.time_embedder)
    ends = (5 * 2, STEPS * 2) if ret_steps else (1 * 2, STEPS * 2 - 2)
    oracle = OfficialTeaCache(COEFFICIENTS, threshold, 2, *ends, lambda x: signal())
    text = ":".join(map(str, COEFFICIENTS))
    policy = f"teacache(threshold={threshold},coefficients={text},ret_steps={ret_steps})"
    compare(pipe, policy, attach_to_wan, oracle, num_frames=5, guidance_scale=4.0)


@pytest.mark.parametrize("build", [build_hunyuan, build_flux])
def test_joint_attention_models(build):
    pipe = build()
    is_flux = build is build_flux
    first = pipe.transformer.transformer_blocks[0]
    temb = seen_by(pipe.transformer.time_text_embed, lambda output: output[0] if isinstance(output, tuple) else output)
    oracle = OfficialTeaCache(COEFFICIENTS, 0.2, 1, 1, STEPS - 1, lambda x: first.norm1(x, emb=temb())[0])
    text = ":".join(map(str, COEFFICIENTS))
    kwargs = {} if is_flux else {"num_frames": 5}
    compare(
        pipe,
        f"teacache(threshold=0.2,coefficients={text})",
        lambda transformer, oracle: attach_to_two_lists(transformer, oracle, text_first=is_flux),
        oracle,
        **kwargs,
    )
