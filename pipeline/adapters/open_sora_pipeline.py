"""The parts of Open-Sora 1.2 together, as a pipeline class of cineray's own: diffusers has none."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.video_processor import VideoProcessor
from transformers import AutoTokenizer, T5EncoderModel

from cineray.pipeline.adapters.open_sora_transformer import STDiT3
from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE

CLEANINGS = 2  # text_preprocessing in opensora/models/text_encoder/t5.py cleans twice, "as was in the training stage"


class OpenSoraPipeline(DiffusionPipeline):
    """Holds the parts; `cineray.pipeline.adapters.open_sora` renders with them."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: T5EncoderModel,
        vae: OpenSoraVAE,
        transformer: STDiT3,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.max_text_tokens: int = transformer.config["model_max_length"]
        self.vae_scale_factor_spatial = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        device_map: Any = None,
        dtype: dict[str, torch.dtype] | None = None,
        use_safetensors: bool = True,
        local_files_only: bool = True,
        **parts: Any,
    ) -> "OpenSoraPipeline":
        """Loads a converted folder; diffusers' own loader would not know classes that are not diffusers'.

        Args:
            dtype: of each component by name, "default" for the others.
            parts: components that stand in the place of the folder's.
        """
        dtypes, folder = dtype or {}, Path(folder)
        common = {
            "device_map": device_map,
            "use_safetensors": use_safetensors,
            "local_files_only": local_files_only,
        }
        for name, kind in (("text_encoder", T5EncoderModel), ("vae", OpenSoraVAE), ("transformer", STDiT3)):
            if name not in parts:
                chosen = dtypes.get(name, dtypes.get("default", torch.float32))
                named = {"dtype": chosen} if name == "text_encoder" else {"torch_dtype": chosen}
                parts[name] = kind.from_pretrained(folder / name, **named, **common).eval()
        if "tokenizer" not in parts:
            parts["tokenizer"] = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=local_files_only)
        if "scheduler" not in parts:
            parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        return cls(**parts)


def clean_prompt(text: str) -> str:
    """A prompt as the model saw its captions: lower case, without addresses, tags, Chinese characters, file names.

    The rules are PixArt's, which upstream took over and diffusers has too. Upstream strips blanks once more before the
    last rules: punctuation that stands alone at an end may stay here.
    """
    cleaner: Any = PixArtAlphaPipeline  # its method needs the class's pattern alone
    for _ in range(CLEANINGS):
        text = cleaner._clean_caption(cleaner, text).strip()
    return text
