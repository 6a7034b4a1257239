"""What is read from disk is regular, bounded and parsed without a traceback."""

import os

import pytest

from cineray.files import parse_json, read_json, read_regular


def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        read_regular(tmp_path / "pipe")


@pytest.mark.parametrize("what", ["/dev/zero", "/dev", "/proc/self/cwd"])
def test_devices_and_folders_are_refused(what):
    with pytest.raises(OSError, match=r"regular file|directory"):
        read_regular(what)


def test_a_link_is_followed_only_if_it_may_be(tmp_path):
    (tmp_path / "a").write_text("[1]")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_json(tmp_path / "b") == [1]
    with pytest.raises(OSError, match="is a symbolic link"):
        read_json(tmp_path / "b", follow_links=False)


def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="has more than 4 bytes"):
        read_regular(tmp_path / "a", max_bytes=4)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"", b"\xff", b"{", b'{"a":' * 50_000])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words
        parse_json(text)


def test_a_byte_order_mark_is_no_content():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
