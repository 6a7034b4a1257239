"""The forms of a manifest, each read as a stream of numbered rows: JSON lines, a JSON list, a table, a list of prompts.

A file's suffix says its form; without one (standard input, pipes) it is JSON, and the first character says which. What
looks like another form than its name says is refused with a line that names the form: nothing is guessed.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from cineray.jobs.manifest.row import FIELDS, NotANumber, Row, read_cells, read_row, unknown_fields
from cineray.jobs.manifest.source import MAX_LINE_CHARS, ManifestSource, read_lines
from cineray.pipeline.request import InputError
from cineray.text import shorten

EXAMPLE = '{"prompt": "..."}'
Numbered = Iterator[tuple[int, Row | list[str]]]  # a list says what is wrong with the row


class Rows(NamedTuple):
    """All rows that are not blank, as a stream; numbers count lines, or for a JSON list its clips."""

    unit: str  # "line" or "clip"
    numbered: Numbered


def read_rows(source: ManifestSource, say: Callable[[str], None]) -> Rows:
    """Reads a manifest in the form that its name says.

    Args:
        say: told what was left out on purpose.

    Raises:
        InputError: it cannot be read, or has another form; also while rows are taken.
    """
    if source.suffix in ("csv", "tsv"):
        return Rows("line", _read_table(source))
    if source.suffix == "txt":
        return Rows("line", _read_prompts(source, say))
    return _read_json(source)


def _read_json(source: ManifestSource) -> Rows:
    """JSON lines, or where nothing says that it is lines, a list."""
    head, chunks = "", source.chunks
    for chunk in chunks:
        head += chunk
        if head.strip("\ufeff \n\t") or len(head) > MAX_LINE_CHARS:
            break
    chunks = chain((head,), chunks)
    if not head.lstrip("\ufeff \n\t").startswith("["):
        return Rows("line", _read_json_lines(source, chunks))
    if source.suffix in ("jsonl", "ndjson"):
        raise InputError(
            f"manifest {source.name} looks like a JSON list, [...], and is named as JSON lines: name it .json"
        )
    return Rows("clip", _read_json_list(source, _Text(chunks)))


def _read_json_lines(source: ManifestSource, chunks: Iterator[str]) -> Numbered:
    is_first = True
    for number, line in read_lines(source, chunks):
        if isinstance(line, list):
            yield number, line
        else:
            row = _parse_json_line(number, line)
            if is_first and isinstance(row, list):
                row = _explained(source, number, line, row)
            yield number, row
        is_first = False


def _parse_json_line(number: int, line: str) -> Row | list[str]:
    try:
        value, end = _JSON.raw_decode(line)  # takes less time than `decode`, which looks for blanks around it
    except (ValueError, RecursionError):
        pass  # said below
    else:
        if end == len(line):
            return _row_of_json(number, value)
    try:
        value = _JSON.decode(line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        rest = line[error.pos :].strip()
        comma = "; a comma stands behind the object, where a line must end" if rest == "," else ""
        return [f"not JSON: {error.msg} at column {error.pos + 1}{comma}"]
    except RecursionError:
        return ["not JSON that can be read: nested too deeply"]
    except ValueError:  # Python's own limit
        return ["a number has more digits than can be read"]
    return _row_of_json(number, value)


def _row_of_json(number: int, value: Any) -> Row | list[str]:
    if isinstance(value, _Repeated):
        return [f"field {shorten(value.key)} stands there twice"]
    if not isinstance(value, dict):
        return [f"each clip must be a JSON object such as {EXAMPLE}"]
    return read_row(number, value)


class _Repeated:
    """An object that says one key twice, and so does not say what is meant."""

    def __init__(self, key: str) -> None:
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    return _Repeated(Counter(key for key, _ in pairs).most_common(1)[0][0])


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=NotANumber)


def _explained(source: ManifestSource, number: int, line: str, reasons: list[str]) -> list[str]:
    """What is wrong with the first line, which may show that the whole has another form.

    Raises:
        InputError: it has.
    """
    text = line.strip("\ufeff \t")
    form = _form_of(text)
    where = f"{source.name} line {number}"
    if form == "csv":
        raise InputError(f"{where} looks like the head of a table: name the file .csv")
    if text.startswith("{") and reasons[0].startswith("not JSON") and _is_cut(text):
        raise InputError(
            f"{where}: the object does not end on its line; write one per line, or a list, [...], in a .json file"
        )
    if '"clips"' in text[:100]:
        return [*reasons, "for a list write [...] alone, in a .json file"]
    if not text.startswith("{") and reasons[0].startswith("not JSON"):
        return [*reasons, "for one prompt per line name the file .txt"]
    return reasons


def _is_cut(text: str) -> bool:
    """Whether JSON ends before its time."""
    try:
        _JSON.decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _form_of(first_line: str) -> str | None:
    """What a first line can be nothing else than: "jsonl", "json", "csv"; None for a prompt and all else."""
    text = first_line.strip("\ufeff \t")
    if text.startswith(("{", "[")):
        try:
            value = _JSON.decode(text)
        except (ValueError, RecursionError):
            return "json" if text in ("[", "{") or re.match(r"\[\s*\{", text) else None
        return "jsonl" if isinstance(value, dict | _Repeated) else "json"
    for delimiter in _DELIMITERS:
        names = [name.strip().strip('"').lower() for name in text.split(delimiter)]
        if len(names) > 1 and "prompt" in names and set(names) & {*FIELDS} - {"prompt"}:
            return "csv"
    return None


class _Text:
    """Text that comes in pieces, as one string of which the part that was read is forgotten."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._ended = False
        self.text = ""
        self.at = 0

    def more(self) -> bool:
        """Takes in at least as much again as is left; False at the end."""
        pieces, size = [self.text[self.at :]], 0
        while not self._ended and size <= len(pieces[0]):
            chunk = next(self._chunks, None)
            if chunk is None:
                self._ended = True
            else:
                pieces.append(chunk)
                size += len(chunk)
        self.text, self.at = "".join(pieces), 0
        return size > 0

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            found = _NOT_BLANK.search(self.text, self.at)
            if found:
                self.at = found.start()
                return found[0]
            self.at = len(self.text)
            if not self.more():
                return ""

    def value(self) -> Any:
        """Reads the next JSON value.

        Raises:
            ValueError: it is none, or above MAX_LINE_CHARS.
        """
        while True:
            try:
                value, end = _JSON.raw_decode(self.text, self.at)
                if end < len(self.text) or self._ended:
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if self._ended:
                    raise
            if len(self.text) - self.at > MAX_LINE_CHARS:
                raise ValueError(f"it is no JSON, or has more than {MAX_LINE_CHARS} characters")
            self.more()


_NOT_BLANK = re.compile(r"[^\ufeff \t\n]")


def _read_json_list(source: ManifestSource, text: _Text) -> Numbered:
    text.peek()
    text.at += 1  # the bracket
    number, found = 0, text.peek()
    while found != "]":
        number += 1
        yield number, _row_of_json(number, _list_value(source, text, number))
        found = text.peek()
        if found == ",":
            text.at += 1
            found = text.peek()
            if found == "]":
                raise InputError(f"{source.name} clip {number}: not JSON: a comma stands behind the last one")
        elif found != "]":
            said = f"got {shorten(found)}" if found else "the file ends: it is not whole"
            raise InputError(f"{source.name} clip {number}: not JSON: a comma or ] must follow, {said}")
    text.at += 1
    if text.peek():
        raise InputError(f"manifest {source.name}: not JSON: something follows the list")


def _list_value(source: ManifestSource, text: _Text, number: int) -> Any:
    start = f"{source.name} clip {number}"
    try:
        return text.value()
    except json.JSONDecodeError as error:
        said = "; the file ends: it is not whole" if error.pos >= len(text.text) else ""
        raise InputError(f"{start}: not JSON: {error.msg}{said}") from None
    except RecursionError:
        raise InputError(f"{start}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        reason = "a number has more digits than can be read" if "digits" in str(error) else str(error)
        raise InputError(f"{start}: {reason}") from None


def _read_prompts(source: ManifestSource, say: Callable[[str], None]) -> Numbered:
    num_comments, is_first = 0, True
    for number, line in read_lines(source, source.chunks):
        if isinstance(line, list):
            yield number, line
            continue
        prompt = line.strip("\ufeff \t")
        if is_first and (form := _form_of(prompt)):
            kind = {"jsonl": "JSON lines", "json": "a JSON list", "csv": "the head of a table"}[form]
            raise InputError(f"{source.name} line {number} looks like {kind}: name the file .{form}")
        is_first = False
        if prompt.startswith("#"):
            num_comments += 1
        elif prompt:
            yield number, Row(number, prompt)
    if num_comments:
        lines = "1 line that begins" if num_comments == 1 else f"{num_comments} lines that begin"
        say(f"manifest {source.name}: {lines} with # left out as comments")


_DELIMITERS = (",", ";", "\t")


def _read_table(source: ManifestSource) -> Numbered:
    """Numbers are those of the line on which a record begins; a quoted cell may have several lines."""
    reader = _TableLines(source)
    head = reader.first()
    if head is None:
        return
    start = f"{source.name} line {reader.number}"
    if _form_of(head) in ("jsonl", "json"):
        raise InputError(f"{start} looks like JSON: name the file .{_form_of(head)}")
    delimiter, columns = _columns(start, head, ("\t",) if source.suffix == "tsv" else _DELIMITERS)
    records = csv.reader(reader, delimiter=delimiter, strict=True)
    while True:
        number = reader.number + 1
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            opened = "; is a quotation mark left open?" if "unexpected end" in str(error) else ""
            yield number, [f"not CSV: {error}{opened}"]
            continue
        if reader.bad:
            yield number, reader.bad
            reader.bad = []
        elif len(cells) != len(columns) and any(cells):
            quote = f'; quote a text that has "{delimiter}" in it' if len(cells) > len(columns) else ""
            yield number, [f"has {len(cells)} cells, the head has {len(columns)}{quote}"]
        elif any(cell.strip() for cell in cells):
            yield number, read_cells(number, columns, cells)


class _TableLines:
    """The lines of a table for `csv.reader`, which may ask for several per record.

    Attributes:
        number: of the line that was given last.
        bad: what is wrong with lines that were given since it was emptied.
    """

    def __init__(self, source: ManifestSource) -> None:
        self._name = source.name
        self._lines = read_lines(source, source.chunks, keeps_blank=True)
        self.number = 0
        self.bad: list[str] = []

    def first(self) -> str | None:
        """The first line that is not blank; `sep=;`, which spreadsheets write for each other, does not count.

        Raises:
            InputError: it is no text.
        """
        for line in self:
            if self.bad:
                raise InputError(f"{self._name} line {self.number}: {self.bad[0]}")
            text = line.strip("\ufeff \t\n")
            if text and not re.fullmatch(r"(?i)sep=.", text):
                return text
        return None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, str):
            return line + "\n"
        self.bad += line
        return "\n"


def _columns(start: str, head: str, delimiters: tuple[str, ...]) -> tuple[str, list[str]]:
    """(delimiter, field of each column, empty where it has no name)."""
    found = {}
    for delimiter in delimiters:
        try:
            names = [name.strip().lower() for name in next(csv.reader([head], delimiter=delimiter, strict=True))]
        except csv.Error:
            continue
        if names not in found.values():
            found[delimiter] = names
    fitting = {delimiter: names for delimiter, names in found.items() if "prompt" in names} or found
    if not fitting:
        raise InputError(f"{start}: not CSV: the head cannot be read")
    delimiter, names = max(fitting.items(), key=lambda item: len(item[1]))
    unknown = [name for name in names if name and name not in FIELDS]
    repeated = [name for name, count in Counter(names).items() if name and count > 1]
    if unknown:
        raise InputError(f"{start}: {unknown_fields('column', unknown)}")
    if repeated:
        raise InputError(f"{start}: column {shorten(repeated[0])} stands there twice")
    if "prompt" not in names:
        raise InputError(f"{start}: a column named prompt is required")
    if not names[0]:
        raise InputError(f"{start}: the first column has no name; pandas leaves it out with to_csv(index=False)")
    return delimiter, names
