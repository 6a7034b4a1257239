"""Open-Sora 1.2's VAE and its sampling loop from state dicts and formulas, as its own code computes them. Shares no
code with `cineray.pipeline.adapters`.

Read from github.com/hpcaitech/Open-Sora at v1.2.0: opensora/models/vae/vae.py and vae_temporal.py,
opensora/schedulers/rf/__init__.py and rectified_flow.py. The picture VAE is diffusers' AutoencoderKL there too.
"""

import math
from collections.abc import Callable

import torch

State = dict[str, torch.Tensor]


def temporal_shapes(
    filters: int = 128, blocks: int = 4, multipliers=(1, 2, 2, 4), halves=(False, True, True), channels: int = 4
) -> dict[str, tuple[int, ...]]:
    """What upstream's constructors register for the temporal VAE, without the prefix."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, size_in: int, size_out: int, kernel: int, bias: bool) -> None:
        shapes[f"{name}.conv.weight"] = (size_out, size_in, kernel, kernel, kernel)
        if bias:
            shapes[f"{name}.conv.bias"] = (size_out,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def res(name: str, size_in: int, size_out: int) -> None:
        norm(f"{name}.norm1", size_in)
        conv(f"{name}.conv1", size_in, size_out, 3, bias=False)
        norm(f"{name}.norm2", size_out)
        conv(f"{name}.conv2", size_out, size_out, 3, bias=False)
        if size_in != size_out:
            conv(f"{name}.conv3", size_in, size_out, 1, bias=False)

    conv("encoder.conv_in", channels, filters, 3, bias=False)
    size = filters
    for i, multiplier in enumerate(multipliers):
        for j in range(blocks):
            res(f"encoder.block_res_blocks.{i}.{j}", size, filters * multiplier)
            size = filters * multiplier
        if i < len(multipliers) - 1 and halves[i]:
            conv(f"encoder.conv_blocks.{i}", size, size, 3, bias=True)
    for j in range(blocks):
        res(f"encoder.res_blocks.{j}", size, size)
    norm("encoder.norm1", size)
    conv("encoder.conv2", size, 2 * channels, 1, bias=True)
    conv("quant_conv", 2 * channels, 2 * channels, 1, bias=True)
    conv("post_quant_conv", channels, channels, 1, bias=True)
    conv("decoder.conv1", channels, size, 3, bias=True)
    for j in range(blocks):
        res(f"decoder.res_blocks.{j}", size, size)
    for i in range(len(multipliers) - 1, -1, -1):
        for j in range(blocks):
            res(f"decoder.block_res_blocks.{i}.{j}", size, filters * multipliers[i])
            size = filters * multipliers[i]
        if i > 0 and halves[i - 1]:
            conv(f"decoder.conv_blocks.{i - 1}", size, 2 * size, 3, bias=True)
    norm("decoder.norm1", size)
    conv("decoder.conv_out", size, channels, 3, bias=True)
    return shapes


def temporal_encode(w: State, x, groups: int):
    """[B, C, F, H, W] -> means [B, C, T, H, W] of one group of frames."""
    if x.shape[2] % 4:
        x = torch.cat([torch.zeros_like(x[:, :, :1])] * (4 - x.shape[2] % 4) + [x], dim=2)
    x = _conv(w, "encoder.conv_in", x)
    for i in range(_count(w, "encoder.block_res_blocks")):
        for j in range(_count(w, f"encoder.block_res_blocks.{i}")):
            x = _res(w, f"encoder.block_res_blocks.{i}.{j}", x, groups)
        if f"encoder.conv_blocks.{i}.conv.weight" in w:
            x = _conv(w, f"encoder.conv_blocks.{i}", x, stride=2)
    for j in range(_count(w, "encoder.res_blocks")):
        x = _res(w, f"encoder.res_blocks.{j}", x, groups)
    x = _conv(w, "encoder.conv2", _silu_norm(w, "encoder.norm1", x, groups))
    x = _conv(w, "quant_conv", x)
    return x[:, : x.shape[1] // 2]


def temporal_decode(w: State, z, num_frames: int, groups: int):
    """[B, C, T, H, W] -> [B, C, num_frames, H, W] of one group."""
    x = _conv(w, "decoder.conv1", _conv(w, "post_quant_conv", z))
    for j in range(_count(w, "decoder.res_blocks")):
        x = _res(w, f"decoder.res_blocks.{j}", x, groups)
    for i in range(_count(w, "decoder.block_res_blocks") - 1, -1, -1):
        for j in range(_count(w, f"decoder.block_res_blocks.{i}")):
            x = _res(w, f"decoder.block_res_blocks.{i}.{j}", x, groups)
        if f"decoder.conv_blocks.{i - 1}.conv.weight" in w:
            x = _conv(w, f"decoder.conv_blocks.{i - 1}", x)
            longer = x.new_empty(x.shape[0], x.shape[1] // 2, 2 * x.shape[2], *x.shape[3:])
            longer[:, :, 0::2], longer[:, :, 1::2] = x[:, 0::2], x[:, 1::2]
            x = longer
    x = _conv(w, "decoder.conv_out", _silu_norm(w, "decoder.norm1", x, groups))
    return x[:, :, x.shape[2] - num_frames :]


def whole_encode(w: State, picture_encode: Callable, x, groups: int):
    """Pixels -> normalized latents, both posteriors at their means; `picture_encode` is the frames' VAE's mean."""
    temporal = {name.removeprefix("temporal_vae."): t for name, t in w.items() if name.startswith("temporal_vae.")}
    frames = torch.stack([picture_encode(x[:, :, f]) * 0.18215 for f in range(x.shape[2])], dim=2)
    parts = [temporal_encode(temporal, frames[:, :, f : f + 17], groups) for f in range(0, x.shape[2], 17)]
    return (torch.cat(parts, dim=2) - w["shift"]) / w["scale"]


def whole_decode(w: State, picture_decode: Callable, z, num_frames: int, groups: int):
    """Normalized latents -> pixels."""
    temporal = {name.removeprefix("temporal_vae."): t for name, t in w.items() if name.startswith("temporal_vae.")}
    z = z * w["scale"] + w["shift"]
    parts = []
    for first in range(0, z.shape[2], 5):
        parts.append(temporal_decode(temporal, z[:, :, first : first + 5], min(17, num_frames), groups))
        num_frames -= 17
    x = torch.cat(parts, dim=2)
    return torch.stack([picture_decode(x[:, :, f] / 0.18215) for f in range(x.shape[2])], dim=2)


def _count(w: State, prefix: str) -> int:
    return 1 + max(int(name[len(prefix) + 1 :].split(".")[0]) for name in w if name.startswith(f"{prefix}."))


def _conv(w: State, name: str, x, stride: int = 1):
    weight = w[f"{name}.conv.weight"]
    kernel = weight.shape[2]
    front = kernel - 1 + (1 - stride)
    if front:
        x = torch.cat([x.new_zeros(*x.shape[:2], front, *x.shape[3:]), x], dim=2)
    side = kernel // 2
    return torch.nn.functional.conv3d(x, weight, w.get(f"{name}.conv.bias"), (stride, 1, 1), (0, side, side))


def _silu_norm(w: State, name: str, x, groups: int):
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    shape = (1, -1, 1, 1, 1)
    y = parts.view_as(x) * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)
    return y * torch.sigmoid(y)


def _res(w: State, name: str, x, groups: int):
    y = _conv(w, f"{name}.conv1", _silu_norm(w, f"{name}.norm1", x, groups))
    y = _conv(w, f"{name}.conv2", _silu_norm(w, f"{name}.norm2", y, groups))
    return y + (_conv(w, f"{name}.conv3", x) if f"{name}.conv3.conv.weight" in w else x)


def timesteps(num_steps: int, height: int, width: int, num_frames: int) -> list[float]:
    """1000 (noise) downwards, moved towards the noise for large and long clips."""
    latent_frames = 1 if num_frames == 1 else num_frames // 17 * 5
    ratio = math.sqrt(height * width / (512 * 512)) * math.sqrt(latent_frames)
    moved = []
    for i in range(num_steps):
        t = 1 - i / num_steps
        moved.append(ratio * t / (1 + (ratio - 1) * t) * 1000)
    return moved


def sample(velocity: Callable, z, steps: list[float], guidance: float, given=None):
    """The rectified flow. `velocity(z, t, mask)` gives the conditional and the unconditional velocity of all frames.

    Args:
        given: bool [T], latent frames of `z` that are a picture's and stay (edit ratio 0), or None.
    """
    for i, t in enumerate(steps):
        before = z.clone()
        mask = None if given is None else ~given  # frames whose own time has come: edit ratio 0 never, 1 always
        cond, uncond = velocity(z, t, mask)
        dt = (t - steps[i + 1] if i < len(steps) - 1 else t) / 1000
        z = z + (uncond + guidance * (cond - uncond)) * dt
        if given is not None:
            z = torch.where(given[None, None, :, None, None], before, z)
    return z
