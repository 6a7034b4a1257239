"""No text from elsewhere reaches a terminal or a log as it is, on whatever way it is printed."""

import io
import json
import os
import subprocess
import sys
import warnings

import pytest
from rich.console import Console
from waiting import PATIENCE_S

from cineray.jobs.cli import main as command_line
from cineray.jobs.cli.main import main
from cineray.jobs.cli.measure import _print_quality
from cineray.jobs.console import terminal
from cineray.jobs.console.bars import ClipBars
from cineray.jobs.console.progress import RenderProgress, checking_lines
from cineray.jobs.console.terminal import UndeliveredError, print_json, print_lines, tell
from cineray.jobs.measure.bench import BenchRow

HOSTILE = [
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[1;1H",
    "over\rwritten",
    "two\nlines",
    "\u202eright to left",
    "a\u2028b\u0085c",
    "\x9b31m\x90q\x9c",
    "x" * 600_000,
    "9" * 40,
    "[/b][red]",
    ":boom: [link=http://x]y[/link]",
    "\ud800",
    "\x00\x7f\x08",
]
SHORT = [text for text in HOSTILE if len(text) < 60 and not set(text) & {"\0", "\ud800"}]  # no argument has those
MAX_LINE = 1100


def is_harmless(text: str) -> bool:
    lines = text.split("\n")
    return all(len(line) <= MAX_LINE and not any(c in line for c in FORBIDDEN) for line in lines)


FORBIDDEN = {chr(n) for n in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x202E)} - {"\n"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "{}"],
        ["render", "a", "--out", "{out}", "--model", "{}"],
        ["render", "a", "--out", "{out}", "--cache", "{}"],
        ["render", "a", "--out", "{out}", "--cache", "magcache(profile={})"],
        ["render", "a", "--out", "{out}", "--cache", "replay:{}"],
        ["render", "a", "--out", "{out}", "--dtype", "{}"],
        ["render", "a", "--out", "{out}", "--steps", "{}"],
        ["render", "--out", "{out}", "--manifest", "{}"],
        ["render", "a", "--out", "{out}", "--{}"],
        ["render", "a", "--out", "{out}", "--address", "{}"],
        ["render", "a", "--out", "{out}", "--sp", "{}"],
        ["render", "a", "--out", "{out}", "--gangs", "{}"],
        ["verify", "--layouts", "{}"],
        ["submit", "a", "--out", "/x", "--model", "{}", "--dry-run"],
        ["{}"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_what_was_typed_is_escaped_and_shortened(arguments, tmp_path, capsys):
    filled = [a.replace("{out}", str(tmp_path / "o")) for a in arguments]
    for text in ("".join(SHORT), "x" * 100_000, "9" * 40):
        code = main([a.replace("{}", text) for a in filled])
        shown = capsys.readouterr()
        if arguments[0] != "submit":  # which prints a command to be pasted
            assert code == 2
            assert is_harmless(shown.out)
        assert not any(c in shown.out for c in FORBIDDEN)
        assert is_harmless(shown.err)
        assert "Traceback" not in shown.err


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_lines_bars_and_tables_show_it_escaped(text, capsys):
    tell(text)
    print_lines(sys.stdout, text)
    print_json({"id": text})
    with ClipBars(1) as bars:
        bars.say(text)
    with checking_lines(text) as on_line:
        on_line(10_000)
    _print_quality([BenchRow(asked=text, at=2.0, row=None, best_speedup=1.5)])
    shown = capsys.readouterr()
    assert is_harmless(shown.err)
    printed = [line for line in shown.out.splitlines() if line.startswith("{")]
    assert all(line.isascii() for line in printed)
    assert json.loads(printed[0]) == {"id": text}
    assert not any(c in shown.out for c in FORBIDDEN)
    assert "boom" in shown.out or "boom" not in text  # an emoji's name stays a name


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_on_a_terminal_too(text, monkeypatch):
    """There rich's own escape sequences are right; what stands between them must be ours."""
    out = io.StringIO()
    terminal_console = Console(file=out, force_terminal=True, width=200)
    monkeypatch.setattr("cineray.jobs.console.bars.new_console", lambda stream: terminal_console)
    with RenderProgress(1) as bars:
        bars.begin_clip(text, 4)
        bars.step(1, 4)
        bars.say(text)
        bars.bars.refresh()
    shown = out.getvalue()
    assert not any(c in shown for c in FORBIDDEN - {"\x1b", "\r"})
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    if "[red]" in text:
        assert shown.count("[/b][red]") >= 2


def test_what_libraries_print_is_escaped_and_bars_stay_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    log, screen = io.StringIO(), Terminal()
    for raw in (log, screen):
        stream = terminal._EscapedStream(raw)
        print("a prompt \x1b]0;owned\x07 of\x9b1m \x1b[36mcolours\x1b[0m", file=stream)
        stream.write("\r 50%|#### |")
        stream.write("\n\x1b[A")
    assert log.getvalue() == "a prompt \\x1b]0;owned\\x07 of\\x9b1m colours\n 50%|#### |\n\\x1b[A"
    assert screen.getvalue() == "a prompt \\x1b]0;owned\\x07 of\\x9b1m colours\n\r 50%|#### |\n\x1b[A"


LOGGING = """
import logging
from cineray.jobs.console.terminal import begin_printing
begin_printing()
logging.getLogger("cineray.caching.exchange").info("nobody asked")
logging.getLogger("cineray.caching.exchange").warning("cache: %s differ", "a\x1b]0;owned\x07")
"""


@pytest.mark.process
def test_what_is_logged_below_jobs_is_told_in_one_line_of_its_own_and_escaped():
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOGGING], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    assert run.stderr == "cache: a\\x1b]0;owned\\x07 differ\n"
    assert run.stdout == ""


def test_an_unexpected_error_is_one_line(capsys, monkeypatch):
    def fail(_arguments):
        raise KeyError("a\x1b[2Jb\nc")

    monkeypatch.setattr(command_line, "main", fail)
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # begin_printing replaces one
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delenv("CINERAY_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        command_line.run([])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cineray: unexpected error: KeyError: 'a\\x1b[2Jb")
    assert end.value.code == 1
    monkeypatch.setenv("CINERAY_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        command_line.run([])
    assert "Traceback" in capsys.readouterr().err


CHILD = "from cineray.jobs.cli.main import run; run(['models'])"


@pytest.mark.process
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ('"$0" -c "$1" >/dev/full', 2, "cineray: stdout cannot be written: No space left on device"),
        ('"$0" -c "$1" >&-', 2, "cineray: stdout is closed"),
        ('"$0" -c "$1" 2>&- >/dev/null', 0, ""),
        ('"$0" -c "$1" <&- >&- 2>&-', 2, ""),
        ('"$0" -c "$1" | true; exit ${PIPESTATUS[0]}', 0, ""),
    ],
)
def test_a_stream_that_cannot_be_written_gives_no_traceback(shell, code, said):
    run = subprocess.run(
        ["bash", "-c", shell, sys.executable, CHILD],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        timeout=PATIENCE_S,
        check=False,
    )
    assert run.returncode == code, run.stderr
    assert run.stderr.startswith(said)
    assert len(run.stderr.splitlines()) == bool(said)


def test_a_reader_that_has_gone_is_not_a_closed_stdout(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        print_json({})
        print_json({})
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UndeliveredError, match="No space left"):
            print_json({})


@pytest.mark.process
def test_torchao_says_nothing_at_every_start():
    program = "from cineray.jobs.console.terminal import begin_printing; begin_printing(); import diffusers, torchao"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
