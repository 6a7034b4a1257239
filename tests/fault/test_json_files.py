"""JSON that is read back may hold anything: the readers answer, or say in one line why not. No traceback, no hang."""

import json
import os
import random
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict

import pytest

from cineray.caching.forecast import Forecasting
from cineray.caching.policies.smoothcache import load_schedule
from cineray.caching.trace import Trace, TraceEntry, entries_from, load_trace
from cineray.jobs.cli.main import main
from cineray.jobs.measure.trial_log import TrialLog
from cineray.jobs.output.failure_record import read_failure_record
from cineray.jobs.output.lease import Lease
from cineray.jobs.output.record import read_record
from cineray.jobs.output.status import read_status
from cineray.pipeline.calibrate.dicache import CurvePoint
from cineray.pipeline.request import InputError

MARK = "0123456789ab"
MUTANTS_EACH = 300
VALUES = [
    None,
    True,
    -1,
    0,
    3.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\u2028\x1b[2J",
    [],
    [1],
    {},
    {"a": []},
]

RECORD = {
    "id": "a",
    "fingerprint": MARK,
    "prompt": "x",
    "trace": {"policy": "none", "steps": 4, "computed_steps": 4, "skipped_steps": 0, "cost": 1.0},
    "resumed_at": [2],
}
TROUBLE = {"id": "a", "fingerprint": MARK, "status": "retrying", "reasons": ["gang-0: rank 1 died"]}
RUN = {"num_clips": 5, "model": "tiny-wan", "options": {"device": "cpu"}}
RUNNING = {"running": [{"id": "c", "on": "gang-0", "step": 3, "steps": 9}, {"id": "d", "on": "finisher"}], "counts": {}}
ENTRY = TraceEntry(step=0, branch="cond", sample=0, compute=True, cost=1.0, reason="", statistic=None, gamma=None)
TRACE = Trace(policy="interval", forecasting=Forecasting(), num_blocks=3, probe_depth=0, entries=[ENTRY]).to_dict()
SCHEDULE = {"attn1": [1, 0, 1], "ffn-2": [1, 1, 1]}
TRIAL = {"search": "s", "key": "k", "point": asdict(CurvePoint(threshold=1, speedup=2, psnr_db=3, worst_psnr_db=4))}


def read_as_status(path, name):
    folder = path.parent
    state = folder / ".state"
    (state / "failures").mkdir(parents=True, exist_ok=True)
    target = folder / name
    if os.path.lexists(target):
        target.unlink()
    os.replace(path, target)
    (folder / "b.0123456789ab.mp4").touch()
    status = read_status(folder)
    json.dumps(status.to_dict())
    return status


# name of the reader -> (a good content, the file's name, how it is read)
READERS = {
    "sidecar": (RECORD, f"a.{MARK}.json", read_record),
    "failures": (TROUBLE, f"a.{MARK}.json", read_failure_record),
    "trace": (TRACE, "a.json", load_trace),
    "schedule": (SCHEDULE, "a.json", lambda path: load_schedule(path, ("attn1", "ffn"), 3)),
    "trials": (TRIAL, "a.json", lambda path: TrialLog(path, "s", CurvePoint)),
    "run.json": (RUN, "a.json", lambda path: read_as_status(path, "run.json")),
}


def parts(content, path=()):
    yield path
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield from parts(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]


def mutant(content, chooser):
    """The content with one to three places replaced or gone."""
    content = json.loads(json.dumps(content))
    for _ in range(chooser.randint(1, 3)):
        *where, last = chooser.choice([path for path in parts(content) if path] or [()]) or (None,)
        if last is None:
            return chooser.choice(VALUES)
        place = content
        for key in where:
            place = place[key]
        if chooser.random() < 0.2:
            del place[last]
        else:
            place[last] = deepcopy(chooser.choice(VALUES))
    return content if chooser.random() < 0.95 else chooser.choice([[content], content and 7, "x", None])


def refusal(read, path):
    """What a reader says of a file that it does not take; nothing of one that it does."""
    try:
        read(path)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", READERS)
def test_mutants_are_read_or_refused_in_one_line(tmp_path, name):
    good, file_name, read = READERS[name]
    path, chooser = tmp_path / file_name, random.Random(0)
    path.write_text(json.dumps(good))
    read(path)
    for _ in range(MUTANTS_EACH):
        path.write_text(json.dumps(mutant(good, chooser)))
        assert "\n" not in refusal(read, path)


RAW = {
    "empty": b"",
    "binary": bytes(range(256)) * 20,
    "not UTF-8": b'{"id": "\xff\xfe"}',
    "a byte order mark alone": b"\xef\xbb\xbf",
    "UTF-16": json.dumps(RECORD).encode("utf-16"),
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "a huge number": b'{"num_clips": 1' + b"0" * 6000 + b"}",
    "a number": b"7",
    "null": b"null",
    "keys twice": b'{"id": "a", "id": 3, "reasons": [], "reasons": 3, "num_clips": 1, "num_clips": []}',
    "NaN": b'{"num_clips": NaN, "trace": NaN, "reasons": [NaN], "entries": NaN}',
    "cut": json.dumps(RECORD).encode()[:-1],
    "100 MB": None,
}


def lay(path, kind):
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to("/nowhere")
    elif RAW[kind] is None:
        with path.open("wb") as file:
            file.truncate(10**8)
    else:
        path.write_bytes(RAW[kind])


KINDS = [*RAW, "FIFO", "folder", "link", "dangling link"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in READERS if name not in ("trials", "run.json")])
def test_whatever_lies_there_is_refused_in_one_line(tmp_path, name, kind):
    _, file_name, read = READERS[name]
    lay(tmp_path / file_name, kind)
    with pytest.raises((OSError, ValueError)) as error:
        read(tmp_path / file_name)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_log_begins_anew_or_is_refused(tmp_path, kind):
    path = tmp_path / "a.trials"
    lay(path, kind)
    said = refusal(lambda path: TrialLog(path, "s", CurvePoint), path)
    if said:
        assert "delete it to begin anew" in said
        return
    log = TrialLog(path, "s", CurvePoint)
    assert len(log) == 0
    with suppress(InputError):  # a dangling link is not written through
        log["k"] = CurvePoint(threshold=1, speedup=2, psnr_db=3, worst_psnr_db=4)
        assert len(TrialLog(path, "s", CurvePoint)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_status_never_dies_of_a_file(tmp_path, capsys, kind):
    """The same thing in every place that it reads."""
    state = tmp_path / ".state"
    (state / "failures").mkdir(parents=True)
    (tmp_path / f"a.{MARK}.mp4").write_bytes(b"video")
    good = state / "failures" / f"c.{MARK}.json"
    good.write_text(json.dumps(TROUBLE | {"id": "c"}))
    places = [tmp_path / "run.json", state / "running.json", state / "failures" / f"b.{MARK}.json"]
    with Lease(state, heartbeat_s=0.05):
        for place in places:
            lay(place, kind)
        assert main(["status", str(tmp_path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["status", str(tmp_path)]) == 0
        said = capsys.readouterr().out
    assert (found["done"], found["retrying"], found["driver"] is None) == (1, 1, False)
    num_there = 0 if kind == "dangling link" else 3
    assert found["unreadable"] in (num_there, 3)
    assert ("unreadable files, left out here: run.json, .state/running.json" in said) == bool(found["unreadable"])


def test_status_counts_what_it_leaves_out(tmp_path):
    (tmp_path / ".state" / "failures").mkdir(parents=True)
    for number in range(5):
        (tmp_path / ".state" / "failures" / f"{number}.{MARK}.json").write_text(json.dumps(TROUBLE))  # another clip's
    status = read_status(tmp_path)
    assert (status.failures, len(status.unreadable), status.to_dict()["unreadable"]) == ([], 5, 5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": "b"}, "another clip"),
        ({"fingerprint": "ba9876543210"}, "another clip"),
        ({"trace": None}, "trace"),
        ({"trace": RECORD["trace"] | {"cost": "0"}}, "trace.cost"),
        ({"trace": RECORD["trace"] | {"steps": 10**30}}, "trace.steps"),
        ({"resumed_at": [True]}, "resumed_at.0"),
        ({"version": 2}, "version"),
        ({"warning": []}, "warning"),
    ],
)
def test_a_sidecar_is_of_its_clip(tmp_path, changes, said):
    path = tmp_path / f"a.{MARK}.json"
    path.write_text(json.dumps(RECORD | changes))
    with pytest.raises(ValueError, match=said):
        read_record(path)


def test_a_sidecar_of_an_earlier_version_keeps_all_it_says(tmp_path):
    path = tmp_path / f"a.{MARK}.json"
    path.write_text(json.dumps(RECORD | {"something": [1]}))
    assert read_record(path) == RECORD | {"something": [1]}


@pytest.mark.parametrize(
    "entry",
    [
        {"step": -1},
        {"step": 10**9},
        {"branch": "both"},
        {"sample": -1},
        {"cost": float("nan")},
        {"gamma": float("inf")},
    ],
)
def test_entries_of_a_trace_are_within_range(entry):
    with pytest.raises(ValueError, match="out of range"):
        entries_from([asdict(ENTRY) | entry])
    assert entries_from([asdict(ENTRY) | {"statistic": float("nan")}])[0].statistic != 0  # NaN is a reason to compute
