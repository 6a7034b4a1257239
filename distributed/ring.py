"""Ring attention: keys and values travel round the ranks, each rank adds them to its own queries' softmax.

Ring Attention, arXiv 2310.01889. Text keys are on every rank and join the first block; text queries are shared out
over the ring and gathered at the end, so that the text part is the same bits on every rank.

Letters: B batch, S image tokens of a ring rank's ulysses group, T text tokens, h heads here, D channels of a head,
N all tokens of the joint sequence.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
import torch.distributed as dist
from torch.nn import functional

from cineray.distributed.mesh import Axis, Mesh
from cineray.distributed.tokens import TokenShards, gather_tokens


def ring_attention(
    image: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor | None,
    shards: TokenShards,
    text_first: bool,
    mesh: Mesh,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of this ring rank's image queries and of all text queries.

    Args:
        image: queries, keys and values [3, B, S, h, D].
        text: the same [3, B, T, h, D], replicated over the ring.
        mask: True where a key is attended to, [B or 1, 1, 1, N], in the order of the joint sequence, or None. Image
            keys must all be: only text is padded, and blocks of image keys then need no mask.
        shards: image tokens of each rank of the sequence axis.

    Returns:
        (image [B, S, h, D], text [B, T, h, D]).

    Raises:
        ValueError: a mask that is not the same for all queries and heads.
    """
    ring, num_ulysses = mesh.ring, mesh.ulysses.size
    sizes = tuple(sum(shards.sizes[r * num_ulysses : (r + 1) * num_ulysses]) for r in range(ring.size))
    if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1):
        raise ValueError(f"ring: the mask must be [B, 1, 1, keys], the same for all queries, got {tuple(mask.shape)}")
    num_text = text.shape[2]
    # text queries: an even share of each rank, possibly none of them
    text_sizes = tuple(num_text // ring.size + (r < num_text % ring.size) for r in range(ring.size))
    text_shards = TokenShards(text_sizes, ring.index)
    queries = torch.cat([image[0], text_shards.own(text[0], 1)], dim=1)

    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    travelling = image[1:].contiguous()  # keys and values [2, B, S of their owner, h, D]
    for turn in range(ring.size):
        owner = (ring.index - turn) % ring.size
        arriving = _pass_on(travelling, sizes[(owner - 1) % ring.size], ring) if turn < ring.size - 1 else None
        keys, seen = travelling, None
        if turn == 0 and num_text:
            keys = torch.cat([keys, text[1:]], dim=2)
            seen = _mask_of_first_block(mask, num_text, keys.shape[2], text_first)
        merged = _merge(merged, attention_with_lse(queries, keys[0], keys[1], seen))
        if arriving is not None:
            travelling = arriving()
    assert merged is not None
    out = merged[0].to(image.dtype)
    own_image, own_text = out.split([image.shape[2], text_shards.size], dim=1)
    all_text = gather_tokens(own_text, text_shards, ring.group, dim=1) if num_text else own_text
    return own_image, all_text


def _pass_on(values: torch.Tensor, num_arriving: int, ring: Axis):
    """Sends to the next rank of the ring while the caller computes; call the result to wait for what arrives."""
    arriving = values.new_empty((*values.shape[:2], num_arriving, *values.shape[3:]))
    to, source = ring.ranks[(ring.index + 1) % ring.size], ring.ranks[(ring.index - 1) % ring.size]
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, values, to, group=ring.group),
            dist.P2POp(dist.irecv, arriving, source, group=ring.group),
        ]
    )

    def wait() -> torch.Tensor:
        for work in works:
            work.wait()
        return arriving

    return wait


def _mask_of_first_block(
    mask: torch.Tensor | None, num_text: int, num_keys: int, text_first: bool
) -> torch.Tensor | None:
    """[B or 1, 1, 1, num_keys] for image keys, which all count, and the text keys behind them."""
    if mask is None:
        return None
    text = mask[..., :num_text] if text_first else mask[..., -num_text:]
    return torch.cat([text.new_ones((*text.shape[:-1], num_keys - num_text)), text], dim=-1)


def _merge(
    so_far: tuple[torch.Tensor, torch.Tensor] | None, block: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a block of keys to a softmax: outputs [B, Q, h, D] float32, log-sum-exps [B, Q, h, 1] float32."""
    if so_far is None:
        return block
    (out, lse), (block_out, block_lse) = so_far, block
    # out + sigmoid(block_lse - lse) (block_out - out): the two exponentials in their stable form
    out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
    return out, lse - functional.logsigmoid(lse - block_lse)


def attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp, from the kernels that scaled_dot_product_attention itself calls.

    Args:
        query [B, Q, h, D]; key, value [B, K, h, D]; mask [B or 1, 1, 1, K], True is attended to; at least one key
        of each sample must be.

    Returns:
        ([B, Q, h, D] float32, [B, Q, h, 1] float32).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)
    elif bias is None and query.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    else:
        if bias is not None:
            # the kernel wants rows of the bias aligned to 16 values
            num_keys = key.shape[2]
            bias = functional.pad(bias, (0, -num_keys % 16))[..., :num_keys]
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], num_keys)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)
        lse = lse[:, :, : query.shape[2]]  # the kernel pads queries
    return out.transpose(1, 2).float(), lse.transpose(1, 2).unsqueeze(-1).float()
