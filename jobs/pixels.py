"""Which commands need clips of pixels."""

from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.media.output import SOUND
from cineray.pipeline.request import InputError


def refuse_sounds(checkpoint: Checkpoint, command: str) -> None:
    """
    Raises:
        InputError: the model's clips have no pixels to be compared.
    """
    if checkpoint.model.output.noun == SOUND.noun:
        raise InputError(
            f"{command}: {checkpoint.name} makes sounds, and quality is measured in pixels here; "
            "cineray compare tells how far two sounds are apart"
        )
