"""How many ranks render one clip, and along which axes: arithmetic only, no process groups."""

from dataclasses import asdict, dataclass


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
    def ranks_per_gang(self) -> int:
        return self.cfg * self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        return self.gangs * self.ranks_per_gang
