"""How many ranks render one clip, and along which axes: arithmetic only, no process groups.

Ranks count gang by gang; inside a gang the guidance half changes slowest and the place in the ulysses group fastest,
so that the ranks which exchange most stand beside each other.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_AXIS = re.compile(r"(gangs|cfg|ring|ulysses)(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """`gangs` clips at a time, each on cfg x ring x ulysses ranks.

    Args:
        gangs: independent replicas of the model.
        cfg: 2 where the two guidance branches run on two halves of the gang, else 1.
        ring: ranks that pass keys and values around.
        ulysses: ranks that split the attention heads.
    """

    gangs: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for axis, degree in asdict(self).items():
            if degree < 1:
                raise ValueError(f"layout: {axis} must be 1 or more, got {degree}")
        if self.cfg > 2:
            raise ValueError(f"layout: cfg must be 1 or 2 (guidance has two branches), got {self.cfg}")

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share one branch's tokens."""
        return self.ring * self.ulysses

    @property
    def ranks_per_gang(self) -> int:
        return self.cfg * self.sequence_ranks

    @property
    def world_size(self) -> int:
        return self.gangs * self.ranks_per_gang

    @property
    def text(self) -> str:
        """The layout as text, which `parse_layout` reads: `cfg2xulysses4`; `1` for one rank."""
        return "x".join(f"{axis}{degree}" for axis, degree in asdict(self).items() if degree > 1) or "1"

    def coordinates(self, rank: int) -> "Coordinates":
        """Where a rank of the world stands."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"layout {self.text}: rank must be 0 to {self.world_size - 1}, got {rank}")
        rest, ulysses = divmod(rank, self.ulysses)
        rest, ring = divmod(rest, self.ring)
        gang, cfg = divmod(rest, self.cfg)
        return Coordinates(gang=gang, cfg=cfg, ring=ring, ulysses=ulysses)

    def rank_at(self, coordinates: "Coordinates") -> int:
        """The rank with these coordinates; the inverse of `coordinates`."""
        return (
            (coordinates.gang * self.cfg + coordinates.cfg) * self.ring + coordinates.ring
        ) * self.ulysses + coordinates.ulysses


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Coordinates of a rank, each from 0."""

    gang: int
    cfg: int
    ring: int
    ulysses: int


def parse_layout(text: str) -> Layout:
    """`cfg2xulysses4` and the like, or a number of ranks, which means ulysses.

    Raises:
        ValueError: not of this form, an axis given twice, or a degree that cannot be.
    """
    if text.strip().isdecimal():
        return Layout(ulysses=int(text))
    degrees: dict[str, int] = {}
    for part in text.strip().split("x"):
        match = _AXIS.fullmatch(part.strip())
        if match is None or match[1] in degrees:
            raise ValueError(
                f"layout {text!r} is not of the form AXISn or AXISnxAXISn with each of gangs, cfg, ring, ulysses at "
                "most once, as ulysses4, ring2xulysses2, cfg2xulysses2, nor a number of ranks"
            )
        degrees[match[1]] = int(match[2])
    return Layout(**degrees)


def check_layout(layout: Layout, num_heads: int, num_branches: int, world_size: int | None = None) -> None:
    """Checks a layout against a model and a number of ranks.

    Args:
        num_heads: attention heads of the model; ulysses must divide them.
        num_branches: calls of the transformer per step; cfg 2 needs two.
        world_size: ranks at hand; None where any number can be had.

    Raises:
        ValueError: it does not fit; says what does.
    """
    problem = None
    if num_heads % layout.ulysses:
        divisors = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        problem = f"ulysses must divide the model's {num_heads} attention heads ({divisors}), got {layout.ulysses}"
    elif layout.cfg > num_branches:
        problem = f"cfg {layout.cfg} needs two guidance branches, this clip has {num_branches}"
    elif world_size is not None and layout.world_size != world_size:
        problem = f"it takes {layout.world_size} ranks, there are {world_size}"
    if problem is not None:
        ranks = world_size or layout.world_size
        fits = ", ".join(fit.text for fit in fitting_layouts(ranks // layout.gangs, num_heads, num_branches))
        raise ValueError(f"layout {layout.text}: {problem}; layouts of {ranks // layout.gangs} ranks that fit: {fits}")


def fitting_layouts(num_ranks: int, num_heads: int, num_branches: int) -> Iterator[Layout]:
    """Every layout of one gang on exactly `num_ranks` ranks, those with the highest ulysses degree first.

    There is always one: a ring fits any number of heads.
    """
    for cfg in range(1, min(num_branches, 2) + 1):
        for ulysses in range(min(num_ranks // cfg, num_heads), 0, -1):
            if num_ranks % (cfg * ulysses) == 0 and num_heads % ulysses == 0:
                yield Layout(cfg=cfg, ring=num_ranks // (cfg * ulysses), ulysses=ulysses)
