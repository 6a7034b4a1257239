"""`cineray render` as a Ray job: what is uploaded, and the command line of `ray job submit`."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cineray
from cineray.jobs.console.terminal import tell, write
from cineray.jobs.manifest.check import BadRows, spool
from cineray.jobs.manifest.forms import read_rows
from cineray.jobs.manifest.row import Row
from cineray.jobs.manifest.source import STDIN, opened
from cineray.pipeline.request import InputError
from cineray.text import printable

# what is left of a clip's step, and the driver's own clean-up; Ray's default of 3 s kills it before
STOP_WAIT_S = 45
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A batch to render on a cluster.

    Args:
        address: of the cluster's dashboard; None where RAY_API_SERVER_ADDRESS says it.
        render: arguments of `cineray render`, without its prompts and --manifest.
        files: those that options of `render` name, by the option.
        from_source: upload this cineray; else the cluster's nodes have one installed.
    """

    address: str | None
    render: tuple[str, ...]
    prompts: tuple[str, ...]
    manifest: Path | None
    negative_prompt: str | None
    files: Mapping[str, Sequence[Path]]
    out: Path
    model: str
    from_source: bool
    no_wait: bool

    def __post_init__(self) -> None:
        if not self.out.is_absolute():
            raise InputError(
                f"submit: --out must be an absolute path on storage that every node sees, got {self.out}; a relative "
                "one would lie in the job's own folder and be lost"
            )
        if Path(self.model).exists() and not Path(self.model).is_absolute():
            raise InputError(
                f"submit: a model's folder must be an absolute path that every node sees, got {self.model}"
            )
        if bool(self.prompts) == bool(self.manifest):
            raise InputError("submit: give prompts or --manifest, one of them")
        if self.manifest not in (None, STDIN) and not (self.manifest.is_file() or self.manifest.is_fifo()):
            raise InputError(f"submit: manifest {self.manifest} is not a file")
        if self.manifest is not None and self.negative_prompt is not None:
            raise InputError("submit: with --manifest, write negative_prompt into its lines")
        for option, paths in self.files.items():
            for path in paths:
                if not path.is_absolute():
                    raise InputError(f"submit: {option} must be an absolute path that every node sees, got {path}")


def runtime_env(submission: Submission) -> dict[str, object]:
    """What the job's processes get beside the image."""
    env: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    if submission.from_source:
        # the folder is named as it is imported, and Ray follows its links; it is known by its content
        env["py_modules"] = [str(Path(cineray.__file__).parent)]
    return env


def command(submission: Submission, working_dir: Path) -> list[str]:
    """`ray job submit` with all its arguments; no prompt is among them, so none reaches a shell."""
    ray = ["ray", "job", "submit"]
    if submission.address:
        ray += ["--address", submission.address]
    if submission.no_wait:
        ray.append("--no-wait")
    ray += ["--working-dir", str(working_dir), "--runtime-env-json", json.dumps(runtime_env(submission))]
    render = ["python", "-m", "cineray", "render", "--manifest", MANIFEST, "--address", "auto"]
    return [*ray, "--", *render, *submission.render]


def environment(env: Mapping[str, str], home: Path | None = None) -> dict[str, str]:
    """What to add to the environment: clients of a cluster with token authentication must say so.

    Args:
        home: where Ray's own token lies; by default this user's, who may have none that can be read.
    """
    token = os.path.join(os.path.expanduser("~") if home is None else home, ".ray", "auth_token")
    has_token = "RAY_AUTH_TOKEN" in env or "RAY_AUTH_TOKEN_PATH" in env or os.path.isfile(token)
    return {"RAY_AUTH_MODE": "token"} if has_token and "RAY_AUTH_MODE" not in env else {}


def write_manifest(submission: Submission, folder: Path) -> None:
    """Puts the clips into the folder that is uploaded, as JSON lines whatever form they came in; ids stay.

    Raises:
        InputError: rows that cannot be read; an image's path is meant from the manifest's folder, which stays here.
    """
    rows = (Row(number, prompt) for number, prompt in enumerate(submission.prompts, 1))
    if submission.manifest is not None:
        with opened(submission.manifest) as source:
            notes: list[str] = []
            unit, numbered = read_rows(source, notes.append)
            bad = BadRows(source.name, unit)
            spooled, _ = spool(numbered, _image_problem, bad, lambda _: None)
            bad.raise_any()
            tell(*(f"cineray: {note}" for note in notes))
        rows = (Row(*values) for _, *values in spooled)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):
            given = {name: value for name, value in row._asdict().items() if value is not None and name != "number"}
            if submission.negative_prompt is not None:
                given["negative_prompt"] = submission.negative_prompt
            if row.id is None and row.number != number:
                given["id"] = row.clip_id  # its number in the form it came in
            file.write(json.dumps(given) + "\n")


def _image_problem(row: Row) -> list[str]:
    files = {
        "image": (row.image,),
        "reference_images": row.reference_images or (),
        "control_video": (row.control_video,),
        "control_mask": (row.control_mask,),
    }
    return [
        f"{name} must be an absolute path that every node sees"
        for name, paths in files.items()
        if any(path is not None and not Path(path).is_absolute() for path in paths)
    ]


def as_text(arguments: Sequence[str], added: Mapping[str, str]) -> str:
    """The command as text, for a person to read or to paste into a shell."""
    return shlex.join(
        ["env", *(f"{name}={value}" for name, value in added.items()), *arguments] if added else arguments
    )


def submit(submission: Submission) -> int:
    """Uploads and starts the job, and follows its log unless told not to; the exit code of `ray job submit`."""
    added = environment(os.environ)
    with TemporaryDirectory(prefix="cineray-submit-") as folder:
        write_manifest(submission, Path(folder))
        arguments = [sys.executable, "-m", "ray.scripts.scripts", *command(submission, Path(folder))[1:]]
        unbuffered = {"PYTHONUNBUFFERED": "1"}  # its lines come one by one, through this process
        with subprocess.Popen(
            arguments, env=os.environ | added | unbuffered, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as job:
            assert job.stdout is not None
            try:
                for line in job.stdout:  # the job's log: what it quotes is foreign, and its JSON may be long
                    write(sys.stdout, printable(line.rstrip("\n"), limit=len(line)) + "\n")
            except BaseException:
                job.kill()
                raise
        return job.returncode
