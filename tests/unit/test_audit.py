"""`render --audit`: clips that are rendered again without a cache, and compared."""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest

from cineray.jobs.audit import FOLDER, Audit, AuditedRow, audited
from cineray.jobs.cli.main import main
from cineray.jobs.report.batch import batch_page


@pytest.mark.parametrize(("num_clips", "share", "expected"), [(100, 0.02, 2), (10, 0.25, 3), (3, 0.01, 1), (4, 1.0, 4)])
def test_an_audit_is_spread_over_the_batch(new_request, num_clips, share, expected):
    batch = [replace(new_request(cache="interval"), id=str(number)) for number in range(num_clips)]
    chosen = list(audited(batch, share))
    assert len(chosen) == expected
    assert chosen == list(audited(batch, share))
    places = [int(clip.id) for clip in chosen]
    assert all(b - a <= 1 / share + 1 for a, b in pairwise(places))
    assert list(audited([replace(clip, cache="none") for clip in batch], share)) == []


def row(clip, floors=None, **scores):
    return AuditedRow(clip=clip, cache="", floors=floors or {}, scores=scores)


def test_what_could_not_be_compared_is_said():
    found = Audit(share=0.5, rows=(row("a", psnr=40.0), row("b", psnr=30.0), row("c")))
    assert found.line == (
        "audit: 2 clips rendered again without a cache: PSNR 35.0 dB, worst 30.0 dB (b); no VMAF, which this ffmpeg "
        "does not give; 1 could not be compared"
    )
    assert Audit(share=0.5, rows=(row("c"),)).line == "audit: no clip could be compared"


def test_floors_that_are_kept_and_that_are_not_are_counted():
    floors = {"psnr": 35.0, "vmaf": 90.0}
    rows = (
        row("a", floors, psnr=40.0, vmaf=95.0),
        row("b", floors, psnr=40.0, vmaf=89.0),
        row("c", floors, psnr=34.0, vmaf=95.0),
        row("d", psnr=1.0, vmaf=1.0),
    )
    found = Audit(share=0.5, rows=rows)
    assert found.to_dict()["below_floors"] == ["b", "c"]
    assert found.line.endswith("VMAF 70.0, worst 1.0; 1 of 3 keep their floor")


@pytest.mark.slow
@pytest.mark.process
def test_a_batch_is_audited_reported_and_not_rendered_twice(checkpoint_folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["render", "a red circle", "a blue square", "--model", str(checkpoint_folder("wan")), "--out", str(out)]
    words += ["--width", "32", "--height", "32", "--frames", "5", "--steps", "12", "--cache", "interval(interval=3)"]
    assert main([*words, "--audit", "0.5", "--lossless"]) == 0
    assert "audit: 1 clips rendered again" in capsys.readouterr().err
    audit = json.loads((out / "run.json").read_text())["audit"]
    assert audit["num_clips"] == 1
    assert 0 < audit["psnr_mean"] < 100
    assert 0 < audit["vmaf_mean"] < 100
    (video,) = (out / FOLDER).glob("*.mp4")
    page = batch_page(out, tmp_path / "page.html", lambda *_: nullcontext(lambda *_: None))
    assert "PSNR of 1 audited clips" in page.html
    before = video.stat().st_mtime_ns
    assert main([*words, "--audit", "0.5", "--lossless"]) == 0
    assert video.stat().st_mtime_ns == before
    assert json.loads((out / "run.json").read_text())["audit"] == audit


@pytest.mark.parametrize("share", ["0", "-1", "1.5", "nan"])
def test_shares_that_are_none(share, capsys, tmp_path):
    assert main(["render", "a red circle", "--audit", share, "--out", str(tmp_path / "o")]) == 2
    assert "--audit must be a share of the clips" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
