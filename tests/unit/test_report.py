"""`cineray report`: the page of a real batch, parsed; hostile text, odd paths, folders that are no output folders."""

import base64
import hashlib
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from report_pages import HOSTILE, parse, render_batch

from cineray.jobs.cli.main import main
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.report import clips as report_clips
from cineray.jobs.report.clips import CHANGED_VIDEO, LOST_RECORD, natural

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def rendered(checkpoint_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("batch") / "out"
    render_batch(checkpoint_folder("wan"), out)
    return out


@pytest.fixture
def batch(rendered, tmp_path):
    return Path(shutil.copytree(rendered, tmp_path / "a batch"))


@pytest.fixture
def report(capsys):
    """Runs `cineray report`: (exit code, the JSON object or None, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = main(["report", *map(str, words), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return run


def test_the_page_of_a_batch(batch, report):
    code, facts, _ = report(batch)
    assert code == 0
    path = batch / "report.html"
    assert facts["page"] == str(path)
    assert (facts["clips"], facts["bytes"]) == (3, path.stat().st_size)
    assert facts["counts"] == {"done": 2, "running": 0, "failed": 1, "quarantined": 0, "retrying": 0}
    page = parse(path)
    assert page.of("html") == [{"lang": "en"}]
    assert page.text_in("title") == "a batch: cineray batch"
    assert "2 of 3" in page.text
    assert "is a folder, which cineray does not make" in page.text
    clips = page.data["clips"]
    assert clips["id"] == ["blocked", "clip-9", "clip-10"]  # in order of their numbers
    assert clips["status"] == ["failed", "done", "done"]
    assert clips["seed"] == [None, 6, 5]
    assert [poster is not None for poster in clips["poster"]] == [False, True, True]
    assert base64.b64decode(clips["poster"][1].removeprefix("data:image/webp;base64,"))[:4] == b"RIFF"
    assert [(s["lanes"][0]["name"], sum(s["bins"])) for s in page.data["sessions"]] == [("process", 3)]


def test_decisions_and_gammas_are_those_of_the_trace(batch, report):
    report(batch)
    data = parse(batch / "report.html").data
    place = data["clips"]["id"].index("clip-9")
    (trace,) = batch.glob("clip-9.*.trace.json")
    entries = json.loads(trace.read_text())["entries"]
    decisions = data["decisions"][data["clips"]["decisions"][place]]
    for branch, steps in decisions:
        assert [step == "C" for step in steps] == [e["compute"] for e in entries if e["branch"] == branch]
    *_, (_, steps) = decisions
    assert "s" in steps
    gammas = {e["step"]: round(e["gamma"], 3) for e in reversed(entries) if e["gamma"] is not None}
    assert dict(map(tuple, data["clips"]["gammas"][place])) == gammas != {}
    assert data["clips"]["computed_steps"][place] == steps.count("C")


def test_hostile_text_stays_text(batch, report):
    """It is in the page twice, once as JSON; no element comes of it."""
    failed = batch / "events.jsonl"
    line = {"time": 1.8e9, "event": "failed", "id": HOSTILE, "fingerprint": "x", "wall_s": 1, "error": HOSTILE}
    failed.write_text(failed.read_text() + json.dumps(line) + "\n")
    run = json.loads((batch / "run.json").read_text())
    (batch / "run.json").write_text(json.dumps(run | {"model": HOSTILE, "defaults": {HOSTILE: HOSTILE}}))
    code, _, _ = report(batch)
    assert code == 0
    page = parse(batch / "report.html")
    assert HOSTILE in page.data["clips"]["prompt"]
    assert HOSTILE in page.data["clips"]["id"]
    assert "alert(1)" in page.text
    assert len(page.of("script")) == 2
    assert page.of("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "49" not in page.text_in("bdi")  # no template in a template
    raw = (batch / "report.html").read_text()
    assert "\u202e" not in raw  # it would turn the direction of what follows
    assert "\u2028" not in raw


def test_nothing_is_fetched_and_only_the_page_s_own_script_may_run(batch, report):
    report(batch)
    page = parse(batch / "report.html")
    assert not any(name in a for _, a in page.elements for name in ("src", "srcset", "action", "integrity"))
    assert all(a["href"].startswith("#") for _, a in page.elements if "href" in a)
    raw = (batch / "report.html").read_text()
    assert re.findall(r"https?://[^\s\"'<)]+", raw) == ["http://www.w3.org/2000/svg"] * 2  # a name, not a place
    assert "url(" not in raw
    assert "@import" not in raw
    (policy,) = (a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        text = [text for name, text in page.texts if name == tag][-1]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "unsafe" not in policy


def test_what_is_typed_or_seen_has_a_label(batch, report):
    report(batch)
    raw = (batch / "report.html").read_text()
    page = parse(batch / "report.html")
    for tag in ("input", "select"):
        for field in page.of(tag):
            assert re.search(rf'<label>[^<]+<{tag}[^>]* id="{field["id"]}"', raw), field
    assert all(canvas["aria-label"] and canvas["tabindex"] == "0" for canvas in page.of("canvas"))
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a")} <= set(ids)


@pytest.mark.parametrize("name", ["with space", "50% #1?", "ü日本", "a:b", "'\"&<b>", "..."])
def test_videos_are_found_from_a_page_elsewhere(rendered, report, tmp_path, name):
    folder = Path(shutil.copytree(rendered, tmp_path / name / "clips"))
    pages = tmp_path / "pages"
    pages.mkdir()
    assert report(folder, "--out", pages / "p.html")[0] == 0
    data = parse(pages / "p.html").data
    assert re.fullmatch(r"\.[A-Za-z0-9_.~/%-]*/", data["base"])
    for video in filter(None, data["clips"]["video"]):
        assert (pages / unquote(data["base"]) / video).is_file()


def test_beside_its_videos_the_page_finds_them_wherever_it_is_moved(batch, report, tmp_path):
    report(batch)
    assert parse(batch / "report.html").data["base"] == "./"
    (tmp_path / "link").symlink_to(batch)
    report(tmp_path / "link")
    assert parse(batch / "report.html").data["base"] == "./"


def test_the_same_folder_gives_the_same_page(batch, report):
    report(batch)
    first = (batch / "report.html").read_bytes()
    report(batch)
    assert (batch / "report.html").read_bytes() == first


def test_a_page_in_the_folder_is_nobody_s_business(batch, report, checkpoint_folder, capsys):
    """Neither `status` nor the next run trips over it or removes it."""
    main(["status", str(batch), "--json"])
    before = capsys.readouterr().out
    report(batch)
    content = (batch / "report.html").read_bytes()
    main(["status", str(batch), "--json"])
    assert capsys.readouterr().out == before
    folder = OutputFolder(batch)
    folder.check("a test")
    folder.remove_leftovers()
    folder.delete_stale_clips()
    folder.close()
    assert (batch / "report.html").read_bytes() == content
    size = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "8"]
    render = ["render", "a red circle", "--model", str(checkpoint_folder("wan")), *size, "--out", str(batch)]
    assert main(render) == 0
    assert (batch / "report.html").read_bytes() == content
    assert not [name for name in os.listdir(batch) if name.startswith(".report")]


def test_half_a_line_and_other_nonsense_in_the_log(batch, report):
    log = batch / "events.jsonl"
    lines = ['{"time": 1.0, "eve', "[]", "\x00\xff", '{"time": "x", "event": "done"}', "[" * 5000, "y" * 200_000]
    log.write_text(log.read_text() + "\n".join(lines))
    code, facts, err = report(batch)
    assert (code, facts["clips"]) == (0, 3)
    assert "events.jsonl: 6 lines are no event and left out" in err
    assert "6 lines are no event" in parse(batch / "report.html").text


@pytest.mark.parametrize("how", ["missing", "folder", "fifo", "link"])
def test_without_a_log_there_is_a_page_without_a_timeline(batch, report, how):
    log = batch / "events.jsonl"
    log.rename(batch.parent / "elsewhere.jsonl")
    if how == "folder":
        log.mkdir()
    elif how == "fifo":
        os.mkfifo(log)
    elif how == "link":
        log.symlink_to(batch.parent / "elsewhere.jsonl")
    code, facts, err = report(batch)
    assert (code, facts["counts"]["done"]) == (0, 2)
    assert "events.jsonl is missing or cannot be read" in err
    assert parse(batch / "report.html").data["sessions"] == []


def test_lost_sidecars_changed_videos_and_no_run_json(batch, report):
    (batch / "run.json").unlink()
    next(p for p in batch.glob("clip-9.*.json") if "trace" not in p.name).write_text("{}")
    with next(batch.glob("clip-10.*.mp4")).open("ab") as video:
        video.write(b"x")
    code, facts, err = report(batch)
    assert (code, facts["counts"]["done"]) == (0, 2)
    assert "run.json is missing" in err
    remarks = parse(batch / "report.html").data["clips"]["remarks"]
    assert remarks[1:] == [[LOST_RECORD], [CHANGED_VIDEO]]


def test_clips_that_run_now(batch, report):
    from cineray.jobs.output.lease import Lease

    running = {"running": [{"id": "clip-11", "on": "gang-0", "step": 3, "steps": 9}], "counts": {}}
    (batch / ".state").mkdir(exist_ok=True)
    (batch / ".state" / "running.json").write_text(json.dumps(running))
    with Lease(batch / ".state", heartbeat_s=0.05):
        _, facts, _ = report(batch)
    assert facts["counts"]["running"] == 1
    page = parse(batch / "report.html")
    assert "a driver is at work" in page.text
    assert ["step 3 of 9 on gang-0"] in page.data["clips"]["remarks"]


def test_more_clips_than_a_page_holds(batch, report, monkeypatch):
    monkeypatch.setattr(report_clips, "MAX_CLIPS", 2)
    code, facts, err = report(batch)
    assert (code, facts["clips"], facts["counts"]["done"]) == (0, 2, 2)
    assert "1 video is not on this page" in err
    assert parse(batch / "report.html").data["clips"]["id"] == ["blocked", "clip-9"]  # what failed comes first


def many(batch, num_clips):
    """Copies of a real clip under other ids, with long prompts."""
    (sidecar,) = (p for p in batch.glob("clip-10.*.json") if "trace" not in p.name)
    stem = sidecar.name.removesuffix(".json")
    record = json.loads(sidecar.read_text())
    for number in range(num_clips):
        name = f"shot-{number}.{stem.rsplit('.', 1)[1]}"
        os.link(batch / f"{stem}.mp4", batch / f"{name}.mp4")
        os.link(batch / f"{stem}.trace.json", batch / f"{name}.trace.json")
        changed = record | {
            "id": f"shot-{number}",
            "prompt": f"{number} " + "soft light, film grain " * 20,
        }
        (batch / f"{name}.json").write_text(json.dumps(changed))


def test_two_hundred_clips_stay_below_two_megabytes(batch, report):
    many(batch, 200)
    code, facts, _ = report(batch)
    assert (code, facts["clips"]) == (0, 203)
    assert facts["bytes"] < 2_000_000
    assert all(parse(batch / "report.html").data["clips"]["poster"][1:])


BAD = {
    "nowhere": "cannot be read: No such file or directory",
    "file": "cannot be read: Not a directory",
    "empty": "is not an output folder",
    "other": "is not an output folder",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_output_folder_is_told_in_one_line(tmp_path, report, name):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.mp4").write_bytes(b"x")
    before = sorted(os.listdir(tmp_path / name)) if (tmp_path / name).is_dir() else None
    code, facts, err = report(tmp_path / name)
    assert (code, facts, err.count("\n")) == (2, None, 1)
    assert BAD[name] in err
    assert "give a render's --out" in err
    assert before is None or sorted(os.listdir(tmp_path / name)) == before


@pytest.mark.parametrize("out", ["page.mp4", "page", "no/such.html", "folder.html", "link.html"])
def test_where_no_page_can_be_written(batch, report, tmp_path, out):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "file")
    before = sorted(os.listdir(tmp_path))
    code, _, err = report(batch, "--out", tmp_path / out)
    assert (code, err.count("\n")) == (2, 1)
    assert "--out" in err
    assert sorted(os.listdir(tmp_path)) == before


def test_natural_order():
    names = ["clip-10", "clip-9", "a", "clip-009", "b2x10", "b2x9", "10", "9", "9" * 5000]
    assert sorted(names, key=natural) == ["9", "10", "9" * 5000, "a", "b2x9", "b2x10", "clip-9", "clip-009", "clip-10"]
