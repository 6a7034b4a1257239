"""The one place where lines are printed: what came from elsewhere is escaped, and a closed pipe ends nothing."""

import json
import os
import sys
from typing import Any, TextIO

from cineray.text import printable


def tell(*lines: object) -> None:
    """Lines on stderr, each escaped and shortened by `printable`; silent once nobody reads them any more."""
    print_lines(sys.stderr, *lines)


def print_lines(stream: TextIO, *lines: object) -> None:
    """The same on stdout or stderr."""
    write(stream, "".join(f"{printable(line)}\n" for line in lines))


def print_json(content: Any) -> None:
    """One JSON object on stdout, in ASCII: the same under every locale."""
    write(sys.stdout, json.dumps(content) + "\n")


def write(stream: TextIO, text: str) -> None:
    """Text of our own. A reader that has gone (`| head -1`) is no reason to stop: the work goes on without it."""
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError:
        stream.write(text.encode(stream.encoding or "ascii", "backslashreplace").decode(stream.encoding or "ascii"))
        stream.flush()
    except OSError:  # EPIPE, a terminal that was closed, a full /dev/full
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # what later lines, and other libraries, write goes nowhere
