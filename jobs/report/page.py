"""From values to one HTML file that needs nothing else: no network, no other file but the videos beside it.

Text of users reaches the page in two ways only: through the template's escaping, and as JSON in a script element that
no browser executes. On top of that the page says itself that nothing but its own script, known by its hash, may run.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[..., None]]]

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A page that is to be written.

    Args:
        facts: what `--json` tells beside the page's path and size.
        remarks: lines for the person: what is not on the page, and why.
    """

    html: str
    facts: dict[str, Any]
    remarks: tuple[str, ...]


def fill_page(template: str, script: str, values: Mapping[str, Any], data: Any) -> str:
    """The whole page.

    Args:
        template: a file in `templates/` that extends `page.html`.
        script: a file there, the only code of the page.
        values: for the template; every text is escaped.
        data: for the script, as JSON can hold it.
    """
    style_text, script_text = (_TEMPLATES / "page.css").read_text("utf-8"), (_TEMPLATES / script).read_text("utf-8")
    page = (
        _environment()
        .get_template(template)
        .render(
            **values,
            style=Markup(style_text),
            script=Markup(script_text),
            policy=_policy(style_text, script_text),
            data=data,
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate, as a path may have, has no UTF-8


def link_to(target: Path, page: Path) -> str:
    """A URL by which a page finds a file: relative, quoted, whatever characters the path has."""
    relative = os.path.relpath(target, page.parent)
    quoted = "/".join(quote(os.fsencode(part), safe="") for part in relative.split(os.sep))
    return quoted if quoted.startswith(".") else f"./{quoted}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # ASCII, so that the page's encoding cannot matter; the filter escapes < > & ' as well
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": True, "separators": (",", ":"), "allow_nan": False}
    return environment


def _policy(style: str, script: str) -> str:
    """The page's content security policy; `file:` because a page opened from a disk has no origin of its own."""
    hashed = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashed[0]}'; script-src 'sha256-{hashed[1]}'; "
        "img-src 'self' file: data:; media-src 'self' file:; base-uri 'none'; form-action 'none'"
    )
