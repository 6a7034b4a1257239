"""FBCache: the rule, and the loop against a plain transcription of diffusers' FirstBlockCache."""

from dataclasses import replace

import pytest
import torch
from conftest import build_hunyuan, build_wan
from every_model import in_double

import cineray
from cineray.caching.observation import Observation
from cineray.caching.policies.first_block import FirstBlockConfig, FirstBlockPolicy

SEEN = Observation(
    step_index=5,
    num_steps=50,
    branch_index=0,
    num_branches=1,
    sample=0,
    change_sum=4.0,
    previous_sum=100.0,
    accumulated=0.0,
    num_skips_in_a_row=3,
    num_pairs=1,
)


def test_the_change_since_the_last_computed_step_decides_alone():
    decide = FirstBlockPolicy(FirstBlockConfig(threshold=0.05)).decide
    assert not decide(SEEN).compute
    assert decide(replace(SEEN, change_sum=5.0)).reason == "threshold"
    assert decide(replace(SEEN, change_sum=float("nan"))).reason == "unknown"
    assert decide(replace(SEEN, num_pairs=0)).reason == "empty"
    with pytest.raises(ValueError, match="threshold must be 0 or more"):
        FirstBlockConfig(threshold=float("nan"))


@pytest.mark.parametrize("build", [build_wan, build_hunyuan])
def test_the_loop_equals_diffusers_own_first_block_cache(build):
    from diffusers import FirstBlockCacheConfig

    def call(pipe):
        generator = torch.Generator("cpu").manual_seed(3)
        sizes = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 20}
        return pipe("a red circle", **sizes, generator=generator, output_type="latent")[0]

    pipe = in_double(build())
    pipe.set_progress_bar_config(disable=True)
    with cineray.enable_cache(pipe, "fbcache(threshold=0.2)") as handle:
        ours = call(pipe)
    assert 3 < sum(not entry.compute for entry in handle.trace.entries) < len(handle.trace.entries) - 3
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    torch.testing.assert_close(ours, call(pipe), atol=1e-5, rtol=1e-5)
