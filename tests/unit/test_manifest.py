"""Manifest lines: what is accepted, and what is said about what is not."""

import json
import tracemalloc

import pytest

from cineray.jobs.manifest.check import RunDefaults, check_manifest, check_prompts
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.request import InputError

GOOD = {"prompt": "a red circle moving left on a black background"}


@pytest.fixture
def defaults():
    return RunDefaults(
        negative_prompt=None,
        seed=7,
        width=64,
        height=64,
        num_frames=17,
        num_inference_steps=50,
        guidance_scale=5.0,
        fps=8,
        cache="none",
        image=None,
    )


@pytest.fixture
def checkpoint(checkpoint_folder):
    return open_checkpoint(str(checkpoint_folder("wan")))


@pytest.fixture
def write(tmp_path):
    def manifest(*lines):
        path = tmp_path / "clips.jsonl"
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(texts) + b"\n")
        return path

    return manifest


def test_rows_get_defaults_and_line_numbers(write, defaults, checkpoint):
    path = write(GOOD, b"", GOOD | {"id": 41, "seed": 3, "guidance": 4, "frames": 5, "steps": 9, "fps": 12})
    checked = check_manifest(path, defaults, checkpoint)
    assert checked.num_clips == 2
    first, second = checked.requests()
    assert (first.id, first.seed, first.num_frames) == ("1", 7, 17)
    assert (second.id, second.seed, second.num_frames, second.fps) == ("41", 3, 5, 12)
    assert (second.guidance_scale, second.num_inference_steps) == (4.0, 9)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{prompt", "not JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at column 13; save the file as UTF-8"),
        ({}, "prompt is required"),
        ({"prompt": ""}, "prompt must not be empty"),
        ({"prompt": " \n"}, "prompt must not be empty"),
        ({"prompt": 3}, "prompt must be a text, got '3'"),
        ({"prompt": "a\x00b"}, "prompt must have no control characters"),
        (GOOD | {"prompt": "x" * 20_001}, "prompt must have at most 20000 characters, got 20001"),
        (GOOD | {"promt": 1}, "unknown field 'promt'; allowed: prompt, id,"),
        (GOOD | {"id": "../x"}, "id must be 1 to 100 of"),
        (GOOD | {"id": "a/b"}, "id must be 1 to 100 of"),
        (GOOD | {"id": "a\x00b"}, "id must be 1 to 100 of"),
        (GOOD | {"id": ""}, "id must be 1 to 100 of"),
        (GOOD | {"id": ".hidden"}, "id must be 1 to 100 of"),
        (GOOD | {"id": "x" * 101}, "id must be 1 to 100 of"),
        (GOOD | {"frames": 16}, "frames must be 4k+1, got 16; nearest: 13 or 17"),
        (GOOD | {"frames": 0}, "frames must be 1 to 4097, got 0"),
        (GOOD | {"width": 60}, "width must be a multiple of 16, got 60; nearest: 48 or 64"),
        (GOOD | {"height": 7}, "height must be a multiple of 16, got 7; nearest: 16"),
        (GOOD | {"steps": 0}, "steps must be 1 to 1000, got 0"),
        (GOOD | {"steps": 2.5}, "steps must be a whole number, got '2.5'"),
        (GOOD | {"steps": True}, "steps must be a whole number"),
        (GOOD | {"seed": -1}, "seed must be 0 to"),
        (GOOD | {"guidance": "high"}, "guidance must be a number"),
        (GOOD | {"steps": "20"}, "steps must be a whole number, got the text '20'"),
        (
            GOOD | {"seed": 2**32},
            "seed must be 0 to 4294967295 (2^32 - 1: noise is drawn from 32 bits), got 4294967296",
        ),
        (GOOD | {"seed": 10**4000}, "got 1000000000... (4001 characters)"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "a number has more digits than can be read"),
        (GOOD | {"seed": 1e300}, "seed must be 0 to"),
        (GOOD | {"guidance": 10**400}, "guidance must be 0 to 100, got inf"),
        (b'{"prompt": "a", "guidance": 1e999}', "guidance must be 0 to 100, got inf"),
        (
            b'{"prompt": "a", "guidance": NaN}',
            "guidance must be a number, got NaN, which JSON does not have; write null",
        ),
        (b'{"prompt": "a", "seed": -Infinity}', "seed must be a whole number, got -Infinity, which JSON does not have"),
        (b'{"prompt": "a", "prompt": "b"}', "field 'prompt' stands there twice"),
        (b'{"prompt": "a", "seed": 1, "seed": 1}', "field 'seed' stands there twice"),
        (b'{"prompt": "a"},', "not JSON: Extra data at column 16; a comma stands behind the object"),
        (b'{"prompt": "a",}', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b'{"a":' * 500 + b"1" + b"}" * 501, "prompt must be a text, got an object"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        ({"prompt": None}, "prompt is required"),
        (GOOD | {"prompt": "a\ud83d"}, "prompt must have no control characters"),
        (GOOD | {str(i) * 100: 1 for i in range(9)}, "and 6 more; allowed: prompt, id"),
        (GOOD | {"cache": "a\x1b]0;pwned\x07\nb" * 1000}, "cache 'a"),
        (GOOD | {"guidance": -1}, "guidance must be 0 to 100, got -1.0"),
        (GOOD | {"fps": 0}, "fps must be 1 to 240, got 0"),
        (GOOD | {"cache": "dicash"}, "unknown policy 'dicash'; valid: none"),
        (GOOD | {"image": "x.png"}, "image cannot be used"),
        (GOOD | {"image_fit": "zoom"}, "image_fit must be stretch, crop or pad, got 'zoom'"),
        (GOOD | {"image_fit": 1}, "image_fit must be a text, got '1'"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(write, defaults, checkpoint, line, said):
    path = write(GOOD, line)
    with pytest.raises(InputError) as caught:
        check_manifest(path, defaults, checkpoint)
    (message,) = str(caught.value).splitlines()
    assert message.startswith(f"{path} line 2: ")
    assert said in message
    assert len(message) < 600
    assert message.isprintable()


def test_all_bad_lines_are_reported_up_to_a_limit(write, defaults, checkpoint):
    path = write(*[GOOD | {"steps": 0}] * 30)
    with pytest.raises(InputError) as caught:
        check_manifest(path, defaults, checkpoint)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1].endswith("10 more bad lines")


def test_ids_must_be_unique_also_against_line_numbers(write, defaults, checkpoint):
    with pytest.raises(InputError, match=r"line 2: id 'a' is used by an earlier line"):
        check_manifest(write(GOOD | {"id": "a"}, GOOD | {"id": "a"}), defaults, checkpoint)
    with pytest.raises(InputError, match=r"line 2: id '2' is used by an earlier line"):
        check_manifest(write(GOOD | {"id": 2}, GOOD), defaults, checkpoint)


def test_ids_are_told_apart_though_their_hashes_be_equal(write, defaults, checkpoint, monkeypatch):
    monkeypatch.setattr("builtins.hash", lambda _: 1)
    assert check_manifest(write(*(GOOD | {"id": name} for name in "abc")), defaults, checkpoint).num_clips == 3
    with pytest.raises(InputError) as caught:
        check_manifest(write(*(GOOD | {"id": name} for name in "abca")), defaults, checkpoint)
    assert str(caught.value).endswith("line 4: id 'a' is used by an earlier line; ids must be unique")


@pytest.mark.parametrize(
    "bad", [{"prompt": " "}, {"prompt": "a\x00"}, {"id": "/"}, {"seed": -1}, {"seed": 2**32}, {"prompt": "a" * 20_001}]
)
def test_a_line_that_is_like_a_good_one_but_for_its_prompt_id_or_seed(write, defaults, checkpoint, bad):
    """What lines have in common is checked once, what differs in every line."""
    with pytest.raises(InputError, match="line 2") as caught:
        check_manifest(write(GOOD, GOOD | bad, GOOD), defaults, checkpoint)
    assert len(str(caught.value).splitlines()) == 1


def test_an_endless_line_is_reported_and_the_next_is_read(write, defaults, checkpoint):
    path = write(GOOD | {"prompt": "x" * 10_000_000}, GOOD | {"steps": 0})
    with pytest.raises(InputError) as caught:
        check_manifest(path, defaults, checkpoint)
    first, second = str(caught.value).splitlines()
    assert "line 1: the line must have at most 1000000 characters" in first
    assert "line 2: steps" in second


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_manifest_without_clips(tmp_path, defaults, checkpoint, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="has no clips"):
        check_manifest(path, defaults, checkpoint)


def test_a_missing_manifest_and_a_folder(tmp_path, defaults, checkpoint):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        check_manifest(tmp_path / "none.jsonl", defaults, checkpoint)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        check_manifest(tmp_path, defaults, checkpoint)


def test_negative_prompt_is_refused_where_guidance_is_embedded(defaults, checkpoint_folder):
    hunyuan = open_checkpoint(str(checkpoint_folder("hunyuan")))
    from dataclasses import replace

    with pytest.raises(InputError, match="negative_prompt cannot be used"):
        check_prompts(["a"], replace(defaults, negative_prompt="gray"), hunyuan)


def test_a_long_manifest_is_a_stream(tmp_path, defaults, checkpoint):
    """Memory grows with the ids' digests only: below 300 bytes a line, so below 300 MB for a million."""
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps(GOOD | {"id": f"clip-{i}"}) + "\n")
    tracemalloc.start()
    assert check_manifest(path, defaults, checkpoint).num_clips == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 * 300


def test_what_was_checked_is_what_is_rendered(write, defaults, checkpoint):
    """Lines that are changed, added or taken away after the check are not looked at."""
    path = write(GOOD | {"id": "a"}, GOOD | {"id": "b"})
    checked = check_manifest(path, defaults, checkpoint)
    requests = checked.requests()
    assert next(requests).id == "a"
    write(GOOD | {"id": "../ESCAPED", "cache": "nonsense"}, b"{", GOOD, GOOD)
    assert [request.id for request in requests] == ["b"]
    path.unlink()
    assert [request.id for request in checked.requests()] == ["a", "b"]


def test_bad_lines_and_repeated_ids_are_told_in_their_order(write, defaults, checkpoint):
    path = write(GOOD | {"id": "a"}, GOOD | {"steps": 0}, GOOD | {"id": "a"}, GOOD | {"id": "a", "fps": 0}, {})
    with pytest.raises(InputError) as caught:
        check_manifest(path, defaults, checkpoint)
    lines = [line.partition("clips.jsonl ")[2] for line in caught.value.lines]
    assert [line[:7] for line in lines] == ["line 2:", "line 3:", "line 4:", "line 5:"]
    assert "fps" in lines[2]
    assert "used by an earlier line" in lines[2]


def test_an_image_that_cannot_be_is_told_in_the_check_of_its_line(write, defaults, checkpoint_folder):
    i2v = open_checkpoint(str(checkpoint_folder("wan_i2v")))
    for image in ("x" * 300 + ".png", "a\x00b.png", ".", "none.png", "\ud800.png"):
        with pytest.raises(InputError, match="line 1: image '"):
            check_manifest(write(GOOD | {"image": image}), defaults, i2v)


def test_clips_too_small_for_the_ranks_are_told_in_the_check(write, defaults, checkpoint):
    small = GOOD | {"width": 16, "height": 16, "frames": 1}
    assert check_manifest(write(small), defaults, checkpoint).num_clips == 1
    with pytest.raises(InputError, match="line 1: a clip of 1 tokens cannot be shared by 2 ranks; each needs one"):
        check_manifest(write(small, GOOD), defaults, checkpoint, num_ranks=2)
