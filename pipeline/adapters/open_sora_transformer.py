"""STDiT3, the transformer of Open-Sora 1.2, as a diffusers model.

diffusers has no class for it. The state dict has the keys and shapes of the published checkpoint
(hpcai-tech/OpenSora-STDiT-v3); the mathematics is that of github.com/hpcaitech/Open-Sora at v1.2.0,
opensora/models/stdit/stdit3.py and opensora/models/layers/blocks.py, without its training.

Letters: B batch, T latent frames, S patches of a frame, C hidden size, H heads, D channels of a head, L text tokens,
M times of the frames: 1 where all have the same, else T.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import load_file
from torch import nn

FREQUENCIES = 256  # width of the sinusoids before each embedder's MLP
MAX_PERIOD = 10_000  # of all sinusoids: timesteps, sizes, places, rotary angles
NORM_EPS = 1e-6

Rotary = tuple[torch.Tensor, torch.Tensor]  # (cosine, sine) of each frame's angles [T, D]


class STDiT3(ModelMixin, ConfigMixin, CacheMixin):
    """Spatial and temporal blocks in turn, both with cross-attention to the text.

    Args:
        patch_size: latent frames, rows, columns of a patch.
        caption_channels: channels of the text encoder's output.
        model_max_length: tokens of the learned empty caption, `null_embeds`.
        input_sq_size: side in pixels of the square clip at which places have their trained spacing.
        pred_sigma: the output has a variance beside each channel of the velocity, in its second half.
    """

    _repeated_blocks = ["STDiT3Block"]  # noqa: RUF012  # diffusers declares it so
    _no_split_modules = ["STDiT3Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        input_sq_size: int = 512,  # noqa: ARG002  # of published configurations
        pred_sigma: bool = True,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels = in_channels * 2 if pred_sigma else in_channels
        self.x_embedder = _PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = _SinusoidEmbedder(hidden_size)
        self.fps_embedder = _SinusoidEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = _CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.rope = _RotaryFrequencies(hidden_size // num_heads)

        def blocks(temporal: bool) -> nn.ModuleList:
            mlp_size = int(hidden_size * mlp_ratio)
            return nn.ModuleList(STDiT3Block(hidden_size, num_heads, mlp_size, qk_norm, temporal) for _ in range(depth))

        self.spatial_blocks = blocks(temporal=False)
        self.temporal_blocks = blocks(temporal=True)
        patch_volume = patch_size[0] * patch_size[1] * patch_size[2]
        self.final_layer = _FinalLayer(hidden_size, patch_volume * self.out_channels)

    @classmethod
    def from_open_sora(cls, folder: Path | str, dtype: torch.dtype = torch.float32) -> "STDiT3":
        """Loads a folder as published: config.json and *.safetensors with upstream's names.

        Raises:
            ValueError: a file is missing, or the weights are not those of the configuration.
        """
        folder = Path(folder)
        weights = sorted(folder.glob("*.safetensors"))
        if not (folder / "config.json").is_file() or not weights:
            raise ValueError(f"STDiT3: {folder} must hold config.json and *.safetensors, as published")
        config = json.loads((folder / "config.json").read_text())
        known = {name: value for name, value in config.items() if name in cls._get_init_keys(cls)}
        model: Any = cls(**known)
        state = {name: tensor for file in weights for name, tensor in load_file(file).items()}
        state.setdefault("rope.freqs", model.rope.freqs)  # constants, which a checkpoint may leave out
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"STDiT3: the weights in {folder} do not fit its config.json: {error}") from None
        return model.to(dtype).eval()

    @property
    def null_embeds(self) -> torch.Tensor:
        """The learned empty caption [model_max_length, caption_channels], for the unconditional branch."""
        return self.y_embedder.y_embedding

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        *,
        fps: torch.Tensor,
        height: int,
        width: int,
        noisy_frames: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts one velocity.

        Args:
            hidden_states: latents [B, in_channels, frames, rows, columns].
            timestep: [B], 0 (clean) to 1000 (noise).
            encoder_hidden_states: the text encoder's output [B, L, caption_channels].
            encoder_attention_mask: [B, L], nonzero where there is text, at least once in each row.
            fps: frames per second [B] or [1].
            height, width: of the clip, in pixels.
            noisy_frames: bool [B, frames] or [1, frames], upstream's `x_mask`: the others are given, and have timestep
                0. None where all are noisy. Needs a patch of one frame.

        Returns:
            [B, out_channels, frames, rows, columns] float32.
        """
        dtype = self.x_embedder.proj.weight.dtype
        tokens, grid = self.x_embedder(hidden_states.to(dtype))  # [B, T * S, C]
        places = _places(grid[1:], (height * width) ** 0.5 / self.config["input_sq_size"], tokens)  # [S, C]
        tokens = (tokens.unflatten(1, (grid[0], -1)) + places).flatten(1, 2)
        # upstream rounds the timestep to the weights' type first, and was trained so
        speed = self.fps_embedder(fps)
        temb = (self.t_embedder(timestep.to(dtype)) + speed)[:, None]  # [B, M, C]
        if noisy_frames is not None:
            clean = (self.t_embedder(torch.zeros_like(timestep, dtype=dtype)) + speed)[:, None]
            temb = torch.where(noisy_frames[..., None], temb, clean)
        modulation = self.t_block(temb).unflatten(2, (6, -1))  # [B, M, 6, C]
        text = self.y_embedder.y_proj(encoder_hidden_states.to(dtype))  # [B, L, C]
        mask = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None] != 0  # [B, 1, 1, L]
        rotary = self.rope(grid[0])
        for spatial_block, temporal_block in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial_block(tokens, text, modulation, mask, rotary)
            tokens = temporal_block(tokens, text, modulation, mask, rotary)
        sample = self._unpatched(self.final_layer(tokens.unflatten(1, (grid[0], -1)), temb), grid)
        frames, rows, columns = hidden_states.shape[2:]
        sample = sample[:, :, :frames, :rows, :columns].float()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _unpatched(self, tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """[B, T, S, patch volume * C'] -> [B, C', frames, rows, columns]."""
        patch = self.config["patch_size"]
        x = tokens.unflatten(3, (*patch, self.out_channels)).unflatten(2, grid[1:])  # [B, T, h, w, pt, ph, pw, C']
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C', T, pt, h, ph, w, pw]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class STDiT3Block(nn.Module):
    """Attention within each frame, or at each place over time; cross-attention; feed-forward."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.attn = _SelfAttention(hidden_size, num_heads, qk_norm)
        self.cross_attn = _CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = _Mlp(hidden_size, mlp_size, hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        rotary: Rotary,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [B, T * S, C].
            encoder_hidden_states: [B, L, C].
            modulation: [B, M, 6, C].
            encoder_attention_mask: bool [B, 1, 1, L].
            rotary: says how many frames there are; turns the temporal blocks' queries and keys.
        """
        # each [B, M, 1, C]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + modulation).split(1, dim=2)
        frames = (len(rotary[0]), -1)
        x = self.norm1(hidden_states).unflatten(1, frames) * (1 + scale) + shift  # [B, T, S, C]
        if self.temporal:
            x = self.attn(x.transpose(1, 2).flatten(0, 1), rotary)  # [B * S, T, C]
            x = x.unflatten(0, (len(hidden_states), -1)).transpose(1, 2)
        else:
            x = self.attn(x.flatten(0, 1), None).unflatten(0, (len(hidden_states), -1))  # from [B * T, S, C]
        hidden_states = hidden_states + (gate * x).flatten(1, 2)
        hidden_states = hidden_states + self.cross_attn(hidden_states, encoder_hidden_states, encoder_attention_mask)
        x = self.norm2(hidden_states).unflatten(1, frames) * (1 + mlp_scale) + mlp_shift
        return hidden_states + (mlp_gate * self.mlp(x)).flatten(1, 2)


class _SelfAttentionProcessor:
    """Attention of `_SelfAttention`, apart from it as diffusers has it, so that ranks can share its tokens."""

    def __call__(self, attn: "_SelfAttention", hidden_states: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        """[N, length, C] -> [N, length, C]."""
        query, key, value = attn.qkv(hidden_states).unflatten(2, (3, *attn.heads)).permute(2, 0, 3, 1, 4)
        query, key = attn.q_norm(query), attn.k_norm(key)  # [N, H, length, D]
        if rotary is not None:
            query, key = _rotated(query, rotary), _rotated(key, rotary)
        x = F.scaled_dot_product_attention(query, key, value)
        return attn.proj(x.transpose(1, 2).flatten(2))


class _SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = (num_heads, hidden_size // num_heads)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.RMSNorm(self.heads[1], eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.heads[1], eps=NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor = _SelfAttentionProcessor()

    def forward(self, hidden_states: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary)


class _CrossAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self._heads = (num_heads, hidden_size // num_heads)
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query = self.q_linear(hidden_states).unflatten(2, self._heads).transpose(1, 2)  # [B, H, T * S, D]
        key, value = self.kv_linear(text).unflatten(2, (2, *self._heads)).permute(2, 0, 3, 1, 4)  # [B, H, L, D]
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, size_in: int, size_hidden: int, size_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size_in, size_hidden)
        self.fc2 = nn.Linear(size_hidden, size_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _PatchEmbedder(nn.Module):
    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Latents -> (tokens [B, T * S, C], (T, rows, columns) of patches); sizes are padded to whole patches."""
        missing = [-size % patch for size, patch in zip(latents.shape[2:], self.proj.kernel_size, strict=True)]
        x = self.proj(F.pad(latents, (0, missing[2], 0, missing[1], 0, missing[0])))
        # row by row, as ranks that share them have them: products of transposed ones have other last bits in 16 bits
        return x.flatten(2).transpose(1, 2).contiguous(), (x.shape[2], x.shape[3], x.shape[4])


class _SinusoidEmbedder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[B] -> [B, C]."""
        sinusoids = get_timestep_embedding(
            values, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=MAX_PERIOD
        )
        return self.mlp(sinusoids.to(next(self.parameters()).dtype))


class _CaptionEmbedder(nn.Module):
    def __init__(self, caption_channels: int, hidden_size: int, num_tokens: int) -> None:
        super().__init__()
        self.y_proj = _Mlp(caption_channels, hidden_size, hidden_size)
        self.y_embedding: torch.Tensor
        self.register_buffer("y_embedding", torch.randn(num_tokens, caption_channels) / caption_channels**0.5)


class _RotaryFrequencies(nn.Module):
    """Angles of rotary embeddings over all channels of a head, neighbours turned together."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(MAX_PERIOD ** -(torch.arange(0, size, 2) / size), requires_grad=False)

    def forward(self, num_frames: int) -> Rotary:
        frames = torch.arange(num_frames, device=self.freqs.device, dtype=self.freqs.dtype)
        angles = torch.outer(frames, self.freqs).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()


class _FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, out_size)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """[B, T, S, C] and [B, M, C] -> [B, T, S, out_size]."""
        shift, scale = (self.scale_shift_table + temb[:, :, None]).split(1, dim=2)  # [B, M, 1, C]
        return self.linear(self.norm_final(hidden_states) * (1 + scale) + shift)


def _rotated(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """[N, H, T, D] with each pair of neighbouring channels turned by its frame's angle."""
    cosine, sine = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack((-odd, even), dim=-1).flatten(-2) * sine


def _places(grid: tuple[int, ...], scale: float, like: torch.Tensor) -> torch.Tensor:
    """Sinusoids of each patch's column, then of its row [rows * columns, C], in the type and on the device of `like`.

    Args:
        grid: rows and columns of patches.
        scale: the clip's size over the one at which a patch is one apart from the next.
    """
    rows, columns = grid
    base = round((rows * columns) ** 0.5)
    half = like.shape[-1] // 2
    # upstream keeps the frequencies as a buffer in the weights' type, and was trained with them rounded so
    frequencies = (MAX_PERIOD ** -(torch.arange(0, half, 2) / half)).to(like.device, like.dtype).float()

    def sinusoids(count: int) -> torch.Tensor:
        angles = torch.outer(torch.arange(count, device=like.device) / scale * (base / count), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, C / 2]

    of_column = sinusoids(columns).expand(rows, -1, -1)
    of_row = sinusoids(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([of_column, of_row], dim=-1).flatten(0, 1).to(like.dtype)
