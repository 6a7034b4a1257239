"""`cineray render --dry-run`: what it says of a folder, and that it writes nothing."""

import json
import os

import pytest

from cineray.jobs.cli.main import main

pytestmark = pytest.mark.process

SMALL = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "1", "--fps", "8"]


@pytest.fixture
def render(checkpoint_folder, tmp_path, capsys):
    """Runs `cineray render` with the small model: (exit code, last line of stdout, stderr)."""

    def run(*arguments: str):
        command = ["render", "--out", str(tmp_path / "out"), "--model", str(checkpoint_folder("wan")), *SMALL]
        code = main([*command, *arguments])
        captured = capsys.readouterr()
        return code, (captured.out.splitlines() or [""])[-1], captured.err

    return run


def counted(answer) -> tuple[int, ...]:
    return tuple(json.loads(answer[1])[name] for name in ("done", "new", "changed", "refused"))


def snapshot(folder) -> list:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def test_it_counts_what_is_done_new_changed_and_refused_and_writes_nothing(render, tmp_path):
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out"
    manifest.write_text('{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}\n')
    answer = render("--manifest", str(manifest), "--dry-run", "--json")
    assert (answer[0], counted(answer)) == (0, (0, 2, 0, 0))
    assert not out.exists()
    assert render("--manifest", str(manifest))[0] == 0
    before = snapshot(out)
    manifest.write_text(
        '{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "another"}\n{"id": "c", "prompt": "three"}\n'
        '{"id": "d", "prompt": "", "steps": 0}\n{"id": "c", "prompt": "again"}\n'
    )
    code, _, stderr = answer = render("--manifest", str(manifest), "--dry-run", "--json")
    assert (code, counted(answer)) == (2, (1, 1, 1, 2))
    assert "m.jsonl line 4: prompt must not be empty; steps must be" in stderr
    assert "m.jsonl line 5: id 'c' is used by an earlier line" in stderr
    assert snapshot(out) == before


def test_prompts_that_are_refused_are_counted_beside_good_ones(render):
    code, _, stderr = answer = render("a red circle", " ", "--dry-run", "--json")
    assert (code, counted(answer)) == (2, (0, 1, 0, 1))
    assert "prompt 2: prompt must not be empty" in stderr


def test_an_option_that_changes_pixels_changes_all_clips_and_one_that_does_not_none(render):
    assert render("a red circle")[0] == 0
    assert counted(render("a red circle", "--dry-run", "--json")) == (1, 0, 0, 0)
    assert counted(render("a red circle", "--lossless", "--dry-run", "--json")) == (0, 0, 1, 0)
    assert counted(render("a red circle", "--sp", "2", "--dry-run", "--json")) == (1, 0, 0, 0)


def test_a_link_or_an_empty_file_is_no_video(render, tmp_path):
    assert render("a red circle")[0] == 0
    (video,) = (tmp_path / "out").glob("*.mp4")
    os.replace(video, tmp_path / "kept.mp4")
    video.symlink_to(tmp_path / "kept.mp4")
    assert counted(render("a red circle", "--dry-run", "--json")) == (0, 1, 0, 0)
    video.unlink()
    video.touch()
    assert counted(render("a red circle", "--dry-run", "--json")) == (0, 1, 0, 0)


def test_for_a_person_it_is_a_line(render):
    assert render("a red circle", "--dry-run")[1].startswith("no forecast: nothing in the folder says")


def test_the_folder_s_own_clips_say_how_long_the_rest_takes(render, tmp_path):
    assert render("one", "two")[0] == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json") if path.name != "run.json"]
    expected = sum(sum(record["timings"].values()) for record in records) / 2  # the median of two
    rest = json.loads(render("one", "two", "three", "--dry-run", "--price", "3600", "--json")[1])["forecast"]
    assert rest["wall_s"] == pytest.approx(expected, abs=0.06)
    assert rest["gpu_hours"] == pytest.approx(expected / 3600, abs=6e-5)
    assert rest["cost"] == pytest.approx(expected, abs=0.3)
    assert rest["source"] == "forecast from 2 clips of this folder"
    other = json.loads(render("three", "--steps", "2", "--dry-run", "--json")[1])["forecast"]
    assert (other["wall_s"], other["gpu_hours"], other["cost"]) == (None, None, None)
    done = json.loads(render("one", "two", "--dry-run", "--json")[1])["forecast"]
    assert done["wall_s"] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "nothing to render: give prompts or --manifest FILE"),
        (("a", "--manifest", "m.jsonl"), "give prompts or --manifest, not both"),
        (("--manifest", "none.jsonl"), "none.jsonl"),
    ],
)
def test_bad_input_is_one_line(capsys, checkpoint_folder, tmp_path, arguments, reason):
    command = ["render", "--out", str(tmp_path / "o"), "--model", str(checkpoint_folder("wan")), "--dry-run"]
    assert main([*command, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
