"""What was measured once for a model: DiCache's skip costs, TeaCache's polynomials, MagCache's ratios, as JSON files.

Those of published models and of the shipped ones stand in caching/profiles/POLICY/NAME.json; each says where it comes
from. A profile fits a model whose family and whose transformer configuration agree in every value that it names.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cineray.files import read_regular
from cineray.text import printable

MAX_PROFILE_BYTES = 4 * 2**20  # 1,000 steps of two branches are 40 kB
ANY_FAMILY = "any"  # of a generic profile
COMMANDS = {"auto": "quality"}  # of `cineray calibrate`, where it is not the policy's name
SHIPPED = Path(__file__).resolve().parent / "profiles"


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
NotNegative = Annotated[Finite, Field(ge=0)]
Fraction = Annotated[Finite, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Ratios = dict[Literal["cond", "uncond"], tuple[Finite, ...]]


def _rows_of_one_length(ratios: Ratios) -> Ratios:
    if "cond" not in ratios:
        raise ValueError("must have a row for cond")
    if len({len(row) for row in ratios.values()}) != 1 or not ratios["cond"]:
        raise ValueError("each row must have one ratio per step")
    return ratios


class Profile(BaseModel):
    """What all profiles say.

    Args:
        transformer: entries of the transformer's configuration that a model must have.
        source: file and commit, or how it was calibrated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    transformer: dict[str, Any]
    source: str

    def fits(self, family: str, transformer: Mapping[str, Any]) -> bool:
        return family == self.family and all(transformer.get(k) == v for k, v in self.transformer.items())

    @property
    def digest(self) -> str:
        """Identity of its numbers, whatever its source says."""
        # by the names of the first files: a digest is in the fingerprints of clips
        numbers = self.model_dump(exclude={"source", "transformer", "family"}, by_alias=True, exclude_none=True)
        return f"sha256={hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]}"


class TeaCacheFit(BaseModel):
    """One signal's polynomial, highest power first, and the threshold that its authors propose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    coefficients: Annotated[tuple[Finite, ...], Field(min_length=1, max_length=32)]
    threshold: NotNegative


class TeaCacheProfile(Profile):
    policy: Literal["teacache"] = "teacache"
    signals: dict[Literal["timestep-embedding", "timestep-projection", "modulated-input"], TeaCacheFit]


class MagCacheProfile(Profile):
    """Ratios by branch, one per step, and the settings that the authors propose.

    Args:
        ratios: mean over tokens of |r_t| / |r_(t-1)|, r_t what all blocks add at step t; the first is 1.
        never_skip: steps, in the ratios' own count, that are always computed.
    """

    policy: Literal["magcache"] = "magcache"
    ratios: Annotated[Ratios, AfterValidator(_rows_of_one_length)]
    threshold: NotNegative
    max_skips: Count
    retention: Fraction = 0.2
    never_skip: tuple[Count, ...] = ()


class DiCacheProfile(Profile):
    """Cost of skipping each step, for `dicache`. Earlier files call `skip_costs` weights and `expected_change` usual.

    Args:
        skip_costs: by step; doubling a step's cost halves the change tolerated before it is recomputed.
        expected_change: relative change of the probe's output from the step before, mean over the calibration's clips.
        gamma_clip, threshold: that the calibration proposes.
        corrector: whether the skip costs are those of steps that are corrected; None where that was not asked.
    """

    policy: Literal["dicache"] = "dicache"
    skip_costs: tuple[Finite, ...] = Field(
        validation_alias=AliasChoices("skip_costs", "weights"), serialization_alias="weights"
    )
    expected_change: tuple[Finite, ...] = Field(
        validation_alias=AliasChoices("expected_change", "usual_change"), serialization_alias="usual_change"
    )
    gamma_clip: tuple[Finite, Finite]
    threshold: NotNegative
    corrector: bool | None = None

    @model_validator(mode="after")
    def _one_number_a_step(self) -> "DiCacheProfile":
        if len(self.skip_costs) != len(self.expected_change) or len(self.skip_costs) < 2:
            raise ValueError("skip_costs and expected_change must have one number for each of 2 or more steps")
        if min(self.skip_costs) <= 0 or min(self.expected_change) <= 0:
            raise ValueError("skip_costs and expected_change must be above 0")
        if self.gamma_clip[0] > self.gamma_clip[1]:
            raise ValueError("gamma_clip must be two numbers, low and high")
        return self

    def at(self, num_steps: int) -> tuple[list[float], list[float]]:
        """(skip costs, expected change) for another number of steps: longer steps change in proportion."""
        known = np.linspace(0, 1, len(self.skip_costs))
        wanted = np.linspace(0, 1, num_steps)
        scale = len(self.skip_costs) / num_steps
        skip_costs = np.exp(np.interp(wanted, known, np.log(self.skip_costs)))
        return skip_costs.tolist(), (np.interp(wanted, known, self.expected_change) * scale).tolist()


Curve = Annotated[tuple[Annotated[Finite, Field(ge=-20, le=20)], ...], Field(min_length=7, max_length=7)]


class FittedProfile(Profile):
    """Where over the steps of a clip the computed ones lie, for `fitted`.

    Args:
        density: logarithm of how dense they lie, at the knots of `policies/fitted.py`; at 2.8x and above.
        density_at_2x, density_at_1_4x: the same at these, with straight lines between what there is (`curve_at`).
        length: over which clean latents stay alike, as a share of the steps.
        curvature: how far skipped steps are corrected along a cubic and not a straight line, 0 to 1; None: 0.
    """

    policy: Literal["fitted"] = "fitted"
    density: Curve
    density_at_2x: Curve | None = None
    density_at_1_4x: Curve | None = None
    length: Annotated[Finite, Field(gt=0.01, le=10)]
    curvature: Annotated[Finite, Field(ge=0, le=1)] | None = None


class QualityPoint(BaseModel):
    """What a speed-up of `fitted` keeps on the calibration's clips, clip by clip: dB, and VMAF where it was known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    speedup: Annotated[Finite, Field(ge=1)]
    psnr_db: Annotated[tuple[Finite, ...], Field(min_length=2, max_length=10_000)]
    vmaf: Annotated[tuple[Finite, ...], Field(max_length=10_000)] = ()


class QualityProfile(Profile):
    """What settings of `fitted` keep, for `auto`.

    Args:
        fitted: the profile that they were measured with, as `fitted` takes it.
        fitted_digest: of that profile; "" in earlier files.
        num_steps: of the clips that they were measured on; None in earlier files.
    """

    policy: Literal["auto"] = "auto"
    fitted: str = "auto"
    fitted_digest: str = ""
    num_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    points: Annotated[tuple[QualityPoint, ...], Field(min_length=1, max_length=1000)]


AnyProfile = TypeVar("AnyProfile", TeaCacheProfile, MagCacheProfile, DiCacheProfile, FittedProfile, QualityProfile)


def shipped_profile(kind: type[AnyProfile], family: str, transformer: Mapping[str, Any]) -> AnyProfile | None:
    """The shipped profile that fits, if there is just one."""
    fitting = list(_fitting(kind, family, transformer).values())
    return fitting[0] if len(fitting) == 1 else None


def generic_profile(kind: type[AnyProfile]) -> AnyProfile:
    """The profile for models that nobody has calibrated."""
    return _load(kind, SHIPPED / kind.model_fields["policy"].default / "generic.json", "a file")


def _fitting(kind: type[AnyProfile], family: str, transformer: Mapping[str, Any]) -> dict[str, AnyProfile]:
    shipped = {path.stem: _load(kind, path, "a file") for path in _shipped_files(kind)}
    return {name: profile for name, profile in shipped.items() if profile.fits(family, transformer)}


def _shipped_files(kind: type[Profile]) -> list[Path]:
    return sorted((SHIPPED / kind.model_fields["policy"].default).glob("*.json"))


def find_profile(kind: type[AnyProfile], name_or_file: str, family: str, transformer: Mapping[str, Any]) -> AnyProfile:
    """The profile that was asked for, or else the one shipped profile that fits.

    Args:
        name_or_file: a shipped profile's name, a JSON file, or "" for any that fits.

    Raises:
        ValueError: none fits, several do, or the one asked for is not there, not a profile, or of another model.
    """
    policy = kind.model_fields["policy"].default
    shipped = {path.stem: path for path in _shipped_files(kind)}
    if name_or_file:
        path = shipped.get(name_or_file, Path(name_or_file))
        profile = _load(kind, path, f"a shipped profile ({', '.join(shipped)}) nor a file")
        if profile.family != ANY_FAMILY and not profile.fits(family, transformer):
            wants = printable(", ".join(f"{k} {v}" for k, v in profile.transformer.items()), 200)
            has = printable(", ".join(f"{k} {transformer.get(k)}" for k in profile.transformer), 200)
            shown, of = printable(name_or_file, 200), printable(profile.family, 60)
            raise ValueError(
                f"cache: {policy} profile {shown} is for another model: {of} with {wants}; this one "
                f"is {family} with {has}; calibrate one with `cineray calibrate {COMMANDS.get(policy, policy)}`"
            )
        return profile
    fitting = _fitting(kind, family, transformer)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise ValueError(
            f"cache: several {policy} profiles fit this model: {', '.join(fitting)}; say which, as "
            f"{policy}(profile={next(iter(fitting))})"
        )
    command = COMMANDS.get(policy, policy)
    raise ValueError(
        f"cache: {policy} has no profile of this model; make one with `cineray calibrate {command} --out FILE.json` "
        f"and use it as {policy}(profile=FILE.json)"
    )


def _load(kind: type[AnyProfile], path: Path, else_it_is: str) -> AnyProfile:
    policy, shown = kind.model_fields["policy"].default, printable(path, 200)
    try:
        return kind.model_validate_json(read_regular(path, MAX_PROFILE_BYTES).removeprefix(b"\xef\xbb\xbf"))
    except FileNotFoundError:
        raise ValueError(f"cache: {policy} profile {shown} is neither {else_it_is}") from None
    except OSError as error:
        raise ValueError(f"cache: {policy} profile {shown} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(map(str, first["loc"])), 100)
        reason = printable(first["msg"].removeprefix("Value error, "), 200)
        raise ValueError(f"cache: {shown} is not a {policy} profile: {where + ': ' if where else ''}{reason}") from None
    except ValueError as error:  # a null character in the name
        raise ValueError(f"cache: {policy} profile {shown} cannot be read: {error}") from None
