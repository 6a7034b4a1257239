"""What differs between models. A model is one adapter file here and one line in `FAMILIES`."""

from cineray.pipeline.adapters.hunyuan_video import HunyuanVideo
from cineray.pipeline.adapters.protocol import Adapter, Branch, Conditions
from cineray.pipeline.adapters.wan import WanImageToVideo, WanTextToVideo

# diffusers pipeline class -> adapter
FAMILIES: dict[str, Adapter] = {
    "WanPipeline": WanTextToVideo(),
    "WanImageToVideoPipeline": WanImageToVideo(),
    "HunyuanVideoPipeline": HunyuanVideo(),
}

__all__ = ["FAMILIES", "Adapter", "Branch", "Conditions"]
