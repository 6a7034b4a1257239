"""What differs between models. A model is one file here and one line in `MODELS`."""

from collections.abc import Mapping

from cineray.pipeline.adapters import dit, flux, hunyuan_video, open_sora, stable_audio, wan
from cineray.pipeline.adapters.model import BlockLayout, KnownCheckpoint, Model
from cineray.pipeline.adapters.protocol import Adapter, Branch, Denoising, Expert

Models = Mapping[str, Model]  # by the class of their transformer


def by_transformer(*models: Model) -> Models:
    """A registry of these models, for what takes one in the place of `MODELS`."""
    return {model.transformer: model for model in models}


def adapters_of(models: Models) -> dict[str, Adapter]:
    """diffusers pipeline class -> rendering adapter."""
    every = (pair for model in models.values() for pair in model.pipelines.items())
    return {pipeline: adapter for pipeline, adapter in every if adapter is not None}


def model_of(pipeline: str, models: Models) -> Model:
    """The model that a diffusers pipeline class renders with, one of `adapters_of`."""
    return next(model for model in models.values() if model.pipelines.get(pipeline) is not None)


def checkpoints_of(models: Models) -> dict[str, KnownCheckpoint]:
    """Name on the command line -> checkpoint."""
    return {name: checkpoint for model in models.values() for name, checkpoint in model.checkpoints.items()}


MODELS: Models = by_transformer(
    wan.MODEL,
    hunyuan_video.MODEL,
    flux.MODEL,
    dit.MODEL,
    stable_audio.MODEL,
    open_sora.MODEL,
)
ADAPTERS = adapters_of(MODELS)
KNOWN_MODELS = checkpoints_of(MODELS)

__all__ = [
    "ADAPTERS",
    "KNOWN_MODELS",
    "MODELS",
    "Adapter",
    "BlockLayout",
    "Branch",
    "Denoising",
    "Expert",
    "KnownCheckpoint",
    "Model",
    "Models",
    "adapters_of",
    "by_transformer",
    "checkpoints_of",
    "model_of",
]
