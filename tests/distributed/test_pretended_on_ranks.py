"""Two experts on the ranks of a gang: each is sharded and cached, and the clip is that of one process."""

import pytest
import torch
from pretended import EXPERTS, build_two_experts

from cineray.distributed.layout import parse_layout
from cineray.pipeline.blocks import is_sharded
from cineray.pipeline.caches.step_tracker import StepTracker
from cineray.pipeline.gang import SOLO, Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import denoise_clip


def denoise_on_rank(rank, num_ranks, init_method, layout, source, requests):
    is_alone = num_ranks == 1
    gang = (
        SOLO if is_alone else Gang.join(parse_layout(layout), rank, num_ranks, init_method=init_method, timeout_s=120)
    )
    model = load_model(open_checkpoint(source, EXPERTS), LoadOptions())
    experts = (model.pipe.transformer, model.pipe.transformer_2)
    seen = []

    def look(*_):
        seen.append([(is_sharded(expert), StepTracker.is_attached(expert)) for expert in experts])

    found = []
    with gang:
        for request in requests:
            clip = denoise_clip(model, request, look, gang=gang)
            assert seen[-1] == [(not is_alone and "ulysses" in layout, request.cache != "none")] * 2
            found.append(
                (clip.latents, [(e.step, e.branch, e.compute) for e in clip.trace.entries] if clip.trace else [])
            )
    assert not any(is_sharded(expert) or StepTracker.is_attached(expert) for expert in experts)
    return found


@pytest.mark.parametrize("layout", ["ulysses2", "cfg2"])
def test_both_experts_are_sharded_and_cached(ranks, tmp_path, new_request, layout):
    build_two_experts().save_pretrained(tmp_path)
    requests = [new_request(num_inference_steps=12, cache=cache) for cache in ("none", "dicache(threshold=0.5)")]
    alone = ranks.run(denoise_on_rank, 1, "1", str(tmp_path), requests, timeout_s=300)[0]
    for rank in ranks.run(denoise_on_rank, 2, layout, str(tmp_path), requests, timeout_s=300):
        for (latents, decisions), (expected, expected_decisions) in zip(rank, alone, strict=True):
            assert torch.equal(latents, expected)
            assert decisions == expected_decisions
    assert any(not compute for _, _, compute in alone[1][1])
