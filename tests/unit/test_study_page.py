"""The page of a study's folder."""

import json
import shutil
import subprocess

import pytest
from report_pages import HOSTILE, Page, parse
from waiting import PATIENCE_S

from cineray.jobs.cli.main import main
from cineray.jobs.measure.study_law import StudiedClips, study_of
from cineray.jobs.measure.study_log import append_line, append_row
from cineray.jobs.measure.study_rows import TimedClip, cells_of, csv_text
from cineray.jobs.measure.study_tables import Measured, markdown
from cineray.jobs.report.study import MAX_ROWS, PICTURES, read_blocks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def timed(layout, ranks, cache="none", steps=8, clip="1", clip_s=None):
    clip_s = clip_s or 1.0 + 8.0 / ranks
    return TimedClip(
        model="tiny-wan",
        cache=cache,
        layout=layout,
        steps=steps,
        clip=clip,
        repeat=0,
        gang=0,
        clip_s=clip_s,
        text_s=0.1,
        denoise_s=clip_s - 1.0,
        exchange_s=None if ranks == 1 else 0.2,
        decode_s=0.5,
        write_s=0.1,
        idle_s=0.0,
        computed_share=1.0,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study's folder as `cineray study` leaves it, but for its pictures; its seconds are thought up."""
    folder = tmp_path_factory.mktemp("study") / "my study"
    folder.mkdir()
    rows = [timed("1", 1), timed("ulysses2", 2), timed("ulysses4", 4)]
    rows += [timed(row.layout, 2, cache="dicache(threshold=0.1)", clip_s=row.clip_s / 2 + 0.6) for row in rows]
    append_line(folder / "rows.jsonl", {"model": "tiny-wan", "setup": {"device": "a CPU"}})
    for row in rows:
        append_row(folder / "rows.jsonl", row)
    cells = cells_of(rows)
    about = StudiedClips(
        model="tiny-wan", width=64, height=64, frames=9, steps=8, guided=True, device="a CPU", gpu="cpu", num_units=4
    )
    sizes = {"tiny-wan": "64x64, 9 frames, 8 steps"}
    law = study_of(cells, {"tiny-wan": about}, "2026-11-26T12:00:00Z")
    found = Measured(cells=cells, where="4 cores of a CPU", num_units=4, sizes=sizes, study=law)
    (folder / "study.md").write_text(markdown(found))
    (folder / "study.csv").write_text(csv_text(rows))
    for name in PICTURES:
        (folder / f"{name}.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg"><title>{name}</title></svg>')
    return folder


def report(folder, out, capsys):
    code = main(["report", str(folder), "--out", str(out), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]) if code == 0 else None, captured.err


def test_it_has_the_pictures_the_tables_and_every_row_and_needs_nothing_else(study, tmp_path, capsys):
    code, facts, said = report(study, tmp_path / "page.html", capsys)
    assert code == 0
    assert (facts["rows"], facts["models"]) == (6, ["tiny-wan"])
    assert "6 rows" in said
    page = parse(tmp_path / "page.html")
    pictures = page.of("img")
    assert len(pictures) == len(PICTURES)
    assert all(picture["src"].startswith("data:image/svg+xml;base64,") and picture["alt"] for picture in pictures)
    for heading in (
        "Latency and throughput",
        "Where the seconds of a rank go",
        "What the cache gains on more ranks",
        "The law",
    ):
        assert heading in page.text_in("h3")
    assert "Measured on 4 cores of a CPU" in page.text
    assert "dicache(threshold=0.1)" in page.text_in("td")
    assert len(page.data["rows"]) == 6
    assert page.data["columns"][:3] == ["model", "cache", "layout"]
    (policy,) = (meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert facts["bytes"] < 2_000_000


def test_tables_are_read_as_they_are_written():
    blocks = list(read_blocks("# Title\n\nA line.\n\n- a: b\n\n## Head\n\n| a | b |\n| --- | --- |\n| 1 | - |\n"))
    assert [(block.kind, block.lines) for block in blocks] == [
        ("text", ("A line.",)),
        ("text", ("a: b",)),
        ("heading", ("Head",)),
        ("table", (["a", "b"], ["1", "-"])),
    ]


def test_a_study_that_has_not_ended_has_a_page_of_its_rows(study, tmp_path, capsys):
    begun = tmp_path / "begun"
    begun.mkdir()
    lines = (study / "rows.jsonl").read_text().splitlines(keepends=True)
    (begun / "rows.jsonl").write_text("".join(lines[:3]) + '{"row": {"mod')
    code, facts, said = report(begun, tmp_path / "page.html", capsys)
    assert (code, facts["rows"]) == (0, 1 if lines[0] == "\n" else 2)
    assert "The tables and pictures are not there yet" in said
    page = parse(tmp_path / "page.html")
    assert page.of("img") == []
    assert len(page.data["rows"]) == facts["rows"]


def test_hostile_text_stays_text_and_odd_rows_break_nothing(tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    rows = [{"model": HOSTILE, "clip_s": 1.5, "list": [1], "gone": None}, {"model": "b", "clip_s": True}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"row": row}) for row in rows))
    (folder / "study.md").write_text(f"# T\n\n## {HOSTILE}\n\n| {HOSTILE.replace('|', ' ')} |\n| --- |\n| x |\n")
    (folder / "latency.svg").write_bytes(b"<svg onload='alert(3)'/>")  # in an img no script of it runs
    assert report(folder, tmp_path / "page.html", capsys)[0] == 0
    page = parse(tmp_path / "page.html")
    assert len(page.of("script")) == 2
    assert page.data["rows"] == [[HOSTILE, 1.5, "[1]", None], ["b", "True", None, None]]
    assert page.text_in("h3") == HOSTILE


def test_what_cannot_be_shown_is_told(tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("")
    code, _, said = report(folder, tmp_path / "page.html", capsys)
    assert code == 2
    assert "rows.jsonl has no row yet" in said
    assert not (tmp_path / "page.html").exists()
    line = json.dumps({"row": {"model": "m"}}) + "\n"
    (folder / "rows.jsonl").write_text(line * (MAX_ROWS + 5))
    _, facts, said = report(folder, tmp_path / "page.html", capsys)
    assert facts["rows"] == MAX_ROWS + 5
    assert "5 rows are left out" in said


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_the_rows_and_the_pictures(study, tmp_path, capsys):
    assert report(study, tmp_path / "page.html", capsys)[0] == 0
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    told = ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    run = subprocess.run([*command, *told], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "CONSOLE" not in run.stderr  # an error of the script, or what the page's own policy refused
    page = Page()
    page.feed(run.stdout)
    assert "6 of 6 rows" in page.text
    assert page.text_in("td").count("dicache(threshold=0.1)") >= 3
    assert len(page.of("img")) == len(PICTURES)
