"""`dicache-paper` against the official rules: same decisions, same gamma, outputs within 1e-6, over 50 steps."""

import pytest
import torch
from every_model import in_double
from oracle_dicache import OfficialDiCache, attach_to_two_lists, attach_to_wan

import cineray

STEPS = 50


def run(pipe, **kwargs):
    generator = torch.Generator("cpu").manual_seed(3)
    call = {"prompt": "a red circle", "width": 32, "height": 32, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**(call | kwargs), generator=generator)[0]


@pytest.fixture(scope="module")
def uncached():
    """Factory: what a pipeline gives without a cache, computed once for the thresholds of one model."""
    made = {}

    def result(pipe, **kwargs):
        key = (type(pipe), *sorted(kwargs.items()))
        if key not in made:
            made[key] = run(pipe, **kwargs)
        return made[key]

    return result


def compare(uncached, build, attach, oracle, policy, tolerance=1e-6, **kwargs):
    pipe = in_double(build())
    pipe.set_progress_bar_config(disable=True)
    handle = cineray.enable_cache(pipe, policy)
    ours = run(pipe, **kwargs)
    handle.disable()
    plain = uncached(pipe, **kwargs)
    attach(pipe.transformer, oracle)
    theirs = run(pipe, **kwargs)
    entries = handle.trace.entries
    assert [e.compute for e in entries] == [computed for computed, _ in oracle.log]
    for entry, (_, gamma) in zip(entries, oracle.log, strict=True):
        assert (entry.gamma is None) == (gamma is None)
        if gamma is not None:
            assert entry.gamma == pytest.approx(gamma, rel=1e-5)
    skips = sum(not e.compute for e in entries)
    assert 0.2 * len(entries) < skips < 0.9 * len(entries)  # a threshold at which something happens
    assert len({e.gamma for e in entries if e.gamma is not None}) > 3
    assert not torch.equal(ours, plain)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    return entries


# at 13 steps the two branches leave the warm-up at different steps: the official code counts calls
@pytest.mark.parametrize(("threshold", "steps"), [(0.03, STEPS), (0.06, STEPS), (0.09, 13)])
def test_wan(uncached, threshold, steps):
    from conftest import build_wan

    oracle = OfficialDiCache(steps, threshold, ret_ratio=0.2, clip=(1, 2), num_branches=2)
    compare(
        uncached,
        build_wan,
        attach_to_wan,
        oracle,
        f"dicache-paper(threshold={threshold})",
        num_frames=5,
        guidance_scale=4.0,
        num_inference_steps=steps,
    )


@pytest.mark.parametrize("threshold", [0.02, 0.06])
def test_hunyuan_video(uncached, threshold):
    from conftest import build_hunyuan

    oracle = OfficialDiCache(STEPS, threshold, ret_ratio=0.2, clip=(1, 1.5), num_branches=1, inclusive=True)
    compare(
        uncached,
        build_hunyuan,
        lambda transformer, oracle: attach_to_two_lists(transformer, oracle, text_first=False),
        oracle,
        f"dicache-paper(threshold={threshold})",
        num_frames=5,
    )


@pytest.mark.parametrize("threshold", [0.02, 0.06])
def test_flux(uncached, threshold):
    from conftest import build_flux

    oracle = OfficialDiCache(STEPS, threshold, ret_ratio=0.2, clip=(1, 1.5), num_branches=1, flux=True)
    entries = compare(
        uncached,
        build_flux,
        lambda transformer, oracle: attach_to_two_lists(transformer, oracle, text_first=True),
        oracle,
        f"dicache-paper(threshold={threshold})",
    )
    assert entries[-1].compute
    assert all(e.compute for e in entries[: int(0.2 * STEPS) + 1])
