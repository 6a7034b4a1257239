"""`cineray study` on ranks: what it leaves, and how it goes on after it was cut off."""

import json

import pytest
from conftest import build_wan

from cineray.jobs.cli.main import main
from cineray.jobs.measure.study import num_cores
from cineray.jobs.measure.study_log import read_rows
from cineray.jobs.planning.study_file import read_study
from cineray.jobs.threads import rank_threads

SMALL = ["a red circle", "--width", "32", "--height", "48", "--frames", "5", "--steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "wan"
    build_wan().save_pretrained(folder)
    return str(folder)


def test_it_measures_what_is_missing_and_keeps_what_is_there(model, tmp_path, capsys):
    out, log = tmp_path / "study", tmp_path / "study" / "rows.jsonl"
    words = ["study", *SMALL, "--model", model, "--repeats", "1", "--out", str(out), "--json"]
    caches = ["--cache", "none", "--cache", "dicache(threshold=1)"]
    code = main([*words, *caches, "--layouts", "1"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert json.loads(said.out.splitlines()[-1])["laws"] == []
    assert not (out / "study.json").exists()  # one number of ranks is no law
    before = read_rows(log)
    assert [(p.cache, p.steps) for p in before] == [("none", 4), ("dicache(threshold=1)", 4), ("none", 2)]

    log.write_bytes(log.read_bytes()[:-40])  # as a process leaves it that is killed while it writes
    kept = read_rows(log)
    assert len(kept) == 2
    code = main([*words, *caches, "--layouts", "1,2,gangs2"])
    said = capsys.readouterr()
    assert code == 0, said.err
    rows = read_rows(log)
    assert {place: rows[place] for place in kept} == kept
    assert len(rows) == 3 * (1 + 1 + 2)
    content = json.loads(said.out.splitlines()[-1])
    assert [(c["cache"], c["layout"]) for c in content["cells"]][:3] == [
        ("none", n) for n in ("1", "ulysses2", "gangs2")
    ]
    assert {"study.md", "study.csv", "latency.png", "cache_gain.svg"} <= {p.name for p in out.iterdir()}
    assert all(abs(sum(cell["stages"].values()) - cell["clip_s"]) < 1e-6 for cell in content["cells"])
    cached = next(c for c in content["cells"] if c["cache"] != "none")
    assert cached["computed_share"] < 1
    shared = [row for row in rows.values() if row.layout == "ulysses2"]
    assert all(0 < row.exchange_s < row.denoise_s for row in shared)
    assert {row.gang for row in rows.values() if row.layout == "gangs2"} == {0, 1}

    done = log.read_bytes()
    assert main([*words, *caches, "--layouts", "1,2,gangs2"]) == 0
    assert log.read_bytes() == done  # nothing was left to measure
    has_law = num_cores() // rank_threads() > 1  # on one core no two ranks run side by side
    assert (out / "study.json").exists() == has_law
    if has_law:
        fits = read_study(out / "study.json", content["cells"][0]["model"]).fits
        shown = [(fit.cache, fit.gpu, len(fit.rows)) for fit in fits]
        assert shown == [("none", "cpu", 2), ("dicache(threshold=1)", "cpu", 2)]

    assert main([*words, "--layouts", "1", "--seed", "7"]) == 2
    assert "measured with other clips; choose another --out" in capsys.readouterr().err
    assert log.read_bytes() == done
