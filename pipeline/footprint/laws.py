"""How a clip's transients grow with its size and its ranks: planes through the rows of the table that the harness made.

Every kind of transient is a sum of tensors that are linear in few quantities: the tokens here and the tokens everywhere
for a step, pixels and frames for a decode (and the square of the pixels, where a VAE attends over a frame with a mask).
So a law is a least-squares fit of those, per phase, and the largest phase counts. Rows that are held out tell how far
off it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cineray.distributed.layout import Layout, parse_layout
from cineray.pipeline.adapters.model import hidden_size
from cineray.pipeline.footprint.operations import joint_text_tokens, num_hints
from cineray.pipeline.footprint.published import Published, published, published_checkpoint, published_names
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.request import ClipRequest, InputError
from cineray.text import shorten

TABLE = Path(__file__).parent / "table.json"
Row = dict[str, Any]
_TWINS = ("width", "height", "frames", "layout", "cache")
_ELEMENT_BYTES = 2  # bfloat16
_LATENT_FRAME = 4  # frames of video that a latent frame stands for, in every VAE of videos but Open-Sora's
# HunyuanVideo 1.5's 480p and 720p, text and image to video: what its pipelines read to choose a size and a task by. No
# module of the transformer has a shape from it, and steps with a picture are told by the pipeline (`takes_image`).
_CHANGES_NO_TENSOR = ("target_size", "task_type")
_ATTENDS_OVER_CLIP = ("AutoencoderKLHunyuanVideo15",)  # VAEs with a mask of all latents, or a tile's, by all
_LATENT_SIDE = 16  # pixels of theirs to a latent
_MASK_ROW = 16  # values to which a row of a mask is filled up for the kernel, in a copy (`fake_gpu`)


@dataclass(frozen=True, slots=True)
class Laws:
    """The laws of one model, from the table's rows.

    Args:
        rank_weights: bytes of the transformer, or of both experts.
        text_encoder_bytes: weights of the text encoders, and of an image encoder, and the transient of one prompt.
        text_host_bytes: the same of encoders whose weights stay in host memory: the layer that is at work.
        text_flop: operations of encoding one prompt.
        vae_weights: bytes.
        beside_weights: what blocks take, beside the weights that they hold, where these are not whole: gathered from
            other ranks ("sharded"), or widened to compute with ("fp8", "int8").
    """

    rank_weights: int
    text_encoder_bytes: int
    text_host_bytes: int
    text_flop: float
    vae_weights: int
    beside_weights: Mapping[str, int]
    _num_text: int
    _steps: tuple[Row, ...]
    _decodes: tuple[Row, ...]
    _images: tuple[Row, ...]

    def step_bytes(self, here: int, everywhere: int, layout: Layout, is_cached: bool) -> int:
        """The largest transient of a step on a rank, beside weights and cache.

        Args:
            here, everywhere: image tokens of the rank, and of all.
        """
        kind = _kind(layout)
        rows = [r for r in self._steps if r["is_cached"] == is_cached and _kind(parse_layout(r["layout"])) == kind]
        wanted = _step_features(here, everywhere, layout, self._num_text)
        known = [_step_features(r["here"], r["everywhere"], parse_layout(r["layout"]), self._num_text) for r in rows]
        return _largest_phase(rows, known, wanted)

    def image_encode_bytes(self, width: int, height: int, frames: int) -> int:
        """The transient of encoding a first frame; 0 for text-to-video."""
        if not self._images:
            return 0
        return _largest_phase(
            list(self._images),
            [[*_size(r), 1.0] for r in self._images],
            [*_size({"width": width, "height": height, "frames": frames}), 1.0],
        )

    def decode_bytes(self, width: int, height: int, frames: int, how: str, num_ranks: int) -> int:
        """The transient of a decode to frames on the host, beside weights.

        Args:
            how: "whole", "tiled" or "rows".
            num_ranks: that share the rows.
        """
        rows = self._decoded(how)
        clip = rows[0] | {"width": width, "height": height, "frames": frames, "num_ranks": num_ranks}
        found = 0
        for phase in ("middle", "rows", "frames"):
            known = [_decode_features(r, phase) for r in rows]
            values = [r["phases"][phase] for r in rows]
            found = max(found, round(_predict(known, values, _decode_features(clip, phase))))
        return found

    def _decoded(self, how: str) -> list[Row]:
        """The rows of a way to decode; in tiles it takes no more than whole, which stands for it where no row tells."""
        return [r for r in self._decodes if r["how"] == how] or [r for r in self._decodes if r["how"] == "whole"]

    def decode_flop(self, width: int, height: int, frames: int, how: str, num_ranks: int) -> float:
        """Operations of a decode on one device."""
        rows = self._decoded(how)
        clip = rows[0] | {"width": width, "height": height, "frames": frames, "num_ranks": num_ranks}
        return _predict([_flop_features(r) for r in rows], [r["flop"] for r in rows], _flop_features(clip))


_NO_TEXT: Row = {"weights": 0, "phases": {"encode": 0}, "flop": 0.0}  # of a model that reads none


@cache
def read_table() -> tuple[Row, ...]:
    """The table's rows."""
    return tuple(json.loads(TABLE.read_text())["rows"])


@cache
def forecast_names() -> tuple[str, ...]:
    """The named checkpoints that the table has rows for: their own, or those of one that is built alike."""
    return tuple(name for name in published_names() if _rows_of(name) is not None)


def forecast_checkpoint(model: str) -> Checkpoint:
    """The published checkpoint of a name that `forecast_names` lists.

    Raises:
        InputError: nothing is forecast of it; lists those of which something is.
    """
    if model not in forecast_names():
        known = ", ".join(forecast_names())
        raise InputError(f"model {shorten(model, 200)} has no forecast here; these have: {known}")
    return published_checkpoint(model)


@dataclass(frozen=True, slots=True)
class _Rows:
    load: Row
    text: Row
    text_host: Row
    steps: list[Row]
    others: list[Row]
    decodes: list[Row]
    images: list[Row]


def _rows_of(model: str) -> _Rows | None:
    """The table's rows that tell of a checkpoint; None where a part of it has none."""
    rows, found = [row for row in read_table() if not row["is_held_out"]], published(model)

    def alike(name: str, *parts: str) -> list[Row]:
        config = _shaping(found, name)
        return [r for r in rows if r["part"] in parts and _shaping(published(r["model"]), name) == config]

    checkpoint = published_checkpoint(model)
    has_encoder, takes_control = found.has("image_encoder"), checkpoint.size_rule.takes_control
    takes_image = checkpoint.size_rule.takes_image
    encodes = takes_image or takes_control

    def is_encoded_alike(row: Row) -> bool:
        return published_checkpoint(row["model"]).size_rule.takes_control == takes_control

    def steps() -> list[Row]:
        rows = alike("transformer", "denoise")
        return [row for row in rows if published_checkpoint(row["model"]).size_rule.takes_image == takes_image]

    def text(part: str) -> Row:
        if not checkpoint.model.encoder_parts:
            return _NO_TEXT
        rows = alike("text_encoder", part)
        return next((row for row in rows if published(row["model"]).has("image_encoder") == has_encoder), {})

    made = _Rows(
        load=next(iter(alike("transformer", "load")), {}),
        text=text("encode-text"),
        text_host=text("encode-text-host"),
        steps=[row for row in steps() if row["weights_as"] == "whole"],
        others=[row for row in steps() if row["weights_as"] != "whole"],
        decodes=alike("vae", "decode", "tiled"),
        images=[row for row in alike("vae", "encode-image") if is_encoded_alike(row)] if encodes else [],
    )
    needed = (made.load, made.text, made.text_host, made.steps, made.decodes, made.images or not encodes)
    return made if all(needed) else None


def _shaping(found: Published, part: str) -> Mapping[str, Any] | None:
    """A part's configuration, as far as shapes of tensors follow from it; None where there is no such part."""
    if not found.has(part):
        return None
    return {name: value for name, value in found.config(part).items() if name not in _CHANGES_NO_TENSOR}


def laws_of(model: str) -> Laws:
    """The laws of a named checkpoint.

    Raises:
        InputError: nothing is forecast of it.
    """
    checkpoint, rows = forecast_checkpoint(model), _rows_of(model)
    assert rows is not None
    load, text, decodes = rows.load, rows.text, rows.decodes
    return Laws(
        rank_weights=load["weights"] // published_checkpoint(load["model"]).num_experts * checkpoint.num_experts,
        text_encoder_bytes=text["weights"] + max(text["phases"].values()),
        text_host_bytes=rows.text_host["weights"] + max(rows.text_host["phases"].values()),
        text_flop=text["flop"],
        vae_weights=decodes[0]["weights"],
        beside_weights=_beside_weights(rows),
        _num_text=joint_text_tokens(checkpoint.configs.transformer),
        _steps=tuple(with_tokens(row) for row in rows.steps),
        _decodes=tuple(_with_how(row) for row in decodes),
        _images=tuple(rows.images),
    )


def _beside_weights(rows: _Rows) -> dict[str, int]:
    """The most that a run took more than its twin with whole weights."""
    found: dict[str, int] = {}
    for row in rows.others:
        twin = next(whole for whole in rows.steps if all(whole[name] == row[name] for name in _TWINS))
        more = max(row["phases"].values()) - max(twin["phases"].values())
        found[row["weights_as"]] = max(found.get(row["weights_as"], 0), more)
    return found


def errors_of(row: Row) -> tuple[float, float]:
    """Relative errors of the laws on a row: of its largest transient, and of its operations (0 where no law tells)."""
    laws, size, full = laws_of(row["model"]), (row["width"], row["height"], row["frames"]), row
    flop = 0.0
    if row["part"] == "denoise":
        full = with_tokens(row)
        said = laws.step_bytes(full["here"], full["everywhere"], parse_layout(row["layout"]), full["is_cached"])
    elif row["part"] == "encode-image":
        said = laws.image_encode_bytes(*size)
    else:
        full = _with_how(row)
        said = laws.decode_bytes(*size, full["how"], full["num_ranks"])
        flop = laws.decode_flop(*size, full["how"], full["num_ranks"]) / row["flop"] - 1
    return said / max(full["phases"].values()) - 1, flop


def with_tokens(row: Row) -> Row:
    """The row of a run of steps with its tokens, and with what all hints take that its few blocks have not made."""
    checkpoint, layout = published_checkpoint(row["model"]), parse_layout(row["layout"])
    clip = ClipRequest(
        id="row",
        prompt="row",
        width=row["width"],
        height=row["height"],
        num_frames=row["frames"],
        num_inference_steps=1,
        guidance_scale=1.0,
        fps=1,
    )
    everywhere = checkpoint.adapter.num_tokens(checkpoint.configs, clip)
    here = checkpoint.tokens_here(clip, layout.sequence_ranks)
    hints = here * _hint_bytes(checkpoint.configs.transformer, row["num_blocks"])
    # without a cache the blocks that make them run before all others
    phases = {name: size + (hints if name in ("before", "blocks") else 0) for name, size in row["phases"].items()}
    return row | {"here": here, "everywhere": everywhere, "is_cached": row["cache"] != "none", "phases": phases}


def _hint_bytes(config: Mapping[str, Any], num_blocks: int) -> int:
    """Bytes a token of VACE's hints, all of which wait for their block, beyond those of a run of few blocks."""
    more = num_hints(config) - num_hints({**config, "num_layers": num_blocks}) if "vace_layers" in config else 0
    return more * hidden_size(config) * _ELEMENT_BYTES


def _with_how(row: Row) -> Row:
    num_ranks = parse_layout(row["layout"]).world_size
    how = "tiled" if row["part"] == "tiled" else "whole" if num_ranks == 1 else "rows"
    vae = published(row["model"]).config("vae").get("_class_name")
    return row | {"how": how, "num_ranks": num_ranks, "attends_over_clip": vae in _ATTENDS_OVER_CLIP}


def _kind(layout: Layout) -> str:
    """Layouts that run the same code."""
    return f"{'ring' if layout.ring > 1 else ''}{'ulysses' if layout.ulysses > 1 else ''}"


def _step_features(here: int, everywhere: int, layout: Layout, num_text: int) -> list[float]:
    if layout.sequence_ranks == 1:
        return [here, 1.0]
    if layout.ring == 1:
        return [here, everywhere, 1.0]
    # text that attends beside the image's tokens is whole on each rank; FLUX's is as long as a small picture's tokens
    joint = here + num_text
    # from three ranks on, what arrives next is there beside what is at work at the widest moment
    return [joint, everywhere, joint if layout.ring > 2 else 0.0]


def _size(clip: Row) -> list[float]:
    pixels = clip["width"] * clip["height"]
    return [pixels, pixels * clip["frames"]]


def _decode_features(clip: Row, phase: str) -> list[float]:
    pixels, volume = _size(clip)
    if phase == "frames":
        return [pixels, volume]
    if clip["attends_over_clip"]:  # and its tiles, all as wide and as high, go on over all frames
        frames = clip["frames"]
        if clip["how"] == "tiled":
            return [volume, frames, frames**2 if phase == "middle" else pixels, 1.0]
        return [_mask(clip), volume, pixels] if phase == "middle" else [volume, pixels, 1.0]
    if phase == "middle":
        return [pixels**2, pixels, volume]
    return [pixels / clip["num_ranks"], pixels, volume] if clip["num_ranks"] > 1 else [pixels, volume, 1.0]


def _latents(clip: Row) -> int:
    return _latent_frames(clip) * (clip["width"] // _LATENT_SIDE) * (clip["height"] // _LATENT_SIDE)


def _mask(clip: Row) -> float:
    """Values of a mask of all latents by all, and of its copy where its rows are filled up."""
    latents = _latents(clip)
    return latents**2 * (2.0 if latents % _MASK_ROW else 1.0)


def _latent_frames(clip: Row) -> int:
    return (clip["frames"] - 1) // _LATENT_FRAME + 1


def _flop_features(clip: Row) -> list[float]:
    pixels, num_ranks = clip["width"] * clip["height"], clip["num_ranks"]
    frames = _latent_frames(clip)
    latent = frames * pixels
    if clip["attends_over_clip"]:
        return [latent, pixels, latent * (frames if clip["how"] == "tiled" else latent)]
    shared = [latent / num_ranks, pixels / num_ranks] if num_ranks > 1 else []
    return [latent, pixels, latent * pixels, *shared]


def _largest_phase(rows: list[Row], known: list[list[float]], wanted: list[float]) -> int:
    phases = rows[0]["phases"]
    return max(round(_predict(known, [r["phases"][name] for r in rows], wanted)) for name in phases)


def _predict(known: Sequence[Sequence[float]], values: Sequence[float], wanted: Sequence[float]) -> float:
    """What the plane through the known points says; each counts by its relative error."""
    features, target = np.asarray(known, float), np.asarray(values, float)
    scale = np.maximum(np.abs(features).max(axis=0), 1e-300)
    weight = 1 / np.maximum(np.abs(target), np.abs(target).max() * 1e-3)[:, None]
    found, *_ = np.linalg.lstsq(features / scale * weight, target * weight[:, 0], rcond=None)
    return float(np.asarray(wanted, float) / scale @ found)
