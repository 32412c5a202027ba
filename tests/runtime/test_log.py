"""Logs in conmon's format, read at any offset while they grow."""

import json
import random
from pathlib import Path

import pytest

from runtime.log import LogReader

TIME = b"2026-01-02T03:04:05.123456789+00:00"


def record(content: bytes, stream: bytes = b"stdout") -> bytes:
    """What conmon writes for one piece of output."""
    full = content.endswith(b"\n")
    return TIME + b" " + stream + (b" F " + content if full else b" P " + content + b"\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the log will be."""
    return tmp_path / "log"


def append(path: Path, data: bytes) -> None:
    """Let it grow."""
    with open(path, "ab") as file:
        file.write(data)


def texts(reader: LogReader) -> list[tuple[str, str]]:
    """Stream and text of all JSON lines."""
    lines = reader.read_json(0, 1 << 30).splitlines()
    return [(line["stream"], line["text"]) for line in map(json.loads, lines)]


def test_before_the_first_output(path: Path) -> None:
    reader = LogReader(path)
    assert (reader.text_size(), reader.mtime_ns()) == (0, 0)
    assert reader.read_text(0, 10) == reader.read_json(5, 10) == b""


def test_text_and_json(path: Path) -> None:
    append(path, record(b"one\n") + record(b"two", b"stderr") + record(b" F three\n", b"stderr"))
    reader = LogReader(path)
    assert reader.read_text(0, 100) == b"one\ntwo F three\n"
    assert reader.read_text(2, 4) == b"e\ntw"
    assert reader.read_text(100, 10) == b""
    assert json.loads(reader.read_json(0, 1000).splitlines()[0]) == {
        "time": "2026-01-02T03:04:05.123456789Z",
        "stream": "stdout",
        "text": "one\n",
    }
    assert texts(reader)[1:] == [("stderr", "two"), ("stderr", " F three\n")]
    assert reader.mtime_ns() == path.stat().st_mtime_ns


def test_a_line_counts_when_it_is_finished(path: Path) -> None:
    whole = record(b"whole\n")
    append(path, whole + whole[:30])
    reader = LogReader(path)
    assert reader.text_size() == 6
    append(path, whole[30:])
    assert reader.read_text(0, 100) == b"whole\nwhole\n"
    assert reader.text_size() == 12


def test_what_is_no_record_is_left_out(path: Path) -> None:
    append(path, b"rubbish\n" + record(b"a\n") + TIME[:20] + record(b"lost\n") + b"\n\0\0\n")
    append(path, record(b"b\n"))
    reader = LogReader(path)
    assert reader.text_size() == 4
    assert reader.read_text(0, 100) == b"a\nb\n"
    assert texts(reader) == [("stdout", "a\n"), ("stdout", "b\n")]


def test_a_file_of_zeros_does_not_stop_the_reader(path: Path) -> None:
    append(path, record(b"a\n") + bytes(1_000_000) + b"\n" + record(b"b\n"))
    reader = LogReader(path)
    assert reader.text_size() == 4
    assert reader.read_text(0, 100) == b"a\nb\n"


def test_characters_that_were_cut(path: Path) -> None:
    euro, smile = "€".encode(), "😀".encode()
    append(
        path, record(b"1" + euro[:2]) + record(b"err\n", b"stderr") + record(euro[2:] + smile[:3])
    )
    append(path, record(smile[3:] + b"\xff\n") + record(euro[:1] + b"\n"))
    reader = LogReader(path)
    assert texts(reader) == [
        ("stdout", "1"),
        ("stderr", "err\n"),
        ("stdout", "€"),
        ("stdout", "😀\ufffd\n"),
        ("stdout", "\ufffd\n"),
    ]
    assert (
        reader.read_text(0, 100) == b"1" + euro[:2] + b"err\n" + euro[2:] + smile + b"\xff\n\xe2\n"
    )


def test_a_cut_file_begins_anew(path: Path) -> None:
    append(path, record(b"x" * 5000 + b"\n") * 100)
    reader = LogReader(path)
    assert reader.text_size() == 500_100
    path.write_bytes(record(b"new\n"))
    assert reader.read_text(0, 100) == b"new\n"


def test_any_offset_while_it_grows(path: Path) -> None:
    chance = random.Random(1)
    reader = LogReader(path)
    text = bytearray()
    for _ in range(60):
        piece = b""
        for _ in range(chance.randrange(200)):
            length = chance.choice((0, 1, 5, 80, 8192))
            content = chance.randbytes(length).replace(b"\n", b"-")
            content += b"" if chance.random() < 0.3 and content else b"\n"
            piece += record(content, chance.choice((b"stdout", b"stderr")))
            text += content
        append(path, piece)
        assert reader.text_size() == len(text)
        for _ in range(5):
            offset, length = chance.randrange(len(text) + 10), chance.randrange(300_000)
            assert reader.read_text(offset, length) == bytes(text[offset : offset + length])
    whole = reader.read_json(0, 1 << 40)
    size = len(whole)
    for line in whole.splitlines():
        json.loads(line)
    fresh = LogReader(path)
    for _ in range(20):
        offset, length = chance.randrange(size), chance.randrange(100_000)
        assert fresh.read_json(offset, length) == whole[offset : offset + length]


def test_the_size_is_that_of_the_text_whatever_is_in_the_file(path: Path) -> None:
    chance = random.Random(2)
    words = [b"\n", b"\n\n", b"\0" * 40, b" stdout F ", b" stderr P ", TIME, TIME[:20], b"x" * 90]
    words += [
        record(b"a\n"),
        record(b"p", b"stderr"),
        record(TIME + b" stdout F \n"),
        record(b"\n"),
    ]
    for _ in range(300):
        path.write_bytes(b"".join(chance.choices(words, k=chance.randrange(60))))
        reader = LogReader(path)
        assert reader.text_size() == len(reader.read_text(0, 1 << 30))


def test_a_long_log_of_short_lines_is_measured(path: Path) -> None:
    path.write_bytes(record(b"x\n") * 2_000_000)
    reader = LogReader(path)
    assert reader.text_size() == 4_000_000
    append(path, record(b"end\n"))
    assert reader.text_size() == 4_000_004
    assert reader.read_text(3_999_998, 10) == b"x\nend\n"


def test_a_measured_file_that_was_cut_and_grew_less(path: Path) -> None:
    append(path, record(b"old\n") * 3)
    reader = LogReader(path)
    assert reader.text_size() == 12
    path.write_bytes(record(b"new\n") * 2)
    assert reader.text_size() == 8
    assert reader.read_text(0, 100) == b"new\nnew\n"
