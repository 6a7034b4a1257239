"""Attention across ranks by xfuser's USP: FlashAttention 3 and other kernels, Ulysses inside a ring (CUDA).

xfuser (0.6 and 0.7 were tried) keeps its groups and settings in globals of the process, builds them over the whole
world, splits tokens evenly and knows no masks. So it is imported only when it is chosen, takes one gang per world,
and what it cannot do is refused instead of rendered wrong.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cineray.distributed.attention import JointSequence, Kernel, split_joint
from cineray.distributed.mesh import Mesh


@dataclass(frozen=True, slots=True)
class XfuserAttention:
    """`SequenceAttention` by xfuser; `new_xfuser_attention` makes one."""

    usp: Any

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sequence: JointSequence,
        _kernel: Kernel,
        /,
    ) -> torch.Tensor:
        """Raises ValueError for uneven shards, and for masks that differ between the samples of a batch."""
        sizes = sequence.shards.sizes
        if len(set(sizes)) > 1:
            raise ValueError(
                f"attention xfuser: {sum(sizes)} tokens are not divisible by {len(sizes)} ranks; "
                "use attention native, or another size of clip"
            )
        image, text = split_joint(torch.stack([query, key, value]).transpose(2, 3), sequence, dim=3)  # [3, B, H, S, D]
        if text.shape[3] == 0:
            return self.usp(*image).transpose(1, 2)
        num_text = text.shape[3]
        text = text[:, :, :, : _num_valid_text(mask, num_text, sequence)]
        strategy = "front" if sequence.text_first else "rear"
        joint = {"joint_query": text[0], "joint_key": text[1], "joint_value": text[2], "joint_strategy": strategy}
        out = self.usp(*image, **joint).transpose(1, 2)  # [B, S + valid text, H, D]
        if text.shape[3] == num_text:
            return out
        # what masked text tokens would hold is never attended to
        padding = out.new_zeros((out.shape[0], num_text - text.shape[3], *out.shape[2:]))
        return torch.cat([padding, out] if sequence.text_first else [out, padding], dim=1)

    def close(self) -> None:
        """Takes xfuser's groups and globals down; torch.distributed's world stays."""
        from xfuser.core.distributed import parallel_state, runtime_state

        runtime_state._RUNTIME = None
        parallel_state.destroy_model_parallel()
        parallel_state._WORLD = None


def _num_valid_text(mask: torch.Tensor | None, num_text: int, sequence: JointSequence) -> int:
    """Text tokens that are attended to, which must stand at the text's start and be as many in every sample."""
    if mask is None:
        return num_text
    if sequence.text_first:
        raise ValueError("attention xfuser: a mask over text that stands first is not supported; use attention native")
    per_sample = set(mask[..., sum(sequence.shards.sizes) :].sum(dim=-1).flatten().tolist())
    if len(per_sample) > 1:
        raise ValueError("attention xfuser: samples with masks of their own are not supported; use attention native")
    return int(per_sample.pop())


def new_xfuser_attention(mesh: Mesh) -> XfuserAttention:
    """Sets xfuser up over the world that the mesh stands in; every rank of it calls this.

    Raises:
        ValueError: several gangs in one world, or xfuser does not import here.
    """
    layout = mesh.layout
    if layout.gangs > 1:
        raise ValueError("attention xfuser: its groups span the whole world; give each gang a world of its own")
    try:
        from xfuser import xFuserArgs
        from xfuser.core.distributed import parallel_state, runtime_state
        from xfuser.model_executor.layers.usp import USP
    except (ImportError, NotImplementedError) as error:  # it raises the latter where there is no GPU
        raise ValueError(f"attention xfuser does not import here: {error}; use attention native") from error
    backend = dist.get_backend()
    local_rank = torch.cuda.current_device() if backend == "nccl" else mesh.rank
    parallel_state.init_distributed_environment(
        rank=mesh.rank, world_size=layout.world_size, local_rank=local_rank, backend=backend
    )
    parallel_state.initialize_model_parallel(
        classifier_free_guidance_degree=layout.cfg,
        sequence_parallel_degree=layout.sequence_ranks,
        ulysses_degree=layout.ulysses,
        ring_degree=layout.ring,
        backend=backend,
    )
    config, _ = xFuserArgs(
        model="", ulysses_degree=layout.ulysses, ring_degree=layout.ring, use_cfg_parallel=layout.cfg > 1
    ).create_config()

    class State(runtime_state.RuntimeState):
        """USP asks it for its kernel; xfuser's own kinds want one of xfuser's pipelines."""

    runtime_state._RUNTIME = State(config)
    return XfuserAttention(USP)
