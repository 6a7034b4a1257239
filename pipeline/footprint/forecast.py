"""Memory and work of a clip of any size on any layout, in milliseconds and without torch.

Weights, cached tensors, operations and exchanges follow from the published configuration in closed form. Transients of
a step and of a decode follow laws (`laws.py`) whose numbers come from a table that the harness made by running the real
code on fake tensors: a forecast, never a measurement on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cineray.caching.plan import AnyPlan, CachePlan
from cineray.caching.policies.smoothcache import LayerPlan
from cineray.caching.policies.taylorseer import SeriesPlan
from cineray.distributed.layout import Layout, check_layout
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.caches.memory import forecast_cache_bytes
from cineray.pipeline.footprint.exchanges import step_exchanges
from cineray.pipeline.footprint.laws import forecast_checkpoint, laws_of
from cineray.pipeline.footprint.layer_caches import layer_cache_bytes
from cineray.pipeline.footprint.operations import ForwardFlop, forward_flop
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.request import ClipRequest, InputError, problems
from cineray.text import shorten

Decode = Literal["auto", "finisher", "tiled", "gang"]
# On top of what tensors take: blocks of the allocator that nothing fits into and cuDNN's workspaces (a share), CUDA's
# context and NCCL's buffers (fixed). An estimate that no GPU has confirmed yet; scripts/bench_gpu.py can.
SAFETY_FACTOR = 1.08
FIXED_BYTES = 1_500_000_000
_HOW = {"finisher": "whole", "tiled": "tiled", "gang": "rows"}  # way to decode -> the law's name for it
_ELEMENT_BYTES = 2  # bfloat16, what CUDA loads by default


@dataclass(frozen=True, slots=True)
class MemoryByPart:
    """Bytes on the GPU that has most to hold: the one with the gang's first rank and a finisher.

    Args:
        weights: of the transformer, or of both experts, which is all that a rank loads.
        activations: the largest transient of a step on a rank, beside weights and cache.
        cache: tensors that the cache holds on a rank.
        vae: its weights and its largest transient: of the decode, latents and video included, or of the encoding of a
            first frame.
        text_encoder: of the text encoders (and of the image encoder), whose weights stay in host memory beside a rank:
            the layer that is at work, and the transient of one prompt.
        total: what the card must have. A finisher decodes one clip while the ranks are at the next, so its parts come
            on top: (weights + activations + cache + vae + text_encoder) x SAFETY_FACTOR + FIXED_BYTES. Where the gang
            decodes by itself, step and decode take turns: (weights + VAE's weights + max(activations + cache, its
            transient) + text_encoder) x SAFETY_FACTOR + FIXED_BYTES.
    """

    weights: int
    activations: int
    cache: int
    vae: int
    text_encoder: int
    total: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank computes and sends for one clip.

    Args:
        computed_step_flop: of a step whose blocks run, on a rank; both guidance branches unless cfg splits them.
        attention_flop: of these, attention over tokens that ranks share.
        skipped_step_flop: of a step that the cache skips after a probe; without a probe it is yet less, and 0 where
            whole steps are forecast.
        decode_flop: on one device; with a decode by rows, on each rank.
        text_flop: of encoding the clip's prompts, once, in one place.
        exchanged_bytes_per_computed_step: that a rank sends to other ranks.
        num_exchanges_per_computed_step: collectives and batches of sends that a rank takes part in.
    """

    computed_step_flop: float
    attention_flop: float
    skipped_step_flop: float
    decode_flop: float
    text_flop: float
    exchanged_bytes_per_computed_step: float
    num_exchanges_per_computed_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Bytes of tensors that a clip takes, by what holds them, in the types that CUDA loads by default.

    Args:
        weights, vae_weights: of the transformer, and of the VAE.
        step: the largest transient of a step on a rank.
        cache: tensors that the cache holds on a rank.
        decoding: the largest transient of the decode.
        image_encoding: the transient of encoding a first frame; 0 where there is none.
        text_encoder: weights of all encoders, and the transient of one prompt.
        text_host: the same where their weights stay in host memory.
    """

    weights: int
    step: int
    cache: int
    vae_weights: int
    decoding: int
    image_encoding: int
    text_encoder: int
    text_host: int


def with_margin(num_bytes: int) -> int:
    """What a card should have for so many bytes of tensors."""
    return round(num_bytes * SAFETY_FACTOR) + FIXED_BYTES


def way_to_decode(checkpoint: Checkpoint, decode: str, layout: Layout) -> tuple[str, int]:
    """(the law's name for a way to decode, number of ranks that share it): one where the model has no rows to share."""
    num_ranks = layout.ranks_per_gang if decode == "gang" and checkpoint.model.row_convolutions else 1
    how = _HOW[decode]
    return ("whole" if how == "rows" and num_ranks == 1 else how), num_ranks


def parts_of(checkpoint: Checkpoint, request: ClipRequest, layout: Layout, decode: str) -> Parts:
    """What a clip takes, part by part.

    Args:
        checkpoint: one of `forecast_checkpoint`.
        request: one that the model can render.
        layout: of one gang, which fits the model.
        decode: "finisher", "tiled" or "gang".

    Raises:
        InputError: the cache does not fit the model.
    """
    laws, plan = laws_of(checkpoint.name), _plan(checkpoint, request.cache)
    num_tokens = checkpoint.adapter.num_tokens(checkpoint.configs, request)
    here = checkpoint.tokens_here(request, layout.sequence_ranks)
    config = checkpoint.configs.transformer
    if isinstance(plan, LayerPlan | SeriesPlan):
        held = layer_cache_bytes(plan, config, here, len(MODELS[config["_class_name"]].branches) // layout.cfg)
    else:
        # every rank of one branch holds that branch's history alone
        held = (forecast_cache_bytes(checkpoint, request, _ELEMENT_BYTES, layout.sequence_ranks) or 0) // layout.cfg
    size = (request.width, request.height, request.num_frames)
    return Parts(
        weights=laws.rank_weights,
        step=laws.step_bytes(here, num_tokens, layout, is_cached=plan is not None),
        cache=held,
        vae_weights=laws.vae_weights,
        decoding=laws.decode_bytes(*size, *way_to_decode(checkpoint, decode, layout)),
        image_encoding=laws.image_encode_bytes(*size) if encodes_picture(checkpoint, request) else 0,
        text_encoder=laws.text_encoder_bytes,
        text_host=laws.text_host_bytes,
    )


def encodes_picture(checkpoint: Checkpoint, request: ClipRequest) -> bool:
    """Whether the VAE encodes what a clip begins with, or a control video: VACE's, of zeros where there is none."""
    rule = checkpoint.size_rule
    if rule.takes_control:
        return True
    return rule.takes_image and (rule.needs_image or bool(request.image or request.control_video))


def _plan(checkpoint: Checkpoint, cache: str) -> AnyPlan | None:
    try:
        return checkpoint.plan_cache(cache)
    except ValueError as error:
        raise InputError(str(error)) from None


def forecast(
    model: str,
    *,
    width: int,
    height: int,
    frames: int,
    cfg: int,
    ring: int,
    ulysses: int,
    cache: str,
    decode: str = "auto",
) -> tuple[MemoryByPart, Work]:
    """What a clip takes, in the types that CUDA loads by default, with guidance where the model has a branch for it.

    Args:
        model: a name that `forecast_names` lists.
        cfg, ring, ulysses: degrees of the gang's layout.
        cache: a policy as on the command line.
        decode: "finisher": whole, beside rank 0; "tiled": so in tiles; "gang": by rows on every rank; "auto": as
            `cineray render` does on GPUs, "tiled" where the model asks for it, else "finisher".

    Raises:
        InputError: nothing is forecast of the model, a size that it cannot render, a layout or a cache that does not
            fit it, or an unknown way to decode.
    """
    if decode not in get_args(Decode):
        raise InputError(f"decode must be one of {', '.join(get_args(Decode))}, got {shorten(decode)}")
    checkpoint = forecast_checkpoint(model)
    request = _request(checkpoint, width, height, frames, cache)
    layout = _layout(checkpoint, cfg, ring, ulysses)
    laws, plan = laws_of(model), _plan(checkpoint, cache)
    if decode == "auto":
        decode = "tiled" if checkpoint.adapter.tiles_on_gpus else "finisher"
    how, num_ranks = way_to_decode(checkpoint, decode, layout)
    parts = parts_of(checkpoint, request, layout, decode)
    step_and_cache, decoding = parts.step + parts.cache, max(parts.decoding, parts.image_encoding)
    beside = max(step_and_cache, decoding) if decode == "gang" else step_and_cache + decoding
    memory = MemoryByPart(
        weights=parts.weights,
        activations=parts.step,
        cache=parts.cache,
        vae=parts.vae_weights + decoding,
        text_encoder=parts.text_host,
        total=with_margin(parts.weights + parts.vae_weights + beside + parts.text_host),
    )
    config = checkpoint.configs.transformer
    num_tokens = checkpoint.adapter.num_tokens(checkpoint.configs, request)
    here = checkpoint.tokens_here(request, layout.sequence_ranks)
    num_frames = num_tokens // checkpoint.num_shared_tokens(request)
    num_calls = len(MODELS[config["_class_name"]].branches) // cfg

    def forward_on(sequence_ranks: int) -> ForwardFlop:
        return forward_flop(
            config,
            here=here,
            everywhere=num_tokens,
            sequence_ranks=sequence_ranks,
            is_per_token=checkpoint.configs.index.get("expand_timesteps") is True,
            num_frames=num_frames,
        )

    forward = forward_on(layout.sequence_ranks)
    attention = 2 * (forward.total - forward_on(2 * layout.sequence_ranks).total)  # all that twice the ranks halve
    skipped = forward.total  # of policies by layer, unless told otherwise
    if isinstance(plan, CachePlan):
        is_whole = plan.forecasting.target == "clean_latents"
        skipped = 0.0 if is_whole else forward.skipped(plan.probe_depth)
    exchanged = step_exchanges(checkpoint, layout, num_tokens, num_frames=num_frames)
    work = Work(
        computed_step_flop=num_calls * forward.total,
        attention_flop=num_calls * attention,
        skipped_step_flop=num_calls * skipped,
        decode_flop=laws.decode_flop(width, height, frames, how, num_ranks),
        text_flop=laws.text_flop * len(MODELS[config["_class_name"]].branches),
        exchanged_bytes_per_computed_step=exchanged.sent_bytes,
        num_exchanges_per_computed_step=exchanged.num_exchanges,
    )
    return memory, work


def _request(checkpoint: Checkpoint, width: int, height: int, frames: int, cache: str) -> ClipRequest:
    """A clip of this size, with guidance.

    Raises:
        InputError: the model has no such size.
    """
    rule = checkpoint.size_rule
    request = ClipRequest(
        id="forecast",
        prompt="forecast",
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=checkpoint.defaults.num_inference_steps,
        guidance_scale=checkpoint.defaults.guidance_scale,
        fps=checkpoint.defaults.fps,
        cache=cache,
        seconds=checkpoint.defaults.seconds,
        image="first_frame" if rule.takes_image and rule.needs_image else None,
    )
    found = problems(request, rule)
    if found:
        raise InputError(*(f"model {checkpoint.name}: {problem}" for problem in found))
    return request


def _layout(checkpoint: Checkpoint, cfg: int, ring: int, ulysses: int) -> Layout:
    try:
        layout = Layout(cfg=cfg, ring=ring, ulysses=ulysses)
    except ValueError as error:
        raise InputError(f"model {checkpoint.name}: {error}") from None
    check_model_layout(checkpoint, layout)
    return layout


def check_model_layout(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raises InputError where the ranks of a layout cannot share the model's clips."""
    try:
        check_layout(layout, checkpoint.num_heads, checkpoint.num_calls)
    except ValueError as error:
        raise InputError(f"model {checkpoint.name}: {error}") from None
