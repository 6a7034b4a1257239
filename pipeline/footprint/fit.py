"""Whether a clip fits into a GPU as a run is set up, and the nearest setup in which it does. A forecast, without torch.

What is refused is what cannot fit: tensors alone that take more than the GPU has. Between that and the forecast's
margin (`forecast.with_margin`) a run may still end well, and is only warned of; what is advised fits with the margin.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cineray.distributed.layout import Layout
from cineray.pipeline.adapters.model import hidden_size
from cineray.pipeline.footprint.forecast import Parts, check_model_layout, encodes_picture, parts_of, with_margin
from cineray.pipeline.footprint.laws import forecast_checkpoint, forecast_names, laws_of
from cineray.pipeline.footprint.operations import (
    AUDIO_MLP_RATIO,
    DIT_MLP_RATIO,
    DIT_SINUSOIDS,
    FLUX_MLP_RATIO,
    num_hints,
)
from cineray.pipeline.footprint.published import published
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.device import check_device, gpu_memory_bytes
from cineray.pipeline.loading.errors import LoadingError
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import ClipRequest, InputError

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MODULATED_ALONE = (
    "DiTTransformer2DModel",
    "STDiT3",
    "HunyuanVideo15Transformer3DModel",
)  # whose widest layer makes the modulation
MAX_CHANGES = 3  # of a setup, that are advised together


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What of a run decides where its memory goes.

    Args:
        layout: of one gang.
        has_finishers: others than the ranks encode and decode; else one process does it all.
        shares_gpu: a finisher stands on a rank's GPU.
        decodes_on_gang: the ranks decode, by rows where the model can.
        shards_weights: the ranks that share a clip's tokens share the transformer's weights too.

    Raises:
        InputError: weights that are sharded with what they do not go with.
    """

    options: LoadOptions
    layout: Layout = field(default_factory=Layout)
    has_finishers: bool = False
    shares_gpu: bool = False
    decodes_on_gang: bool = False
    shards_weights: bool = False

    def __post_init__(self) -> None:
        others = self.options.quantize != "none" or self.options.offload != "none" or self.options.compile
        if self.shards_weights and (others or self.layout.sequence_ranks == 1):
            raise InputError(
                "--shard-weights goes with ranks that share a clip, and with weights that stay as they are"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a clip takes of one GPU.

    Args:
        place: whose GPU.
        parts: name -> bytes of tensors that are there at the fullest moment.
    """

    place: str
    parts: Mapping[str, int]

    @property
    def tensor_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def text(self) -> str:
        """`98.7 GB of a rank's GPU (transformer 25.6, step 13.3)`."""
        named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items() if size >= 5e7)
        return f"{self.tensor_bytes / 1e9:.1f} GB of {self.place} ({named})"


RANK, FINISHER, SHARED = "a rank's GPU", "a finisher's GPU", "a GPU with a rank and a finisher"
ALONE = "the GPU"


def published_like(checkpoint: Checkpoint) -> Checkpoint | None:
    """The published checkpoint that this one is, or is built like (a downloaded folder), and that has a forecast; None
    if none is."""
    if checkpoint.name in forecast_names():
        return forecast_checkpoint(checkpoint.name)
    return next((known for name in forecast_names() if _is_like(checkpoint, known := forecast_checkpoint(name))), None)


def _is_like(checkpoint: Checkpoint, known: Checkpoint) -> bool:
    ours, theirs = checkpoint.configs, known.configs
    # Wan 2.2's two experts have the pipeline class of Wan 2.1
    if (checkpoint.pipeline_class, checkpoint.model.family) != (known.pipeline_class, known.model.family):
        return False
    pairs = ((ours.transformer, theirs.transformer), (ours.vae, theirs.vae))
    # a published file leaves out what is its class's default, and so may ours
    if any(a[key] != b[key] for a, b in pairs for key in {*a} & {*b} if not key.startswith("_")):
        return False
    return checkpoint.parts.get("text_encoder") == known.parts.get("text_encoder")


def demands(known: Checkpoint, request: ClipRequest, setup: Setup) -> tuple[Demand, ...]:
    """What a clip takes of each kind of GPU of a run.

    Args:
        known: one of `published_like`.
        request: one that the model can render.

    Raises:
        InputError: the layout or the cache does not fit the model.
    """
    check_model_layout(known, setup.layout)
    options, takes_image = setup.options, encodes_picture(known, request)
    decode = "gang" if setup.decodes_on_gang else "tiled" if options.vae_tiling else "finisher"
    parts = _in_types(known, options, parts_of(known, request, setup.layout, decode))
    weights, leaf = _transformer_weights(known, setup, parts.weights), _leaf_bytes(known)
    moves_layers = options.offload in ("group", "sequential")
    on_host = options.encoders_on_host(setup.has_finishers and setup.shares_gpu)
    text = parts.text_host if on_host else parts.text_encoder
    text = min(text, leaf["text encoders"]) if moves_layers else text
    decoding = {"VAE": parts.vae_weights, "decode": parts.decoding}
    given = "control video" if known.size_rule.takes_control else "first frame"
    picture = {"VAE": parts.vae_weights, given: parts.image_encoding} if takes_image else {}
    step = {"transformer": weights, "step": parts.step, "cache": parts.cache}
    encode = {"text encoders": text}
    if not setup.has_finishers:
        stays = {"transformer": weights, "VAE": parts.vae_weights, **encode}
        turns = [stays | turn for turn in (step, decoding, picture)]
        if options.offload == "model":
            turns = [step, decoding, picture, encode]
        return (_fullest(ALONE, turns),)
    rank_turns = [step | {"VAE": parts.vae_weights}, {"transformer": weights, **decoding}]
    rank = _fullest(RANK, rank_turns if setup.decodes_on_gang else [step])
    finishing = [picture] if setup.decodes_on_gang else [decoding, picture]
    beside = [encode | turn for turn in finishing]
    if options.offload == "model":
        beside = [encode, *finishing]
    finisher = _fullest(FINISHER, beside)
    if setup.shares_gpu:
        both = dict(rank.parts)
        for name, size in finisher.parts.items():
            both[name] = both.get(name, 0) + size
        return rank, Demand(place=SHARED, parts=both)
    return rank, finisher


def shortage(demand: Demand, memory_bytes: int) -> str | None:
    """Why a demand cannot be met by a GPU; None where it can, or may."""
    if demand.tensor_bytes <= memory_bytes:
        return None
    return f"it takes {demand.text}, which has {memory_bytes / 1e9:.1f}"


def check_room(wanted: Iterable[Demand], places: tuple[str, ...], memory_bytes: int) -> None:
    """Raises LoadingError, an InputError, where a GPU of these places has too little memory: another may have more."""
    for demand in wanted:
        if demand.place in places and (said := shortage(demand, memory_bytes)):
            raise LoadingError(f"the batch does not fit, by forecast: {said} GB; see `cineray render --dry-run`")


def own_shortage(device: str, wanted: Iterable[Demand], places: tuple[str, ...]) -> str | None:
    """Why an actor's GPU has not the room for these places; None where it has, nobody knows, or it is a CPU."""
    if device != "cuda":
        return None
    memory_bytes = gpu_memory_bytes()[0]
    return next((said for d in wanted if d.place in places and (said := shortage(d, memory_bytes))), None)


def check_own_gpu(device: str, wanted: Iterable[Demand], places: tuple[str, ...]) -> None:
    """Checks before weights are read that an actor's GPU works and has the room; nothing on a CPU.

    Raises:
        LoadingError, an InputError: it does not, or has not.
    """
    if device == "cuda":
        check_device(device)
        check_room(wanted, places, gpu_memory_bytes()[0])


def nearest_fit(
    known: Checkpoint, request: ClipRequest, setup: Setup, memory_bytes: int, max_ranks: int
) -> tuple[str, Setup] | None:
    """(options of the command line, the setup with them) that changes least and fits with the margin; None: nothing.

    Args:
        max_ranks: that a gang may have.
    """
    for number in range(1, MAX_CHANGES + 1):
        for changes in itertools.combinations(_changes(known, setup, max_ranks), number):
            changed, texts = setup, []
            try:
                for text, change in changes:
                    changed = replace(
                        changed,
                        **{k: v for k, v in change.items() if k != "options"},
                        options=replace(changed.options, **change.get("options", {})),
                    )
                    texts.append(text)
                if fits(known, request, changed, memory_bytes):
                    return " ".join(texts), changed
            except InputError:
                continue  # they do not go together, or do not fit the model
    return None


def fits(known: Checkpoint, request: ClipRequest, setup: Setup, memory_bytes: int) -> bool:
    """Whether all demands fit with the forecast's margin."""
    return all(with_margin(d.tensor_bytes) <= memory_bytes for d in demands(known, request, setup))


def _changes(known: Checkpoint, setup: Setup, max_ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(options, what they change), what costs least first."""
    layout, options = setup.layout, setup.options
    if setup.has_finishers and layout.world_size > 1 and not setup.decodes_on_gang and known.model.row_convolutions:
        yield "--decode gang", {"decodes_on_gang": True, "options": {"vae_tiling": False}}
    ulysses = layout.ulysses * 2
    while ulysses * layout.cfg * layout.ring <= max_ranks:
        wider = replace(layout, ulysses=ulysses)
        halves = " --cfg-parallel" if layout.cfg > 1 else ""
        named = f"--layout {wider.text}" if layout.ring > 1 else f"--sp {ulysses}{halves}"
        yield named, {"layout": wider, "has_finishers": True, "shares_gpu": True}
        ulysses *= 2
    if not options.vae_tiling and not setup.decodes_on_gang:
        yield "--vae-tiling", {"options": {"vae_tiling": True}}
    if options.offload == "none" and not options.encoders_on_host(setup.has_finishers and setup.shares_gpu):
        yield "--text-encoders host", {"options": {"text_encoders": "host"}}
    if not setup.shards_weights:
        yield "--shard-weights", {"shards_weights": True}
    if options.offload == "none":
        if not (setup.has_finishers and setup.decodes_on_gang):
            yield "--offload model", {"options": {"offload": "model"}}
        yield "--offload group", {"options": {"offload": "group"}}
    if options.vae_dtype == "auto" and known.adapter.vae_dtype == "float32":
        yield "--vae-dtype bfloat16", {"options": {"vae_dtype": "bfloat16"}}
    if options.dtype_name == "float32":
        yield "--dtype bfloat16", {"options": {"dtype": "bfloat16"}}
    if options.quantize == "none":
        yield "--quantize fp8", {"options": {"quantize": "fp8"}}


def _fullest(place: str, turns: list[dict[str, int]]) -> Demand:
    return Demand(place=place, parts=max(turns, key=lambda turn: sum(turn.values())))


def _in_types(known: Checkpoint, options: LoadOptions, parts: Parts) -> Parts:
    """The parts in the types of the options; the table has those that CUDA loads by default."""
    wide = _ELEMENT_BYTES[options.dtype_name] / 2
    usual = known.adapter.vae_dtype
    asked = options.vae_dtype if options.vae_dtype != "auto" else "float32" if wide > 1 else usual
    vae = _ELEMENT_BYTES[asked] / _ELEMENT_BYTES[usual]
    return Parts(
        weights=round(parts.weights * wide),
        step=round(parts.step * wide),
        cache=round(parts.cache * wide),
        text_encoder=round(parts.text_encoder * wide),
        text_host=round(parts.text_host * wide),
        vae_weights=round(parts.vae_weights * vae),
        decoding=round(parts.decoding * vae),
        image_encoding=round(parts.image_encoding * vae),
    )


def _transformer_weights(known: Checkpoint, setup: Setup, weights: int) -> int:
    """Bytes of the transformer, or of the experts, that are on a GPU while it runs.

    What is gathered or widened for a block at work counts here, though a step's fullest moment may be another one.
    """
    options, num_experts, beside = setup.options, known.num_experts, laws_of(known.name).beside_weights
    if options.offload in ("group", "sequential"):
        return min(weights, _leaf_bytes(known)["transformer"])
    if options.offload == "model":  # one expert at a time
        weights, num_experts = weights // num_experts, 1
    linear = num_experts * block_linear_parameters(known.configs.transformer)
    if options.quantize != "none":
        # one layer is widened at a time, where no run tells: the widest, in float32
        wide = beside.get(options.quantize, _leaf_bytes(known)["transformer"])
        return weights - linear * (_ELEMENT_BYTES[options.dtype_name] - 1) + wide
    if setup.shards_weights:
        size = (linear + block_tables(known.configs.transformer)) * _ELEMENT_BYTES[options.dtype_name]
        return weights - size + size // setup.layout.sequence_ranks + beside["sharded"]
    return weights


def _leaf_bytes(known: Checkpoint) -> dict[str, int]:
    """The two largest layers, in 16 bits: what offloading by layers keeps on a GPU, one at work and one on its way."""
    config = known.configs.transformer
    dim = hidden_size(config)
    inner = config.get("ffn_dim") or round(config.get("mlp_ratio", FLUX_MLP_RATIO) * dim)
    if config["_class_name"] in _MODULATED_ALONE:
        inner = 6 * dim
    if config["_class_name"] == "StableAudioDiTModel":
        inner = 2 * AUDIO_MLP_RATIO * dim
    found = published(known.name)
    texts = [found.config(part) for part in known.model.encoder_parts if found.has(part)]
    texts = [text.get("text_config", text) for text in texts]  # Llava's has a picture's beside it
    sizes = [text.get("vocab_size", 0) * text.get("d_model", text.get("hidden_size", 0)) for text in texts]
    table = max(sizes, default=0)
    return {"transformer": 2 * 2 * dim * inner, "text encoders": 2 * 2 * table}


def block_tables(config: Mapping[str, Any]) -> int:
    """Weights of a transformer's block lists that are no linear layers': DiT's blocks have a table of classes each."""
    if config["_class_name"] != "DiTTransformer2DModel":
        return 0
    return config["num_layers"] * (config["num_embeds_ada_norm"] + 1) * hidden_size(config)


def block_linear_parameters(config: Mapping[str, Any]) -> int:
    """Weights of the linear layers of a transformer's block lists, which 8-bit types hold in half the space."""
    dim = hidden_size(config)
    if config["_class_name"] == "STDiT3":  # attention, cross-attention and feed-forward, in space and in time
        return 2 * config["depth"] * round((8 + 2 * config["mlp_ratio"]) * dim * dim)
    if (
        config["_class_name"] == "DiTTransformer2DModel"
    ):  # attention, feed-forward, modulation, the timestep's embedding
        return config["num_layers"] * ((4 + 2 * DIT_MLP_RATIO + 6 + 1) * dim + DIT_SINUSOIDS) * dim
    if config["_class_name"] == "StableAudioDiTModel":  # attention, cross-attention and feed-forward with its gates
        few = config["num_key_value_attention_heads"] * config["attention_head_dim"]
        return config["num_layers"] * ((6 + 3 * AUDIO_MLP_RATIO) * dim * dim + 2 * config["cross_attention_dim"] * few)
    if config["_class_name"] in ("WanTransformer3DModel", "WanVACETransformer3DModel"):
        picture = 2 * (config["added_kv_proj_dim"] or 0) * dim
        hints = num_hints(config)  # VACE's: each ends with a projection, the first begins with one
        each = 8 * dim * dim + 2 * dim * config["ffn_dim"] + picture
        return (config["num_layers"] + hints) * each + (hints + min(hints, 1)) * dim * dim
    mlp = round(config.get("mlp_ratio", FLUX_MLP_RATIO) * dim)
    double = 8 * dim * dim + 4 * dim * mlp + 12 * dim * dim  # both streams: attention, feed-forward, modulation
    single = 3 * dim * dim + dim * mlp + (dim + mlp) * dim + 3 * dim * dim
    # HunyuanVideo 1.5 has blocks of two streams alone
    return config["num_layers"] * double + config.get("num_single_layers", 0) * single
