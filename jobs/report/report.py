"""Which page a folder gets, and where it is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cineray.jobs.out_file import check_out, ended_by_sigterm, replace_text
from cineray.jobs.report.batch import batch_page
from cineray.jobs.report.page import Page, ProgressBar
from cineray.jobs.report.study import is_study, study_page
from cineray.pipeline.request import InputError

PAGE_NAME = "report.html"
_COMMAND = "report"


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPage:
    """A page on disk."""

    path: Path
    num_bytes: int
    page: Page


def write_report(folder: Path, out: Path | None, progress_bar: ProgressBar) -> WrittenPage:
    """Reads a folder, changes nothing in it, and writes its page in one step.

    Args:
        out: beside the videos unless given.
        progress_bar: shows how far it is.

    Raises:
        InputError: no folder that a page can be made of; or the page cannot be written.
    """
    make = _maker_for(folder)
    out = folder / PAGE_NAME if out is None else out
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"{_COMMAND}: --out must end with .html, got {out}; give a file, as {PAGE_NAME}")
    check_out(out, _COMMAND)
    with ended_by_sigterm():
        page = make(folder, out, progress_bar)
        replace_text(out, page.html, _COMMAND)
    return WrittenPage(path=out, num_bytes=out.stat().st_size, page=page)


def _maker_for(folder: Path) -> Callable[[Path, Path, ProgressBar], Page]:
    """What makes the page of a folder of this kind. Here another kind is told apart by its own file."""
    try:
        os.listdir(folder)
    except OSError as error:
        raise InputError(f"{_COMMAND}: {folder} cannot be read: {error.strerror}; give a render's --out") from None
    return study_page if is_study(folder) else batch_page
