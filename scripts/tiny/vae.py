"""Trains the tiny autoencoders: AutoencoderKLWan, AutoencoderKLHunyuanVideo on moving shapes, AutoencoderKL on stills.

Clips are [B, 3, F, H, W] throughout; a still is a clip of one frame.

Three things make the first two take minutes on one core: training starts on single frames, with convolutions that have
no past (`forget_the_past`); the taps that look into the past are then added as zeros (`recall_the_past`), so
that what was learned on frames survives the change; and AutoencoderKLWan, which diffusers runs in chunks of one
and four frames, is run over all frames at once (`wan_encode`, `wan_decode`: the same numbers, see tests/parity).
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from torch import nn

from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE
from tiny.shapes import draw_batch

LATENT_NOISE = 0.1  # std added to the latents in training: the decoder must forgive a denoiser's small errors
PICTURE_CHANNELS = (16, 32, 64)
PICTURE_SCALE = 0.18215  # of DiT's VAE; Open-Sora's code writes it out
LATENT_PENALTY = 1e-4  # on the squared latents: with the noise above, a KL term of fixed variance


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the training: clips of `num_frames` frames, `batch` at a time.

    `taught`: the encoder learns, and the decoder is given, the 16 principal components of 8x8 pixel patches.
    AutoencoderKLWan normalizes every pixel's channels and sat at 19 dB for 600 steps without that start;
    AutoencoderKLHunyuanVideo did not need it.
    """

    num_frames: int
    batch: int
    steps: int
    peak_rate: float
    latent_noise: float = LATENT_NOISE
    taught: bool = False


STAGES = {
    "wan": (
        Stage(num_frames=1, batch=16, steps=800, peak_rate=1e-3, latent_noise=0.02, taught=True),
        Stage(num_frames=1, batch=16, steps=1000, peak_rate=1e-3, latent_noise=0.02),
        Stage(num_frames=5, batch=4, steps=1500, peak_rate=1e-3),
        Stage(num_frames=17, batch=2, steps=600, peak_rate=6e-4),
    ),
    "hunyuan": (
        Stage(num_frames=1, batch=16, steps=2400, peak_rate=2e-3),
        Stage(num_frames=5, batch=4, steps=1500, peak_rate=6e-4),
        Stage(num_frames=17, batch=2, steps=600, peak_rate=5e-4),
    ),
    "stills": (Stage(num_frames=1, batch=16, steps=1500, peak_rate=2e-3),),
}


def new_wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def new_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(16, 32, 64, 64),  # type: ignore[arg-type]  # diffusers annotates tuple[int]
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
    )


def new_picture_vae() -> AutoencoderKL:
    """Of the kind that DiT and Open-Sora have, with sides shrunk by 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,  # type: ignore[arg-type]  # diffusers annotates tuple[str]
        up_block_types=("UpDecoderBlock2D",) * 3,  # type: ignore[arg-type]
        block_out_channels=PICTURE_CHANNELS,  # type: ignore[arg-type]
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=PICTURE_SCALE,
    )


def _temporal_convolutions(vae: nn.Module) -> list[tuple[nn.Conv3d, nn.Module, str]]:
    """Each convolution over time with the module and the attribute that hold its causal padding."""
    found = []
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            found.append((module, module, "_padding"))
        elif isinstance(module, HunyuanVideoCausalConv3d):
            found.append((module.conv, module, "time_causal_padding"))
    return [f for f in found if f[0].kernel_size[0] == 3]


def forget_the_past(vae: nn.Module) -> None:
    """Keeps only the newest tap of every temporal convolution: a model of single frames, 3x cheaper to run."""
    for conv, owner, padding in _temporal_convolutions(vae):
        conv.weight = nn.Parameter(conv.weight.data[:, :, 2:].clone())
        setattr(owner, padding, (*getattr(owner, padding)[:4], 0, 0))
    channels_last(vae)


def recall_the_past(vae: nn.Module) -> None:
    """Undoes `forget_the_past` with zeros for the past; temporal resampling starts as mean and as copy."""
    for conv, owner, padding in _temporal_convolutions(vae):
        conv.weight = nn.Parameter(nn.functional.pad(conv.weight.data, (0, 0, 0, 0, 2, 0)))
        if conv.stride[0] == 2:
            conv.weight.data[:, :, 2] /= 2
            conv.weight.data[:, :, 1] = conv.weight.data[:, :, 2]
        setattr(owner, padding, (*getattr(owner, padding)[:4], 2, 0))
    for module in vae.modules():
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            conv, eye = module.time_conv, torch.eye(module.dim)
            assert conv.bias is not None
            conv.weight.data.zero_()
            conv.bias.data.zero_()
            if module.mode == "downsample3d":
                conv._padding = (*conv._padding[:4], 0, 0)  # it is given the frame before instead
                conv.weight.data[:, :, 1:, 0, 0] = 0.5 * eye.unsqueeze(-1)
            else:
                conv.weight.data[:, :, 2, 0, 0] = torch.cat([eye, eye])
    channels_last(vae)


def channels_last(vae: nn.Module) -> None:
    """Stores the kernels channels-last: convolutions on CPU then run about 1.5x faster, in bfloat16 2x."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


def _wan_resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """WanResample.forward over a whole clip: the first frame never passes the temporal convolution."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        rest = layer.time_conv(x[:, :, 1:])
        b, c, t, h, w = rest.shape
        rest = rest.view(b, 2, c // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c // 2, 2 * t, h, w)
        x = torch.cat([x[:, :, :1], rest], dim=2)
    b, c, t, h, w = x.shape
    x = layer.resample(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
    x = x.view(b, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def wan_encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """AutoencoderKLWan._encode without chunks: moments [B, 2C, F', H/8, W/8]."""
    encoder = vae.encoder
    x = encoder.conv_in(clips)
    for layer in encoder.down_blocks:
        x = _wan_resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.mid_block(x)
    return vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x))))


def wan_decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """AutoencoderKLWan._decode without chunks and without its last clamp, which has no gradient."""
    decoder: Any = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _wan_resample(block.upsamplers[0], x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def encode(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """Mean latents of clips in [-1, 1]: [B, 16, F', H/8, W/8], of AutoencoderKL [B, 4, F, H/4, W/4], not scaled."""
    if isinstance(vae, AutoencoderKL):
        frames = clips.transpose(1, 2).flatten(0, 1)
        return vae._encode(frames).chunk(2, dim=1)[0].unflatten(0, (len(clips), -1)).transpose(1, 2)
    moments = wan_encode(vae, clips) if isinstance(vae, AutoencoderKLWan) else vae._encode(clips)
    return moments.chunk(2, dim=1)[0]


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Clips of latents, not clamped."""
    if isinstance(vae, AutoencoderKL):
        frames = vae._decode(latents.transpose(1, 2).flatten(0, 1), return_dict=False)[0]  # type: ignore[arg-type]  # a Tensor
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)
    return wan_decode(vae, latents) if isinstance(vae, AutoencoderKLWan) else vae.decode(latents).sample


@torch.no_grad()
def reconstruction_psnr(vae: Any, num_clips: int, seed: int) -> float:
    """Mean PSNR in dB (peak 1.0) over fresh whole clips, through the model's own public encode and decode."""
    clips = draw_batch(num_clips, torch.Generator().manual_seed(seed))
    psnr = []
    for clip in clips.split(1):
        out = restored(vae, clip).clamp(-1, 1)
        psnr.append(-10 * math.log10(((out - clip) / 2).square().mean().item()))
    return sum(psnr) / len(psnr)


def restored(vae: Any, clip: torch.Tensor) -> torch.Tensor:
    """The clip [1, 3, F, H, W] after the model's own public encode (mean) and decode."""
    if isinstance(vae, OpenSoraVAE):
        return vae.decode(vae.encode(clip), clip.shape[2])
    if isinstance(vae, AutoencoderKL):  # frame by frame
        return _coded_and_decoded(vae, clip[0].transpose(0, 1)).transpose(0, 1).unsqueeze(0)
    return _coded_and_decoded(vae, clip)


def _coded_and_decoded(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """A batch as any of diffusers' autoencoders takes it, after encode (mean) and decode."""
    return vae.decode(vae.encode(frames).latent_dist.mode()).sample


@torch.no_grad()
def normalize_latents(vae: nn.Module, seed: int, num_clips: int = 96) -> None:
    """Folds the latents' mean and std over freshly drawn clips into the 1x1x1 convolutions; fixes the log-variance.

    HunyuanVideo's configuration has one scale for all channels and no mean; with the fold both models' latents
    have mean 0 and std 1 in every channel, and the configurations keep their neutral values. AutoencoderKL's get the
    std of which its `scaling_factor` makes 1.
    """
    clips = draw_batch(num_clips, torch.Generator().manual_seed(seed))
    latents = torch.cat([encode(vae, c) for c in clips.split(8)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    num, std = len(mean), std * (PICTURE_SCALE if isinstance(vae, AutoencoderKL) else 1.0)
    quant: Any = vae.quant_conv
    post: Any = vae.post_quant_conv
    ones = (1,) * (quant.weight.ndim - 2)
    quant.weight[:num] /= std.view(-1, 1, *ones)
    quant.bias[:num] = (quant.bias[:num] - mean) / std
    quant.weight[num:] = 0
    quant.bias[num:] = 2 * torch.log(LATENT_NOISE / std)
    post.bias += post.weight.flatten(1) @ mean
    post.weight *= std.view(1, -1, *ones)


class PatchCode:
    """The principal components of 8x8 pixel patches of single frames, scaled to about unit variance.

    Sixteen of the 192 components restore the frames at 30 dB.
    """

    def __init__(self, num_components: int, seed: int) -> None:
        patches = self._patches(draw_batch(256, torch.Generator().manual_seed(seed), 1))  # [B, 192, 1, 8, 8]
        rows = patches.movedim(1, -1).flatten(0, -2)
        self._mean = rows.mean(0)
        vectors, values, _ = torch.linalg.svd((rows - self._mean).T @ (rows - self._mean) / len(rows))
        self._project = vectors[:, :num_components] / values[:num_components].sqrt().clamp(min=0.05)

    @staticmethod
    def _patches(clips: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = clips.shape
        x = clips.reshape(b, c, t, h // 8, 8, w // 8, 8).permute(0, 1, 4, 6, 2, 3, 5)
        return x.reshape(b, c * 64, t, h // 8, w // 8)

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        """[B, 3, F, H, W] -> [B, num_components, F, H/8, W/8]."""
        return ((self._patches(clips).movedim(1, -1) - self._mean) @ self._project).movedim(-1, 1)


def train_vae(vae: nn.Module, work: Path, seed: int, stages: tuple[Stage, ...]) -> None:
    """Trains in place and normalizes the latents.

    Writes `vae.log.jsonl`, and a checkpoint every 200 steps, from which a second call resumes.
    """
    torch.manual_seed(seed)
    forget_the_past(vae)
    for number, stage in enumerate(stages):
        if stage.num_frames > 1 and stages[number - 1].num_frames == 1:
            recall_the_past(vae)
        _train_stage(vae, work, seed + 10 * number, number, stage)
    normalize_latents(vae, seed + 2)


def _train_stage(vae: nn.Module, work: Path, seed: int, number: int, stage: Stage) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * i / stage.steps)))
    )
    parts = {"vae": vae, "optimizer": optimizer, "rate": rate}
    teacher = PatchCode(16, seed) if stage.taught else None
    step, saved, began = 0, work / f"vae.stage{number}.pt", time.monotonic()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        step = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    with (work / "vae.log.jsonl").open("a") as log:
        while step < stage.steps:
            error = _train_step(vae, optimizer, stage, seed * 1_000_003 + step, teacher)
            rate.step()
            step += 1
            if step % 50 == 0:
                row = {"stage": number, "step": step, "train_psnr_db": -10 * math.log10(error / 4)}
                if step % 300 == 0 and stage.num_frames > 1:
                    row["clip_psnr_db"] = reconstruction_psnr(vae, 4, seed=seed + 1)
                print(json.dumps(row | {"wall_s": time.monotonic() - began}), file=log, flush=True)
            if step % 200 == 0 or step == stage.steps:
                torch.save({n: p.state_dict() for n, p in parts.items()} | {"step": step}, work / "vae.tmp")
                (work / "vae.tmp").rename(saved)


def _train_step(
    vae: nn.Module, optimizer: torch.optim.Optimizer, stage: Stage, seed: int, teacher: PatchCode | None
) -> float:
    """One step on freshly drawn clips; returns the mean squared error of values in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    clips = draw_batch(stage.batch, generator, stage.num_frames)
    clips = clips.contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = encode(vae, clips).float()
        code = latents if teacher is None else teacher(clips).float()
        out = decode(vae, code + stage.latent_noise * torch.randn(code.shape, generator=generator))
    difference = out.float() - clips
    error = difference.square().mean()
    loss = error + 0.1 * difference.abs().mean() + LATENT_PENALTY * latents.square().mean()
    if teacher is not None:
        loss = loss + 0.1 * (latents - code).square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return error.item()
