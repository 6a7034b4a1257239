"""Attention over a sequence that is sharded over ranks, behind one small interface.

The joint sequence is image tokens, sharded, and text tokens, replicated; either may come first. `SequenceAttention`
is what a backend provides; `NativeAttention` is the reference, on gloo and NCCL alike.

Letters: B batch, S image tokens here, T text tokens, N all tokens of the joint sequence on all ranks, H heads,
D channels of a head.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from cineray.distributed.mesh import Mesh
from cineray.distributed.ring import ring_attention
from cineray.distributed.tokens import TokenShards
from cineray.distributed.ulysses import heads_to_tokens, own_heads, tokens_to_heads

# (query, key, value [B, N, h, D], mask or None) -> [B, N, h, D]: attention without any rank in sight
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class JointSequence:
    """What is known of a joint sequence.

    Args:
        shards: of the image tokens, over the mesh's sequence axis.
        text_first: text tokens stand before the image tokens.
    """

    shards: TokenShards
    text_first: bool


class SequenceAttention(Protocol):
    """Attention of this rank's image tokens, and of all text tokens, over the whole joint sequence."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sequence: JointSequence,
        kernel: Kernel,
        /,
    ) -> torch.Tensor:
        """Attends over the whole joint sequence.

        Args:
            query, key, value: [B, S + T, H, D]; text may be none.
            mask: of the whole sequence, broadcastable to [B, H, N, N] and the same for all heads and queries; True
                is attended to. It hides padding among the text tokens, never image tokens.
            kernel: attention of the model, for backends that leave that to it.

        Returns:
            [B, S + T, H, D]; the image part is this rank's, the text part is the same on every rank.
        """
        ...

    def close(self) -> None:
        """Gives back what the backend set up for itself."""
        ...


def torch_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention in the layout of `Kernel`."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """Ulysses, ring, or a ring of Ulysses groups, with torch.distributed's own collectives.

    Ulysses gives every head the whole sequence in its usual order, so its result equals that of one rank bit for bit
    where the kernel treats heads alone. A ring adds up parts of the softmax, which changes the last bits.
    """

    mesh: Mesh

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sequence: JointSequence,
        kernel: Kernel,
    ) -> torch.Tensor:
        mesh, shards = self.mesh, sequence.shards
        image, text = split_joint(torch.stack([query, key, value]), sequence, dim=2)
        first = mesh.ring.index * mesh.ulysses.size
        sizes = shards.sizes[first : first + mesh.ulysses.size]
        image = tokens_to_heads(image, sizes, mesh.ulysses)  # [3, B, tokens of the ulysses group, h, D]
        text = own_heads(text, mesh.ulysses)  # [3, B, T, h, D]
        if mesh.ring.group is None:
            query, key, value = join_joint(image, text, sequence, dim=2)
            out = kernel(query, key, value, mask)
            image, text = split_at(out, sum(sizes), sequence, dim=1)
        else:
            image, text = ring_attention(image, text, mask, sequence.shards, sequence.text_first, mesh)
        out = heads_to_tokens(image, text, sizes, mesh.ulysses)
        return out if not sequence.text_first else out.roll(text.shape[1], dims=1)

    def close(self) -> None:
        """Does nothing: it uses the mesh's groups and has none of its own."""


def split_joint(values: torch.Tensor, sequence: JointSequence, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, text) parts of this rank's joint sequence along `dim`; views."""
    return split_at(values, sequence.shards.size, sequence, dim)


def split_at(
    values: torch.Tensor, num_image: int, sequence: JointSequence, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, text) where `num_image` tokens are image; views."""
    num_text = values.shape[dim] - num_image
    if sequence.text_first:
        text, image = values.split([num_text, num_image], dim=dim)
    else:
        image, text = values.split([num_image, num_text], dim=dim)
    return image, text


def join_joint(image: torch.Tensor, text: torch.Tensor, sequence: JointSequence, dim: int) -> torch.Tensor:
    """The inverse of `split_at`."""
    return torch.cat([text, image] if sequence.text_first else [image, text], dim=dim)
