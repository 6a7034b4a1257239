"""Text that came from elsewhere, made safe to show: one line, escaped, short."""

import unicodedata

MAX_LINE = 1000  # characters: the longest of our own messages, with a path of 255 in it, have half as many
MAX_QUOTED = 60


def printable(text: object, limit: int = MAX_LINE) -> str:
    """One line that a terminal shows as it is: no control or format characters, no line ends, no lone surrogates.

    Letters of every script stay; what could move a cursor, turn the writing direction or end the line becomes its
    escape (`\\x1b`, `\\u202e`, `\\n`). What is longer than `limit` characters loses its middle.
    """
    shown = str(text)
    if (
        len(shown) > limit
    ):  # before the escapes, which make some characters longer: a megabyte is not escaped for nothing
        head, tail = limit * 2 // 3, limit // 3
        shown = f"{shown[:head]}...({len(shown) - head - tail} more characters)...{shown[len(shown) - tail :]}"
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in shown)


def shorten(text: str, limit: int = MAX_QUOTED) -> str:
    """`ascii` of a text, cut in the middle of long ones: for a value that stands quoted in a message."""
    shown = text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return ascii(shown)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # blanks of all widths
