"""The file that a measurement leaves is looked at before, replaced in one step, and shared under a lock."""

import os
import signal
import threading
from pathlib import Path

import pytest
from measure_runs import MeasureRuns

from cineray.jobs import out_file
from cineray.jobs.measure.bench import BenchRow, _BenchFile, measured_on
from cineray.jobs.out_file import check_out, ended_by_sigterm, locked, replace_text
from cineray.pipeline.request import InputError


@pytest.fixture
def run(checkpoint_folder, tmp_path, capsys):
    return MeasureRuns(checkpoint_folder, tmp_path / "clips.jsonl", capsys)


BAD = {
    "folder": "is a folder",
    "link": "is a symbolic link",
    "dangling": "is a symbolic link",
    "fifo": "is no regular file",
    "no/such.json": "cannot be written: No such file or directory",
    "file/a.json": "cannot be written: Not a directory",
    "x" * 300: "cannot be written: File name too long",
    ".": "is a folder",
    "..": "names a folder",
    "/": "names a folder",
    "": "names a folder",
    "/proc/a.json": "cannot be written",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    Path("link").symlink_to("file")
    Path("dangling").symlink_to("nowhere")
    os.mkfifo("fifo")
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("out", BAD)
def test_what_cannot_be_written_is_told(out):
    before = sorted(os.listdir("."))
    with pytest.raises(InputError) as error:
        check_out(Path(out), "calibrate")
    assert BAD[out] in str(error.value) or (out in (".", "") and "folder" in str(error.value))
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("out", ["a.json", "file", "folder/a.json", "./a.json"])
@pytest.mark.usefixtures("here")
def test_what_can_be_written_is_left_alone(out):
    before = sorted(os.listdir("."))
    check_out(Path(out), "calibrate")
    assert sorted(os.listdir(".")) == before


COMMANDS = [
    ["calibrate", "smoothcache", "--alpha", "0.1"],
    ["calibrate", "teacache"],
    ["calibrate", "magcache"],
    ["calibrate", "dicache"],
    ["bench", "quality", "none"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1])
@pytest.mark.parametrize("out", ["folder", "link", "fifo", "/", ""])
@pytest.mark.usefixtures("here")
def test_every_command_refuses_it_before_the_model_is_loaded(run, monkeypatch, words, out):
    for module in ("calibration", "bench"):
        monkeypatch.setattr(f"cineray.jobs.measure.{module}.load_model", None, raising=False)
    monkeypatch.setattr("cineray.pipeline.loading.model.load_model", None)
    code, _, err = run(*words, "--out", out, steps=12)
    assert code == 2
    assert "--out" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("floor", ["nan", "inf", "-inf", "0", "-3", "500"])
def test_a_floor_that_nothing_reaches_is_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch, floor):
    monkeypatch.setattr("cineray.jobs.measure.calibration.load_model", None)
    code, _, err = run("calibrate", "dicache", "--floor", floor, "--out", str(tmp_path / "a.json"), steps=12)
    assert code == 2
    assert "--floor must be" in err or "the best keeps 100 dB" in err
    assert not list(tmp_path.glob("a.json*"))


@pytest.mark.usefixtures("here")
def test_a_file_is_replaced_whole_or_not_at_all():
    replace_text(Path("file"), "new", "calibrate")
    assert Path("file").read_text() == "new"
    with pytest.raises(InputError, match="cannot be written"):
        replace_text(Path("folder"), "new", "calibrate")
    assert sorted(os.listdir(".")) == ["dangling", "fifo", "file", "folder", "link"]


def test_sigterm_takes_temporary_files_with_it(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    left = tmp_path / "temporary"

    def work():
        with ended_by_sigterm():
            left.touch()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                left.unlink()

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 143
    assert not left.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lock_that_nobody_gives_back_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(out_file, "LOCK_S", 0.1)
    out = tmp_path / "b.json"
    with locked(out, "bench quality"), pytest.raises(InputError, match="cannot be locked: another process has held"):
        locked(out, "bench quality").__enter__()
    assert not list(tmp_path.iterdir())


def test_two_benches_on_one_file_keep_each_others_rows(loaded, new_request, tmp_path):
    model, out = loaded("wan"), tmp_path / "b.json"
    identity = measured_on(model, [new_request()])

    def measure(number):
        file = _BenchFile(out, identity, model)
        for row in range(8):
            asked = f"policy {number} {row}"
            file.add({(asked, None): BenchRow(asked=asked, at=None, row=None)})

    threads = [threading.Thread(target=measure, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(_BenchFile(out, identity, model)._read()) == 32
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    with pytest.raises(InputError, match="measured with different device"):
        _BenchFile(out, identity | {"device": "other"}, model).add({})
