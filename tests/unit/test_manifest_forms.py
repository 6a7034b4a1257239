"""Manifests as people write them: encodings, line ends, lists, tables, prompts, pipes; and what is said of others."""

import json
import os
import signal
import subprocess
import sys

import pytest
from waiting import PATIENCE_S, wait_for

from cineray.jobs.manifest.forms import read_rows
from cineray.jobs.manifest.row import Row
from cineray.jobs.manifest.row_file import RowFile
from cineray.jobs.manifest.source import opened
from cineray.pipeline.request import InputError


@pytest.fixture
def read(tmp_path):
    """Factory: (file name, content) -> (rows, notes)."""

    def rows(name: str, content: bytes | str):
        path, notes = tmp_path / name, []
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with opened(path) as source:
            found = [row for _, row in read_rows(source, notes.append).numbered]
        return found, notes

    return rows


@pytest.fixture
def refused(read):
    """Factory: what is said of a manifest that is refused as a whole; of rows, the first that is bad."""

    def said(name: str, content: bytes | str) -> str:
        try:
            rows, _ = read(name, content)
        except InputError as error:
            (line,) = error.lines
            return line
        return "; ".join(next(row for row in rows if isinstance(row, list)))

    return said


LINES = '{"prompt": "a", "seed": 1}\n{"prompt": "b \u00e9 \u732b", "id": "x"}\n'
ROWS = [Row(1, "a", seed=1), Row(2, "b \u00e9 \u732b", id="x")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(read, encoding, end):
    assert read("m.jsonl", LINES.replace("\n", end).encode(encoding))[0] == ROWS
    listed = json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1, ensure_ascii=False)
    assert read("m.json", listed.replace("\n", end).encode(encoding))[0] == ROWS


def test_marked_text_and_tables_in_utf_16(read):
    assert read("m.txt", "\ufeffa\r\nb\r\n".encode("utf-16-le"))[0] == [Row(1, "a"), Row(2, "b")]
    assert read("m.csv", "prompt\tseed\r\na\t3\r\n".encode("utf-16"))[0] == [Row(2, "a", seed=3)]


def test_a_byte_that_is_not_utf_8_is_named_with_its_line(refused):
    for name in ("m.jsonl", "m.txt", "m.csv"):
        content = {
            "m.jsonl": b'{"prompt": "a"}\n{"prompt": "caf\xe9"}',
            "m.txt": b"a\ncaf\xe9",
            "m.csv": b"prompt\ncaf\xe9",
        }
        said = refused(name, content[name])
        assert "not UTF-8: byte 0xe9 at column" in said
    assert "m.jsonl: not UTF-16, as its first bytes say, after line 1" in refused(
        "m.jsonl", '{"prompt": "a"}\n'.encode("utf-16") + b"\x00"
    )


def test_marks_in_the_middle_are_those_of_files_that_were_joined(read):
    assert read("m.jsonl", ('\ufeff{"prompt": "a"}\n' * 2).encode())[0] == [Row(1, "a"), Row(2, "a")]


def test_nulls_are_not_given_and_whole_floats_are_whole(read):
    assert read("m.jsonl", '{"prompt": "a", "seed": 42.0, "steps": null, "id": 7.0, "guidance": -0.0}')[0] == [
        Row(1, "a", id="7", seed=42, guidance=0.0)
    ]
    assert str(read("m.jsonl", '{"prompt": "a", "guidance": -0.0}')[0][0].guidance) == "0.0"


@pytest.mark.parametrize("name", ["m.json", "m", "m.dat"])
def test_a_list_on_one_line_or_many_is_counted_by_its_clips(read, name):
    clips = [{"prompt": f"p{i}", "seed": i} for i in range(3000)]
    for indent in (None, 2):
        rows, _ = read(name, json.dumps(clips, indent=indent))
        assert rows == [Row(i + 1, f"p{i}", seed=i) for i in range(3000)]
    assert read(name, "[]")[0] == []
    assert read(name, "\n\n" + LINES)[0] == [row._replace(number=row.number + 2) for row in ROWS]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"prompt": "a"},]', "clip 1: not JSON: a comma stands behind the last one"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "clip 1: not JSON: a comma or ] must follow, got '{'"),
        ('[{"prompt": "a"}', "clip 1: not JSON: a comma or ] must follow, the file ends: it is not whole"),
        ('[{"prompt": "a"}, {"prom', "clip 2: not JSON: Unterminated string"),
        ("[", "clip 1: not JSON: Expecting value"),
        ("[" * 100_000, "clip 1: not JSON that can be read: nested too deeply"),
        ('[{"prompt": "a"}] x', "not JSON: something follows the list"),
        ('["a", "b"]', "each clip must be a JSON object"),
        ("[12345678901, 2]", "each clip must be a JSON object"),
        ('[{"prompt": "a", "prompt": "b"}]', "field 'prompt' stands there twice"),
        (f'[{{"prompt": "a", "seed": {"1" * 5000}}}]', "clip 1: a number has more digits than can be read"),
        (f'[{{"prompt": "{"x" * 3_000_000}"}}]', "clip 1: it is no JSON, or has more than 1000000 characters"),
        ('{"clips": [{"prompt": "a"}]}', "for a list write [...] alone, in a .json file"),
        ('{\n "prompt": "a"\n}', "line 1: the object does not end on its line"),
    ],
)
def test_lists_that_are_none(refused, content, said):
    assert said in refused("m.json", content)


def test_tables(read):
    table = 'Prompt,seed,guidance,id,negative_prompt\r\n"a, ""b""\r\nc",42.0,,x,\r\n\r\n,,,,\r\nd,, 4.5 ,1,no\r\n'
    assert read("m.csv", table.encode("utf-8-sig"))[0] == [
        Row(2, 'a, "b"\nc', id="x", seed=42),
        Row(6, "d", id="1", guidance=4.5, negative_prompt="no"),
    ]
    assert read("m.csv", "sep=;\nseed;prompt;\n1;a, b;\n")[0] == [Row(3, "a, b", seed=1)]
    assert read("m.tsv", "prompt\tseed\na, b; c\t1\n")[0] == [Row(2, "a, b; c", seed=1)]
    assert read("m.csv", "prompt\n" + "".join(f"p{i}\n" for i in range(9999)))[0][-1] == Row(10000, "p9998")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("promt,seed\na,1\n", "line 1: unknown column 'promt'; allowed: prompt, id"),
        ("seed,id\n1,a\n", "line 1: a column named prompt is required"),
        ("prompt,prompt\na,b\n", "line 1: column 'prompt' stands there twice"),
        (",prompt\n0,a\n", "line 1: the first column has no name; pandas leaves it out with to_csv(index=False)"),
        ("prompt,\na,b\n", "'b' stands in a column that has no name"),
        ("prompt\na cat, a dog\n", 'has 2 cells, the head has 1; quote a text that has "," in it'),
        ("prompt,seed\na\n", "has 1 cells, the head has 2"),
        ("prompt,seed\na,NaN\n", "seed must be a whole number, got the text 'NaN'"),
        ("prompt,seed\na,1.5\n", "seed must be a whole number, got the text '1.5'"),
        ("prompt,seed\na,1_0\n", "seed must be a whole number, got the text '1_0'"),
        ("prompt;guidance\na;4,5\n", "guidance must be a number, got the text '4,5'"),
        ("prompt,guidance\na,inf\n", "guidance must be a number, got the text 'inf'"),
        ("prompt,seed\n,1\n", "prompt is required"),
        ('prompt,seed\n"a,1\n', "not CSV: unexpected end of data; is a quotation mark left open?"),
        ('prompt,seed\n"a"b,1\n', "not CSV: ',' expected after '\"'"),
        ('{"prompt": "a"}\n', "line 1 looks like JSON: name the file .jsonl"),
        ('[{"prompt": "a"}]\n', "line 1 looks like JSON: name the file .json"),
    ],
)
def test_tables_that_are_none(refused, content, said):
    assert said in refused("m.csv", content)


def test_prompts_and_comments(read):
    rows, notes = read("m.txt", "# mine\n  a cat, [wide]\n\n#sunset\n{red|blue} b\u2028c\n")
    assert rows == [Row(2, "a cat, [wide]"), Row(5, "{red|blue} b\u2028c")]
    assert notes == [notes[0]]
    assert notes[0].endswith("m.txt: 2 lines that begin with # left out as comments")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.txt", '{"prompt": "a"}\n', "line 1 looks like JSON lines: name the file .jsonl"),
        ("m.txt", '[\n{"prompt": "a"}]\n', "line 1 looks like a JSON list: name the file .json"),
        ("m.txt", "prompt,seed\na,1\n", "line 1 looks like the head of a table: name the file .csv"),
        ("m.jsonl", '[{"prompt": "a"}]', "looks like a JSON list, [...], and is named as JSON lines: name it .json"),
        ("m.jsonl", "prompt,seed\na,1\n", "line 1 looks like the head of a table: name the file .csv"),
        ("m.jsonl", "a red circle\n", "for one prompt per line name the file .txt"),
        ("m.csv", b"PK\x03\x04rest", "is a zip archive or a spreadsheet; save the sheet as CSV"),
        ("m.jsonl", b"\x1f\x8b\x08", "is compressed; unpack it"),
        ("m.jsonl", b"\0" * 100_000, "not JSON"),
        ("m.csv", b"\xff" * 100, "line 1: not UTF-8: byte 0xff at column 1"),
    ],
)
def test_what_has_another_form_than_its_name_says_is_told_the_form(refused, name, content, said):
    assert said in refused(name, content)


def test_what_is_neither_a_file_nor_a_pipe_is_refused(tmp_path):
    for path, said in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none.jsonl", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null"),
        ("/dev/zero", "Is neither a file nor a pipe"),
    ):
        with (
            pytest.raises(InputError, match=f"^manifest [^ ]* cannot be read: [^:]*{said}[^:]*$"),
            opened(type(tmp_path)(path)),
        ):
            pass


def test_rows_that_wait_in_a_file_come_back_as_they_were_each_time():
    rows = RowFile("rows")
    for i in range(200):
        rows.add((i, None, "a\ud83d\u2028", 0.5))
    assert len(rows) == 200
    assert list(rows) == list(rows) == [[i, None, "a\ud83d\u2028", 0.5] for i in range(200)]


def test_no_room_for_them_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="no temporary file for rows: No such file or directory; set TMPDIR"):
        RowFile("rows")


RENDER = [sys.executable, "-m", "cineray", "render", "--out", "out", "--manifest"]


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pipe_that_nobody_writes_to_is_waited_for_until_a_signal(tmp_path, number):
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen(
        [*RENDER, "pipe"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}
    )
    writer = wait_for(lambda: _open_for_writing(tmp_path / "pipe"))
    assert writer
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    os.close(writer)
    assert process.returncode in (128 + number, -number), stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def _open_for_writing(pipe) -> int | None:
    """None as long as nobody reads."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
