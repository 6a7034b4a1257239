"""`cineray bench quality`: many policies on the same clips, with what is measured kept in a file as it comes."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cineray.files import read_json, shaped
from cineray.jobs.console.measure import progress_bar
from cineray.jobs.measure.equal_cost import Sweep, find_value, parse_sweep
from cineray.jobs.measure.quality import NUM_TIMED_CLIPS, QualityMeter, QualityRow, policy_text
from cineray.jobs.measure.quality_tables import files_of
from cineray.jobs.out_file import check_out, ended_by_sigterm, locked, replace_text
from cineray.jobs.output.record import render_options, software_versions
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.request import ClipRequest, InputError, fingerprint

_COMMAND = "bench quality"
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


_ROWS = TypeAdapter(list[BenchRow])


def bench_quality(
    model: LoadedModel,
    requests: list[ClipRequest],
    policies: list[str],
    targets: list[float],
    out: Path | None,
    num_timed: int = NUM_TIMED_CLIPS,
) -> list[BenchRow]:
    """Measures every policy; one with an open option once per target.

    Args:
        out: JSON file that receives each row when it is done; rows in it are not measured again, and stay. Several
            processes may measure into one file.
        num_timed: clips of each policy that are rendered in turn with the uncached ones, for their time.

    Raises:
        InputError: a bad policy or target, or `out` holds a bench of other clips, or cannot be written.
    """
    asked = _asked(model, policies, targets, {request.num_inference_steps for request in requests})
    file = None if out is None else _BenchFile(out, measured_on(model, requests), model)
    known = {} if file is None else file.add({})
    done: list[BenchRow] = []
    with ended_by_sigterm(), progress_bar("rows", len(asked)) as on_done:
        meter = QualityMeter(
            model,
            requests,
            lambda policy, clips, total: on_done(len(done), f"{policy}, clip {clips} of {total}"),
            num_timed,
        )
        for policy, sweep, target in asked:
            row = known.get((policy, target)) or _measure(meter, policy, sweep, target)
            done.append(row)
            if file is not None:
                known = file.add({(policy, target): row})
            on_done(len(done))
    return done


def in_short(row: BenchRow) -> dict[str, Any]:
    """A row as others read it: what ran, its cost and its quality, beside the whole row."""
    found = row.row
    if found is None:
        return {"policy": row.asked}
    return {
        "policy": found.policy,
        "num_clips": found.num_clips,
        "cost": found.cost,
        "wall_ratio": found.wall_ratio,
        **_quality_in_short(found),
    }


def _quality_in_short(row: QualityRow) -> dict[str, Any]:
    if row.is_of_sounds:
        kept = {"snr_mean": row.snr_db, "snr_worst": row.worst_snr_db, "snr_ci95": row.snr_ci95}
        return kept | {"log_stft_db": row.log_stft_db, "stft_convergence": row.stft_convergence}
    kept = {"psnr_mean": row.psnr_db, "psnr_worst": row.worst_psnr_db, "psnr_ci95": row.psnr_ci95}
    return kept | {"ssim": row.ssim, "vmaf": row.vmaf}


def write_tables(folder: Path, rows: list[BenchRow], title: str) -> None:
    """Writes the rows that were measured as CSV, Markdown, PNG and SVG.

    Raises:
        InputError: the folder cannot be written.
    """
    measured = list({row.row.policy: row.row for row in rows if row.row is not None}.values())
    if not measured:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files_of(measured, title).items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise InputError(f"{_COMMAND}: {folder} cannot be written: {error.strerror}") from None


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
    pictures, adapter = Pictures(), model.adapter
    pinned = [adapter.effective(pictures.pinned(request)) for request in requests]
    clips = [fingerprint(request, "none", model.digest, options) for request in pinned]
    return {
        "model": model.checkpoint.name,
        "weights": model.digest,
        "num_clips": len(requests),
        "clips": hashlib.sha256(" ".join(clips).encode()).hexdigest()[:16],
        "options": options,
        "device": model.options.device,
        "versions": software_versions(),
    }


_Rows = dict[tuple[str, float | None], BenchRow]


class _BenchFile:
    """The rows of all who measure into the file: read, joined with ours and replaced as a whole, under a lock."""

    def __init__(self, path: Path, identity: dict[str, Any], model: LoadedModel) -> None:
        check_out(path, _COMMAND)
        self._path = path
        self._identity = identity
        self._model = model

    def add(self, rows: _Rows) -> _Rows:
        """Puts rows there; returns all that were measured of the same clips with policies that still mean the same."""
        with locked(self._path, _COMMAND):
            all_rows = self._read() | rows
            content = {"bench": self._identity, "rows": [asdict(row) for row in all_rows.values()]}
            replace_text(self._path, json.dumps(content, indent=1) + "\n", _COMMAND)
        return {place: row for place, row in all_rows.items() if row.row is not None}  # else it is tried again

    def _read(self) -> _Rows:
        try:
            content = read_json(self._path, follow_links=False)
            identity, rows = content["bench"], shaped(content["rows"], _ROWS)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(f"{_COMMAND}: {self._path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{_COMMAND}: {self._path} is not a file of this command: {error}") from None
        if not isinstance(identity, dict):
            raise InputError(f"{_COMMAND}: {self._path} is not a file of this command: bench: not an object")
        if identity != self._identity:
            other = ", ".join(name for name in self._identity if identity.get(name) != self._identity[name])
            raise InputError(
                f"{_COMMAND}: {self._path} holds rows measured with different {other or 'version'}; choose another "
                "--out, or delete it"
            )
        return {(row.asked, row.at): row for row in rows if _is_of_use(row, self._model)}


def _is_of_use(row: BenchRow, model: LoadedModel) -> bool:
    """Whether a row's numbers are numbers, and its policy still has the options that were measured."""
    numbers = [row.at, row.best_speedup, *(asdict(row.row).values() if row.row else ())]
    if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        return False
    try:
        return row.row is None or policy_text(row.row.policy, model) == row.row.text
    except InputError:
        return False
