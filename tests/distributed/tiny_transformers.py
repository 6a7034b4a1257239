"""Real transformer classes at toy size with four heads and random weights, and calls of them; the same everywhere."""

import torch

WAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 3,
}


def _random(model):
    """Every weight random, of a size that keeps the signal: small ones would let all queries attend alike.

    Fresh models zero or shrink some weights, which would hide errors.
    """
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = values * parameter[0].numel() ** -0.5
        else:
            parameter.data = values * 0.1 + (1 if "norm" in name and name.endswith("weight") else 0)
    return model.eval()


def wan(**changes):
    from diffusers import WanTransformer3DModel

    return _random(WanTransformer3DModel(**(WAN | changes)))


def wan_vace():
    from diffusers import WanVACETransformer3DModel

    return _random(WanVACETransformer3DModel(**WAN, vace_layers=[0, 2], vace_in_channels=6))


def wan_i2v():
    return wan(in_channels=12, image_dim=48, added_kv_proj_dim=128)


def hunyuan(**changes):
    from diffusers import HunyuanVideoTransformer3DModel

    return _random(
        HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=16,
            rope_axes_dim=(8, 12, 12),
            **changes,
        )
    )


def hunyuan_token_replace():
    return hunyuan(image_condition_type="token_replace")


def flux():
    from diffusers import FluxTransformer2DModel

    return _random(
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
    )


def dit():
    """Made for 13 x 13 tokens; positions of other sizes are interpolated."""
    from diffusers import DiTTransformer2DModel

    return _random(
        DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=32, out_channels=8, num_layers=3, sample_size=26
        )
    )


def stable_audio():
    """Half as many heads of keys and values in the cross-attention."""
    from diffusers import StableAudioDiTModel

    return _random(
        StableAudioDiTModel(
            sample_size=319,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=64,
            cross_attention_input_dim=32,
            global_states_input_dim=32,
            time_proj_dim=32,
        )
    )


def open_sora():
    from cineray.pipeline.adapters.open_sora_transformer import STDiT3

    return _random(STDiT3(hidden_size=128, depth=2, num_heads=4, caption_channels=32, model_max_length=8))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def call(model, frames=5, height=16, width=16, valid_text=(8,), num_text=8, seed=0, num_done=None):
    """Output for a batch of len(valid_text): `valid_text` of `num_text` text tokens count, where there is a mask.

    Args:
        num_done: each token has a timestep of its own, 0 for so many of the first (Wan 2.2 TI2V).
    """
    kind = type(model).__name__
    if kind in _OTHER_CALLS:
        return _OTHER_CALLS[kind](model, frames, height, width, valid_text)
    batch, channels = len(valid_text), model.config.in_channels
    kwargs = {"timestep": torch.full((batch,), 500.0), "return_dict": False}
    if num_done is not None:
        num_tokens = frames * (height // 2) * (width // 2)
        kwargs["timestep"] = torch.where(torch.arange(num_tokens) < num_done, 0.0, 500.0).expand(batch, -1)
    kwargs["encoder_hidden_states"] = draw(batch, num_text, 32, seed=seed)
    if kind == "WanVACETransformer3DModel":
        kwargs["control_hidden_states"] = draw(batch, 6, frames, height, width, seed=seed)
    if kind in ("WanTransformer3DModel", "WanVACETransformer3DModel"):
        kwargs["encoder_hidden_states"] = draw(batch, 512, 32, seed=seed)
        if model.config.image_dim is not None:
            kwargs["encoder_hidden_states_image"] = draw(batch, 257, 48, seed=seed)
    else:
        kwargs |= {"pooled_projections": draw(batch, 16, seed=seed), "guidance": torch.full((batch,), 3.0)}
    if kind == "HunyuanVideoTransformer3DModel":
        kwargs["encoder_attention_mask"] = torch.arange(num_text) < torch.tensor(valid_text)[:, None]
    if kind == "FluxTransformer2DModel":
        grid = torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, height, width)))
        kwargs |= {"img_ids": grid, "txt_ids": torch.zeros(num_text, 3), "timestep": kwargs["timestep"] / 1000}
        hidden_states = draw(batch, len(grid), channels, seed=seed)
    else:
        hidden_states = draw(batch, channels, frames, height, width, seed=seed)
    dtype = next(model.parameters()).dtype
    floats = {
        k: v.to(dtype) if k in ("encoder_hidden_states_image", "control_hidden_states", "guidance") else v
        for k, v in kwargs.items()
    }
    floats |= {k: kwargs[k].to(dtype) for k in ("encoder_hidden_states", "pooled_projections") if k in kwargs}
    with torch.no_grad():
        return model(hidden_states=hidden_states.to(dtype), **floats)[0]


@torch.no_grad()
def _call_dit(model, _frames, height, width, valid_text):
    batch = len(valid_text)
    latents = draw(batch, 4, height, width).to(model.dtype)
    return model(latents, torch.full((batch,), 500), torch.arange(batch), return_dict=False)[0]


@torch.no_grad()
def _call_stable_audio(model, frames, height, width, valid_text):
    """As many tokens as a video of this size has, the one in front included."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    batch, num_tokens = len(valid_text), frames * (height // 2) * (width // 2)
    return model(
        draw(batch, 4, num_tokens - 1).to(model.dtype),
        torch.full((1,), 0.5),
        draw(batch, 8, 32).to(model.dtype),
        draw(batch, 1, 32).to(model.dtype),
        get_1d_rotary_pos_embed(16, num_tokens, use_real=True, repeat_interleave_real=False),
        return_dict=False,
    )[0]


@torch.no_grad()
def _call_open_sora(model, frames, height, width, valid_text):
    """The first frame is given, where there are more."""
    batch = len(valid_text)
    return model(
        draw(batch, 4, frames, height, width),
        torch.full((batch,), 500.0),
        draw(batch, 8, 32),
        torch.arange(8) < torch.tensor(valid_text)[:, None],
        fps=torch.full((1,), 24.0),
        height=8 * height,
        width=8 * width,
        noisy_frames=torch.arange(frames)[None] > 0 if frames > 1 else None,
        return_dict=False,
    )[0]


_OTHER_CALLS = {
    "DiTTransformer2DModel": _call_dit,
    "StableAudioDiTModel": _call_stable_audio,
    "STDiT3": _call_open_sora,
}
