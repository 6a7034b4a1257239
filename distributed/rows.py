"""Feature maps that are sharded by rows: what a convolution or a group norm needs from the other ranks.

Letters: B batch, C channels, T frames, H rows here, W columns.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
import torch.distributed as dist
from torch import nn

from cineray.distributed.mesh import Axis


def with_neighbour_rows(values: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, int, int]:
    """Puts the last row of the rank above on top and the first row of the rank below at the bottom.

    Args:
        values: [..., H, W].

    Returns:
        ([..., H + above + below, W], above, below); above and below are 1, or 0 at the frame's edge.
    """
    above, below = int(axis.index > 0), int(axis.index < axis.size - 1)
    top, bottom = values[..., :1, :].contiguous(), values[..., -1:, :].contiguous()
    from_above, from_below = torch.empty_like(top), torch.empty_like(bottom)
    exchanges = []
    if above:
        neighbour = axis.ranks[axis.index - 1]
        exchanges += [
            dist.P2POp(dist.isend, top, neighbour, group=axis.group),
            dist.P2POp(dist.irecv, from_above, neighbour, group=axis.group),
        ]
    if below:
        neighbour = axis.ranks[axis.index + 1]
        exchanges += [
            dist.P2POp(dist.isend, bottom, neighbour, group=axis.group),
            dist.P2POp(dist.irecv, from_below, neighbour, group=axis.group),
        ]
    for work in dist.batch_isend_irecv(exchanges) if exchanges else []:
        work.wait()
    parts = [from_above] * above + [values] + [from_below] * below
    return torch.cat(parts, dim=-2), above, below


def group_norm_over_rows(norm: nn.GroupNorm, values: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`norm(values)` with mean and variance over all ranks' rows.

    Means and variances are taken here in float32 and put together in float64.

    Args:
        values: [B, C, T, H, W].
    """
    grouped = values.float().flatten(2).unflatten(1, (norm.num_groups, -1)).flatten(2)  # [B, groups, elements]
    variance, mean = (v.double() for v in torch.var_mean(grouped, dim=2, correction=0))
    count = torch.full_like(mean, grouped.shape[2])
    sums = torch.stack([count, count * mean, count * (variance + mean * mean)])
    dist.all_reduce(sums, group=axis.group)
    count, mean, square = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    inverse_std = (square - mean * mean + norm.eps).rsqrt()
    per_group = values.shape[1] // norm.num_groups
    scale, mean = (v.repeat_interleave(per_group, dim=1) for v in (inverse_std, mean))  # [B, C] float64
    scale = scale * norm.weight.double()
    shift = norm.bias.double() - mean * scale
    shape = (*scale.shape, *[1] * (values.dim() - 2))
    return torch.addcmul(shift.float().view(shape), values.float(), scale.float().view(shape)).to(values.dtype)
