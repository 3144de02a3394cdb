"""Finding files and reading documents, byte for byte, and one line for each thing that is wrong."""

import json
import os
from pathlib import Path

import pytest

from statespan.errors import DataError
from statespan.training.documents import cut_at_lines, find_files, python_sources, read_documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_folder_is_searched_in_order_without_hidden_empty_other_and_excluded_files(tmp_path: Path):
    for name in ("b.py", "a.txt", "sub/c.MD", "sub/d.jsonl", "tests/e.py", ".git/f.txt", ".g.txt", "h.bin", "sub/i.o"):
        write(tmp_path / name, "x")
    write(tmp_path / "empty.txt", "")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(str(tmp_path), ("tests/*", "*.o"))]
    assert found == ["a.txt", "b.py", "sub/c.MD", "sub/d.jsonl"]


def test_files_that_are_named_are_taken_whatever_their_ending(tmp_path: Path):
    first, second = write(tmp_path / "enwik8", "x"), write(tmp_path / "[a]*.txt", "y")
    assert find_files((str(second), str(first))) == [second, first]


def test_text_is_read_byte_for_byte(tmp_path: Path):
    content = "one\r\ntwo\rthree\n\ufeffé\x00\u2028\n"
    assert list(read_documents([write(tmp_path / "a.txt", content)])) == [content]


@pytest.mark.parametrize("name", ["rows.jsonl", "we[i]rd *.jsonl"])
def test_jsonl_rows_are_documents(tmp_path: Path, name: str):
    rows = [{"body": f"document {i}\r\né", "other": i} for i in range(5)] + [{"body": "", "other": 9}]
    path = write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_documents([path], "body")) == [row["body"] for row in rows[:5]]


def test_json_array_is_read_too(tmp_path: Path):
    path = write(tmp_path / "rows.json", json.dumps([{"text": "a"}, {"text": "b"}]))
    assert list(read_documents([path])) == ["a", "b"]


def test_parquet_rows_are_documents(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a\r\n", "é"], "n": [1, 2]}), tmp_path / "rows.parquet")
    text = write(tmp_path / "z.txt", "last")
    assert list(read_documents([tmp_path / "rows.parquet", text])) == ["a\r\n", "é", "last"]


def test_reading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    level = datasets.logging.get_verbosity()
    assert list(read_documents([write(tmp_path / "rows.jsonl", '{"text": "a"}\n')])) == ["a"]
    assert not cache.exists()
    assert datasets.logging.get_verbosity() == level


@pytest.mark.parametrize("max_bytes", [1, 2, 3, 5, 8, 13, 1000])
@pytest.mark.parametrize("text", ["ab\ncdefgh\n\nij\n", "é🎉é\n🎉\n", "no line end", "\n\n\n"])
def test_cut_keeps_every_byte_and_the_limit(text: str, max_bytes: int):
    pieces = list(cut_at_lines(text, max_bytes))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= max_bytes or len(piece) == 1 for piece in pieces)


def test_cut_is_at_line_ends(tmp_path: Path):
    assert list(cut_at_lines("ab\ncdefgh\n\nij\n", 8)) == ["ab\n", "cdefgh\n\n", "ij\n"]
    path = write(tmp_path / "a.txt", "one\ntwo\n")
    assert list(read_documents([path], max_bytes=5)) == ["one\n", "two\n"]


def test_missing_empty_and_nothing_to_read(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        find_files(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        find_files(str(write(tmp_path / "empty.txt", "")))
    with pytest.raises(DataError, match="has no text, jsonl or parquet file"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "né".encode() + b"\xff!", r"a\.txt: not UTF-8 at byte 3 \(0xff\)"),
        ("a.txt", b"ab\xc3", r"a\.txt: not UTF-8 at byte 2 \(0xc3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl: not UTF-8 at byte 24 \(0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl: line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', r"row 1 has no field 'text'; set data\.text_field to one of: body"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"field 'text' of row 2 is not text: null"),
        ("a.jsonl", b'{"text": 3}\n', r"field 'text' of row 1 is not text: 3"),
        ("a.jsonl", b'{"text": ["a"]}\n', r"field 'text' of row 1 is not text"),
        ("a.parquet", b"PAR1 no more", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_bad_files_are_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, message: str
):
    with pytest.raises(DataError, match=message) as error:
        list(read_documents([write(tmp_path / name, content)]))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # the library's own words are not added


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, os.strerror(13), str(path))

    path = write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so chmod would not do
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        list(read_documents([path]))


def test_python_sources_are_drawn_by_seed(tmp_path: Path):
    for index in range(30):
        write(tmp_path / f"pack{index % 3}" / f"module{index}.py", "x = 1\n")
    write(tmp_path / "pack0" / "tests" / "test_x.py", "x = 1\n")
    write(tmp_path / "latin.py", b"# \xe9\n")
    write(tmp_path / "empty.py", "")
    everything = python_sources(tmp_path)
    assert len(everything) == 30 and everything == sorted(everything)
    drawn, same, other = (python_sources(tmp_path, 10, seed) for seed in (0, 0, 1))
    assert len(drawn) == 10 and drawn == same != other and set(drawn) < set(everything)
    assert python_sources(tmp_path, 100) == everything
