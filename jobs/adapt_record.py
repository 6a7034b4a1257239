"""What `--audit-adapt` keeps on disk, OUT/.audit/adapted.json: settings of each wave, scores of the audited clips.

A batch that was broken off goes on with the settings that its clips had, and one that is done costs nothing again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from cineray.files import read_shaped
from cineray.pipeline.request import InputError
from cineray.text import printable

NAME = "adapted.json"
_Text = Annotated[str, Field(max_length=4000)]
_Name = Annotated[str, Field(pattern="^(psnr|vmaf)$")]
_Speedup = Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)]
_Score = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Wave(_Part):
    """Clips that are rendered with the same settings.

    Args:
        begin: clips before it.
        end: clips before what follows it, as it was planned on so many gangs; None in earlier files.
        settings: speed-up by the cache as it was asked for; 1 is uncached.
    """

    begin: Annotated[int, Field(ge=0, le=2**53)]
    end: Annotated[int, Field(gt=0, le=2**53)] | None = None
    settings: dict[_Text, _Speedup]


class Scored(_Part):
    """What an audited clip kept.

    Args:
        place: in the batch.
        video: its file.
        scores: "psnr" in dB, "vmaf"; none where it could not be compared.
    """

    place: Annotated[int, Field(ge=0, le=2**53)]
    video: _Text
    scores: dict[_Name, _Score]


class AdaptRecord(_Part):
    """
    Args:
        share: of the clips that are audited.
        profiles: digest of the quality profile by the cache as it was asked for.
        waves: in order, the first from clip 0 on.
        scored: in order.
    """

    version: Literal[1] = 1
    share: Annotated[float, Field(gt=0, le=1)]
    profiles: dict[_Text, _Text]
    waves: list[Wave] = []
    scored: list[Scored] = []

    @model_validator(mode="after")
    def _in_order(self) -> "AdaptRecord":
        begins = [wave.begin for wave in self.waves]
        if begins != sorted(set(begins)) or (begins and begins[0]):
            raise ValueError("waves must be in order, from clip 0 on")
        if any(wave.settings.keys() != self.profiles.keys() for wave in self.waves):
            raise ValueError("a wave must have a setting for each of the profiles")
        return self


def read_adapt_record(folder: Path, share: float, profiles: Mapping[str, str]) -> AdaptRecord:
    """The record of a batch; a new one where there is none.

    Args:
        folder: of the uncached clips.
        share, profiles: as the record has them.

    Raises:
        InputError: something else lies there, or the record is of another share, of other floors or profiles.
    """
    path, remedy = folder / NAME, "remove it, and the clips get settings anew"
    shown = printable(str(path), 300)
    try:
        record = read_shaped(path, _RECORD, follow_links=False)
    except (FileNotFoundError, NotADirectoryError):
        return AdaptRecord(share=share, profiles=dict(profiles))
    except OSError as error:
        raise InputError(f"--audit-adapt: {shown} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError as error:
        reason = printable(str(error), 200)
        raise InputError(f"--audit-adapt: {shown} is not a record of settings: {reason}; {remedy}") from None
    if record.share != share:
        raise InputError(
            f"--audit-adapt: the clips in {shown} have their settings by --audit {record.share:g}, got {share:g}; "
            f"give that, or {remedy}"
        )
    if record.profiles != dict(profiles):
        raise InputError(f"--audit-adapt: {shown} is of other floors or quality profiles; {remedy}")
    return record


_RECORD = TypeAdapter(AdaptRecord)
