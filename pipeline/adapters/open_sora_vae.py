"""The VAE of Open-Sora 1.2 as a diffusers model: a picture VAE for each frame, and a causal one over time behind it.

diffusers has no class for it. The state dict has the keys and shapes of the published checkpoint
(hpcai-tech/OpenSora-VAE-v1.2); the mathematics is that of github.com/hpcaitech/Open-Sora at v1.2.0,
opensora/models/vae/vae.py and vae_temporal.py, less its training. Frames are coded in groups of 17, which become 5
latent frames each; what is left over is padded in front to whole fours.

Letters: B batch, C channels, F frames, T latent frames, H W height and width.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import nn

from cineray.pipeline.adapters.open_sora_configs import published_settings

PICTURE_SCALE = 0.18215  # between the two VAEs; upstream writes it out, whatever the picture VAE's configuration says
KERNEL = 3  # frames, rows and columns of the temporal VAE's convolutions


class OpenSoraVAE(ModelMixin, ConfigMixin):
    """Pixels in [-1, 1] to normalized latents and back. Its defaults are the published configuration.

    Args:
        block_out_channels, layers_per_block, norm_num_groups: of the picture VAE, as AutoencoderKL has them.
        latent_channels: of both VAEs.
        filters: channels of the temporal VAE's first level.
        num_res_blocks: of each of its levels.
        channel_multipliers: of `filters`, for each level.
        temporal_downsample: where the frames are halved, after each level but the last.
        temporal_norm_num_groups: of its group norms.
        micro_frame_size: frames that are coded together.
        micro_batch_size: frames that the picture VAE takes at once; for memory alone.
        latents_shift, latents_scale: mean and spread of the latents, for each channel; upstream's `shift`, `scale`.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        latent_channels: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        temporal_norm_num_groups: int = 32,
        micro_frame_size: int = 17,
        micro_batch_size: int = 4,
        latents_shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98),
        latents_scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06),
    ) -> None:
        super().__init__()
        self.spatial_vae = _FrameVAE(tuple(block_out_channels), layers_per_block, norm_num_groups, latent_channels)
        self.temporal_vae = _TemporalVAE(
            latent_channels,
            [filters * multiplier for multiplier in channel_multipliers],
            num_res_blocks,
            temporal_downsample,
            temporal_norm_num_groups,
        )
        self._micro_frames, self._micro_batch = micro_frame_size, micro_batch_size
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", torch.tensor(latents_scale).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(latents_shift).view(1, -1, 1, 1, 1))

    @classmethod
    def from_open_sora(cls, folder: Path | str, dtype: torch.dtype = torch.float32) -> "OpenSoraVAE":
        """Loads a folder as published: config.json and *.safetensors with upstream's names.

        Of the configuration it takes what upstream's own says of sizes (`micro_frame_size`, `shift`, `scale`), and
        what a converted one says besides; upstream has the rest in its code.

        Raises:
            ValueError: a file is missing, or the weights are not those of the configuration.
        """
        folder = Path(folder)
        weights = sorted(folder.glob("*.safetensors"))
        if not (folder / "config.json").is_file() or not weights:
            raise ValueError(f"OpenSoraVAE: {folder} must hold config.json and *.safetensors, as published")
        config = published_settings(json.loads((folder / "config.json").read_text()))
        model: Any = cls(**{name: value for name, value in config.items() if name in cls._get_init_keys(cls)})
        try:
            model.load_state_dict({name: tensor for file in weights for name, tensor in load_file(file).items()})
        except RuntimeError as error:
            raise ValueError(f"OpenSoraVAE: the weights in {folder} do not fit its config.json: {error}") from None
        return model.to(dtype).eval()

    def enable_tiling(self) -> None:
        """Large frames are coded in tiles, as AutoencoderKL does it."""
        self.spatial_vae.module.enable_tiling()

    @apply_forward_hook
    def encode(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels [B, 3, F, H, W] in [-1, 1] -> normalized latents [B, C, T, H / 8, W / 8].

        Args:
            generator: draws from both posteriors, as upstream does; None takes their means.
        """
        frames = self.spatial_vae.encode(x, self._micro_batch, generator)
        groups = [_drawn(self.temporal_vae.encode(g), generator) for g in frames.split(self._micro_frames, dim=2)]
        return (torch.cat(groups, dim=2) - self.shift) / self.scale

    @apply_forward_hook
    def decode(self, z: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Normalized latents [B, C, T, H / 8, W / 8] -> pixels [B, 3, num_frames, H, W], in about [-1, 1].

        Raises:
            ValueError: the latents are not those of so many frames.
        """
        sizes = [self._micro_frames] * (num_frames // self._micro_frames)
        sizes += [num_frames % self._micro_frames] if num_frames % self._micro_frames else []
        lengths = [-(-size // self.temporal_vae.shrinks) for size in sizes]
        if sum(lengths) != z.shape[2]:
            raise ValueError(f"OpenSoraVAE: {num_frames} frames have {sum(lengths)} latent frames, got {z.shape[2]}")
        z = z * self.scale.to(z.dtype) + self.shift.to(z.dtype)
        groups = zip(z.split(lengths, dim=2), sizes, strict=True)
        frames = torch.cat([self.temporal_vae.decode(group, size) for group, size in groups], dim=2)
        return self.spatial_vae.decode(frames, self._micro_batch)


class _FrameVAE(nn.Module):
    def __init__(self, channels: tuple[int, ...], num_layers: int, num_groups: int, latent_channels: int) -> None:
        super().__init__()
        self.module: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),  # type: ignore[arg-type]  # annotated tuple[str]
            up_block_types=("UpDecoderBlock2D",) * len(channels),  # type: ignore[arg-type]
            block_out_channels=channels,  # type: ignore[arg-type]
            layers_per_block=num_layers,
            norm_num_groups=num_groups,
            latent_channels=latent_channels,
        )

    def encode(self, x: torch.Tensor, micro_batch: int, generator: torch.Generator | None) -> torch.Tensor:
        """[B, 3, F, H, W] -> [B, C, F, H / 8, W / 8]."""

        def coded(frames: torch.Tensor) -> torch.Tensor:
            posterior = self.module.encode(frames).latent_dist
            return (posterior.mode() if generator is None else posterior.sample(generator)) * PICTURE_SCALE

        return _frame_by_frame(coded, x, micro_batch)

    def decode(self, x: torch.Tensor, micro_batch: int) -> torch.Tensor:
        """[B, C, F, H / 8, W / 8] -> [B, 3, F, H, W]."""
        return _frame_by_frame(lambda frames: self.module.decode(frames / PICTURE_SCALE).sample, x, micro_batch)


class _TemporalVAE(nn.Module):
    """Of each group of frames; it sees nothing of the groups before.

    Args:
        sizes: channels of each level, the first one that of the most frames.
    """

    def __init__(
        self, channels: int, sizes: Sequence[int], num_res_blocks: int, halves: Sequence[bool], num_groups: int
    ) -> None:
        super().__init__()
        self.shrinks = 2 ** sum(halves)
        self.encoder = _Encoder(channels, sizes, num_res_blocks, halves, num_groups)
        self.quant_conv = _CausalConv(2 * channels, 2 * channels, kernel=1)
        self.post_quant_conv = _CausalConv(channels, channels, kernel=1)
        self.decoder = _Decoder(channels, sizes, num_res_blocks, halves, num_groups)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, F, H, W] -> means, then log variances [B, 2 C, T, H, W]."""
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.shrinks, 0))))

    def decode(self, z: torch.Tensor, num_frames: int) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, C, num_frames, H, W], the last ones of those that were made."""
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames % self.shrinks :]


class _CausalConv(nn.Module):
    """A convolution that sees no later frame; zeros stand before the first one and around each."""

    def __init__(self, size_in: int, size_out: int, kernel: int = KERNEL, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self._padding = (side, side, side, side, kernel - stride if kernel > 1 else 0, 0)
        self.conv = nn.Conv3d(size_in, size_out, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self._padding))


class _ResBlock(nn.Module):
    def __init__(self, size_in: int, size_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, size_in)
        self.conv1 = _CausalConv(size_in, size_out, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, size_out)
        self.conv2 = _CausalConv(size_out, size_out, bias=False)
        self.conv3 = None if size_in == size_out else _CausalConv(size_in, size_out, kernel=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv3 is None else self.conv3(x))


def _res_blocks(size_in: int, size_out: int, count: int, num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(_ResBlock(size_out if n else size_in, size_out, num_groups) for n in range(count))


class _Encoder(nn.Module):
    def __init__(self, channels: int, sizes: Sequence[int], count: int, halves: Sequence[bool], groups: int) -> None:
        super().__init__()
        self.conv_in = _CausalConv(channels, sizes[0], bias=False)
        before = [sizes[0], *sizes[:-1]]
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(size_in, size, count, groups) for size_in, size in zip(before, sizes, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            _CausalConv(size, size, stride=2) if is_halved else nn.Identity()
            for size, is_halved in zip(sizes[:-1], halves, strict=True)
        )
        self.res_blocks = _res_blocks(sizes[-1], sizes[-1], count, groups)
        self.norm1 = nn.GroupNorm(groups, sizes[-1])
        self.conv2 = _CausalConv(sizes[-1], 2 * channels, kernel=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for blocks, shrink in itertools.zip_longest(self.block_res_blocks, self.conv_blocks):
            for block in blocks.children():
                x = block(x)
            x = x if shrink is None else shrink(x)  # there is none after the last level
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class _Decoder(nn.Module):
    """The levels stand in the encoder's order and run from the last to the first."""

    def __init__(self, channels: int, sizes: Sequence[int], count: int, halves: Sequence[bool], groups: int) -> None:
        super().__init__()
        self.conv1 = _CausalConv(channels, sizes[-1])
        self.res_blocks = _res_blocks(sizes[-1], sizes[-1], count, groups)
        before = [*sizes[1:], sizes[-1]]
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(size_in, size, count, groups) for size_in, size in zip(before, sizes, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            _CausalConv(size, 2 * size) if is_halved else nn.Identity()
            for size, is_halved in zip(sizes[1:], halves, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, sizes[0])
        self.conv_out = _CausalConv(sizes[0], channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        grows = [None, *self.conv_blocks]  # there is none after the first level
        for blocks, grow in reversed(list(zip(self.block_res_blocks, grows, strict=True))):
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList
                x = block(x)
            if isinstance(grow, _CausalConv):
                x = _frames_of_channels(grow(x))
        return self.conv_out(F.silu(self.norm1(x)))


def _frames_of_channels(x: torch.Tensor) -> torch.Tensor:
    """[B, 2 C, F, H, W] -> [B, C, 2 F, H, W]: neighbouring channels become neighbouring frames."""
    return x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


def _frame_by_frame(code: Any, x: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """A function of pictures [N, C, H, W] on the frames of [B, C, F, H, W], `micro_batch` of them at once."""
    frames = x.transpose(1, 2).flatten(0, 1)
    made = torch.cat([code(some) for some in frames.split(micro_batch)])
    return made.unflatten(0, (len(x), -1)).transpose(1, 2)


def _drawn(moments: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """A draw from a diagonal Gaussian [B, 2 C, ...] of means and log variances, or its mean."""
    mean, logvar = moments.chunk(2, dim=1)
    if generator is None:
        return mean
    noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise
