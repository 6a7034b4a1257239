"""Open-Sora 1.2's STDiT3 from its state dict, as its own code computes it: text packed without padding, attention
written out, one frame list at a time. Shares no code with `cineray.pipeline.adapters.open_sora_transformer`.

Read from github.com/hpcaitech/Open-Sora at v1.2.0, opensora/models/stdit/stdit3.py and
opensora/models/layers/blocks.py, and from rotary_embedding_torch 0.5.3, which its requirements name.
"""

import math

import torch

State = dict[str, torch.Tensor]


def published_shapes(
    hidden: int = 1152,
    depth: int = 28,
    heads: int = 16,
    channels: int = 4,
    caption: int = 4096,
    tokens: int = 300,
) -> dict[str, tuple[int, ...]]:
    """What upstream's constructors register, by name, patches of 1x2x2 and twice the channels for pred_sigma."""

    def linear(name: str, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size_out, size_in), f"{name}.bias": (size_out,)}

    shapes: dict[str, tuple[int, ...]] = {
        "rope.freqs": (hidden // heads // 2,),
        "x_embedder.proj.weight": (hidden, channels, 1, 2, 2),
        "x_embedder.proj.bias": (hidden,),
        "y_embedder.y_embedding": (tokens, caption),
        "final_layer.scale_shift_table": (2, hidden),
    }
    shapes |= linear("y_embedder.y_proj.fc1", caption, hidden) | linear("y_embedder.y_proj.fc2", hidden, hidden)
    for embedder in ("t_embedder", "fps_embedder"):
        shapes |= linear(f"{embedder}.mlp.0", 256, hidden) | linear(f"{embedder}.mlp.2", hidden, hidden)
    shapes |= linear("t_block.1", hidden, 6 * hidden) | linear("final_layer.linear", hidden, 4 * 2 * channels)
    for block in (f"{kind}_blocks.{n}" for kind in ("spatial", "temporal") for n in range(depth)):
        shapes |= {
            f"{block}.scale_shift_table": (6, hidden),
            f"{block}.attn.q_norm.weight": (hidden // heads,),
            f"{block}.attn.k_norm.weight": (hidden // heads,),
        }
        shapes |= linear(f"{block}.attn.qkv", hidden, 3 * hidden) | linear(f"{block}.attn.proj", hidden, hidden)
        shapes |= linear(f"{block}.cross_attn.q_linear", hidden, hidden)
        shapes |= linear(f"{block}.cross_attn.kv_linear", hidden, 2 * hidden)
        shapes |= linear(f"{block}.cross_attn.proj", hidden, hidden)
        shapes |= linear(f"{block}.mlp.fc1", hidden, 4 * hidden) | linear(f"{block}.mlp.fc2", 4 * hidden, hidden)
    return shapes


def stdit3(w: State, x, timestep, y, mask, fps, height: int, width: int, heads: int, input_sq_size: int, x_mask=None):
    """[B, channels, T, H, W] -> [B, 2 * channels, T, H, W]; arguments as upstream's forward takes them."""
    hidden = w["t_block.1.weight"].shape[1]
    batch, _, frames, rows, columns = x.shape
    x = torch.nn.functional.pad(x, (0, columns % 2, 0, rows % 2))
    patches = torch.nn.functional.conv3d(
        x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=w["x_embedder.proj.weight"].shape[2:]
    )
    h, wd = patches.shape[3:]
    place = torch.empty(h, wd, hidden)
    scale, base = math.sqrt(height * width) / input_sq_size, round(math.sqrt(h * wd))
    for i in range(h):
        for j in range(wd):
            at = [_waves(j / scale * base / wd, hidden // 2), _waves(i / scale * base / h, hidden // 2)]
            place[i, j] = torch.cat(at)
    z = patches.permute(0, 2, 3, 4, 1) + place  # [B, T, h, w, C]

    both = []  # the conditioning of the frames that are noisy, and of those that are given
    for time in (timestep, torch.zeros_like(timestep)):
        t = _mlp(w, "t_embedder", _cos_sin(time)) + _mlp(w, "fps_embedder", _cos_sin(fps))
        both.append((t, _linear(w, "t_block.1", torch.nn.functional.silu(t)).view(batch, 6, hidden)))
    if x_mask is None:
        x_mask = torch.ones(batch, frames, dtype=torch.bool)
    (t, t_mlp), (t0, t0_mlp) = both
    text = _linear(w, "y_embedder.y_proj.fc1", y)
    text = _linear(w, "y_embedder.y_proj.fc2", torch.nn.functional.gelu(text, approximate="tanh"))
    texts = [row[keep.bool()] for row, keep in zip(text, mask, strict=True)]  # each without its padding

    depth = sum(name.startswith("spatial_blocks.") and name.endswith("scale_shift_table") for name in w)
    for n in range(depth):
        for name, temporal in ((f"spatial_blocks.{n}", False), (f"temporal_blocks.{n}", True)):
            z = _block(w, name, z, texts, (t_mlp, t0_mlp), heads, temporal, x_mask)

    made = []
    for conditioning in (t, t0):
        shift, scale_by = (w["final_layer.scale_shift_table"][None] + conditioning[:, None]).unbind(1)
        made.append(_normed(z) * (1 + scale_by.view(batch, 1, 1, 1, -1)) + shift.view(batch, 1, 1, 1, -1))
    z = _select(x_mask, *made)
    z = _linear(w, "final_layer.linear", z)
    out = torch.empty(batch, z.shape[-1] // 4, frames, 2 * h, 2 * wd)
    for corner, values in enumerate(z.unflatten(-1, (4, -1)).unbind(-2)):
        out[..., corner // 2 :: 2, corner % 2 :: 2] = values.permute(0, 4, 1, 2, 3)
    return out[..., :rows, :columns]


def _select(x_mask, noisy, given):
    """[B, T, h, w, C]: the first where the frame is noisy, the second where it is given."""
    return torch.where(x_mask[:, :, None, None, None], noisy, given)


def _block(w: State, name: str, z, texts, t_mlps, heads: int, temporal: bool, x_mask):
    batch = len(z)
    mods, mods0 = ((w[f"{name}.scale_shift_table"][None] + m)[:, :, None, None, None].unbind(1) for m in t_mlps)

    def modulated(x, shift: int):
        return _select(x_mask, *(_normed(x) * (1 + at[shift + 1]) + at[shift] for at in (mods, mods0)))

    m = modulated(z, 0)
    attended = torch.empty_like(m)
    for b in range(batch):
        if temporal:
            for i in range(m.shape[2]):
                for j in range(m.shape[3]):
                    attended[b, :, i, j] = _self_attention(w, f"{name}.attn", m[b, :, i, j], heads, turned=True)
        else:
            for f in range(m.shape[1]):
                frame = m[b, f].flatten(0, 1)
                attended[b, f] = _self_attention(w, f"{name}.attn", frame, heads, turned=False).view_as(m[b, f])
    z = z + _select(x_mask, mods[2] * attended, mods0[2] * attended)
    crossed = [_cross_attention(w, f"{name}.cross_attn", z[b].flatten(0, 2), texts[b], heads) for b in range(batch)]
    z = z + torch.stack(crossed).view_as(z)
    m = _linear(w, f"{name}.mlp.fc1", modulated(z, 3))
    m = _linear(w, f"{name}.mlp.fc2", torch.nn.functional.gelu(m, approximate="tanh"))
    return z + _select(x_mask, mods[5] * m, mods0[5] * m)


def _self_attention(w: State, name: str, x, heads: int, turned: bool):
    """[N, C] -> [N, C]."""
    q, k, v = _linear(w, f"{name}.qkv", x).view(len(x), 3, heads, -1).unbind(1)
    q, k = (_rms(v) * w[f"{name}.{n}.weight"] for v, n in ((q, "q_norm"), (k, "k_norm")))
    if turned:
        q, k = _turn(w, q), _turn(w, k)
    return _linear(w, f"{name}.proj", _attend(q, k, v))


def _cross_attention(w: State, name: str, x, text, heads: int):
    q = _linear(w, f"{name}.q_linear", x).view(len(x), heads, -1)
    k, v = _linear(w, f"{name}.kv_linear", text).view(len(text), 2, heads, -1).unbind(1)
    return _linear(w, f"{name}.proj", _attend(q, k, v))


def _attend(q, k, v):
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hnm,mhd->nhd", scores.softmax(dim=-1), v).flatten(1)


def _turn(w: State, x):
    """Rotary embedding: channels (2i, 2i + 1) of frame n turned by n * freqs[i]."""
    turned = torch.empty_like(x)
    for n in range(len(x)):
        angle = n * w["rope.freqs"]
        even, odd = x[n, :, 0::2], x[n, :, 1::2]
        turned[n, :, 0::2] = even * angle.cos() - odd * angle.sin()
        turned[n, :, 1::2] = odd * angle.cos() + even * angle.sin()
    return turned


def _linear(w: State, name: str, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _mlp(w: State, name: str, x):
    return _linear(w, f"{name}.mlp.2", torch.nn.functional.silu(_linear(w, f"{name}.mlp.0", x)))


def _normed(x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt()


def _rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def _cos_sin(values):
    """[B] -> [B, 256]."""
    angles = values.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _waves(place: float, size: int):
    """[size]: sines, then cosines."""
    angles = place / 10000 ** (torch.arange(0, size, 2) / size)
    return torch.cat([angles.sin(), angles.cos()])
