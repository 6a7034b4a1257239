"""What the driver and its actors tell each other: plain values. Latents and prompts cross as files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cineray.distributed.layout import Layout
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.footprint.fit import Demand
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import ClipRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """What every actor of a run needs to know.

    Args:
        options: how the weights are loaded.
        file_format: of the clips, as `Checkpoint.written_as` takes it.
        decodes_on_gang: the ranks decode; finishers encode prompts, and make videos of frames.
        demands: what the clips take of each kind of GPU at most, by forecast, where that is known before actors start.
    """

    model: str
    options: LoadOptions
    out: Path
    lossless: bool
    run: RunOptions
    decodes_on_gang: bool = False
    demands: tuple[Demand, ...] = ()
    file_format: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One clip's way through the stages.

    Args:
        warnings: what was asked for and the pixels will not show.
        ranks: what its ranks computed on, where they have in this run.
        layout: of the gang that denoised it to its end, where it is another than the run's.
        demands: what the clip takes of each kind of GPU, by forecast, where actors came up before that was known.
    """

    request: ClipRequest
    fingerprint: str
    prompt_key: str
    warnings: tuple[str, ...] = ()
    ranks: tuple[Mapping[str, Any], ...] = ()
    layout: Layout | None = None
    demands: tuple[Demand, ...] = ()

    @property
    def name(self) -> str:
        """A name of this clip alone: two rows may ask for the same pixels."""
        return f"{self.request.id}.{self.fingerprint}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLocation:
    """Where a rank runs.

    Args:
        device: Ray's id of its GPU: a number, or a name such as `MIG-...`; empty on a CPU.
    """

    node_id: str
    device: str
    pid: int

    @property
    def order(self) -> tuple[str, bool, int, str]:
        """Ranks are counted in this order, so that neighbours stand side by side."""
        is_number = self.device.isascii() and self.device.isdecimal()
        return self.node_id, not is_number, int(self.device) if is_number else 0, self.device


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoised:
    """The latents of a clip are on disk; seconds of this attempt, and what this rank computed on."""

    busy_s: float
    hardware: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preempted:
    """The gang stopped between two steps because it was asked to."""

    step: int
    kept: bool
    busy_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFault:
    """The clip cannot be rendered; the process is well. `fault` as `RankOutcome` says."""

    reason: str
    fault: Literal["input", "step", "memory"] = "input"


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPrompt:
    """The clip's encoded prompt cannot be read by every rank; it must be encoded again."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCount:
    """How many steps of its clip a rank has done."""

    fingerprint: str
    step: int
    num_steps: int
