"""`cineray bench quality`: many policies on the same clips, with what is measured kept in a file as it comes."""

import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cineray.jobs.equal_cost import Sweep, find_value, parse_sweep
from cineray.jobs.measure_progress import counting
from cineray.jobs.quality import QualityMeter, QualityRow, policy_text
from cineray.jobs.record import render_options, software_versions
from cineray.pipeline.loading import LoadedModel
from cineray.pipeline.request import ClipRequest, InputError, fingerprint

NUM_SEARCH_CLIPS = 2  # an open option is searched on these first clips, then measured on all


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """What was asked, and what came out.

    Args:
        asked: the policy as typed.
        at: speed-up asked for, where the policy had an option left open.
        row: None if that speed-up is out of reach.
        best_speedup: the highest one seen then.
    """

    asked: str
    at: float | None
    row: QualityRow | None
    best_speedup: float | None = None


def bench_quality(
    model: LoadedModel, requests: list[ClipRequest], policies: list[str], targets: list[float], out: Path | None
) -> list[BenchRow]:
    """Measures every policy; one with an open option once per target.

    Args:
        out: JSON file that receives each row when it is done; rows in it are not measured again, and stay.

    Raises:
        InputError: a bad policy or target, or `out` holds a bench of other clips, or cannot be written.
    """
    asked = _asked(model, policies, targets, {request.num_inference_steps for request in requests})
    file = None if out is None else _BenchFile(out, measured_on(model, requests))
    known = {} if file is None else file.rows(model)
    done: list[BenchRow] = []
    with counting("rows", len(asked)) as on_done:
        meter = QualityMeter(
            model,
            requests,
            lambda policy, clips, total: on_done(len(done), f"{policy}, clip {clips} of {total}"),
        )
        for policy, sweep, target in asked:
            row = known.get((policy, target)) or _measure(meter, policy, sweep, target)
            known[(policy, target)] = row
            done.append(row)
            if file is not None:
                file.write(list(known.values()))
            on_done(len(done))
    return done


def _asked(
    model: LoadedModel, policies: list[str], targets: list[float], steps: set[int]
) -> list[tuple[str, Sweep | None, float | None]]:
    """Every row to come: (policy as typed, its sweep, the speed-up to reach)."""
    if not policies:
        raise InputError("bench quality: give at least one policy")
    asked: list[tuple[str, Sweep | None, float | None]] = []
    for policy in policies:
        sweep = parse_sweep(policy)
        if sweep is None:
            policy_text(policy, model)
            asked.append((policy, None, None))
            continue
        if not targets:
            raise InputError(f"bench quality: {policy} leaves an option open; give speed-ups to reach, as --at 2.0")
        if sweep.text != "fewer-steps(?)":
            policy_text(sweep.at(1), model)
        asked += [(policy, sweep, target) for target in targets]
    for target in targets:
        if not 1 <= target <= min(steps):
            raise InputError(f"bench quality: --at must be 1 to {min(steps)} for {min(steps)} steps, got {target}")
    if len(steps) != 1:
        raise InputError(f"bench quality: all clips must have the same number of steps, got {sorted(steps)}")
    return asked


def _measure(meter: QualityMeter, policy: str, sweep: Sweep | None, target: float | None) -> BenchRow:
    if sweep is None or target is None:
        return BenchRow(asked=policy, at=None, row=meter.measure(policy))
    num_steps = meter.requests[0].num_inference_steps
    found, bound = find_value(sweep, target, num_steps, lambda text: meter.speedup(text, NUM_SEARCH_CLIPS))
    if found is None:
        return BenchRow(asked=policy, at=target, row=None, best_speedup=bound.best if bound else None)
    return BenchRow(asked=policy, at=target, row=meter.measure(found))


def measured_on(model: LoadedModel, requests: list[ClipRequest]) -> dict[str, Any]:
    """What the numbers depend on beside the policies."""
    options = render_options(model.options, lossless=False)
    clips = [fingerprint(request, "none", model.digest, options) for request in requests]
    return {
        "model": model.checkpoint.name,
        "weights": model.digest,
        "num_clips": len(requests),
        "clips": hashlib.sha256(" ".join(clips).encode()).hexdigest()[:16],
        "options": options,
        "device": model.options.device,
        "versions": software_versions(),
    }


class _BenchFile:
    """The rows so far, replaced as a whole each time."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = identity

    def rows(self, model: LoadedModel) -> dict[tuple[str, float | None], BenchRow]:
        """What an earlier run measured of the same clips with policies that still mean the same."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            rows = TypeAdapter(list[BenchRow]).validate_python(content["rows"])
            identity = content["bench"]
        except FileNotFoundError:
            self.write([])  # a file that cannot be written should be known before hours of rendering
            return {}
        except OSError as error:
            raise InputError(f"bench quality: {self._path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"bench quality: {self._path} is not a file of this command: {error}") from None
        if identity != self._identity:
            other = ", ".join(name for name in self._identity if identity.get(name) != self._identity[name])
            raise InputError(
                f"bench quality: {self._path} holds rows measured with another {other}; choose another --out, or "
                "delete it"
            )
        return {(row.asked, row.at): row for row in rows if _means_the_same(row, model)}

    def write(self, rows: list[BenchRow]) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        content = {"bench": self._identity, "rows": [asdict(row) for row in rows]}
        try:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            raise InputError(f"bench quality: {self._path} cannot be written: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)


def _means_the_same(row: BenchRow, model: LoadedModel) -> bool:
    """Whether a row's policy still has the options that were measured; what was out of reach is tried again."""
    try:
        return row.row is not None and policy_text(row.row.policy, model) == row.row.text
    except InputError:
        return False
