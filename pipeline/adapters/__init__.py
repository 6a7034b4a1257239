"""What differs between models. A model is one file here and one line in `MODELS`."""

from cineray.pipeline.adapters import dit, flux, hunyuan_video, open_sora, stable_audio, wan
from cineray.pipeline.adapters.model import BlockLayout, KnownCheckpoint, Model
from cineray.pipeline.adapters.protocol import Adapter, Branch, Conditions

# transformer class -> model
MODELS: dict[str, Model] = {
    model.transformer: model
    for model in (
        wan.MODEL,
        hunyuan_video.MODEL,
        flux.MODEL,
        dit.MODEL,
        stable_audio.MODEL,
        open_sora.MODEL,
    )
}

# diffusers pipeline class -> rendering adapter
ADAPTERS: dict[str, Adapter] = {
    pipeline: adapter
    for model in MODELS.values()
    for pipeline, adapter in model.pipelines.items()
    if adapter is not None
}

# name on the command line -> checkpoint
KNOWN_MODELS: dict[str, KnownCheckpoint] = {
    name: checkpoint for model in MODELS.values() for name, checkpoint in model.checkpoints.items()
}

__all__ = [
    "ADAPTERS",
    "KNOWN_MODELS",
    "MODELS",
    "Adapter",
    "BlockLayout",
    "Branch",
    "Conditions",
    "KnownCheckpoint",
    "Model",
]
