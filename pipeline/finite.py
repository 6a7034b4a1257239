"""Numbers that are not finite end their clip: they would be written as black or noise, and count as done."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line tells of this error, and starts without torch
    import torch


class NotFiniteError(ValueError):
    """A clip's latents or frames hold NaN or infinity."""

    @property
    def lines(self) -> tuple[str, ...]:
        return (str(self),)


def is_finite(values: "torch.Tensor") -> bool:
    """Whether no element is NaN or infinite; makes no tensor of the size of `values`."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()  # both NaN if any element is
    return bool(low.isfinite()) and bool(high.isfinite())


def check_finite(values: "torch.Tensor", what: str, stage: str, clip_id: str, cache: str | None = None) -> None:
    """Raises unless all values are finite.

    Args:
        what, stage: as "latents", "denoising".
        cache: the policy that may have a part in it; "none" has none.

    Raises:
        NotFiniteError: in one line, with likely causes.
    """
    if is_finite(values):
        return
    num_bad = values.numel() - int(values.isfinite().sum())
    causes = ["weights that are not finite", "a dtype too narrow for this model (try --dtype float32)"]
    if cache not in (None, "none"):
        causes.append("the cache (try --cache none)")
    raise NotFiniteError(
        f"clip {clip_id}: {num_bad} of {values.numel()} values of its {what} are not finite after {stage}; likely "
        f"causes: {', '.join(causes)}"
    )
