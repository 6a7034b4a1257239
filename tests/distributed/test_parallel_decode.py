"""Decoding by bands of rows, against one rank: the shipped VAEs, whose weights are trained.

Bounds relative to the largest value: measured 9e-7 (Wan) and 1.1e-6 (HunyuanVideo) in float32 on a CPU, where a
convolution adds up in another order for another height. The frames then differ in a few of 200,000 values by one of
256 levels.
"""

import pytest
import torch

from cineray.distributed.layout import parse_layout
from cineray.pipeline.gang import SOLO, Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import to_frames
from cineray.pipeline.request import ClipRequest

# the shipped models' decoders look at the latents alone
SIZES = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0, "fps": 8}
REQUEST = ClipRequest(id="1", prompt="", **SIZES)
BOUND = 3e-6
SHAPES = [(1, 16, 3, 8, 8), (1, 16, 2, 7, 6), (1, 16, 2, 3, 8)]  # even and uneven bands; fewer rows than 4 ranks


def decode_on_rank(rank, num_ranks, init_method, name):
    gang = Gang.join(
        parse_layout(str(num_ranks)), rank, num_ranks, init_method=init_method, timeout_s=120, parallel_decode=True
    )
    model = load_model(open_checkpoint(name), LoadOptions())
    convolved_rows = []
    last_convolution = model.pipe.vae.decoder.conv_out
    last_convolution.register_forward_pre_hook(lambda module, args: convolved_rows.append(args[0].shape[-2]))
    results = []
    with gang:
        for shape in SHAPES:
            latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            alone = SOLO.decode(model, REQUEST, latents)
            convolved_rows.clear()
            together = gang.decode(model, REQUEST, latents)
            num_rows = convolved_rows[0]
            assert torch.equal(SOLO.decode(model, REQUEST, latents), alone)  # the decoder is as before
            assert (together is None) == (rank > 0)
            if together is not None:
                levels = (to_frames(together).astype(int) - to_frames(alone)).ravel()
                error = ((together - alone).abs().max() / alone.abs().max()).item()
                results.append((error, abs(levels).max(), (levels != 0).mean(), num_rows, alone.shape[-2]))
    return results


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("tiny-wan", 4),
        ("tiny-hunyuan", 2),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("tiny-wan", 2), ("tiny-hunyuan", 4))),
    ],
)
def test_rows_on_ranks_are_the_frames_of_one_rank(ranks, name, num_ranks):
    results = ranks.run(decode_on_rank, num_ranks, name, timeout_s=300)[0]
    for (error, largest_level, share, num_rows, height), shape in zip(results, SHAPES, strict=True):
        assert error <= BOUND
        assert largest_level <= 1
        assert share < 1e-4
        if shape[-2] >= num_ranks:
            assert num_rows < height  # the last convolution saw a band, not the frame
        else:
            assert (num_rows, error) == (height, 0)


def test_every_autoencoder_that_is_rendered_with_has_its_rows():
    from cineray.pipeline.adapters import KNOWN_MODELS

    for name in ("tiny-wan", "tiny-hunyuan"):
        assert name in KNOWN_MODELS
        assert open_checkpoint(name).model.row_convolutions
