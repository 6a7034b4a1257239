"""What prompts, pictures and classes are encoded to, of the longest prompt, on a fake GPU: tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cineray.pipeline.adapters import hunyuan15, hunyuan_image, wan, wan_vace
from cineray.pipeline.adapters.open_sora_configs import GROUP_FRAMES
from cineray.pipeline.footprint.fake_gpu import GPU
from cineray.pipeline.footprint.operations import AUDIO_TEXT_TOKENS, WAN_TEXT_TOKENS, joint_text_tokens
from cineray.pipeline.footprint.subject import DTYPE
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.media.picture import first_frame
from cineray.pipeline.request import ClipRequest

Table = dict[str, torch.Tensor]


def encoded(model: LoadedModel, request: ClipRequest, encodes_image: bool) -> Table:
    """The table of the adapter's `encode`; call it within `fake_gpu`.

    Args:
        encodes_image: what a clip begins with goes through the VAE (Wan's first frame, which its image encoder sees;
            HunyuanVideo's, 1.5 too; the end of a video that Open-Sora goes on from; VACE's control video); else its
            latents are as made.
    """
    family = model.checkpoint.model.family
    if family in _TABLES:
        return _TABLES[family](model, request)
    return _WITH_VAE.get(family, _wan)(model, request, encodes_image)


def _empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(1, *shape, dtype=dtype, device=GPU)


def _ones(*shape: int) -> torch.Tensor:
    """Of a mask: the longest prompt has no padding."""
    return torch.ones(1, *shape, dtype=DTYPE, device=GPU)


def _latent_size(model: LoadedModel, request: ClipRequest) -> tuple[int, int, int]:
    """(frames, height, width) of a clip's latents."""
    step, scale = model.pipe.vae_scale_factor_temporal, model.pipe.vae_scale_factor_spatial
    return (request.num_frames - 1) // step + 1, request.height // scale, request.width // scale


def _hunyuan(model: LoadedModel, _request: ClipRequest) -> Table:
    config = model.pipe.transformer.config
    num_tokens = joint_text_tokens(model.checkpoint.configs.transformer)
    return {
        "text": _empty(num_tokens, config.text_embed_dim),
        "pooled": _empty(config.pooled_projection_dim),
        "mask": _ones(num_tokens),
    }


def _hunyuan_image(model: LoadedModel, request: ClipRequest, encodes_image: bool) -> Table:
    if encodes_image:
        condition = model.checkpoint.configs.transformer["image_condition_type"]
        return {**_hunyuan(model, request), "image": hunyuan_image.encode_picture(model.pipe, request, condition)}
    _, height, width = _latent_size(model, request)
    image = _empty(model.pipe.transformer.config.out_channels, 1, height, width, dtype=torch.float32)
    return {**_hunyuan(model, request), "image": image}


def _hunyuan15(model: LoadedModel, request: ClipRequest, encodes_image: bool) -> Table:
    pipe, config = model.pipe, model.pipe.transformer.config
    found: Table = {}
    for branch in hunyuan15.BRANCHES:
        found[f"{branch}_text"] = _empty(pipe.tokenizer_max_length, config.text_embed_dim)
        found[f"{branch}_mask"] = _ones(pipe.tokenizer_max_length)
        found[f"{branch}_glyphs"] = _empty(pipe.tokenizer_2_max_length, config.text_embed_2_dim)
        found[f"{branch}_glyph_mask"] = _ones(pipe.tokenizer_2_max_length)
    if request.image is not None:
        _, height, width = _latent_size(model, request)
        if encodes_image:
            found["image"] = hunyuan15.encode_picture(pipe, request)
        else:
            found["image"] = _empty(config.out_channels, 1, height, width, dtype=torch.float16)  # the VAE's type
        found["seen"] = _empty(pipe.vision_num_semantic_tokens, config.image_embed_dim)
    return found


def _flux(model: LoadedModel, _request: ClipRequest) -> Table:
    config = model.pipe.transformer.config
    num_tokens = joint_text_tokens(model.checkpoint.configs.transformer)
    return {"text": _empty(num_tokens, config.joint_attention_dim), "pooled": _empty(config.pooled_projection_dim)}


def _wan_texts(model: LoadedModel) -> Table:
    dim = model.pipe.transformer.config.text_dim
    return {"cond": _empty(WAN_TEXT_TOKENS, dim), "uncond": _empty(WAN_TEXT_TOKENS, dim)}


def _wan(model: LoadedModel, request: ClipRequest, encodes_image: bool) -> Table:
    pipe, config = model.pipe, model.pipe.transformer.config
    texts = _wan_texts(model)
    if request.image is None:
        return texts
    if encodes_image:
        return texts | wan.encode_picture(pipe, request)
    channels = config.in_channels - config.out_channels
    found = {**texts, "condition": _empty(channels, *_latent_size(model, request), dtype=torch.float32)}
    if config.image_dim is not None:
        found["image"] = pipe.encode_image(first_frame(request), GPU)
    return found


def _vace(model: LoadedModel, request: ClipRequest, encodes_image: bool) -> Table:
    if encodes_image:
        return {**_wan_texts(model), "control": wan_vace.encode_control(model.pipe, request)}
    channels = model.pipe.transformer.config.vace_in_channels
    control = _empty(channels, *_latent_size(model, request), dtype=torch.float32)
    return {**_wan_texts(model), "control": control}


def _dit(_model: LoadedModel, _request: ClipRequest) -> Table:
    return {"class": torch.ones(1, dtype=torch.int64, device=GPU)}


def _open_sora(model: LoadedModel, request: ClipRequest, encodes_image: bool) -> Table:
    """With what goes on from a video, of which the VAE reads most: its last group of frames."""
    config = model.pipe.transformer.config
    num_tokens = config["model_max_length"]
    mask = torch.ones(1, num_tokens, dtype=torch.int64, device=GPU)
    found = {"text": _empty(num_tokens, config["caption_channels"]), "mask": mask}
    if encodes_image:
        vae = model.pipe.vae
        pixels = torch.empty(1, 3, GROUP_FRAMES, request.height, request.width, dtype=vae.dtype, device=GPU)
        found["given"] = vae.encode(pixels).float()
    return found


def _stable_audio(model: LoadedModel, request: ClipRequest) -> Table:
    """Both rows of a batch, and the two tokens that tell of the seconds behind the text's."""
    config, num_rows = model.pipe.transformer.config, 2 if request.guidance_scale > 1.0 else 1
    text = (num_rows, AUDIO_TEXT_TOKENS + 2, config.cross_attention_input_dim)
    seconds = (num_rows, 1, config.global_states_input_dim)
    return {name: torch.empty(shape, dtype=DTYPE, device=GPU) for name, shape in (("text", text), ("seconds", seconds))}


# of families whose VAE encodes something; Wan is one of several names
_WITH_VAE: Mapping[str, Callable[[Any, ClipRequest, bool], Table]] = {
    "open-sora": _open_sora,
    "wan-vace": _vace,
    "hunyuan-video-i2v": _hunyuan_image,
    "hunyuan-video-1.5": _hunyuan15,
}
_TABLES: Mapping[str, Callable[[Any, ClipRequest], Table]] = {
    "hunyuan-video": _hunyuan,
    "flux": _flux,
    "dit": _dit,
    "stable-audio": _stable_audio,
}
