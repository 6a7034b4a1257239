"""Manifests that a hostile or unlucky hand has written: refused in clean lines, or rendered as they say.

1,600 of them: values of every kind in every field, and whole files of each form with bytes changed, cut and moved.
"""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cineray.jobs.manifest.check import MAX_REPORTED, RunDefaults, check_manifest
from cineray.jobs.manifest.row import FIELDS
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.request import CLIP_ID, InputError, problems
from cineray.text import MAX_LINE

NUM_MUTANTS_PER_FORM = 300
DEFAULTS = RunDefaults(
    negative_prompt=None,
    seed=0,
    width=64,
    height=64,
    num_frames=17,
    num_inference_steps=50,
    guidance_scale=5.0,
    fps=8,
    cache="none",
    image=None,
)
ROWS = [
    {"id": "a", "prompt": "a red circle", "seed": 7, "cache": "dicache(threshold=0.1)"},
    {"id": "b", "prompt": 'blue, "square"; é 猫', "width": 32, "height": 32, "frames": 5, "guidance": 3.5},
    {"id": "c", "prompt": "green", "negative_prompt": "blurry", "steps": 20, "fps": 16},
]
CSV = 'id,prompt,seed,guidance\na,"red, ""big"" circle",1,2.5\nb,blue,,\nc,green square,42.0,1e0\n'
FORMS = {
    "m.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "m.json": json.dumps(ROWS, indent=1).encode("utf-16"),
    "m.csv": CSV.encode("utf-8-sig"),
    "m.txt": b"a red circle\r\na blue square\r\n\r\n",
}


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("tiny-wan")


def judge(path, checkpoint) -> bool:
    """Whether it was accepted; fails if it was neither read rightly nor refused in clean, short lines."""
    try:
        manifest = check_manifest(path, DEFAULTS, checkpoint)
    except InputError as error:
        refusal = error.lines
    else:
        return _is_as_checked(manifest, checkpoint)
    assert 1 <= len(refusal) <= MAX_REPORTED + 1
    for line in refusal:
        assert path.name in line
        assert len(line) <= MAX_LINE + 2 * len(str(path))
        assert line.isprintable() or "猫" in line
    return False


def _is_as_checked(manifest, checkpoint) -> bool:
    requests = list(manifest.requests())
    assert len(requests) == manifest.num_clips > 0
    assert len({request.id for request in requests}) == len(requests)
    for request in requests:
        assert CLIP_ID.fullmatch(request.id)  # so it cannot leave the output folder
        assert problems(request, checkpoint.size_rule) == []
        checkpoint.plan_cache(request.cache)
    return True


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=30)
    | st.sampled_from(
        ["../out", "a/b", "..", "\x1b]0;x\x07", "a\nb", "\u202e", "\u2028", "\x00", "9" * 60, "[/b]", "-"]
    )
    | st.sampled_from([2**32, 2**63, -1, 0, 1e400, "dicache(threshold=nan)", "magcache(profile=/dev/zero)", "none"])
)
# two levels, not st.recursive: drawing deep values took nine tenths of the time, and what is nested is refused whole
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)


@pytest.mark.slow
@settings(max_examples=400, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(st.sampled_from((*FIELDS, "unknown", "\x1b")), VALUES, min_size=1, max_size=2),
    has_prompt=st.sampled_from([True, True, True, False]),  # a row without one is refused for that
)
def test_any_value_in_any_field(tmp_path, checkpoint, row, has_prompt):
    path = tmp_path / "m.jsonl"
    if has_prompt:
        row = {"prompt": "a red circle"} | row
    path.write_text(json.dumps(row) + "\n" + '{"prompt": "good", "id": "good"}\n')
    judge(path, checkpoint)


@pytest.mark.parametrize("name", FORMS)
def test_changed_files_of_every_form(tmp_path, checkpoint, name):
    chance, num_accepted = random.Random(name), 0
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    assert judge(path, checkpoint)
    for _ in range(NUM_MUTANTS_PER_FORM):
        content = bytearray(FORMS[name])
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(content) or 1)
            match chance.randrange(5):
                case 0:
                    content[place : place + 1] = bytes([chance.randrange(256)])
                case 1:
                    content[place:place] = chance.choice(
                        [b"\0", b"\n", b'"', b"{", b"\xff\xfe", b"\x1b[2J", b"[" * 5000]
                    )
                case 2:
                    del content[place : place + chance.randint(1, 20)]
                case 3:
                    del content[place:]
                case 4:
                    content += content[place : place + 40]
        path.write_bytes(content)
        num_accepted += judge(path, checkpoint)
    assert 0 < num_accepted < NUM_MUTANTS_PER_FORM  # both ways were tried
