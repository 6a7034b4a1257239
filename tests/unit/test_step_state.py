"""A clip that stops between two steps and goes on elsewhere is the clip that never stopped."""

import pytest
import torch

from cineray.pipeline.render import denoise_clip
from cineray.pipeline.resume.step_state import load_step_state, save_step_state

STEPS = 7


class Stopped(Exception):
    pass


class FileKeeper:
    """Begins where a file says; writes the state after `stop_at` steps and stops there."""

    def __init__(self, path, stop_at=None):
        self.path, self.stop_at, self.began_at = path, stop_at, None

    def begin(self, beginning):
        state = load_step_state(self.path)
        assert state is None or beginning.misfit(state) is None
        self.began_at = 0 if state is None else state.step
        return state

    def after_step(self, take):
        state = take()
        if state.step == self.stop_at:
            save_step_state(state, self.path)
            raise Stopped


def denoise(model, request, keeper=None):
    steps = []
    clip = denoise_clip(model, request, lambda done, total: steps.append(done), keeper=keeper)
    return clip, steps


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
@pytest.mark.parametrize("stop_at", [1, 2, 3, 6])
def test_resuming_without_a_cache_is_bit_equal_to_never_having_stopped(loaded, new_request, tmp_path, name, stop_at):
    """UniPC (Wan) keeps two model outputs and the last sample; FlowMatchEuler (HunyuanVideo) keeps none."""
    request, path = new_request(num_inference_steps=STEPS), tmp_path / "state.safetensors"
    whole, _ = denoise(loaded(name), request)
    with pytest.raises(Stopped):
        denoise(loaded(name), request, FileKeeper(path, stop_at))
    second, steps = denoise(loaded(name), request, FileKeeper(path))
    assert steps == list(range(stop_at + 1, STEPS + 1))
    assert torch.equal(second.latents, whole.latents)


def test_a_second_stop_goes_on_from_the_second(loaded, new_request, tmp_path):
    request, path = new_request(num_inference_steps=STEPS), tmp_path / "state.safetensors"
    for stop_at in (2, 5):
        with pytest.raises(Stopped):
            denoise(loaded("wan"), request, FileKeeper(path, stop_at))
    clip, steps = denoise(loaded("wan"), request, FileKeeper(path))
    assert steps == [6, 7]
    assert torch.equal(clip.latents, denoise(loaded("wan"), request)[0].latents)


def test_a_cache_begins_empty_and_its_trace_tells_of_both_parts(loaded, new_request, tmp_path):
    request = new_request(num_inference_steps=12, cache="interval(interval=3)")
    path = tmp_path / "state.safetensors"
    with pytest.raises(Stopped):
        denoise(loaded("wan"), request, FileKeeper(path, 8))
    first = load_step_state(path).notes.entries
    assert {entry.step for entry in first} == set(range(8))
    clip, _ = denoise(loaded("wan"), request, FileKeeper(path))
    assert [entry.step for entry in clip.trace.entries if entry.branch == "cond"] == list(range(12))
    assert any(not entry.compute for entry in clip.trace.entries)
    assert all(entry.compute for entry in clip.trace.entries if entry.step == 8)


def test_a_file_that_is_not_whole_means_the_beginning(loaded, new_request, tmp_path):
    request, path = new_request(num_inference_steps=STEPS), tmp_path / "state.safetensors"
    with pytest.raises(Stopped):
        denoise(loaded("wan"), request, FileKeeper(path, 3))
    content = path.read_bytes()
    for broken in (b"", content[:50], content[:-100], b"x" * 200):
        path.write_bytes(broken)
        assert load_step_state(path) is None
    assert load_step_state(tmp_path / "none") is None
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
