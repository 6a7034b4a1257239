"""Cards that can be planned for: memory, rate and interconnect, from data sheets (data/gpus.json)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.files import read_shaped
from cineray.pipeline.request import InputError
from cineray.text import shorten

DATA = Path(__file__).parent / "data"
_Positive = Annotated[float, Field(gt=0)]


class Gpu(BaseModel):
    """One kind of card.

    Args:
        memory_bytes: as its driver reports it.
        bf16_flop_s: dense operations a second.
        memory_bytes_s: bandwidth of its memory.
        collectives: whose times in data/collectives.json hold for it; None where nobody published any.
        collectives_factor: those times are multiplied by it, because of `collectives_rule`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    memory_bytes: Annotated[int, Field(gt=0)]
    bf16_flop_s: _Positive
    memory_bytes_s: _Positive
    interconnect: str
    collectives: str | None
    collectives_factor: _Positive = 1.0
    collectives_rule: str = ""
    source: str


@cache
def known_gpus() -> dict[str, Gpu]:
    """All of them by name."""
    content = read_shaped(DATA / "gpus.json", TypeAdapter(dict))
    return {name: Gpu(name=name, **fields) for name, fields in content["gpus"].items()}


def gpu_name(device: str) -> str:
    """What `cineray plan` calls a card: `NVIDIA H100 80GB HBM3`, to Ray `H100`, is `h100`; one unknown is "other"."""
    plain = "".join(c for c in device.lower() if c.isalnum())
    return max((name for name in known_gpus() if name in plain), key=len, default="other")


def find_gpu(name: str) -> Gpu:
    """A card by name; case, blanks and hyphens do not count: `RTX 4090` is `rtx4090`, and so is `4090`.

    Raises:
        InputError: there is none; lists them.
    """
    gpus = known_gpus()
    plain = "".join(c for c in name.lower() if c.isalnum())
    found = gpus.get(f"rtx{plain}" if plain.isdecimal() else plain)
    if found is None:
        raise InputError(f"--gpu must be one of {', '.join(gpus)}, got {shorten(name)}")
    return found
