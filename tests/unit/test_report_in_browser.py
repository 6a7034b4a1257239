"""The page's script, run by Chromium where one is installed: what it draws, and what hostile text cannot do."""

import shutil
import subprocess

import pytest
from report_pages import HOSTILE, Page, render_batch
from waiting import PATIENCE_S

from cineray.jobs.cli.main import main

pytestmark = pytest.mark.process

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


def drawn(page_file, tmp_path) -> Page:
    """The page as it is when its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    told = ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", page_file.as_uri()]
    run = subprocess.run([*command, *told], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "CONSOLE" not in run.stderr  # an error of the script, or what the page's own policy refused
    page = Page()
    page.feed(run.stdout)
    return page


@needs_chromium
def test_the_gallery_is_drawn_and_hostile_text_stays_text(checkpoint_folder, tmp_path):
    out = tmp_path / "50% #1?" / "out"
    out.parent.mkdir()
    render_batch(checkpoint_folder("wan"), out)
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    page = drawn(tmp_path / "page.html", tmp_path)
    assert [a["class"] for a in page.of("li") if "class" in a][:3] == ["card"] * 3
    videos = page.of("video")
    assert [(a["preload"], a["poster"][:16]) for a in videos] == [("none", "data:image/webp;")] * 2
    assert videos[0]["src"].startswith("./50%25%20%231%3F/out/clip-9.")
    assert page.text_in("bdi").count(HOSTILE) == 1
    assert page.of("img") == []
    assert len(page.of("script")) == 2
    assert next(a["aria-label"] for a in page.of("svg") if a.get("class") == "strip").startswith("branch cond: ")
    assert "of 3 clips" in page.text
    assert "clips done in" in page.text
    assert [text for name, text in page.texts if name == "option" and "UTC" in text]


@needs_chromium
@pytest.mark.parametrize(("model", "prompt", "tag"), [("dit", "3", "img"), ("stable_audio", "rain", "audio")])
def test_pictures_and_sounds_stand_where_videos_would(checkpoint_folder, tmp_path, model, prompt, tag):
    out = tmp_path / "50% #1?" / "out"
    out.parent.mkdir()
    command = ["render", prompt, "--model", str(checkpoint_folder(model)), "--steps", "2", "--out", str(out)]
    assert main(command) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    page = drawn(tmp_path / "page.html", tmp_path)
    assert [a["src"][:24] for a in page.of(tag)] == ["./50%25%20%231%3F/out/1."]
    assert "none" not in [a.get("class") for a in page.of("div")]  # what stands there if a file cannot be shown
    assert "hidden" in next(a for a in page.of("button") if a.get("id") == "play")
