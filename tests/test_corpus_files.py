"""Reading corpora: every packing gives the same documents, every mistake one line that names its place."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from litgpt_memsinks.corpus_files import Document, corpus_files, read_documents
from litgpt_memsinks.errors import MemSinksError

LINES = [json.dumps({"text": f"Document {i}, ä漢🙂\nof two lines.", "n": i}) + "\n" for i in range(2000)]
EXPECTED = [Document(i + 1, f"Document {i}, ä漢🙂\nof two lines.") for i in range(2000)]
PLAIN = "".join(LINES).encode()

Pack = Callable[[bytes], bytes]


def _frames(compress: Pack) -> Pack:
    """Compress pieces on their own and put them one after another; they do not end where lines end."""
    return lambda content: b"".join(
        compress(content[start : start + 30_011]) for start in range(0, len(content), 30_011)
    )


def _streamed_zstd(content: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()  # a frame that does not say how long its content is
    return compressor.compress(content) + compressor.flush()


def _skippable_zstd(content: bytes) -> bytes:
    # pzstd writes such frames, whose content is for its own use, before each frame
    return struct.pack("<II", 0x184D2A50, 4) + b"mine" + zstandard.compress(content)


PACKINGS: dict[str, tuple[str, Pack]] = {
    "jsonl": (".jsonl", bytes),
    "json": (".json", bytes),
    "gz": (".jsonl.gz", gzip.compress),
    "gz-members": (".jsonl.gz", _frames(gzip.compress)),
    "zst": (".jsonl.zst", zstandard.compress),
    "zst-frames": (".jsonl.zst", _frames(zstandard.compress)),
    "zst-streamed": (".jsonl.zst", _streamed_zstd),
    "zst-skippable": (".jsonl.zst", _frames(_skippable_zstd)),
}


def _write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _message(path: Path, text_field: str = "text") -> str:
    """The error of reading ``path``, which must be one line and name the file."""
    with pytest.raises(MemSinksError) as caught:
        list(read_documents(path, text_field))
    message = str(caught.value)
    assert "\n" not in message
    assert repr(str(path)) in message
    return message


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_documents(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    path = _write(tmp_path, f"corpus{ending}", pack(PLAIN))
    progress: list[int] = []
    assert list(read_documents(path, on_bytes=progress.append)) == EXPECTED
    assert progress[-1] == path.stat().st_size
    assert progress == sorted(progress)
    if packing == "jsonl":
        assert len(set(progress)) > 5  # a bar that moves


@pytest.mark.parametrize("packing", PACKINGS)
def test_last_line_may_lack_its_end(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    assert list(read_documents(_write(tmp_path, f"corpus{ending}", pack(PLAIN[:-1])))) == EXPECTED


@pytest.mark.parametrize("packing", PACKINGS)
def test_empty_file_has_no_documents(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    assert list(read_documents(_write(tmp_path, f"packed{ending}", pack(b"")))) == []
    assert list(read_documents(_write(tmp_path, f"nothing{ending}", b""))) == []


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"))),
    escaped=st.booleans(),
    packing=st.sampled_from(sorted(PACKINGS)),
)
def test_any_text_round_trips(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], escaped: bool, packing: str
) -> None:
    ending, pack = PACKINGS[packing]
    content = "".join(json.dumps({"text": text}, ensure_ascii=escaped) + "\n" for text in texts)
    path = _write(tmp_path_factory.getbasetemp(), f"round-trip{ending}", pack(content.encode()))
    assert list(read_documents(path)) == [Document(i, text) for i, text in enumerate(texts, start=1) if text]


def test_lines_are_counted_and_blank_ones_passed_over(tmp_path: Path) -> None:
    content = b'{"text": "a"}\r\n\n \t\n{"text": ""}\n{"text": "b\\u2028c"}\n\n{"text": " "}'
    path = _write(tmp_path, "corpus.jsonl", content)
    assert list(read_documents(path)) == [Document(1, "a"), Document(5, "b\u2028c"), Document(7, " ")]


def test_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    # str.splitlines would also cut at these, and Python's text files at \r
    text = "a\u2028b\u2029c\x85d"
    path = _write(tmp_path, "corpus.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\r")
    assert list(read_documents(path)) == [Document(1, text)]
    path = _write(tmp_path, "corpus.jsonl", b'{"text":\r"a"}\n')
    assert list(read_documents(path)) == [Document(1, "a")]


def test_text_field(tmp_path: Path) -> None:
    path = _write(tmp_path, "corpus.jsonl", b'{"text": "no", "content": "yes"}\n')
    assert list(read_documents(path, "content")) == [Document(1, "yes")]


def test_documents_are_read_one_by_one(tmp_path: Path) -> None:
    documents = read_documents(_write(tmp_path, "corpus.jsonl", b'{"text": "a"}\n' * 5 + b"broken\n"))
    assert [next(documents).line for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(MemSinksError, match="line 6 is not JSON"):
        next(documents)


def test_folder_gives_its_files_sorted(tmp_path: Path) -> None:
    names = ["b.jsonl", "a/z.jsonl.zst", "a/b.gz", "c.json"]
    for name in [*names, "README.md", "a/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert corpus_files(tmp_path) == [tmp_path / name for name in sorted(names)]
    assert corpus_files(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]


def test_folder_without_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(MemSinksError, match=r"has no file ending in \.jsonl") as caught:
        corpus_files(tmp_path)
    assert repr(str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    assert "There is no file" in _message(tmp_path / "missing.jsonl")
    assert "There is no file" in _message(tmp_path)


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.parquet", "corpus"])
def test_wrong_ending(tmp_path: Path, name: str) -> None:
    message = _message(_write(tmp_path, name, PLAIN))
    assert repr(Path(name).suffix) in message
    assert ".jsonl, .json, .gz, .zst" in message


GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "not JSON": (b"{'text': 'python'}", ["line 3 is not JSON"]),
    "cut": (b'{"text": "cut', ["line 3 is not JSON"]),
    "two objects": (b'{"text": "a"} {"text": "b"}', ["line 3 is not JSON", "Extra data"]),
    "deep nesting": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", ["line 3 is not JSON"]),
    "long number": (b'{"n": ' + b"1" * 5000 + b', "text": "a"}', ["line 3"]),  # Python refuses to convert it
    "missing field": (
        b'{"title": "a", "body": "b"}',
        ["line 3 has the fields ['body', 'title']", "'text'", "(text_field)"],
    ),
    "no fields": (b"{}", ["line 3 has the fields []"]),
    "list": (b'["a"]', ["line 3 is a list", "an object with the text in"]),
    "string": (b'"text"', ["line 3 is a str"]),
    "number": (b"5", ["line 3 is a int"]),
    "null": (b"null", ["line 3 is a NoneType"]),
    "number as text": (b'{"text": 5}', ["line 3 has a int in 'text'"]),
    "null as text": (b'{"text": null}', ["line 3 has a NoneType in 'text'"]),
    "list as text": (b'{"text": ["a"]}', ["line 3 has a list in 'text'"]),
    "half a surrogate pair": (b'{"text": "a \\ud83d b"}', ["line 3"]),  # no tokenizer takes it
}


@pytest.mark.parametrize("packing", ["jsonl", "gz", "zst"])
@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(tmp_path: Path, case: str, packing: str) -> None:
    line, parts = BAD_LINES[case]
    ending, pack = PACKINGS[packing]
    message = _message(_write(tmp_path, f"corpus{ending}", pack(GOOD + b"\n" + line + b"\n" + GOOD)))
    for part in parts:
        assert part in message


def test_byte_order_mark_is_named(tmp_path: Path) -> None:
    message = _message(_write(tmp_path, "corpus.jsonl", b"\xef\xbb\xbf" + GOOD))
    assert "line 1" in message
    assert "BOM" in message


@pytest.mark.parametrize("packing", PACKINGS)
def test_not_utf8(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    content = GOOD * 10_000 + '{"text": "façade"}\n'.encode("latin-1") + GOOD
    message = _message(_write(tmp_path, f"corpus{ending}", pack(content)))
    assert "UTF-8" in message
    after = int(message.split("after line ")[1].split(":")[0])
    assert 9_000 < after <= 10_000  # it is decoded by the buffer, so the line is not known more exactly


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("packing", sorted(PACKINGS.keys() - {"jsonl", "json"}))
def test_truncated_file(tmp_path: Path, packing: str, fraction: float) -> None:
    ending, pack = PACKINGS[packing]
    content = pack(PLAIN)
    message = _message(_write(tmp_path, f"corpus{ending}", content[: int(len(content) * fraction)]))
    assert "cannot be read after line" in message


@pytest.mark.parametrize("packing", ["gz", "zst", "zst-streamed"])
def test_every_truncation_of_one_line(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    content = pack(b'{"text": "hello"}\n')
    for length in range(1, len(content)):
        _message(_write(tmp_path, f"corpus{ending}", content[:length]))


@pytest.mark.parametrize("packing", sorted(PACKINGS.keys() - {"jsonl", "json"}))
def test_damaged_file(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    content = bytearray(pack(PLAIN))
    middle = len(content) // 2
    content[middle : middle + 200] = b"\xff" * 200
    _message(_write(tmp_path, f"corpus{ending}", bytes(content)))


def test_damaged_deflate_block(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(PLAIN))
    content[10] = 0xFF  # the first byte behind the header: a type of block that does not exist
    assert "invalid block type" in _message(_write(tmp_path, "corpus.jsonl.gz", bytes(content)))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_not_compressed_at_all(tmp_path: Path, ending: str) -> None:
    assert "after line 0" in _message(_write(tmp_path, f"corpus{ending}", PLAIN))
