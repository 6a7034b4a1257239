"""What a rank of a gang does: meets the others, loads the weights, denoises clip after clip."""

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from cineray.jobs.gangs.faults import Fault, explain_shortage, fault_of, free_memory, with_memory
from cineray.jobs.gangs.messages import ClipFault, Denoised, NoPrompt, Preempted, RunSpec, StepCount, Task
from cineray.jobs.output.folder import OutputError, OutputFolder
from cineray.jobs.output.hardware import begin_peak, hardware
from cineray.jobs.output.step_keeper import ClipPreempted, StepKeeper
from cineray.jobs.threads import loading_threads, rank_threads
from cineray.pipeline.denoise import StepDone
from cineray.pipeline.footprint.fit import RANK, SHARED, check_own_gpu, own_shortage
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadedModel, load_model
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.render import (
    DenoisedClip,
    PreparedClip,
    decode_clip_on_gang,
    denoise_prepared,
    prepare_clip,
)
from cineray.pipeline.request import explain
from cineray.pipeline.resume.decoded_frames import DecodedFrames, write_frames
from cineray.pipeline.resume.encoded_prompts import EncodedPrompt, read_encoded
from cineray.pipeline.resume.tensor_file import TensorFileError

LOCALHOST = "127.0.0.1"  # a node's address in a Ray that listens there alone
HAS_ROOM = "has room"
JOIN_TIMEOUT_S = 600.0  # ranks load their weights before they meet; a 28 GB checkpoint from a slow disk


class RankWork:
    """The work of one rank of a gang.

    Attributes:
        pulse: how far it is; read from another thread.
        stop_requested: set from another thread, it puts the gang's clip down after the current step.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.step_count = StepCount(fingerprint="", step=0, num_steps=0)
        self.stop_requested = threading.Event()
        self._spec = spec
        self._store: Any = None
        self._gang: Gang | None = None
        self._model: LoadedModel | None = None

    def open_rendezvous(self, host: str) -> tuple[str, int]:
        """Binds a free port of `host`, this node's address, and keeps it: the gang meets there."""
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        self._store = torch.distributed.TCPStore(
            host,
            port,
            self._spec.run.layout.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=_join_timeout(),
            master_listen_fd=listening.detach(),
        )
        return host, port

    def join(self, rank: int, host: str, port: int) -> None:
        """Loads the weights and meets the other ranks."""
        checkpoint = open_checkpoint(self._spec.model)
        options = rank_options(self._spec.options, checkpoint.num_experts)
        check_own_gpu(options.device, self._spec.demands, (RANK, SHARED))
        torch.set_num_threads(loading_threads(options.device))
        if host == LOCALHOST:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        if self._store is None:
            self._store = torch.distributed.TCPStore(host, port, is_master=False, timeout=_join_timeout())
        # loading comes first: it takes ranks unequally long, and a collective would not wait for it
        decoder_parts = () if self._spec.decodes_on_gang else checkpoint.model.decoder_parts
        finishers_parts = (*checkpoint.model.encoder_parts, *decoder_parts)
        shards = self._spec.run.shard_weights
        self._model = load_model(checkpoint, options, skip_components=finishers_parts, is_sharded=shards)
        torch.set_num_threads(rank_threads())
        self._gang = Gang.join(
            self._spec.run.layout,
            rank,
            self._spec.run.layout.world_size,
            device="cuda:0" if options.device == "cuda" else "cpu",
            store=self._store,
            timeout_s=self._spec.run.collective_s,
            attention=options.gang_attention,
            parallel_decode=self._spec.decodes_on_gang,
        )
        if shards:
            self._gang.shard_weights(self._model)

    def denoise(self, task: Task) -> Denoised | Preempted | NoPrompt | ClipFault:
        """Denoises a clip with the other ranks; the first rank leaves the latents, or the frames too, on disk."""
        assert self._gang is not None
        assert self._model is not None
        began = time.monotonic()
        no_room = self._no_room(task)
        if no_room is not None:
            return ClipFault(reason=f"it does not fit, by forecast: {no_room} GB", fault="memory")
        begin_peak(self._spec.options.device)
        steps = task.request.num_inference_steps
        self.step_count = StepCount(fingerprint=task.fingerprint, step=0, num_steps=steps)
        folder = OutputFolder.existing(self._spec.out)

        def on_step(done: int, total: int) -> None:
            self.step_count = StepCount(fingerprint=task.fingerprint, step=done, num_steps=total)

        try:
            with folder.translated_os_errors(f"reading the encoded prompt of clip {task.request.id}"):
                encoded = self._encoded(folder.prompt_path(task.prompt_key))
            if isinstance(encoded, NoPrompt):
                return encoded
            model, tensors = self._model, encoded.tensors
            prepared = with_memory(lambda: prepare_clip(model, task.request, tensors))
        except OutputError:
            raise
        except Exception as reason:  # noqa: BLE001  # `_fault` says whose it is
            return _fault(reason, folder, f"clip {task.request.id} was prepared", of_clip=("input", "step"))
        try:
            if self._gang.mesh.gang.size == 1:
                with_memory(lambda: self._denoise(task, prepared, on_step, folder))
            else:  # peers wait in the middle of an exchange: none could begin the steps again alone
                self._denoise(task, prepared, on_step, folder)
        except ClipPreempted as preempted:
            busy_s = time.monotonic() - began
            return Preempted(step=preempted.step, kept=preempted.kept, busy_s=busy_s)
        except OutputError:
            raise
        except Exception as reason:  # noqa: BLE001  # `_fault` says whose it is
            return _fault(reason, folder, f"clip {task.request.id} was denoised", of_clip=("input",))
        return Denoised(busy_s=time.monotonic() - began, hardware=hardware(self._spec.options.device))

    def _no_room(self, task: Task) -> str | None:
        """Why the clip does not fit into a GPU of this gang; the same answer on every rank, as in `_encoded`."""
        assert self._gang is not None
        if not task.demands:
            return None
        said = own_shortage(self._spec.options.device, task.demands, (RANK, SHARED))
        return next((text for text in self._gang.exchange_text(said or HAS_ROOM) if text != HAS_ROOM), None)

    def _denoise(self, task: Task, prepared: PreparedClip, on_step: StepDone, folder: OutputFolder) -> None:
        """The steps, from where the clip was left on; the first rank keeps the latents."""
        assert self._gang is not None
        assert self._model is not None
        keeper = StepKeeper(
            folder.step_path(task.request.id, task.fingerprint),
            task.fingerprint,
            self._gang,
            self._spec.run.checkpoint_s,
            self.stop_requested.is_set,
        )
        clip = denoise_prepared(self._model, task.request, prepared, on_step, gang=self._gang, keeper=keeper)
        self._model.pipe.maybe_free_model_hooks()  # of offloaded experts the first one begins again
        if self._gang.is_leader:
            with folder.translated_os_errors(f"keeping the latents of clip {task.request.id}"):
                keeper.save_finished(clip, task.request.num_inference_steps)
        if self._spec.decodes_on_gang:
            self._decode(task, clip, folder)

    def _decode(self, task: Task, clip: DenoisedClip, folder: OutputFolder) -> None:
        """The frames, by all ranks; the first one keeps them."""
        assert self._gang is not None
        assert self._model is not None
        rendered = decode_clip_on_gang(self._gang, self._model, clip, task.request)
        if rendered is not None:
            decoded = DecodedFrames(frames=rendered.frames, decode_s=rendered.decode_s)
            with folder.translated_os_errors(f"keeping the frames of clip {task.request.id}"):
                write_frames(decoded, task.fingerprint, folder.frames_path(task.request.id, task.fingerprint))

    def _encoded(self, path: Path) -> EncodedPrompt | NoPrompt:
        """The same answer on every rank: one that went back alone would leave the others waiting in the first step."""
        assert self._gang is not None
        encoded, said = None, "none"
        try:
            encoded = read_encoded(path)
            said = encoded.digest
        except (FileNotFoundError, TensorFileError) as error:
            said = f"{said}: {error}"
        texts = self._gang.exchange_text(said)
        if encoded is None or any(text != said for text in texts):
            reasons = [text.removeprefix("none: ") for text in texts if text.startswith("none")]
            return NoPrompt(reason=f"its encoded prompt: {(reasons or ['ranks read different ones'])[0]}")
        return encoded


def rank_options(options: LoadOptions, num_experts: int = 1) -> LoadOptions:
    """How a rank loads: one transformer is in use all the time, so there is nothing for `--offload model` to move.

    Of two experts the idle one stays off the GPU.
    """
    return replace(options, offload="none") if options.offload == "model" and num_experts == 1 else options


def _fault(error: Exception, folder: OutputFolder, doing: str, of_clip: Sequence[Fault]) -> ClipFault:
    """What an error says of the clip.

    Args:
        of_clip: faults that are the clip's own at this point.

    Raises:
        Exception: the error itself, which says nothing about the clip.
        OutputError: the folder is at fault.
    """
    fault = fault_of(error)
    if fault == "machine":
        raise error
    if fault == "memory":
        reason = explain_shortage(error)
        free_memory()
        return ClipFault(reason=reason, fault="memory")
    folder.check(doing)  # a fault of the folder is not the clip's
    return ClipFault(reason=explain(error), fault="input" if fault in of_clip else "step")


def _join_timeout() -> timedelta:
    return timedelta(seconds=JOIN_TIMEOUT_S)
