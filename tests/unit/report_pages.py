"""A small real batch, and a reader of the page that is made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from cineray.jobs.cli.main import main

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "\u2028 <!-- '\" & {{ 7*7 }} {% raw %} \u202e red \u8d64"
)
VOID = {"meta", "link", "img", "br", "input", "hr", "source"}


@dataclass
class Page(HTMLParser):
    """What a browser would see: elements with attributes, the text within, what was left open."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # (innermost element, text)
    unclosed: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_endtag(self, tag):
        assert self.unclosed.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append((self.unclosed[-1] if self.unclosed else "", data))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text_in(self, tag):
        return "".join(text for name, text in self.texts if name == tag)

    @property
    def text(self):
        return " ".join(text for name, text in self.texts if name not in ("script", "style"))

    @property
    def data(self):
        """What the script is given."""
        place = next(i for i, (_, a) in enumerate(self.elements) if a.get("id") == "data")
        assert self.elements[place] == ("script", {"type": "application/json", "id": "data"})
        return json.loads(next(text for name, text in self.texts if name == "script"))


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text("utf-8"))
    page.close()
    assert page.unclosed == []
    return page


def render_batch(model: Path, out: Path) -> None:
    """Two clips with a cache that skips, one of them with a hostile prompt; and one that fails."""
    rows = [
        {"id": "clip-10", "prompt": "a red circle", "seed": 5},
        {"id": "clip-9", "prompt": HOSTILE, "seed": 6},
        {"id": "blocked", "prompt": "a blue square", "seed": 7},
    ]
    manifest = out.parent / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "9", "--fps", "8"]
    command = ["render", "--manifest", str(manifest), "--model", str(model), "--cache", "dicache(threshold=0.5)", *size]
    assert main([*command, "--out", str(out)]) == 0
    (video,) = out.glob("blocked.*.mp4")
    for path in out.glob("blocked.*"):
        path.unlink()
    video.mkdir()  # what stands there is no clip, and cineray does not remove it
    assert main([*command, "--out", str(out)]) == 1
