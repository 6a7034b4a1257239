"""What differs between models. A model is one file here and one line in `MODELS`."""

from collections.abc import Iterable, Mapping

from cineray.pipeline.adapters import (
    dit,
    flux,
    hunyuan15,
    hunyuan_image,
    hunyuan_video,
    open_sora,
    stable_audio,
    wan,
    wan22,
    wan_vace,
)
from cineray.pipeline.adapters.model import BlockLayout, KnownCheckpoint, Model
from cineray.pipeline.adapters.protocol import Adapter, Branch, Denoising, Expert, ModelConfigs

# By the class of their transformer, which decides how a transformer alone is cached. Of several with the same one the
# later stand by their family; which of them renders a checkpoint, its pipeline's class and its configuration decide.
Models = Mapping[str, Model]


def by_transformer(*models: Model) -> Models:
    """A registry of these models, for what takes one in the place of `MODELS`."""
    found: dict[str, Model] = {}
    for model in models:
        found[model.transformer if model.transformer not in found else model.family] = model
    return found


def transformers_in(models: Iterable[Model]) -> list[str]:
    """The transformer classes of these models, each once."""
    return list(dict.fromkeys(model.transformer for model in models))


def pipelines_of(models: Models) -> list[str]:
    """The diffusers pipeline classes that are rendered."""
    every = (pair for model in models.values() for pair in model.pipelines.items())
    return list(dict.fromkeys(pipeline for pipeline, adapter in every if adapter is not None))


def renderer_of(pipeline: str, configs: ModelConfigs, models: Models) -> tuple[Model, Adapter]:
    """Who renders a checkpoint here.

    Args:
        pipeline: one of `pipelines_of`.

    Raises:
        ValueError: the checkpoint is not supported, or this machine lacks what it needs; says why.
    """
    model, adapter = kind_of(pipeline, configs, models)
    reason = adapter.unsupported(configs)
    if reason is not None:
        raise ValueError(reason)
    return model, adapter.for_checkpoint(configs)


def kind_of(pipeline: str, configs: ModelConfigs, models: Models) -> tuple[Model, Adapter]:
    """Of those that render a checkpoint's pipeline class, the one whose kind it is; else the first."""
    every = [(model, adapter) for model in models.values() if (adapter := model.pipelines.get(pipeline)) is not None]
    return next((pair for pair in every if pair[1].is_of_kind(configs)), every[0])


def checkpoints_of(models: Models) -> dict[str, KnownCheckpoint]:
    """Name on the command line -> checkpoint."""
    return {name: checkpoint for model in models.values() for name, checkpoint in model.checkpoints.items()}


MODELS: Models = by_transformer(
    wan.MODEL,
    wan22.EXPERTS,
    wan22.PER_TOKEN,
    wan_vace.MODEL,
    hunyuan_video.MODEL,
    hunyuan_image.MODEL,
    hunyuan15.MODEL,
    flux.MODEL,
    dit.MODEL,
    stable_audio.MODEL,
    open_sora.MODEL,
)
PIPELINES = pipelines_of(MODELS)
KNOWN_MODELS = checkpoints_of(MODELS)

__all__ = [
    "KNOWN_MODELS",
    "MODELS",
    "PIPELINES",
    "Adapter",
    "BlockLayout",
    "Branch",
    "Denoising",
    "Expert",
    "KnownCheckpoint",
    "Model",
    "Models",
    "by_transformer",
    "checkpoints_of",
    "kind_of",
    "pipelines_of",
    "renderer_of",
    "transformers_in",
]
