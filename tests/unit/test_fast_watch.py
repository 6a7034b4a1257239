"""The watch over fast tests hears of each way to start something."""

import multiprocessing
import os
import subprocess

import pytest
import torch.distributed as dist
from conftest import WATCH


def connect_to_a_forkserver(_):
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()


def open_a_world_of_one(folder):
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    dist.destroy_process_group()


@pytest.mark.process
@pytest.mark.parametrize(
    ("start", "heard"),
    [
        (lambda _: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (lambda _: os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", ":"], {}), 0), "os.posix_spawn"),
        (lambda _: os.system(":"), "os.system"),
        (connect_to_a_forkserver, "socket.connect"),
        (open_a_world_of_one, "torch.distributed.init_process_group"),
        (lambda folder: (folder / "file").write_text("nothing"), None),
    ],
)
def test_it_hears(request, tmp_path, start, heard):
    watch = request.config.stash[WATCH]
    watch.begin()
    try:
        start(tmp_path)
    finally:
        started = watch.end()
    assert (started[0].split()[0] if started else None) == heard
