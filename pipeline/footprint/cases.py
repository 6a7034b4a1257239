"""The runs that the table holds, what is kept of each, and how one is made."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cineray.distributed.layout import parse_layout
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.footprint.fake_gpu import fake_gpu
from cineray.pipeline.footprint.measure import decode_on, denoise_on, encode_text_on
from cineray.pipeline.footprint.published import published, published_checkpoint
from cineray.pipeline.footprint.subject import CUDA, load_fake
from cineray.pipeline.loading.options import Quantize, check_installed
from cineray.pipeline.loading.prepare import quantize
from cineray.pipeline.request import ClipRequest

Weights = Literal["whole", "sharded", "fp8", "int8"]
Part = Literal["load", "denoise", "decode", "tiled", "encode-image", "encode-text", "encode-text-host"]
NUM_LAYERS = 2  # of each list; a test compares with more
# Skips what it may: two computed steps, one that is skipped after a probe, and the last, computed with a full cache.
ALWAYS_SKIPS = "dicache(threshold=1e30)"
_NEVER_BELOW = 1000.0  # a shift with which no timestep of so few steps falls below the second expert's boundary
_NUM_STEPS, _NUM_STEPS_CACHED = 2, 4  # a cached run skips its third; what any cache keeps is there by then


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run of the harness.

    Args:
        model: a named checkpoint; those that are alike but for their default size share its rows.
        part: what runs.
        layout: for "denoise" the gang's; for "decode" ulysses over as many ranks as share the rows.
        weights_as: of "denoise": how the transformer's blocks hold them; "sharded" over the ranks of the layout.
        is_held_out: no law is made from it; it tells how far the laws are off.
    """

    model: str
    part: Part
    width: int = 0
    height: int = 0
    frames: int = 0
    layout: str = "1"
    cache: str = "none"
    weights_as: Weights = "whole"
    is_held_out: bool = False

    @property
    def key(self) -> str:
        size = f" {self.width}x{self.height}x{self.frames}" if self.frames else ""
        layout = f" {self.layout}" if self.layout != "1" else ""
        cached = " cached" if self.cache != "none" else ""
        weights = f" {self.weights_as}" if self.weights_as != "whole" else ""
        return f"{self.model} {self.part}{size}{layout}{cached}{weights}"


def request_of(case: Case, image: str | None = None) -> ClipRequest:
    """The case's clip, with guidance. Of two experts, which are built alike, the first takes all steps."""
    known = published_checkpoint(case.model)
    return ClipRequest(
        id="fake",
        prompt="fake",
        width=case.width,
        height=case.height,
        num_frames=case.frames,
        num_inference_steps=_NUM_STEPS if case.cache == "none" else _NUM_STEPS_CACHED,
        guidance_scale=known.defaults.guidance_scale,
        flow_shift=_NEVER_BELOW if known.num_experts > 1 else None,
        fps=16,
        cache=case.cache,
        image=image,
        seconds=known.defaults.seconds,
    )


def run(case: Case, num_layers: int | None = NUM_LAYERS) -> dict[str, Any]:
    """Runs a case on a fake GPU; gives a row of the table.

    Raises:
        InputError: weights in 8 bits, and torchao is not installed.
    """
    row, known = asdict(case), published_checkpoint(case.model)
    with fake_gpu() as gpu, tempfile.TemporaryDirectory() as folder:
        if case.part in ("decode", "tiled"):
            model = load_fake(case.model, ("vae",))
            if case.part == "tiled":
                model.pipe.vae.enable_tiling()
            taken = decode_on(gpu, model, request_of(case), parse_layout(case.layout).world_size)
            return row | {"weights": taken.weights_bytes, "phases": taken.phase_bytes, "flop": taken.flop}
        if case.part == "load":
            model = load_fake(case.model, known.model.denoiser_parts)
            weights = gpu.ledger.live_bytes
            del model  # held until here: what nobody holds is not live
            return row | {"weights": weights, "phases": {}}
        if case.part in ("encode-text", "encode-text-host"):
            options = replace(CUDA, text_encoders="host" if case.part == "encode-text-host" else "gpu")
            taken = encode_text_on(gpu, load_fake(case.model, known.model.encoder_parts, options=options))
            return row | {"weights": taken.weights_bytes, "phases": taken.phase_bytes, "flop": taken.flop}
        index, takes_image = published(case.model).files["model_index.json"], known.size_rule.takes_image
        # Wan's; what HunyuanVideo 1.5 sees is told, and encoded with its texts
        seeing = {"image_encoder", "image_processor"}
        parts = (*known.model.denoiser_parts, *(seeing if seeing <= index.keys() else ()))
        if case.part == "encode-image":
            parts = (*parts, "vae")
        request = request_of(case, blank_picture(folder, case) if takes_image else None)
        return row | _denoise(gpu, case, load_fake(case.model, parts, num_layers), request)


def _denoise(gpu: Any, case: Case, model: Any, request: ClipRequest) -> dict[str, Any]:
    is_sharded, encodes_image = case.weights_as == "sharded", case.part == "encode-image"
    if case.weights_as in get_args(Quantize):
        options = replace(CUDA, quantize=case.weights_as)
        check_installed(options)
        quantize(model.pipe.transformer, options)
    taken = denoise_on(
        gpu, model, request, parse_layout(case.layout), encodes_image=encodes_image, shards_weights=is_sharded
    )
    if encodes_image:
        return {"phases": {"prepare": taken.prepare_bytes}, "flop": taken.prepare_flop}
    return {
        **({} if case.weights_as == "whole" else {"weights_bytes": taken.weights_bytes}),
        "phases": taken.phase_bytes,
        "cache_bytes": taken.cache_bytes,
        "flop": taken.flop_of(is_computed=True),
        "skipped_flop": taken.flop_of(is_computed=False),
        "sent_bytes": max(step.sent_bytes for step in taken.steps if step.is_computed),
        "num_exchanges": max(step.num_exchanges for step in taken.steps if step.is_computed),
        "num_blocks": num_blocks(model.pipe.transformer),
        "num_host_reads": max(step.num_host_reads for step in taken.steps),
        "num_masked": taken.num_masked,
        "num_unmasked": taken.num_unmasked,
    }


def num_blocks(transformer: Any) -> int:
    counts = MODELS[type(transformer).__name__].layout.counts
    return sum(transformer.config[name] for name in counts)


def blank_picture(folder: str, case: Case) -> str:
    """Path of a new picture of the clip's size."""
    from PIL import Image

    path = Path(folder) / "first.png"
    Image.new("RGB", (case.width, case.height)).save(path)
    return str(path)


_MODELS = ("wan2.1-t2v-14b", "hunyuan-video", "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-720p", "wan2.2-i2v-a14b")
_SMALL, _LARGE = (832, 480, 81), (1280, 720, 81)


def cases() -> Iterator[Case]:
    """Every run of the table."""
    for model in _MODELS:
        yield Case(model=model, part="load")
        yield Case(model=model, part="encode-text")
        yield Case(model=model, part="encode-text-host")
        yield from _denoise_cases(model)
        yield from _other_weights_cases(model)
    for model in ("wan2.1-t2v-14b", "hunyuan-video"):
        yield from _decode_cases(model)
    yield from _per_token_cases()
    yield from _picture_cases()
    yield from _fixed_cases()
    yield from _open_sora_cases()
    yield from _sound_cases()
    yield from _vace_cases()
    yield from _hunyuan_image_cases()
    yield from _hunyuan15_cases()
    for size in ((480, 272, 17), (832, 480, 33), (480, 272, 81)):
        yield _case("wan2.1-i2v-14b-720p", "encode-image", size)
    yield _case("wan2.1-i2v-14b-720p", "encode-image", (640, 368, 49), is_held_out=True)


def _case(model: str, part: Part, size: tuple[int, int, int], **more: Any) -> Case:
    width, height, frames = size
    return Case(model=model, part=part, width=width, height=height, frames=frames, **more)


def _wide(model: str) -> str:
    return "ulysses4" if model.endswith("-1.3b") else "ulysses8"  # Wan 1.3B has 12 heads


def _denoise_cases(model: str) -> Iterator[Case]:
    for cache in ("none", ALWAYS_SKIPS):
        for size in (_SMALL, _LARGE):
            for layout in ("1", "ulysses2", _wide(model), "ring2", "ring2xulysses4"):
                yield _case(model, "denoise", size, layout=layout, cache=cache)
        for layout in ("ring4", "ring2xulysses2"):
            yield _case(model, "denoise", _SMALL, layout=layout, cache=cache)
        for layout, size in (
            ("1", (960, 544, 61)),
            ("ulysses4", (960, 544, 129)),
            ("ring4", (1280, 720, 121)),
            ("ring2xulysses2", (640, 368, 49)),
        ):
            yield _case(model, "denoise", size, layout=layout, cache=cache, is_held_out=True)


def _per_token_cases() -> Iterator[Case]:
    """Wan 2.2 TI2V-5B, with a timestep for each token; its sides are multiples of 32."""
    model, last = "wan2.2-ti2v-5b", (960, 544, 61)
    yield Case(model=model, part="load")
    yield from _few_denoise_cases(model, (_SMALL, (1280, 704, 121)), last)
    for cache in ("none", ALWAYS_SKIPS):
        yield _case(model, "denoise", last, cache=cache, is_held_out=True)
    yield from _few_weights_cases(model, _SMALL)
    for size in ((480, 288, 33), (832, 480, 33), (832, 480, 81), (1280, 704, 33)):
        yield from _decodes(model, size, ("1", "ulysses2", "ulysses8"))
    yield from _decodes(model, last, ("1", "ulysses4"), is_held_out=True)


def _picture_cases() -> Iterator[Case]:
    """FLUX.1: dev, and schnell, whose prompts are half as long."""
    small, large, last = (512, 512, 1), (1536, 1024, 1), (1024, 1024, 1)
    for model in ("flux.1-dev", "flux.1-schnell"):
        yield Case(model=model, part="load")
        yield Case(model=model, part="encode-text")
        yield Case(model=model, part="encode-text-host")
        yield from _few_denoise_cases(model, (small, large), last)
    for weights in ("sharded", "fp8", "int8"):
        layout = "ulysses8"
        yield _case("flux.1-dev", "denoise", large, layout=layout, cache=ALWAYS_SKIPS, weights_as=weights)
    for size in (small, (1024, 512, 1), large):
        yield from _decodes("flux.1-dev", size, ("1",))
    yield _case("flux.1-dev", "decode", last, is_held_out=True)
    yield _case("flux.1-dev", "tiled", last)  # up to this size one tile is the whole picture, so that no law tells it


def _fixed_cases() -> Iterator[Case]:
    """DiT-XL/2, whose two checkpoints have a size each: all clips that there are; layouts alone are held out."""
    for side in (256, 512):
        model, size = f"dit-xl-2-{side}", (side, side, 1)
        yield Case(model=model, part="load")
        yield from _few_denoise_cases(model, (size,), size)
        yield from _few_weights_cases(model, size)
        yield from _decodes(model, size, ("1",))


def _open_sora_cases() -> Iterator[Case]:
    """Whole decodes alone: its tiles are too many to be run here."""
    model, small, large, last = "open-sora-1.2", (424, 240, 51), (848, 480, 51), (640, 360, 68)
    yield Case(model=model, part="load")
    yield Case(model=model, part="encode-text")
    yield Case(model=model, part="encode-text-host")
    yield from _few_denoise_cases(model, (small, large), last)
    for cache in ("none", ALWAYS_SKIPS):
        yield _case(model, "denoise", last, cache=cache, is_held_out=True)
    yield from _few_weights_cases(model, small)
    for size in ((424, 240, 17), small, (848, 480, 17), (640, 360, 34)):
        yield _case(model, "decode", size, is_held_out=size == (640, 360, 34))
    for size in ((424, 240, 17), large, (848, 480, 17), last):
        yield _case(model, "encode-image", size, is_held_out=size == last)


def _sound_cases() -> Iterator[Case]:
    """Stable Audio Open: each clip is cut from one of the full length, so that there is one size; layouts alone are
    held out."""
    model, size = "stable-audio-open-1.0", (1, 1, 1)
    yield Case(model=model, part="load")
    yield Case(model=model, part="encode-text")
    yield Case(model=model, part="encode-text-host")
    yield from _few_denoise_cases(model, (size,), size)
    yield from _few_weights_cases(model, size)
    yield _case(model, "decode", size)


def _vace_cases() -> Iterator[Case]:
    """Wan 2.1 VACE, whose VAE and text encoder are Wan's; its hints are as many as a row's few blocks have."""
    last = (960, 544, 61)
    for model in ("wan2.1-vace-1.3b", "wan2.1-vace-14b"):
        yield Case(model=model, part="load")
        yield from _few_denoise_cases(model, (_SMALL, _LARGE), last)
        for cache in ("none", ALWAYS_SKIPS):
            yield _case(model, "denoise", last, cache=cache, is_held_out=True)
        yield from _few_weights_cases(model, _SMALL)
    for size in ((480, 272, 17), (832, 480, 33), (480, 272, 81)):
        yield _case("wan2.1-vace-1.3b", "encode-image", size)
    yield _case("wan2.1-vace-1.3b", "encode-image", (640, 368, 49), is_held_out=True)


def _hunyuan_image_cases() -> Iterator[Case]:
    """HunyuanVideo image to video, by "token_replace" and by "latent_concat"; decodes are those of text to video, and
    encoders, VAE and the picture, encoded in one piece, the same in both."""
    model = "hunyuan-video-i2v"
    yield Case(model=model, part="encode-text")
    yield Case(model=model, part="encode-text-host")
    for kind in (model, "hunyuan-video-i2v-33ch"):
        yield Case(model=kind, part="load")
        yield from _few_denoise_cases(kind, (_SMALL, _LARGE), (960, 544, 61))
        yield from _few_weights_cases(kind, _SMALL)
    for size in ((480, 272, 17), (832, 480, 33), (480, 272, 81)):
        yield _case(model, "encode-image", size)
    yield _case(model, "encode-image", (640, 368, 49), is_held_out=True)


def _hunyuan15_cases() -> Iterator[Case]:
    """HunyuanVideo 1.5, of which 720p is built as 480p is. Steps with a picture have its tokens among the text's."""
    text, image = "hunyuan-video-1.5-t2v-480p", "hunyuan-video-1.5-i2v-480p"
    small, last = (848, 480, 81), (960, 544, 61)
    for model in (text, image):
        yield Case(model=model, part="load")
        yield Case(model=model, part="encode-text")
        yield Case(model=model, part="encode-text-host")
        yield from _few_denoise_cases(model, (small, _LARGE), last)
        for layout, size in (("ring2xulysses4", last), ("1", (1280, 720, 121))):
            yield _case(model, "denoise", size, layout=layout, cache=ALWAYS_SKIPS, is_held_out=True)
        yield from _few_weights_cases(model, small)
    # a frame more or less decides here: the VAE attends over all frames of a clip, or of a tile, at once
    for size in ((480, 272, 33), (480, 272, 121), (848, 480, 33), (848, 480, 81), (1280, 720, 17)):
        yield from _decodes(text, size, ("1",))
    yield _case(text, "tiled", (848, 480, 121))
    yield from _decodes(text, last, ("1",), is_held_out=True)
    yield _case(text, "tiled", (1280, 720, 121), is_held_out=True)
    for size in ((480, 272, 17), (848, 480, 33), (1280, 720, 17), (480, 272, 81)):
        yield _case(image, "encode-image", size)
    yield _case(image, "encode-image", (640, 368, 49), is_held_out=True)


def _few_weights_cases(model: str, size: tuple[int, int, int]) -> Iterator[Case]:
    yield _case(model, "denoise", size, layout=_wide(model), cache=ALWAYS_SKIPS, weights_as="sharded")
    for weights in ("fp8", "int8"):
        yield _case(model, "denoise", size, cache=ALWAYS_SKIPS, weights_as=weights)


def _few_denoise_cases(
    model: str, sizes: Sequence[tuple[int, int, int]], held_out: tuple[int, int, int]
) -> Iterator[Case]:
    """As few as the laws need, of a model of which others have shown that they hold."""
    for cache in ("none", ALWAYS_SKIPS):
        for size in sizes:
            for layout in ("1", _wide(model), "ring2", "ring2xulysses4"):
                yield _case(model, "denoise", size, layout=layout, cache=cache)
        for layout in ("ulysses2", "ring4", "ring2xulysses2"):
            yield _case(model, "denoise", sizes[0], layout=layout, cache=cache)
        yield _case(model, "denoise", held_out, layout="ulysses4", cache=cache, is_held_out=True)


def _other_weights_cases(model: str) -> Iterator[Case]:
    """Each has a twin with whole weights."""
    for weights in ("sharded", "fp8", "int8"):
        for layout in ("ulysses2", _wide(model)):
            yield _case(model, "denoise", _SMALL, layout=layout, cache=ALWAYS_SKIPS, weights_as=weights)


def _decode_cases(model: str) -> Iterator[Case]:
    for size in ((480, 272, 33), (832, 480, 33), (832, 480, 81), (1280, 720, 33)):
        yield from _decodes(model, size, ("1", "ulysses2", "ulysses8"))
    yield from _decodes(model, (960, 544, 61), ("1", "ulysses4"), is_held_out=True)
    yield _case(model, "decode", _LARGE, is_held_out=True)


def _decodes(
    model: str, size: tuple[int, int, int], layouts: Sequence[str], *, is_held_out: bool = False
) -> Iterator[Case]:
    """Whole on one rank, by rows on several, and in tiles."""
    for layout in layouts:
        yield _case(model, "decode", size, layout=layout, is_held_out=is_held_out)
    yield _case(model, "tiled", size, is_held_out=is_held_out)
