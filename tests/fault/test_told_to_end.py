"""A process that is told to end does so, wherever it stands, and keeps the step of the clip in flight."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from gang_runs import arguments, events, pixels, render, sidecar, start_driver, steps_on_disk, write_manifest
from waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.process

STEPS = 100


def test_a_terminal_that_is_closed_keeps_the_step_and_the_next_run_goes_on(checkpoint_folder, tmp_path, capsys):
    model, out = checkpoint_folder("wan"), tmp_path / "out"
    manifest = write_manifest(tmp_path / "m.jsonl", ["a"], STEPS)
    run = start_driver(manifest, out, model, "--checkpoint-every", 0)
    assert wait_for(lambda: steps_on_disk(out, "a"), PATIENCE_S)
    run.send_signal(signal.SIGHUP)
    _, said = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 128 + signal.SIGHUP, said
    (yielded,) = [event for event in events(out) if event["event"] == "yielded"]
    assert yielded["kept"]
    code, _, said = render(capsys, manifest, out, model)
    assert code == 0, said
    assert sidecar(out, "a")["resumed_at"] == [yielded["step"]]
    assert set(pixels(out)) == {"a"}


def test_nohup_stays_deaf(checkpoint_folder, tmp_path):
    model, out = checkpoint_folder("wan"), tmp_path / "out"
    manifest = write_manifest(tmp_path / "m.jsonl", ["a"], 2)
    _, *clips = arguments(manifest, out, model, "--checkpoint-every", 0)
    run = subprocess.Popen(
        ["nohup", sys.executable, "-m", "cineray", "render", *clips],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert wait_for(lambda: (out / ".state").exists(), PATIENCE_S)
    run.send_signal(signal.SIGHUP)
    _, said = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, said
    assert set(pixels(out)) == {"a"}


STUCK = """
import ctypes, subprocess, sys, threading, time
from cineray.jobs import stopping
stopping.UNWIND_S = 1.0
child = subprocess.Popen(["sleep", "600"])
with stopping.ending_on_signals():
    if sys.argv[1] == "library":
        mutex, lock, is_next = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock, threading.Event()
        threading.Thread(target=lambda: (is_next.wait(), print(child.pid, flush=True)), daemon=True).start()
        lock(mutex)
        sys.setswitchinterval(3600.0)  # the other thread has its turn, and prints, once this one waits in the library
        is_next.set()
        lock(mutex)  # for ever, whatever signals come
    with stopping.stop_requested():
        print(child.pid, flush=True)
        while True:
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                pass
"""


@pytest.mark.parametrize(("where", "num_signals"), [("library", 1), ("loop", 3)])
def test_a_process_that_hears_nothing_is_ended_with_its_children(where, num_signals):
    run = subprocess.Popen(
        [sys.executable, "-c", STUCK, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    child = psutil.Process(int(run.stdout.readline()))
    for _ in range(num_signals):
        run.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    _, said = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert said == "cineray: ended by SIGTERM; finished clips are kept\n"
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10)


def test_nobody_at_an_address_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "cineray", "render", "a", "--out", str(tmp_path / "o"), "--address"),
                f"127.0.0.1:{silent.getsockname()[1]}",
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            timeout=PATIENCE_S,
            check=False,
        )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "no Ray cluster at --address 127.0.0.1:" in line
    assert not (tmp_path / "o").exists()
