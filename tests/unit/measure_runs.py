"""Runs `cineray bench` and `cineray calibrate` on tiny random models, two clips at a time."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cineray.jobs.cli.main import main

SIZE = ["--width", "32", "--height", "32", "--frames", "5"]


@dataclass(frozen=True)
class MeasureRuns:
    """Calls as `cineray WORDS ...`; (exit code, the JSON object of stdout or None, stderr)."""

    checkpoint_folder: Callable[[str], Path]
    manifest: Path
    capsys: pytest.CaptureFixture[str]

    def __post_init__(self) -> None:
        rows = [{"prompt": "a red circle", "seed": seed} for seed in (1, 2)]
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, *words: str, model: str = "wan", steps: int = 8) -> tuple[int, dict[str, Any] | None, str]:
        where = ["--model", str(self.checkpoint_folder(model)), "--manifest", str(self.manifest)]
        code = main([*words, *where, *SIZE, "--steps", str(steps)])
        said = self.capsys.readouterr()
        last = said.out.strip().rsplit("\n", 1)[-1]
        return code, json.loads(last) if last.startswith("{") else None, said.err
