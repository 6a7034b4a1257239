"""The actors: ranks of a gang, which denoise, and finishers, which encode prompts before and decode and write after.

Latents and prompts cross between them as files of the output folder, so that nothing is lost with an actor.
"""

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch

from cineray.caching.trace import trace_from
from cineray.distributed.layout import Layout
from cineray.jobs.commit import commit_clip
from cineray.jobs.output_folder import OutputError, OutputFolder
from cineray.jobs.record import clip_record, render_options
from cineray.jobs.step_keeper import StepKeeper, Yielded
from cineray.pipeline.checkpoint import open_checkpoint
from cineray.pipeline.encoded_prompts import EncodedPipe, encode_prompt
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading import TEXT_ENCODERS, TRANSFORMER, LoadedModel, LoadOptions, load_model
from cineray.pipeline.render import DenoisedClip, decode_clip, denoise_clip
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.step_state import load_step_state
from cineray.pipeline.video import VideoError

# what a clip's own input can raise; all else a rank raises is held against the gang
CLIP_ERRORS = (ValueError, OSError, torch.OutOfMemoryError)
LOCALHOST = "127.0.0.1"  # a node's address in a Ray that listens there alone
JOIN_TIMEOUT_S = 600.0  # ranks load their weights before they meet; a 28 GB checkpoint from a slow disk


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """What every actor of a run is told.

    Args:
        layout: of one gang.
        checkpoint_s: seconds between two step states.
        collective_s: a collective that takes longer fails.
    """

    model: str
    options: LoadOptions
    out: Path
    lossless: bool
    layout: Layout
    checkpoint_s: float
    collective_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One clip's way through the stages."""

    request: ClipRequest
    mark: str  # fingerprint
    prompt_key: str

    @property
    def name(self) -> str:
        """Of this clip alone: two rows may ask for the same pixels."""
        return f"{self.request.id}.{self.mark}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank runs; ranks are counted in this order, so that neighbours stand side by side."""

    node_id: str
    device: str
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoised:
    """The latents of a clip are on disk; seconds of this attempt."""

    busy_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PutDown:
    """The gang stopped between two steps because it was asked to."""

    step: int
    kept: bool
    busy_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFault:
    """The clip's own input cannot be rendered; the process is well."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """How far a rank is."""

    mark: str
    step: int
    num_steps: int


class GangRank:
    """One rank of a gang. The name begins its lines in the log."""

    def __init__(self, name: str, spec: RunSpec) -> None:
        self._name = name
        self._spec = spec
        self._store: Any = None
        self._gang: Gang | None = None
        self._model: LoadedModel | None = None
        self._pulse = Pulse(mark="", step=0, num_steps=0)
        self._asked_to_stop = threading.Event()

    def __repr__(self) -> str:
        return self._name

    def place(self) -> Place:
        context = ray.get_runtime_context()
        devices = context.get_accelerator_ids().get("GPU", [])
        return Place(node_id=context.get_node_id(), device=",".join(devices), pid=os.getpid())

    def open_meeting(self) -> tuple[str, int]:
        """Binds a free port and keeps it: the gang meets there, at this node's address alone."""
        host = ray.util.get_node_ip_address()
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        self._store = torch.distributed.TCPStore(
            host,
            port,
            self._spec.layout.world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=_join_timeout(),
            master_listen_fd=listening.detach(),
        )
        return host, port

    def join(self, rank: int, host: str, port: int) -> None:
        """Loads the weights and meets the other ranks."""
        torch.set_num_threads(1)  # ranks share the machine's cores; and more threads give other last bits
        options = self._spec.options
        if host == LOCALHOST:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        if self._store is None:
            self._store = torch.distributed.TCPStore(host, port, is_master=False, timeout=_join_timeout())
        # loading comes first: it takes ranks unequally long, and a collective would not wait for it
        self._model = load_model(open_checkpoint(self._spec.model), options, without=TEXT_ENCODERS)
        self._gang = Gang.join(
            self._spec.layout,
            rank,
            self._spec.layout.world_size,
            device="cuda:0" if options.device == "cuda" else "cpu",
            store=self._store,
            timeout_s=self._spec.collective_s,
        )

    def denoise(self, task: Task) -> Denoised | PutDown | ClipFault:
        """Denoises a clip with the other ranks; the first rank leaves the latents on disk."""
        assert self._gang is not None
        assert self._model is not None
        began = time.monotonic()
        steps = task.request.num_inference_steps
        self._pulse = Pulse(mark=task.mark, step=0, num_steps=steps)
        folder = OutputFolder.existing(self._spec.out)
        keeper = StepKeeper(
            folder.step_path(task.request.id, task.mark),
            self._gang,
            self._spec.checkpoint_s,
            self._asked_to_stop.is_set,
        )

        def on_step(done: int, total: int) -> None:
            self._pulse = Pulse(mark=task.mark, step=done, num_steps=total)

        try:
            pipe = EncodedPipe(self._model.pipe, folder.prompt_path(task.prompt_key))
            clip = denoise_clip(self._model, task.request, on_step, gang=self._gang, keeper=keeper, pipe=pipe)
            if self._gang.mesh.leads:
                with folder.explained(f"keeping the latents of clip {task.request.id}"):
                    keeper.save_finished(clip, steps)
        except Yielded as put_down:
            busy_s = time.monotonic() - began
            return PutDown(step=put_down.step, kept=put_down.kept, busy_s=busy_s)
        except OutputError:
            raise
        except CLIP_ERRORS as reason:
            return ClipFault(reason=explain(reason))
        return Denoised(busy_s=time.monotonic() - began)

    @ray.method(concurrency_group="control")
    def pulse(self) -> Pulse:
        return self._pulse

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Asks the gang to put its clip down after the current step, and every later one."""
        self._asked_to_stop.set()

    @ray.method(concurrency_group="life")
    def live(self) -> None:
        """Never returns: its failure is how the driver hears of this process's death, busy or idle."""
        threading.Event().wait()


class Finisher:
    """What is done to a clip before and after the gangs: text encoding; decoding, writing and committing."""

    def __init__(self, name: str, spec: RunSpec) -> None:
        self._name = name
        self._spec = spec
        self._model: LoadedModel | None = None

    def __repr__(self) -> str:
        return self._name

    def load(self) -> None:
        torch.set_num_threads(1)
        self._model = load_model(open_checkpoint(self._spec.model), self._spec.options, without=TRANSFORMER)

    @ray.method(concurrency_group="encode")
    def encode(self, task: Task) -> ClipFault | None:
        assert self._model is not None
        torch.set_num_threads(1)
        folder = OutputFolder.existing(self._spec.out)
        path = folder.prompt_path(task.prompt_key)
        try:
            if not path.exists():
                with folder.explained(f"keeping the prompt of clip {task.request.id}"):
                    encode_prompt(self._model, task.request, path)
        except OutputError:
            raise
        except CLIP_ERRORS as reason:
            return ClipFault(reason=explain(reason))
        return None

    def finish(self, task: Task) -> dict[str, Any] | ClipFault | None:
        """Decodes the latents that lie on disk, writes the video and commits it.

        Returns:
            The clip's record; None where there are no whole latents any more.

        Raises:
            OutputError: the output folder is full or gone.
        """
        assert self._model is not None
        folder, request = OutputFolder.existing(self._spec.out), task.request
        path = folder.step_path(request.id, task.mark)
        state = load_step_state(path)
        if state is None or state.step != state.num_steps:
            return None
        content = state.notes["finished"]
        clip = DenoisedClip(
            latents=state.latents.to(self._model.pipe._execution_device),
            trace=None if content is None else trace_from(content),
            encode_s=state.notes["encode_s"],
            denoise_s=state.notes["denoise_s"],
        )
        try:
            rendered = decode_clip(self._model, clip)
            options = render_options(self._spec.options, self._spec.lossless)
            record = clip_record(
                request, task.mark, self._model, options, rendered, self._spec.layout, state.notes["resumed_at"]
            )
            commit_clip(folder, request, task.mark, rendered, record, self._spec.lossless)
        except OutputError:
            raise
        except (*CLIP_ERRORS, VideoError) as reason:
            return ClipFault(reason=explain(reason))
        path.unlink(missing_ok=True)
        return record

    @ray.method(concurrency_group="life")
    def live(self) -> None:
        threading.Event().wait()


# calls of the named groups run beside the main one, in threads of their own
GangRankActor: Any = ray.remote(concurrency_groups={"control": 1, "life": 1})(GangRank)  # type: ignore[call-overload]
FinisherActor: Any = ray.remote(concurrency_groups={"encode": 1, "life": 1})(Finisher)  # type: ignore[call-overload]


def explain(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"


def _join_timeout() -> timedelta:
    return timedelta(seconds=JOIN_TIMEOUT_S)
