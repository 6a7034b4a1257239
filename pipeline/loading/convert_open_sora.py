"""Makes a diffusers folder of Open-Sora 1.2's published files."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cineray.files import read_json
from cineray.pipeline.adapters.open_sora_configs import (
    LIBRARY,
    PIPELINE,
    OpenSoraVAEConfig,
    STDiT3Config,
    published_settings,
)
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.parts import MAX_CONFIG_BYTES
from cineray.pipeline.request import InputError
from cineray.text import printable

_CONFIGS = {"transformer": STDiT3Config, "vae": OpenSoraVAEConfig}
_INDEX = {
    "_class_name": PIPELINE,
    "tokenizer": ["transformers", "T5Tokenizer"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "vae": [LIBRARY, "OpenSoraVAE"],
    "transformer": [LIBRARY, "STDiT3"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
_TOKENIZER_FILES = (
    *("spiece.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def convert_open_sora(transformer: Path, vae: Path, text_encoder: Path, tokenizer: Path, out: Path) -> None:
    """Writes the folder, in one step, after it was judged as every checkpoint is.

    Args:
        transformer, vae: as published, hpcai-tech/OpenSora-STDiT-v3 and hpcai-tech/OpenSora-VAE-v1.2.
        text_encoder, tokenizer: of T5 v1.1 XXL.
        out: not there yet.

    Raises:
        InputError: a file is missing, is not a safetensors file, or does not fit the others; or `out` cannot be made.
    """
    if os.path.lexists(out):
        raise InputError(f"models convert: --out {printable(out, 200)} is there already; give a new folder")
    folders = {"transformer": transformer, "vae": vae, "text-encoder": text_encoder}
    for name, folder in folders.items():
        _check_weights(name, folder)
    if not (tokenizer / "spiece.model").is_file() and not (tokenizer / "tokenizer.json").is_file():
        raise InputError(
            f"models convert: --tokenizer {printable(tokenizer, 200)} must hold spiece.model or tokenizer.json"
        )
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        part.mkdir()
        _write(part, transformer, vae, text_encoder, tokenizer)
        try:
            open_checkpoint(str(part))
        except InputError as error:
            raise InputError(*(line.replace(str(part), str(out)) for line in error.lines)) from None
        os.rename(part, out)
    except OSError as error:
        raise InputError(f"models convert: --out {printable(out, 200)} cannot be made: {error.strerror}") from None
    except InputError:
        raise
    except ValueError as error:  # of the models' own loading: names and shapes
        raise InputError(f"models convert: {printable(' '.join(str(error).split()), 400)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_weights(name: str, folder: Path) -> None:
    said = f"models convert: --{name} {printable(folder, 200)}"
    if not folder.is_dir():
        raise InputError(f"{said} is not a folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".ckpt"))
        held = f", got {printable(pickles[0], 100)}, which could run code" if pickles else ""
        raise InputError(f"{said} must hold *.safetensors: weights are read from nothing else{held}")
    try:
        config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{said} must hold config.json, an object, as published")
    kind = _CONFIGS.get(name)
    if kind is None:
        return  # copied, and judged with the rest
    try:
        kind.model_validate(published_settings(config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("config.json", *first["loc"])))
        raise InputError(f"{said}: {printable(where, 100)}: {first['msg'].removeprefix('Value error, ')}") from None


def _write(part: Path, transformer: Path, vae: Path, text_encoder: Path, tokenizer: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from cineray.pipeline.adapters.open_sora_transformer import STDiT3
    from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE

    kinds: tuple[tuple[str, Path, Any], ...] = (("transformer", transformer, STDiT3), ("vae", vae, OpenSoraVAE))
    for name, folder, kind in kinds:  # one after the other: both would be in memory at once
        kind.from_open_sora(folder).save_pretrained(part / name)
    encoder_files = [*text_encoder.glob("*.safetensors"), *text_encoder.glob("*.safetensors.index.json")]
    _copy([text_encoder / "config.json", *encoder_files], part / "text_encoder")
    _copy([tokenizer / name for name in _TOKENIZER_FILES if (tokenizer / name).is_file()], part / "tokenizer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(part / "scheduler")  # its shift follows from each clip's size
    (part / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n")


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name)
