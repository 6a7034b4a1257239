"""Ulysses: an all-to-all turns shards of tokens with all heads into all tokens with a share of the heads.

DeepSpeed-Ulysses, arXiv 2309.14509, for joint sequences: image tokens are sharded, text tokens are on every rank.

Letters: B batch, S image tokens here, S' image tokens of the whole group, T text tokens, H heads, h = H / ranks,
D channels of a head.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
import torch.distributed as dist

from cineray.distributed.mesh import Axis


def tokens_to_heads(values: torch.Tensor, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
    """[N, B, S, H, D] -> [N, B, S', h, D]: all tokens of the group, this rank's heads. N tensors in one exchange.

    Args:
        sizes: image tokens of each rank of the group.
    """
    if axis.group is None:
        return values
    n, b, _, h_all, d = values.shape
    heads = h_all // axis.size
    sent = values.unflatten(3, (axis.size, heads)).permute(3, 2, 0, 1, 4, 5)  # [ranks, S, N, B, h, D]
    received = values.new_empty((sum(sizes), n, b, heads, d))
    dist.all_to_all_single(
        received,
        sent.flatten(0, 1).contiguous(),
        output_split_sizes=list(sizes),
        input_split_sizes=[sizes[axis.index]] * axis.size,
        group=axis.group,
    )
    return received.permute(1, 2, 0, 3, 4)


def heads_to_tokens(image: torch.Tensor, text: torch.Tensor, sizes: tuple[int, ...], axis: Axis) -> torch.Tensor:
    """[B, S', h, D] and [B, T, h, D] -> [B, S + T, H, D], text last: own tokens and all text, all heads.

    Each rank is sent its image tokens and the whole text, so that one exchange serves both.
    """
    if axis.group is None:
        return torch.cat([image, text], dim=1)
    b, num_text, heads, d = text.shape
    parts = [part for own in image.split(list(sizes), dim=1) for part in (own, text)]
    sent = torch.cat(parts, dim=1).transpose(0, 1).contiguous()  # [S' + ranks x T, B, h, D]
    here = sizes[axis.index] + num_text
    received = image.new_empty((axis.size * here, b, heads, d))
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[here] * axis.size,
        input_split_sizes=[size + num_text for size in sizes],
        group=axis.group,
    )
    return received.unflatten(0, (axis.size, here)).permute(2, 1, 0, 3, 4).flatten(2, 3)  # [B, S + T, H, D]


def own_heads(text: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., H, D] -> [..., h, D]: this rank's heads of a replicated tensor; a view."""
    heads = text.shape[-2] // axis.size
    return text.narrow(-2, axis.index * heads, heads)
