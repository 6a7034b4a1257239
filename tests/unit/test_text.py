"""What a terminal is shown of foreign text."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE_S

from cineray.text import MAX_LINE, printable


@given(st.text(st.characters(exclude_categories=[]), max_size=3000))
def test_every_text_becomes_one_printable_line(text):
    shown = printable(text)
    assert all(c.isprintable() or c in "\u00a0\u3000" or not c.isascii() for c in shown)
    assert len(shown.splitlines()) <= 1
    assert not any(c in shown for c in "\x1b\x9b\u202e\u2066\u2028\n\r\x07")
    assert len(shown) <= 10 * (MAX_LINE + 40)
    shown.encode("utf-8")  # no lone surrogate


def test_letters_stay_and_escapes_are_written_out():
    assert printable("Grüße 日本 🎬\u3000x") == "Grüße 日本 🎬\u3000x"
    assert printable("\x1b]0;owned\x07a\nb\u202e") == r"\x1b]0;owned\x07a\nb\u202e"


def test_a_long_text_loses_its_middle():
    shown = printable("a" * 600_000 + "end")
    assert len(shown) < MAX_LINE + 60
    assert shown.endswith("end")
    assert "more characters" in shown


@pytest.mark.process
def test_a_reader_that_has_gone_ends_nothing():
    tell = "from cineray.jobs.console.terminal import tell\nfor n in range(20000): tell(n)\n"
    script = f"{tell}open('/dev/fd/3', 'w').write('on')"
    read, wrote = os.pipe()
    run = subprocess.Popen(
        ["bash", "-c", f'"$0" -c "$1" 3>&{wrote} 2>&1 | head -1', sys.executable, script],
        stdout=subprocess.PIPE,
        pass_fds=[wrote],
    )
    os.close(wrote)
    assert run.communicate(timeout=PATIENCE_S)[0] == b"0\n"
    with os.fdopen(read) as end:
        assert end.read() == "on"
