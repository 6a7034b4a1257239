"""Whatever lies in the place of a step state: the clip goes on as it would have, or begins anew with one line."""

import json
import os
import random
import struct
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save

from cineray.jobs.output.step_keeper import ClipPreempted, StepKeeper
from cineray.pipeline.gang import SOLO
from cineray.pipeline.render import denoise_clip
from cineray.pipeline.resume.step_state import Beginning, StepState, StepStateError, read_step_state, save_step_state
from cineray.pipeline.resume.tensor_file import TensorFileError, read_tensors, write_tensors

STEPS, STOP_AT, CLIP = 5, 3, "0123456789ab"
NUM_FLIPS = 400


class Probe:
    """A keeper that keeps nothing, and remembers what a clip begins with."""

    beginning: Beginning

    def begin(self, beginning):
        self.beginning = beginning

    def after_step(self, take):
        pass


@dataclass
class Kept:
    """A clip of 5 steps that was preempted after 3 of them."""

    content: bytes
    state: StepState
    beginning: Beginning
    whole: torch.Tensor


def keeper(path, num_steps=STOP_AT):
    """Stops after so many more steps."""
    asked = iter([False] * (num_steps - 1))
    return StepKeeper(path, CLIP, SOLO, 1e9, lambda: next(asked, True))


@pytest.fixture
def request_(new_request):
    return new_request(width=16, height=16, num_frames=1, num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def made():
    return []


@pytest.fixture
def kept(loaded, request_, tmp_path, made):
    if not made:
        path, probe = tmp_path / f"1.{CLIP}.safetensors", Probe()
        whole = denoise_clip(loaded("wan"), request_, lambda done, total: None, keeper=probe).latents
        with pytest.raises(ClipPreempted) as preempted:
            denoise_clip(loaded("wan"), request_, lambda done, total: None, keeper=keeper(path))
        assert preempted.value.kept
        made.append(Kept(path.read_bytes(), read_step_state(path, CLIP), probe.beginning, whole))
        path.unlink()
    return made[0]


@pytest.fixture
def place(tmp_path):
    return tmp_path / f"1.{CLIP}.safetensors"


def is_same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(is_same, a, b))
    return type(a) is type(b) and a == b


def test_it_goes_on_from_a_whole_state(loaded, request_, kept, place):
    place.write_bytes(kept.content)
    steps = []
    clip = denoise_clip(loaded("wan"), request_, lambda done, total: steps.append(done), keeper=keeper(place, 99))
    assert steps == [4, 5]
    assert torch.equal(clip.latents, kept.whole)


def test_any_flipped_bit_is_found_or_changes_nothing(kept, place):
    random.seed(0)
    num_bits = 8 * len(kept.content)
    (num_header_bytes,) = struct.unpack("<Q", kept.content[:8])
    places = [*range(64), *(random.randrange(8 * (8 + num_header_bytes)) for _ in range(NUM_FLIPS // 2))]
    places += [random.randrange(num_bits) for _ in range(NUM_FLIPS // 2)]
    num_found = 0
    for bit in places:
        content = bytearray(kept.content)
        content[bit // 8] ^= 1 << bit % 8
        place.write_bytes(content)
        try:
            state = read_step_state(place, CLIP)
        except StepStateError:
            num_found += 1
            continue
        assert state is not None
        assert torch.equal(state.latents, kept.state.latents), bit
        assert (state.step, state.num_steps, state.clip, state.notes) == (STOP_AT, STEPS, CLIP, kept.state.notes), bit
        assert state.scheduler.keys() == kept.state.scheduler.keys(), bit
        assert all(is_same(state.scheduler[name], value) for name, value in kept.state.scheduler.items()), bit
    assert num_found > 0.95 * len(places)  # what is left is blanks at the end of the header


def changed_scheduler(state, **changes):
    return replace(state, scheduler={**state.scheduler, **changes})


def without(state, name):
    return replace(state, scheduler={key: value for key, value in state.scheduler.items() if key != name})


NAN = float("nan")
STATES = {
    "step 99": lambda s: replace(s, step=99),
    "step -1": lambda s: replace(s, step=-1),
    "step 0": lambda s: replace(s, step=0),
    "step 3.0": lambda s: replace(s, step=3.0),
    "step null": lambda s: replace(s, step=None),
    "step true": lambda s: replace(s, step=True),
    "step text": lambda s: replace(s, step="3"),
    "another step": lambda s: replace(s, step=2),
    "a step later": lambda s: replace(s, step=4),
    "more steps": lambda s: replace(s, num_steps=6),
    "fewer steps": lambda s: replace(s, num_steps=4),
    "steps null": lambda s: replace(s, num_steps=None),
    "finished too early": lambda s: replace(s, step=3, num_steps=3),
    "another clip": lambda s: replace(s, clip="ba9876543210"),
    "no clip": lambda s: replace(s, clip=""),
    "float16": lambda s: replace(s, latents=s.latents.half()),
    "float64": lambda s: replace(s, latents=s.latents.double()),
    "wider": lambda s: replace(s, latents=torch.cat([s.latents, s.latents], -1)),
    "four dimensions": lambda s: replace(s, latents=s.latents[0]),
    "no latents": lambda s: replace(s, latents=s.latents[:, :0]),
    "no scheduler": lambda s: replace(s, scheduler={}),
    "one attribute less": lambda s: without(s, "model_outputs"),
    "one attribute more": lambda s: changed_scheduler(s, betas=1),
    "its step index": lambda s: changed_scheduler(s, _step_index=1),
    "its order": lambda s: changed_scheduler(s, this_order=1),
    "no outputs": lambda s: changed_scheduler(s, model_outputs=[None, None]),
    "one output": lambda s: changed_scheduler(s, model_outputs=s.scheduler["model_outputs"][:1]),
    "outputs not finite": lambda s: changed_scheduler(s, model_outputs=[x * NAN for x in s.scheduler["model_outputs"]]),
    "last sample of another shape": lambda s: changed_scheduler(s, last_sample=s.latents[..., :1]),
    "last sample a number": lambda s: changed_scheduler(s, last_sample=1.0),
    "timesteps of another clip": lambda s: changed_scheduler(
        s, timestep_list=[t - 1 for t in s.scheduler["timestep_list"]]
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_leaves_a_doubt_is_not_used(kept, place, capsys, name):
    save_step_state(STATES[name](kept.state), place)
    assert keeper(place).begin(kept.beginning) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cineray: clip 1 begins anew; its step state is not used: ")


NOTES = {
    "no notes": {},
    "notes that are a list": [],
    "resumed at a text": {"resumed_at": "x"},
    "resumed in the future": {"resumed_at": [4]},
    "resumed backwards": {"resumed_at": [2, 1]},
    "seconds not finite": {"denoise_s": NAN},
    "seconds null": {"encode_s": None},
    "a trace of texts": {"trace": ["x"]},
    "a trace that is no list": {"trace": 3},
    "finished a number": {"finished": 3},
}


def with_notes(kept, place, notes):
    file = kept_file(kept, place)
    header = {**json.loads(file.metadata["header"]), "notes": notes}
    write_tensors(file.tensors, {**file.metadata, "header": json.dumps(header)}, place)


@pytest.mark.parametrize("name", NOTES)
def test_notes_that_leave_a_doubt_are_not_used(kept, place, capsys, name):
    changes = NOTES[name]
    with_notes(kept, place, {**kept.state.notes.to_dict(), **changes} if changes else changes)
    assert keeper(place).begin(kept.beginning) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cineray: clip 1 begins anew; its step state is not used: its notes are not ours: ")


def test_notes_of_earlier_versions_are_read(loaded, request_, kept, place):
    """They have the trace's entries twice where all steps are done, and no `finished` before."""
    with_notes(kept, place, {"trace": [], "resumed_at": [1], "denoise_s": 2.0, "encode_s": 0.5})
    state = keeper(place).begin(kept.beginning)
    assert (state.notes.resumed_at, state.notes.denoise_s, state.notes.encode_s) == ((1,), 2.0, 0.5)
    cached = replace(request_, cache="interval(interval=2)")
    trace = denoise_clip(loaded("wan"), cached, lambda done, total: None).trace
    done = [entry for entry in trace.to_dict()["entries"] if entry["step"] < STOP_AT]
    finished = {**trace.to_dict(), "entries": done}
    with_notes(kept, place, {"trace": done, "finished": finished, "resumed_at": [], "denoise_s": 2.0, "encode_s": 0.5})
    state = read_step_state(place, CLIP)
    assert state.notes.finished.to_dict() == finished
    assert state.notes.all_entries == [entry for entry in trace.entries if entry.step < STOP_AT]


def test_latents_that_are_not_finite_are_neither_written_nor_read(kept, place):
    for value in (NAN, float("inf"), -float("inf")):
        latents = kept.state.latents.clone()
        latents[0, 0, 0, 0, 0] = value
        with pytest.raises(StepStateError, match="not finite"):
            save_step_state(replace(kept.state, latents=latents), place)
        assert not place.exists()
        file = kept_file(kept, place)
        write_tensors({**file.tensors, "latents": latents}, file.metadata, place)
        with pytest.raises(StepStateError, match="not finite"):
            read_step_state(place, CLIP)
        place.unlink()


def kept_file(kept, place):
    place.write_bytes(kept.content)
    try:
        return read_tensors(place)
    finally:
        place.unlink()


def header_of(kept):
    (size,) = struct.unpack("<Q", kept.content[:8])
    return json.loads(kept.content[8 : 8 + size]), kept.content[8 + size :]


def with_header(header, data):
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def old_format(kept, place):
    file = kept_file(kept, place)
    place.write_bytes(save(file.tensors, file.metadata | {"format": "cineray step state 1"}))


def swapped_tensors(kept, place):
    header, data = header_of(kept)
    names = [name for name in header if name.startswith("scheduler.model_outputs")]
    header[names[0]], header[names[1]] = header[names[1]], header[names[0]]
    place.write_bytes(with_header(header, data))


def deep(_kept, place):
    raw = b"[" * 200_000
    place.write_bytes(struct.pack("<Q", len(raw)) + raw)


def sparse(_kept, place):
    with place.open("wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**40)


OBJECTS = {
    "empty": lambda kept, place: place.write_bytes(b""),
    "cut": lambda kept, place: place.write_bytes(kept.content[:-1]),
    "longer": lambda kept, place: place.write_bytes(kept.content + b"\0"),
    "seven bytes": lambda kept, place: place.write_bytes(b"\1" * 7),
    "text": lambda kept, place: place.write_text("hello " * 100),
    "a huge header": lambda kept, place: place.write_bytes(struct.pack("<Q", 2**62) + kept.content[8:]),
    "a header of 100 MB": lambda kept, place: place.write_bytes(struct.pack("<Q", 10**8) + b" " * 10**8),
    "a sparse terabyte": sparse,
    "deep nesting": deep,
    "the format before": old_format,
    "tensors swapped": swapped_tensors,
    "a folder": lambda kept, place: place.mkdir(),
    "a FIFO": lambda kept, place: os.mkfifo(place),
    "a device": lambda kept, place: place.symlink_to("/dev/zero"),
    "a dangling link": lambda kept, place: place.symlink_to("nowhere"),
    "a header that is a list": lambda kept, place: place.write_bytes(with_header([], b"")),
    "no tensors": lambda kept, place: write_tensors({}, {"format": "cineray step state 2", "header": "{}"}, place),
    "a header that is no JSON": lambda kept, place: write_tensors(
        kept_file(kept, place).tensors, {"format": "cineray step state 2", "header": "{"}, place
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_whatever_lies_in_its_place_the_clip_begins_anew(kept, place, capsys, name):
    OBJECTS[name](kept, place)
    assert keeper(place).begin(kept.beginning) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cineray: clip 1 begins anew; its step state is not used: ")
    assert len(line) < 300


def test_a_link_to_a_whole_state_is_not_followed(kept, place, tmp_path):
    (tmp_path / "elsewhere").write_bytes(kept.content)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TensorFileError, match="it is a symbolic link"):
        read_tensors(place)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_every_step_of_every_scheduler_is_recognized(loaded, new_request, place, name):
    """What misfits is foretold from the scheduler alone; a state of our own always fits."""
    request = new_request(width=16, height=16, num_frames=1, num_inference_steps=STEPS)
    for step in range(1, STEPS):
        with pytest.raises(ClipPreempted):
            denoise_clip(loaded(name), request, lambda done, total: None, keeper=keeper(place, step))
        steps = []
        denoise_clip(loaded(name), request, lambda done, total, s=steps: s.append(done), keeper=keeper(place, 99))
        assert steps == list(range(step + 1, STEPS + 1))
        place.unlink()


def test_notes_of_a_finished_clip_are_read_back(loaded, request_, kept, place):
    keep = keeper(place, 99)
    cached = replace(request_, cache="interval(interval=2)")
    clip = denoise_clip(loaded("wan"), cached, lambda done, total: None, keeper=keep)
    keep.save_finished(clip, STEPS)
    state = read_step_state(place, CLIP)
    assert state is not None
    assert state.step == state.num_steps == STEPS
    assert state.notes.finished == clip.trace
    assert state.notes.all_entries == clip.trace.entries
    assert keeper(place).begin(kept.beginning) is not None
