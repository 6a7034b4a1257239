"""The file that a throughput study writes and a plan reads: laws of a clip's time, fitted to clips that were timed.

A study file is a JSON object:

    {"version": 1, "made": "2026-11-26T12:00:00Z", "fits": [{
        "model": "wan2.1-t2v-14b", "width": 1280, "height": 720, "frames": 81, "steps": 50, "guided": true,
        "device": "NVIDIA H100 80GB HBM3", "gpu": "h100", "cache": "none", "computed_share": 1.0,
        "fixed_s": 66.0, "work_s": 1757.0,
        "exchanges": [{"cfg": 1, "ring": 1, "ulysses": 8, "exchange_s": 4.6}],
        "heldout_error": 0.02,
        "rows": [{"cfg": 1, "ring": 1, "ulysses": 1, "clip_s": 1823.0, "denoise_s": 1800.0, "num_clips": 2}]}]}

One fit is of one (model, size, steps, device, cache). `fixed_s` is on one rank while the others wait, `work_s` all of
the denoising on one GPU. A layout with an exchange of its own in `exchanges` takes fixed_s + work_s / ranks +
exchange_s, so it holds whatever keeps the ranks from an even share; one without takes the exchange of the shipped
tables. `heldout_error` is the largest relative error of a row that the fit did not see, null where there were too few.
`rows` are the timed clips themselves (medians of `num_clips`): a plan gives a layout that has a row that row's seconds,
as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.distributed.layout import Layout
from cineray.files import read_shaped
from cineray.pipeline.request import InputError

_Degree = Annotated[int, Field(ge=1, le=4096)]
_Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
_Clip = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # later versions may say more


class _OnLayout(_Part):
    cfg: Annotated[int, Field(ge=1, le=2)] = 1
    ring: _Degree = 1
    ulysses: _Degree = 1

    @property
    def layout(self) -> Layout:
        return Layout(cfg=self.cfg, ring=self.ring, ulysses=self.ulysses)


class StudyExchange(_OnLayout):
    """What exchanges add to a clip on one layout."""

    exchange_s: _Seconds


class StudyRow(_OnLayout):
    """Clips that were timed on one gang of this layout."""

    clip_s: _Clip
    denoise_s: _Seconds
    num_clips: Annotated[int, Field(ge=1)] = 1


class StudyFit(_Part):
    """The law of one (model, size, steps, device, cache), and what it was fitted to."""

    model: str
    width: _Degree
    height: Annotated[int, Field(ge=1)]
    frames: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1, le=1000)]
    guided: bool = True
    device: str
    gpu: str
    cache: str = "none"
    computed_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    fixed_s: _Seconds
    work_s: _Clip
    exchanges: tuple[StudyExchange, ...] = ()
    heldout_error: _Seconds | None = None
    rows: tuple[StudyRow, ...] = ()


class Study(_Part):
    """The whole file."""

    version: Literal[1]
    made: str
    fits: Annotated[tuple[StudyFit, ...], Field(min_length=1)]


_STUDY = TypeAdapter(Study)


def read_study(path: Path, model: str) -> Study:
    """A study file that has something to say of a model.

    Raises:
        InputError: it cannot be read, is no study file, or is of other models.
    """
    try:
        study = read_shaped(path, _STUDY)
    except OSError as error:
        raise InputError(f"--study {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--study {path} is not a study file (docs/scaling.md): {error}") from None
    models = sorted({fit.model for fit in study.fits})
    if model not in models:
        raise InputError(f"--study {path} is of {', '.join(models)}, not of {model}; give that model's study, or none")
    return study


def exchanges_of(fit: StudyFit) -> Iterator[tuple[Layout, float]]:
    """The layouts whose exchange the study knows."""
    for known in fit.exchanges:
        yield known.layout, known.exchange_s
