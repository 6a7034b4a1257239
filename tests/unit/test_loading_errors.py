"""What a checkpoint cannot be loaded for at all, and what for only here and now."""

import errno

import pytest
import torch

from cineray.pipeline.loading import model as loading
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.errors import LoadingError, is_passing
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import InputError


class _Response:
    def __init__(self, status_code):
        self.status_code = status_code


class _HubError(RuntimeError):
    def __init__(self, status_code):
        super().__init__("the hub's words")
        self.response = _Response(status_code)


def hub_error(status):
    return _HubError(status)


def caused_by(cause):
    error = ValueError("could not load")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        ConnectionResetError(),
        TimeoutError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
        RuntimeError("I/O error: Input/output error (os error 5)"),  # safetensors, from Rust
        RuntimeError("503 Server Error: Service Unavailable for url"),
        RuntimeError("Server error '502 Bad Gateway' for url"),
        hub_error(500),
        hub_error(429),
        caused_by(OSError(errno.EIO, "Input/output error")),
        LoadingError("x"),
    ],
)
def test_what_another_machine_may_not_meet(error):
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        IsADirectoryError(errno.EISDIR, "Is a directory"),
        OSError("Error no file named diffusion_pytorch_model.safetensors found in directory"),
        ValueError("vae: 3 tensors are missing from the weights"),
        RuntimeError("Error while deserializing header: invalid header"),
        RuntimeError("No such file or directory (os error 2)"),
        KeyError("weight_map"),
        hub_error(401),
        hub_error(404),
        InputError("x"),
        caused_by(KeyError("x")),
    ],
)
def test_what_is_the_checkpoint_s_own(error):
    assert not is_passing(error)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(OSError(errno.EIO, "Input/output error"), LoadingError), (KeyError("layers"), InputError)],
)
def test_loading_says_which_in_one_line(checkpoint_folder, monkeypatch, raised, kind):
    def fail(*_):
        raise raised

    monkeypatch.setattr(loading, "_load", fail)
    with pytest.raises(InputError) as caught:
        loading.load_model(open_checkpoint(str(checkpoint_folder("wan"))), LoadOptions())
    assert type(caught.value) is kind
    assert len(caught.value.lines) == 1
    assert "loading from" in str(caught.value)
