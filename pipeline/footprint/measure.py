"""Runs the real code on a fake GPU and reads what it took: memory by part, operations, exchanges, reads by the host.

Nothing here is a measurement of a GPU: it is what the code asks of one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cineray.distributed.layout import Layout
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.adapters.open_sora_configs import num_latent_frames
from cineray.pipeline.footprint.encoded import encoded
from cineray.pipeline.footprint.exchange_log import Exchange
from cineray.pipeline.footprint.fake_gpu import GPU, FakeGPU, join_fake_world
from cineray.pipeline.footprint.ledger import Ledger
from cineray.pipeline.footprint.operations import (
    AUDIO_TEXT_TOKENS,
    HUNYUAN_TEXT_TOKENS,
    WAN_TEXT_TOKENS,
    joint_text_tokens,
)
from cineray.pipeline.footprint.subject import DTYPE
from cineray.pipeline.gang import SOLO, Gang
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.render import denoise_prepared, prepare_clip, to_frames, to_samples
from cineray.pipeline.request import ClipRequest

CLIP_TOKENS = 77  # that CLIP's text encoders read
_BEHIND = {
    "STDiT3": "final_layer",
    "StableAudioDiTModel": "proj_out",
}  # what stands behind the blocks, where it is not called norm_out


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTaken:
    """One denoising step on one rank.

    Args:
        is_computed: the blocks ran, in every branch.
        flop: of matrix products and convolutions.
        num_host_reads: times that the host waited for a number of the GPU.
        exchanges: with other ranks, in order.
    """

    is_computed: bool
    flop: int
    num_host_reads: int
    exchanges: tuple[Exchange, ...]

    @property
    def num_exchanges(self) -> int:
        """Collectives, and batches of a send and a receive."""
        return sum(exchange.name != "recv_" for exchange in self.exchanges)

    @property
    def sent_bytes(self) -> float:
        return sum(exchange.sent_bytes for exchange in self.exchanges)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseTaken:
    """What denoising a clip takes of one rank.

    Args:
        weights_bytes: of all that is loaded.
        cache_bytes: tensors that the cache holds at most.
        phase_bytes: phase -> the largest transient in it, beside weights and cache: "before", in and behind ("after")
            the "blocks", and in the "loop" between two forwards.
        prepare_bytes: the transient of drawing noise and, for image-to-video, encoding the first frame.
        prepare_flop: its operations.
        steps: in order.
        num_masked, num_unmasked: calls of an attention kernel with a mask, and without.
        peak_at: the operation at the peak of the blocks.
    """

    weights_bytes: int
    cache_bytes: int
    phase_bytes: dict[str, int]
    prepare_bytes: int
    prepare_flop: int
    steps: tuple[StepTaken, ...]
    num_masked: int
    num_unmasked: int
    peak_at: str

    @property
    def transient_bytes(self) -> int:
        return max(self.phase_bytes.values())

    @property
    def exchanges(self) -> list[Exchange]:
        return [exchange for step in self.steps for exchange in step.exchanges]

    def flop_of(self, is_computed: bool) -> int:
        """Operations of a step that is computed, or of one that is skipped after a probe; 0 if there was none."""
        return max((step.flop for step in self.steps if step.is_computed is is_computed), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A stretch of work beside denoising: a decode, or the encoding of a prompt.

    Args:
        weights_bytes: of all that is loaded.
        phase_bytes: phase -> the peak beside weights. Of a decode: "middle", the decoder's middle block; "rows", behind
            it; "frames", from the video to 8-bit frames.
        flop: of matrix products and convolutions.
        exchanges: with other ranks, in order.
        peak_at: the operation at the highest peak.
    """

    weights_bytes: int
    phase_bytes: dict[str, int]
    flop: int
    exchanges: tuple[Exchange, ...]
    peak_at: str

    @property
    def transient_bytes(self) -> int:
        return max(self.phase_bytes.values())


def denoise_on(
    gpu: FakeGPU,
    model: LoadedModel,
    request: ClipRequest,
    layout: Layout,
    rank: int = 0,
    encodes_image: bool = True,
    shards_weights: bool = False,
) -> DenoiseTaken:
    """Denoises a clip as `render_clip_on_gang` does, as one rank of a gang; call it within `fake_gpu`.

    Args:
        model: with its transformer (and, for image-to-video, VAE and image encoder) on the fake GPU.
        encodes_image: False leaves out the VAE's encoding of a first frame, which is most of the work here.
        shards_weights: this rank keeps a part of the model's weights, as with `--shard-weights`.

    Raises:
        ValueError: the layout does not fit.
    """
    with joined(layout, rank) if layout.world_size > 1 else nullcontext(SOLO) as gang:
        if shards_weights:
            gang.shard_weights(model)
        return _denoise_on(gpu.ledger, model, request, gang, encodes_image)


def _denoise_on(
    ledger: Ledger, model: LoadedModel, request: ClipRequest, gang: Gang, encodes_image: bool
) -> DenoiseTaken:
    gc.collect()
    weights = ledger.live_bytes
    ledger.begin()
    prepared = prepare_clip(model, request, encoded(model, request, encodes_image))
    prepare_bytes, prepare_flop = ledger.peak_bytes - weights, ledger.flop
    taken: list[tuple[int, int, tuple[Exchange, ...]]] = []
    ledger.begin()

    def on_step(_step: int, _num_steps: int) -> None:
        taken.append((ledger.flop, ledger.num_host_reads, tuple(ledger.exchanges)))
        ledger.flop, ledger.num_host_reads, ledger.exchanges = 0, 0, []

    with _Phases(ledger, _around_blocks(model.pipe.transformer), "loop") as phases:
        trace = denoise_prepared(model, request, prepared, on_step, gang=gang).trace
    entries = trace.entries if trace is not None else []
    held = trace.held_bytes if trace is not None else 0
    skipping = {entry.step for entry in entries if not entry.compute}
    return DenoiseTaken(
        weights_bytes=weights,
        cache_bytes=held,
        phase_bytes={name: peak - weights - held for name, (peak, _) in phases.peaks.items()},
        prepare_bytes=prepare_bytes,
        prepare_flop=prepare_flop,
        steps=tuple(
            StepTaken(is_computed=step not in skipping, flop=flop, num_host_reads=reads, exchanges=exchanges)
            for step, (flop, reads, exchanges) in enumerate(taken)
        ),
        num_masked=ledger.num_masked,
        num_unmasked=ledger.num_unmasked,
        peak_at=phases.peaks["blocks"][1],
    )


@contextmanager
def joined(layout: Layout, rank: int, parallel_decode: bool | None = None) -> Iterator[Gang]:
    """One rank of a gang whose other ranks are not there; call it within `fake_gpu`."""
    import torch.distributed as dist

    join_fake_world(layout.world_size, rank)
    try:
        with Gang.join(layout, rank, layout.world_size, device=str(GPU), parallel_decode=parallel_decode) as gang:
            yield gang
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def decode_on(gpu: FakeGPU, model: LoadedModel, request: ClipRequest, num_ranks: int = 1, rank: int = 0) -> Taken:
    """Decodes a clip to frames on the host; on several ranks by rows. Call it within `fake_gpu`.

    Args:
        model: with its VAE on the fake GPU; in tiles if the VAE's tiling is on.
    """
    gc.collect()
    weights = gpu.ledger.live_bytes
    gpu.ledger.begin()
    latents = torch.empty(_latent_shape(model, request), device=GPU)
    middle = _middle(model)
    with _Phases(gpu.ledger, [(middle, True, "middle"), (middle, False, "rows")], "rows") as phases:
        if num_ranks == 1:
            video = SOLO.decode(model, request, latents)
        else:
            with joined(Layout(ulysses=num_ranks), rank, parallel_decode=True) as gang:
                video = gang.decode(model, request, latents)
        phases.enter("frames")
        if video is not None:
            (to_samples if model.checkpoint.model.family == "stable-audio" else to_frames)(video)
    return _taken(gpu.ledger, weights, phases)


def _middle(model: LoadedModel) -> nn.Module:
    """What a decoder begins with: its middle block, or the first of those that stretch a sound."""
    family, vae = model.checkpoint.model.family, model.pipe.vae
    if family == "stable-audio":
        return vae.decoder.block[0]
    return (vae.spatial_vae.module if family == "open-sora" else vae).decoder.mid_block


def _latent_shape(model: LoadedModel, request: ClipRequest) -> tuple[int, ...]:
    config = model.pipe.vae.config
    if model.checkpoint.model.family == "stable-audio":
        return 1, config.decoder_input_channels, int(model.checkpoint.configs.transformer["sample_size"])
    channels = config.z_dim if "z_dim" in config else config.latent_channels
    if model.checkpoint.model.family == "flux":  # packed: four of a channel in one token
        return 1, model.adapter.num_tokens(model.checkpoint.configs, request), 4 * channels
    if model.checkpoint.model.family == "dit":
        side = model.checkpoint.configs.transformer["sample_size"]
        return 1, channels, side, side
    scale = model.pipe.vae_scale_factor_spatial
    if model.checkpoint.model.family == "open-sora":
        return 1, channels, num_latent_frames(request.num_frames), request.height // scale, request.width // scale
    num_frames = (request.num_frames - 1) // model.pipe.vae_scale_factor_temporal + 1
    return 1, channels, num_frames, request.height // scale, request.width // scale


def encode_text_on(gpu: FakeGPU, model: LoadedModel) -> Taken:
    """Runs the text encoders over one prompt, as the pipelines do. Call it within `fake_gpu`."""
    gc.collect()
    weights = gpu.ledger.live_bytes
    gpu.ledger.begin()
    with _Phases(gpu.ledger, [], "encode") as phases:
        _encode_text(model)
    return _taken(gpu.ledger, weights, phases)


def _encode_text(model: LoadedModel) -> None:
    if model.checkpoint.model.family == "hunyuan-video":
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        num_tokens = HUNYUAN_TEXT_TOKENS + DEFAULT_PROMPT_TEMPLATE["crop_start"]
        ids, mask = _tokens(num_tokens)
        model.pipe.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        model.pipe.text_encoder_2(_tokens(CLIP_TOKENS)[0], output_hidden_states=False)
    elif model.checkpoint.model.family == "hunyuan-video-i2v":
        _see(model)
    elif model.checkpoint.model.family == "hunyuan-video-1.5":
        _read_and_see(model.pipe)
    elif model.checkpoint.model.family == "flux":
        model.pipe.text_encoder(_tokens(CLIP_TOKENS)[0], output_hidden_states=False)
        num_tokens = joint_text_tokens(model.checkpoint.configs.transformer)
        model.pipe.text_encoder_2(_tokens(num_tokens)[0], output_hidden_states=False)
    elif model.checkpoint.model.family == "stable-audio":
        text = model.pipe.text_encoder(*_tokens(AUDIO_TEXT_TOKENS))[0]
        model.pipe.projection_model(text_hidden_states=text)
    elif model.checkpoint.model.family == "open-sora":
        model.pipe.text_encoder(*_tokens(model.checkpoint.configs.transformer["model_max_length"]))
    else:
        model.pipe.text_encoder(*_tokens(WAN_TEXT_TOKENS))


def _see(model: LoadedModel) -> None:
    """Llava over the longest prompt and a picture, expanded as `HunyuanVideoImageToVideoPipeline` does, then CLIP."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

    encoder, side = model.pipe.text_encoder, model.pipe.text_encoder.config.vision_config.image_size
    ids, mask = _tokens(HUNYUAN_TEXT_TOKENS + TEMPLATE["crop_start"] + TEMPLATE["image_emb_len"] - 1)
    ids[:, TEMPLATE["image_emb_start"] : TEMPLATE["image_emb_end"]] = encoder.config.image_token_index
    pixels = torch.empty(1, 3, side, side, device=GPU)
    encoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        pixel_values=pixels,
        output_hidden_states=True,
    )
    model.pipe.text_encoder_2(_tokens(CLIP_TOKENS)[0], output_hidden_states=False)


def _read_and_see(pipe: Any) -> None:
    """HunyuanVideo 1.5: Qwen2.5-VL's text model over the template and the longest prompt, of which the pipeline takes
    all layers' outputs; ByT5 over the longest text in quotes; and SigLIP, where there is a picture."""
    ids, mask = _tokens(pipe.prompt_template_encode_start_idx + pipe.tokenizer_max_length)
    pipe.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    ids, mask = _tokens(pipe.tokenizer_2_max_length)
    pipe.text_encoder_2(input_ids=ids, attention_mask=mask.float())
    vision = getattr(pipe, "image_encoder", None)
    if vision is not None:
        side = vision.config.image_size
        vision(pixel_values=torch.empty(1, 3, side, side, dtype=DTYPE, device=GPU))


def _tokens(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.ones(1, number, dtype=torch.long, device=GPU) for _ in range(2))  # type: ignore[return-value]


def _taken(ledger: Ledger, weights: int, phases: _Phases) -> Taken:
    return Taken(
        weights_bytes=weights,
        phase_bytes={name: peak - weights for name, (peak, _) in phases.peaks.items()},
        flop=ledger.flop,
        exchanges=tuple(ledger.exchanges),
        peak_at=max(phases.peaks.values())[1],
    )


class _Phases:
    """The peak of each phase of a stretch of work: what stands before, in and behind the blocks grows in other ways.

    Attributes:
        peaks: phase -> (bytes, the operation there).

    Args:
        begins: (module, whether the phase begins before or behind its forward, phase).
        first: the phase that it begins with.
    """

    def __init__(self, ledger: Ledger, begins: list[tuple[nn.Module, bool, str]], first: str) -> None:
        self.peaks: dict[str, tuple[int, str]] = {}
        self._ledger = ledger
        self._phase = first
        self._hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: self.enter(name))
            if is_before
            else module.register_forward_hook(lambda *_, name=name: self.enter(name))
            for module, is_before, name in begins
        ]

    def enter(self, phase: str) -> None:
        reached = (self._ledger.peak_bytes, self._ledger.peak_at)
        self.peaks[self._phase] = max(self.peaks.get(self._phase, reached), reached)
        self._phase = phase
        self._ledger.begin_peak()

    def __enter__(self) -> _Phases:
        return self

    def __exit__(self, *_: object) -> None:
        self.enter(self._phase)
        for hook in self._hooks:
            hook.remove()


def _around_blocks(transformer: Any) -> list[tuple[nn.Module, bool, str]]:
    first_list = MODELS[type(transformer).__name__].layout.lists[0]
    return [
        (transformer, True, "before"),
        (getattr(transformer, first_list)[0], True, "blocks"),
        (transformer.get_submodule(_BEHIND.get(type(transformer).__name__, "norm_out")), True, "after"),
        (transformer, False, "loop"),
    ]
