"""What the trainer of the tiny checkpoints takes over from one checkpoint to the next."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tiny.denoiser import shifted
from tiny.experts import BOUNDARY, EXPERTS, KEPT_BLOCKS, SHIFT, draw_sigma, halved


def test_each_expert_is_trained_at_the_noise_of_its_steps():
    generator = torch.Generator().manual_seed(0)
    steps = shifted(torch.linspace(1, 1 / 40, 40), SHIFT)
    high, low = (draw_sigma(*EXPERTS[name], 4000, generator) for name in ("transformer", "transformer_2"))
    assert high.min() >= BOUNDARY > low.max()
    for drawn, seen in ((high, steps[steps >= BOUNDARY]), (low, steps[steps < BOUNDARY])):
        # as often: the medians lie within one of some twenty steps
        assert abs((seen < drawn.median()).float().mean() - 0.5) < 1 / len(seen)


def test_an_expert_begins_as_blocks_of_the_model_before_it():
    from diffusers import WanPipeline
    from tiny.experts import TINY_WAN

    wan = WanPipeline.from_pretrained(TINY_WAN, torch_dtype=torch.float32)
    denoiser = halved(wan)
    for new, old in enumerate(KEPT_BLOCKS):
        for name, weight in denoiser.transformer.blocks[new].state_dict().items():
            assert torch.equal(weight, wan.transformer.blocks[old].state_dict()[name])
    assert torch.equal(denoiser.transformer.proj_out.weight, wan.transformer.proj_out.weight)
    assert not any(p.requires_grad for p in denoiser.text_encoder.parameters())
