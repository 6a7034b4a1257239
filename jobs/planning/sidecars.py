"""Seconds of clips that an output folder already holds: its sidecars' timings."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.distributed.layout import Layout
from cineray.files import shaped
from cineray.jobs.output.record import read_record
from cineray.pipeline.request import InputError

MAX_SIDECARS = 10_000  # more say nothing new
_Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, le=10**6)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Timings(_Part):
    encode_s: _Seconds
    denoise_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
    decode_s: _Seconds
    write_s: _Seconds


class _Degrees(_Part):
    cfg: Annotated[int, Field(ge=1, le=2)] = 1
    ring: _Count = 1
    ulysses: _Count = 1


class _Model(_Part):
    name: str


class _Trace(_Part):
    computed_steps: Annotated[int, Field(ge=0, le=10**6)]
    steps: _Count


class _Sidecar(_Part):
    """What is read here of a record."""

    model: _Model
    width: _Count
    height: _Count
    frames: _Count
    steps: _Count
    guidance: _Seconds
    cache: str
    trace: _Trace
    layout: _Degrees = _Degrees()
    device: str
    resumed_at: list[int] = []
    timings: _Timings


_SIDECAR = TypeAdapter(_Sidecar)


@dataclass(frozen=True, kw_only=True, slots=True)
class PastKind:
    """Clips of the folder that differ in prompt and seed alone."""

    model: str
    width: int
    height: int
    frames: int
    steps: int
    num_branches: int
    cache: str
    layout: Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class PastClips:
    """Medians over the folder's clips of one kind.

    Args:
        fixed_s: encoding, decoding and writing.
    """

    kind: PastKind
    num_clips: int
    fixed_s: float
    denoise_s: float
    computed_share: float

    @property
    def clip_s(self) -> float:
        return self.fixed_s + self.denoise_s


def read_sidecars(folder: Path, max_branches: int) -> tuple[PastClips, ...]:
    """What a folder's clips took, those that were rendered on GPUs in one go.

    Args:
        max_branches: calls of the transformer per step of a guided clip of the model.

    Raises:
        InputError: no such folder, or no such clip in it.
    """
    if not folder.is_dir():
        raise InputError(f"--out {folder} is no folder; give the folder of an earlier run, or leave --out away")
    found: dict[PastKind, list[_Sidecar]] = defaultdict(list)
    num_other = 0
    for path in sorted(folder.glob("*.json"))[:MAX_SIDECARS]:
        try:
            sidecar = shaped(read_record(path), _SIDECAR)
        except (OSError, ValueError):
            continue  # run.json, a foreign file, a record without timings
        if sidecar.device != "cuda" or sidecar.resumed_at:  # a resumed clip's seconds are of its last part
            num_other += 1
            continue
        found[_kind(sidecar, max_branches)].append(sidecar)
    if not found:
        also = f" ({num_other} others were rendered on a CPU, or resumed)" if num_other else ""
        raise InputError(f"--out {folder} has no clip whose time on a GPU is known{also}; leave --out away")
    return tuple(_medians(kind, sidecars) for kind, sidecars in found.items())


def _kind(sidecar: _Sidecar, max_branches: int) -> PastKind:
    degrees: dict[str, Any] = sidecar.layout.model_dump()
    return PastKind(
        model=sidecar.model.name,
        width=sidecar.width,
        height=sidecar.height,
        frames=sidecar.frames,
        steps=sidecar.steps,
        num_branches=min(max_branches, 1 + (sidecar.guidance > 1)),
        cache=sidecar.cache,
        layout=Layout(**degrees),
    )


def _medians(kind: PastKind, sidecars: Iterable[_Sidecar]) -> PastClips:
    all_of = list(sidecars)
    timings = [sidecar.timings for sidecar in all_of]
    return PastClips(
        kind=kind,
        num_clips=len(all_of),
        fixed_s=statistics.median(t.encode_s + t.decode_s + t.write_s for t in timings),
        denoise_s=statistics.median(t.denoise_s for t in timings),
        computed_share=statistics.median(s.trace.computed_steps / s.trace.steps for s in all_of),
    )
