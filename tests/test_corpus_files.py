"""Reading corpora: every packing gives the same documents, every mistake one line that names its place."""

import errno
import functools
import gzip
import http.server
import io
import json
import os
import random
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from litgpt_memsinks.corpus import file_formats
from litgpt_memsinks.corpus.corpus_files import CorpusFile, Document, Passed, corpus_files, read_documents, read_texts
from litgpt_memsinks.corpus.mixture import Reading
from litgpt_memsinks.errors import MemSinksError

LINES = [json.dumps({"text": f"Document {i}, ä漢🙂\nof two lines.", "n": i}) + "\n" for i in range(2000)]
EXPECTED = [Document(i + 1, f"Document {i}, ä漢🙂\nof two lines.") for i in range(2000)]
PLAIN = "".join(LINES).encode()
SEPARATOR = "<|endoftext|>"
FORMATS = ["jsonl", "json", "parquet", "separated", "text"]

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


def _long_zstd(content: bytes) -> bytes:
    # zstd --long=28: its window is larger than what decompressors accept by themselves
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


PACKINGS: dict[str, tuple[str, Pack]] = {
    "jsonl": (".jsonl", bytes),
    "ndjson": (".ndjson", bytes),
    "json": (".json", bytes),
    "gz": (".jsonl.gz", gzip.compress),
    "gz-members": (".jsonl.gz", _frames(gzip.compress)),
    "json-gz": (".json.gz", gzip.compress),
    "zst": (".jsonl.zst", zstandard.compress),
    "zst-frames": (".jsonl.zst", _frames(zstandard.compress)),
    "zst-streamed": (".jsonl.zst", _streamed_zstd),
    "zst-skippable": (".jsonl.zst", _frames(_skippable_zstd)),
    "zst-long": (".jsonl.zst", _long_zstd),
    "zst-bare": (".zst", zstandard.compress),
}
PACKED = sorted(PACKINGS.keys() - {"jsonl", "ndjson", "json"})
COMPRESSIONS: dict[str, Pack] = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}


def _write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _read(path: Path | str | list[str], passed: Passed | None = None, **settings: Any) -> list[Document]:
    reading = Reading(path=path if isinstance(path, list) else str(path), **settings)
    return [document for file in corpus_files(reading) for document in read_documents(file, reading, passed)]


def _texts(path: Path | str, **settings: Any) -> list[str]:
    return [document.text for document in _read(path, **settings)]


def _message(path: Path | str, **settings: Any) -> str:
    """The error of reading ``path``, which must be one line and name the file."""
    with pytest.raises(MemSinksError) as caught:
        _read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000 + len(str(path))
    assert str(path) in message
    return message


def _parquet(rows: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(rows), out, **options)
    return out.getvalue()


def _formatted(objects: list[dict[str, Any]], format: str) -> bytes:
    """Documents as the content of one file."""
    if format == "jsonl":
        return "".join(json.dumps(content, ensure_ascii=False) + "\n" for content in objects).encode()
    if format == "json":
        return json.dumps(objects, ensure_ascii=False, indent=1).encode()
    if format == "parquet":
        names = sorted({name for content in objects for name in content})
        return _parquet({name: [content.get(name) for content in objects] for name in names}, row_group_size=7)
    return f"\n{SEPARATOR}\n".join(content["text"] for content in objects).encode()


# ----------------------------------------------------------------------------------------------------------- JSON lines


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_documents(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    path = _write(tmp_path, f"corpus{ending}", pack(PLAIN))
    assert _read(path) == EXPECTED


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_progress(tmp_path: Path, format: str, compression: str) -> None:
    noise = random.Random(0)  # that does not compress to nothing
    texts = [{"text": "".join(noise.choices("abcdefghijklmnop", k=1000))} for _ in range(3000)]
    path = _write(tmp_path, "corpus", COMPRESSIONS[compression](_formatted(texts, format)))
    if format == "parquet" and compression:
        pytest.skip("parquet packs itself")
    progress: list[int] = []
    file = CorpusFile(str(path), path.stat().st_size, format, compression)
    for _ in read_documents(file, Reading(), on_bytes=progress.append):
        pass
    assert progress[-1] == file.size
    assert progress == sorted(progress)
    assert len(set(progress)) > 5  # a bar that moves


@pytest.mark.parametrize("packing", PACKINGS)
def test_last_line_may_lack_its_end(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    assert _read(_write(tmp_path, f"corpus{ending}", pack(PLAIN[:-1]))) == EXPECTED


@pytest.mark.parametrize("packing", PACKINGS)
def test_empty_file_has_no_documents(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    assert _read(_write(tmp_path, f"packed{ending}", pack(b""))) == []
    assert _read(_write(tmp_path, f"nothing{ending}", b"")) == []


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"))),
    escaped=st.booleans(),
    packing=st.sampled_from(sorted(PACKINGS.keys() - {"zst-long"})),
)
def test_any_text_round_trips(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], escaped: bool, packing: str
) -> None:
    ending, pack = PACKINGS[packing]
    content = "".join(json.dumps({"text": text}, ensure_ascii=escaped) + "\n" for text in texts)
    path = _write(tmp_path_factory.getbasetemp(), f"round-trip{ending}", pack(content.encode()))
    assert _read(path) == [Document(i, text) for i, text in enumerate(texts, start=1) if text]


def test_lines_are_counted_and_blank_ones_passed_over(tmp_path: Path) -> None:
    content = b'{"text": "a"}\r\n\n \t\n{"text": ""}\n{"text": "b\\u2028c"}\n\n{"text": " "}'
    path, passed = _write(tmp_path, "corpus.jsonl", content), Passed()
    assert _read(path, passed) == [Document(1, "a"), Document(5, "b\u2028c"), Document(7, " ")]
    assert passed == Passed(empty=1)


def test_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    # str.splitlines would also cut at these, and Python's text files at \r
    text = "a\u2028b\u2029c\x85d"
    path = _write(tmp_path, "corpus.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\r")
    assert _read(path) == [Document(1, text)]
    path = _write(tmp_path, "corpus.jsonl", b'{"text":\r"a"}\n')
    assert _read(path) == [Document(1, "a")]


def test_documents_are_read_one_by_one(tmp_path: Path) -> None:
    path = _write(tmp_path, "corpus.jsonl", b'{"text": "a"}\n' * 5 + b"broken\n")
    documents = read_documents(CorpusFile(str(path), 0, "jsonl", ""), Reading())
    assert [next(documents).line for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(MemSinksError, match="line 6 is not JSON"):
        next(documents)


def test_nul_bytes_and_long_lines(tmp_path: Path) -> None:
    text = "x\0ä" + "x" * 50_000_000
    for name, content in {
        "jsonl": json.dumps({"text": text}).encode(),
        "json": json.dumps([{"text": text}]).encode(),
        "parquet": _parquet({"text": [text]}),
        "separated": (text + SEPARATOR).encode(),
        "text": text.encode(),
    }.items():
        (document,) = _read(_write(tmp_path, "corpus", content), format=name)
        assert document == Document(1, text)


def test_read_texts(tmp_path: Path) -> None:
    _write(tmp_path, "b.jsonl", b'{"story": "b"}\n{"story": ""}\n{"story": "c"}')
    _write(tmp_path, "a.json", b'[{"story": "a"}]')
    assert list(read_texts(tmp_path, "story")) == ["a", "b", "c"]


# -------------------------------------------------------------------------------------------------------- other formats

STORIES = [{"text": f"Story {i}, ä漢🙂\n\nof two\tparagraphs\0.", "id": f"s{i}", "n": i} for i in range(300)]


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
@pytest.mark.parametrize("format", ["jsonl", "json", "parquet", "separated"])
def test_every_format_gives_the_same_documents(tmp_path: Path, format: str, compression: str) -> None:
    if format == "parquet" and compression:
        pytest.skip("parquet packs itself")
    ending = {"separated": ".txt"}.get(format, f".{format}") + (f".{compression}" if compression else "")
    path = _write(tmp_path, f"corpus{ending}", COMPRESSIONS[compression](_formatted(STORIES, format)))
    assert _read(path) == [Document(i, content["text"]) for i, content in enumerate(STORIES, start=1)]
    (file,) = corpus_files(Reading(path=str(path)))
    assert file == CorpusFile(str(path), path.stat().st_size, format, compression)
    assert _read(_write(tmp_path, "any.ending", _formatted(STORIES, format)), format=format) == _read(path)


def test_folder_of_texts(tmp_path: Path) -> None:
    for i, content in enumerate(STORIES):
        _write(tmp_path, f"{i // 100}/{i:04}.md", content["text"].encode())
    _write(tmp_path, "README.md", b"about the others")
    assert _texts(tmp_path) == [content["text"] for content in STORIES]
    assert _texts(tmp_path / "**" / "0*.md") == [content["text"] for content in STORIES]


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<\r"), min_size=1), min_size=1),
    block=st.sampled_from([1, 2, 3, 7, 64]),
)
def test_blocks_may_end_anywhere(tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int) -> None:
    texts = [text.strip("\n") or "-" for text in texts]
    objects = [{"n": -1.5e-7, "none": None, "text": text, "list": [[], {}, [12, 3]]} for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_formats, "_BLOCK", block)
        for format in ("json", "jsonl", "separated"):
            path = _write(tmp_path_factory.getbasetemp(), "blocks", _formatted(objects, format))
            assert _texts(path, format=format) == texts


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_numbers_may_be_cut_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(file_formats, "_BLOCK", block)
    path, passed = _write(tmp_path, "a.json", b'[12345, {"text": "a"}, -6.78e10]'), Passed()
    assert _read(path, passed, format="json", on_bad_line="skip") == [Document(2, "a")]
    assert passed.bad == 2


def test_array_of_stories(tmp_path: Path) -> None:
    # as TinyStories_all_data/data00.json
    story = {"story": "Once", "instruction": {"prompt:": "Write", "words": ["a", "b"]}, "summary": "s", "source": "GPT"}
    path = _write(
        tmp_path, "data00.json", json.dumps([story, {**story, "story": ""}, {**story, "story": "Two"}]).encode()
    )
    assert _read(path, text_field="story", id_field="instruction.prompt:") == [
        Document(1, "Once", "Write"),
        Document(3, "Two", "Write"),
    ]
    assert _read(_write(tmp_path, "empty.json", b" [ ]\n")) == []


BAD_ARRAYS = {
    "cut": b'[{"text": "a"},',
    "cut in a text": b'[{"text": "a"}, {"text": "b',
    "no end": b'[{"text": "a"}',
    "no comma": b'[{"text": "a"} {"text": "b"}]',
    "comma at the end": b'[{"text": "a"},]',
    "two arrays": b'[{"text": "a"}]\n[]',
    "single quotes": b"[{\"text\": \"a\"}, {'text': 'b'}]",
    "wrong bracket": b'[{"text": "a"}}',
    "line feed in a text": b'[{"text": "a"}, {"text": "b\n"}]',
    "deep nesting": b'[{"text": "a"}, ' + b"[" * 200_000 + b"]" * 200_000 + b"]",
    "long number": b'[{"text": "a"}, {"n": ' + b"1" * 5000 + b"}]",
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_array(tmp_path: Path, case: str) -> None:
    path, passed = _write(tmp_path, "corpus.json", BAD_ARRAYS[case]), Passed()
    assert "cannot be read after element 1: " in _message(path)
    assert _read(path, passed, on_bad_line="skip") == [Document(1, "a")]
    assert passed.bad == 1
    assert passed.first_bad[0].endswith("; the rest of the file is lost")


def test_bad_elements_are_passed_over(tmp_path: Path) -> None:
    content = (
        b'[{"text": "a"}, 5, {"text": "fa\xe7ade"}, {"text": "\\ud83d"}, {"text": null}, {"text": "b", "m": "\xe7"}]'
    )
    path, passed = _write(tmp_path, "corpus.json", content), Passed()
    assert _read(path, passed, on_bad_line="skip") == [Document(1, "a"), Document(6, "b")]
    assert [reason.split(", ")[1][:18] for reason in passed.first_bad] == [
        "element 2 is a int",
        "element 3 is not U",
        "element 4 is not U",
        "element 5 has a No",
    ]
    assert "element 2 is a int" in _message(path)


def test_neither_array_nor_lines(tmp_path: Path) -> None:
    path = _write(tmp_path, "corpus.json", json.dumps({"data": [{"text": "a"}]}, indent=1).encode())
    assert "neither an array of objects nor an object per line: its first line is not JSON" in _message(path)
    assert "is no object" in _message(_write(tmp_path, "corpus.json", b'"text"\n'))
    assert _texts(_write(tmp_path, "one.json", b'\xef\xbb\xbf \n{"text": "a"}')) == ["a"]
    long = b'{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "b"}\n'
    assert len(_read(_write(tmp_path, "long.json", long))) == 2


def test_tinystories_text(tmp_path: Path) -> None:
    # TinyStoriesV2-GPT4-train.txt begins with an empty line, and not every file ends with a separator
    path = _write(
        tmp_path, "train.txt", b"\nOnce.\n\nTwice. \n<|endoftext|>\r\nA cat.\r\n<|endoftext|><|endoftext|>\nEnd\n"
    )
    passed = Passed()
    assert _read(path, passed) == [Document(1, "Once.\n\nTwice. "), Document(2, "A cat."), Document(4, "End")]
    assert passed == Passed(empty=1)
    path, passed = _write(tmp_path, "other.txt", b"a\n---\nb\n---\n"), Passed()
    assert _read(path, passed, separator="---") == [Document(1, "a"), Document(2, "b")]
    assert passed == Passed()


def test_separator_is_never_guessed(tmp_path: Path) -> None:
    path = _write(tmp_path, "book.txt", b"Chapter 1\n")
    message = _message(path)
    assert "format: text" in message
    assert "format: separated" in message
    assert _texts(path, format="text") == ["Chapter 1\n"]
    assert "format: text" in _message(tmp_path)
    _write(tmp_path, "late.txt", b"x" * 2_000_000 + SEPARATOR.encode())
    assert len(_texts(tmp_path)) == 2
    _write(tmp_path, "stories.txt", f"a{SEPARATOR}b".encode())
    with pytest.raises(MemSinksError, match=r"in its first MiB, but others do"):
        _read(tmp_path)
    assert _texts(_write(tmp_path, "nothing.txt", b"")) == []


def test_wrong_separator_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_formats, "_LONGEST", 1_000_000)
    path = _write(tmp_path, "corpus.txt", b"story\n----\n" * 300_000)
    assert "there is no '<|endoftext|>' (separator)" in _message(path, format="separated")
    assert len(_read(path, separator="----")) == 300_000


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet", "parquet in one group", "separated"])
def test_memory_is_bounded(tmp_path: Path, format: str) -> None:
    objects = [{"text": random.Random(i).randbytes(5000).hex()} for i in range(4000)]
    format, _, in_one_group = format.partition(" ")
    path = _write(tmp_path, "corpus", _formatted(objects, format))
    if in_one_group:
        path.write_bytes(_parquet({"text": [content["text"] for content in objects]}, use_dictionary=False))
    assert path.stat().st_size > 20_000_000
    del objects
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    try:
        reading, arrow = Reading(path=str(path), format=format), 0
        for _ in read_documents(corpus_files(reading)[0], reading):
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
        assert arrow < 16_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_strings(tmp_path: Path, type: pa.DataType) -> None:
    path = _write(
        tmp_path, "a.parquet", _parquet({"text": pa.array(["a", "", "b", "a"]).cast(type), "n": [1, 2, 3, 4]})
    )
    passed = Passed()
    assert _read(path, passed, id_field="n") == [Document(1, "a", "1"), Document(3, "b", "3"), Document(4, "a", "4")]
    assert passed == Passed(empty=1)


def test_bad_parquet_rows(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(4, pa.py_buffer(struct.pack("<5i", 0, 1, 3, 3, 4)), pa.py_buffer(b"a\xe7\xe7b"))
    rows = {"text": pa.concat_arrays([text, pa.array([None, "c"])]), "bytes": [b"x"] * 6}
    path, passed = _write(tmp_path, "a.parquet", _parquet(rows)), Passed()
    assert "row 2 cannot be read: 'utf-8' codec" in _message(path)
    assert _read(path, passed, on_bad_line="skip") == [Document(1, "a"), Document(4, "b"), Document(6, "c")]
    assert (passed.bad, passed.empty) == (2, 1)
    assert "row 5 has a NoneType in 'text'" in passed.first_bad[1]
    assert "row 1 has a bytes in 'bytes'" in _message(path, text_field="bytes")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.parquet", _parquet({"content": ["a", "b"], "meta": [{"set": "x"}] * 2}))
    for options in ({}, {"text_field": "meta.text"}, {"include": {"meta.set": ["x"]}}):
        assert "row 1 has the fields ['content', 'meta']" in _message(path, **options)
    passed = Passed()
    assert _read(path, passed, on_bad_line="skip") == []
    assert passed.bad == 2
    assert _texts(path, text_field="content", exclude={"meta.set": ["y"]}) == ["a", "b"]


def test_parquet_checksums_are_compared(tmp_path: Path) -> None:
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    content = _parquet({"text": ["hello"]}, write_page_checksum=True, **options)
    assert content.count(b"hello") == 1
    path = _write(tmp_path, "a.parquet", content.replace(b"hello", b"hallo"))
    assert "after row 0" in _message(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    content = bytearray(_parquet({"text": [str(i) * 50 for i in range(9000)]}, row_group_size=3000, compression="zstd"))
    assert "It is damaged or no parquet" in _message(_write(tmp_path, "cut.parquet", bytes(content[:-100])))
    assert "no parquet" in _message(_write(tmp_path, "no.parquet", b"no parquet at all"))
    start = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(0).data_page_offset
    content[start + 40 : start + 400] = b"\xff" * 360
    path, passed = _write(tmp_path, "second.parquet", bytes(content)), Passed()
    documents = _read(path, passed, on_bad_line="skip")
    assert [document.line for document in documents] == list(range(1, len(documents) + 1))
    assert 2500 < len(documents) <= 3000
    assert passed.bad == 1
    assert f"cannot be read after row {len(documents)}: " in passed.first_bad[0]


# --------------------------------------------------------------------------------------------------- fields and filters

PAJAMA = [
    {"text": "a", "meta": {"redpajama_set_name": "RedPajamaC4"}},
    {"text": "b", "meta": {"redpajama_set_name": "RedPajamaBook"}},
    {"text": "c", "meta": None},
    {"text": "", "meta": {"redpajama_set_name": "RedPajamaBook"}},
    {"text": "d", "meta": {"redpajama_set_name": "RedPajamaArXiv"}},
]
SET = "meta.redpajama_set_name"


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet"])
def test_filters(tmp_path: Path, format: str) -> None:
    path = _write(tmp_path, f"example_train_0.{format}", _formatted(PAJAMA, format))
    passed = Passed()
    included = _read(path, passed, include={SET: ["RedPajamaC4", "RedPajamaBook"]})
    assert [document.text for document in included] == ["a", "b"]
    assert passed == Passed(filtered=2, empty=1, without_field=1)
    passed = Passed()
    assert [document.text for document in _read(path, passed, exclude={SET: ["RedPajamaBook"]})] == ["a", "c", "d"]
    assert passed == Passed(filtered=2, without_field=1)
    assert _read(path, id_field=SET, exclude={"text": ["c"]})[1] == Document(2, "b", "RedPajamaBook")
    assert f"3 has no value in '{SET}'" in _message(path, id_field=SET)
    both = _texts(path, include={SET: ["RedPajamaC4", "RedPajamaBook"]}, exclude={"text": ["a"]})
    assert both == ["b"]


def test_values_are_compared_as_text(tmp_path: Path) -> None:
    content = b'{"n": 1, "text": "a"}\n{"n": "1", "text": "b"}\n{"n": 2, "text": "c"}\n{"n": [1], "text": "d"}\n'
    path = _write(tmp_path, "corpus.jsonl", content)
    assert _texts(path, include={"n": ["1"]}) == ["a", "b"]
    assert [document.key for document in _read(path, id_field="n", exclude={"text": ["d"]})] == ["1", "1", "2"]


def test_long_numbers_keep_their_digits_as_keys(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": b'{"n": %d, "text": "a"}', "a.json": b'[{"n": %d, "text": "a"}]'}.items():
        assert _read(_write(tmp_path, name, content % 10**30), id_field="n")[0].key == str(10**30)


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet"])
def test_dots_lead_into_objects_or_are_part_of_a_name(tmp_path: Path, format: str) -> None:
    path = _write(tmp_path, f"nested.{format}", _formatted([{"a": {"b": {"c": "deep"}}, "a.b": "flat"}], format))
    assert _texts(path, text_field="a.b.c") == ["deep"]
    assert _texts(path, text_field="a.b") == ["flat"]
    assert "has a dict in 'a'" in _message(path, text_field="a")
    assert "has the fields ['a', 'a.b']" in _message(path, text_field="a.c")


def test_plain_text_has_no_fields(tmp_path: Path) -> None:
    path = _write(tmp_path, "corpus.txt", f"a{SEPARATOR}b".encode())
    message = _message(path, include={"lang": ["en"]}, id_field="id")
    assert "Remove include and id_field" in message


# ------------------------------------------------------------------------------------------------------- finding files


def test_folder_gives_its_files_sorted(tmp_path: Path) -> None:
    names = ["b.jsonl", "a/z.jsonl.zst", "a/b.gz", "c.JSON", "d.jsonl/part-0.ndjson"]
    for name in [*names, "README.md", "a/LICENSE.txt", "a/notes.csv", ".cache/d.jsonl", "a/._b.jsonl"]:
        _write(tmp_path, name, b"")
    found = corpus_files(Reading(path=str(tmp_path)))
    assert [file.path for file in found] == [str(tmp_path / name) for name in sorted(names)]
    assert {file.format for file in found} == {"jsonl"}
    assert corpus_files(Reading(path=str(tmp_path / "b.jsonl")))[0].path == str(tmp_path / "b.jsonl")


def test_lists_and_patterns_give_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chunk_0/b.jsonl.zst", "chunk_0/a.jsonl.zst", "chunk_1/a.jsonl.zst", "other/a.jsonl", "x[1].jsonl"):
        _write(tmp_path, name, b"")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "other" / "a.jsonl")
    monkeypatch.chdir(tmp_path)

    def names(*paths: str) -> list[str]:
        return [file.path for file in corpus_files(Reading(path=list(paths)))]

    assert names("chunk_*/*") == ["chunk_0/a.jsonl.zst", "chunk_0/b.jsonl.zst", "chunk_1/a.jsonl.zst"]
    assert names("**/a.*") == ["chunk_0/a.jsonl.zst", "chunk_1/a.jsonl.zst", "other/a.jsonl"]
    assert names("other", "chunk_?/b*", "other/a.jsonl", "other") == ["chunk_0/b.jsonl.zst", "other/a.jsonl"]
    assert names("link.jsonl", "other/a.jsonl") == ["link.jsonl"]
    assert names("x[1].jsonl") == ["x[1].jsonl"]
    with pytest.raises(MemSinksError, match=r"sources.a: no file matches 'chunk_7/\*'"):
        corpus_files(Reading(path="chunk_7/*"), "sources.a")


def test_links_are_followed_once(tmp_path: Path) -> None:
    _write(tmp_path, "data/real/a.jsonl", b'{"text": "a"}')
    for name in ("circle", "another", "third"):  # following each in the others would never end
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    _write(tmp_path, "elsewhere/b.jsonl", b'{"text": "b"}')
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert sorted(_texts(tmp_path / "data")) == ["a", "b"]
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MemSinksError, match=r"gone\.jsonl"):
        _read(tmp_path / "data")


def test_folder_without_a_corpus(tmp_path: Path) -> None:
    _write(tmp_path, "README.rst", b"nothing here")
    assert "has no file ending in .jsonl" in _message(tmp_path)
    assert "has no file ending in .parquet (" in _message(tmp_path, format="parquet")


def test_folder_of_several_kinds(tmp_path: Path) -> None:
    _write(tmp_path, "a.jsonl", b'{"text": "a"}')
    _write(tmp_path, "a.parquet", _parquet({"text": ["b"]}))
    message = _message(tmp_path)
    assert "1 of JSON" in message
    assert "1 of parquet" in message
    assert _texts(tmp_path, format="parquet") == ["b"]


def test_folder_named_like_a_file(tmp_path: Path) -> None:
    _write(tmp_path, "a.jsonl/part", b"")
    assert "which is a folder" in _message(tmp_path / "*.jsonl")
    with pytest.raises(MemSinksError, match="Is a directory"):
        list(read_documents(CorpusFile(str(tmp_path / "a.jsonl"), 0, "jsonl", ""), Reading(on_bad_line="skip")))


@pytest.mark.parametrize("path", ["missing.jsonl", "missing/folder", "x" * 5000, "a\0b"])
def test_missing_file(path: str) -> None:
    with pytest.raises(MemSinksError, match=r"There is no file|cannot be reached"):
        _read(path)
    with pytest.raises(MemSinksError, match=r"There is no file|cannot be reached"):
        list(read_documents(CorpusFile(path, 0, "jsonl", ""), Reading(on_bad_line="skip")))


@pytest.mark.parametrize("name", ["corpus.csv", "corpus.parquet.zip", "corpus", "corpus.0001.gz"])
def test_wrong_ending(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, name, PLAIN)
    message = _message(path)
    assert repr(Path(name.removesuffix(".gz")).suffix) in message
    assert ".jsonl, .ndjson, .json, .parquet, .txt, .text, .md (also .gz, .zst)" in message
    assert "set format" in message
    if not name.endswith(".gz"):
        assert _read(path, format="jsonl") == EXPECTED


def test_packed_parquet(tmp_path: Path) -> None:
    assert "Unpack" in _message(_write(tmp_path, "a.parquet.gz", gzip.compress(_parquet({"text": ["a"]}))))


def test_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, "folder/corpus.jsonl", PLAIN)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # tests may run as root, which may read everything
        patch.setattr(file_formats.io, "FileIO", forbidden)
        assert "may not be read: Permission denied" in _message(path, on_bad_line="skip")
    monkeypatch.setattr(os, "scandir", forbidden)
    assert "may not be read: Permission denied" in _message(tmp_path)


def test_failing_disk_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 10_000:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(memoryview(buffer)[:8192]) or 0

    monkeypatch.setattr(file_formats.io, "FileIO", Failing)
    rows = _parquet({"text": [random.Random(i).randbytes(50).hex() for i in range(2000)]})
    for name, content in {"a.jsonl": PLAIN, "a.jsonl.gz": gzip.compress(PLAIN, 0), "a.parquet": rows}.items():
        with pytest.raises(MemSinksError, match="Input/output error") as caught:
            _read(_write(tmp_path, name, content), on_bad_line="skip")
        assert "damaged" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    if filesystem.exists("/corpus"):
        filesystem.rm("/corpus", recursive=True)


def test_remote_files(memory: Any, tmp_path: Path) -> None:
    contents = {
        "chunk_0/b.jsonl.zst": zstandard.compress(_formatted(STORIES, "jsonl")),
        "chunk_1/a.json.gz": gzip.compress(_formatted(STORIES, "json")),
        "data.parquet": _formatted(STORIES, "parquet"),
        "stories.txt": _formatted(STORIES, "separated"),
        ".hidden/x.parquet": b"",
    }
    for name, content in contents.items():
        memory.pipe(f"/corpus/{name}", content)
    expected = [content["text"] for content in STORIES]
    for name in list(contents)[:4]:
        url = f"memory://corpus/{name}"
        (file,) = corpus_files(Reading(path=url))
        assert (file.path, file.size) == (url, len(contents[name]))
        assert _texts(url) == expected
    found = corpus_files(Reading(path="memory://corpus/chunk_*/*"))
    assert [file.path.split("/corpus/")[1] for file in found] == ["chunk_0/b.jsonl.zst", "chunk_1/a.json.gz"]
    assert [(file.format, file.compression) for file in found] == [("jsonl", "zst"), ("json", "gz")]
    assert found == corpus_files(Reading(path=["memory://corpus/chunk_1", "memory://corpus/**/*.zst"]))
    assert _texts("memory://corpus", format="parquet") == expected
    assert "several kinds" in _message("memory://corpus")


def test_remote_mistakes(memory: Any) -> None:
    memory.pipe("/corpus/a.jsonl", b'{"text": 5}')
    assert "There is no file or folder" in _message("memory://corpus/b.jsonl")
    assert "no file matches" in _message("memory://corpus/*.parquet")
    assert "line 1 has a int in 'text'" in _message("memory://corpus/a.jsonl")
    assert "Protocol not known" in _message("nowhere://corpus/a.jsonl")


def test_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    assert "pip install s3fs" in _message("s3://bucket/a.jsonl")


def test_credentials_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):  # botocore's are no OSErrors
        pass

    def refuse(*_: Any, **__: Any) -> Any:
        raise NoCredentialsError("Unable to locate\ncredentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    assert "NoCredentialsError: Unable to locate credentials" in _message("s3://bucket/a.jsonl")


def test_web(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    _write(tmp_path, "a.jsonl.gz", gzip.compress(PLAIN))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert _read(f"{url}/a.jsonl.gz?download=true") == EXPECTED
            assert "There is no file" in _message(f"{url}/b.jsonl")
        finally:
            server.shutdown()
    assert "Cannot connect to host" in _message(f"{url}/a.jsonl.gz")


# ----------------------------------------------------------------------------------------------------- errors and skips

GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "not JSON": (b"{'text': 'python'}", ["line 3 is not JSON", "column 2"]),
    "cut": (b'{"text": "cut', ["line 3 is not JSON"]),
    "two objects": (b'{"text": "a"} {"text": "b"}', ["line 3 is not JSON", "Extra data"]),
    "deep nesting": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", ["line 3 is not JSON"]),
    "long number": (b'{"n": ' + b"1" * 5000 + b', "text": "a"}', ["line 3"]),  # Python refuses to convert it
    "missing field": (
        b'{"title": "a", "body": "b"}',
        ["line 3 has the fields ['body', 'title']", "'text'", "(text_field)", "on_bad_line: skip"],
    ),
    "many fields": (json.dumps({"f" * 9 + str(i): i for i in range(9999)}).encode(), ["line 3 has the fields"]),
    "no fields": (b"{}", ["line 3 has the fields []"]),
    "list": (b'["a"]', ["line 3 is a list", "an object with the text in"]),
    "string": (b'"text"', ["line 3 is a str"]),
    "number": (b"5", ["line 3 is a int"]),
    "null": (b"null", ["line 3 is a NoneType"]),
    "number as text": (b'{"text": 5}', ["line 3 has a int in 'text'", "on_bad_line: skip"]),
    "null as text": (b'{"text": null}', ["line 3 has a NoneType in 'text'"]),
    "list as text": (b'{"text": ["a"]}', ["line 3 has a list in 'text'"]),
    "half a surrogate pair": (b'{"text": "a \\ud83d b"}', ["line 3"]),  # no tokenizer takes it
    "latin-1": ('{"text": "façade"}'.encode("latin-1"), ["line 3 is not UTF-8", "0xe7"]),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), ["line 3 is not JSON"]),
    "nul bytes": (b"\0" * 100, ["line 3 is not JSON"]),
}


@pytest.mark.parametrize("packing", ["jsonl", "gz", "zst"])
@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named_or_passed_over(tmp_path: Path, case: str, packing: str) -> None:
    line, parts = BAD_LINES[case]
    ending, pack = PACKINGS[packing]
    path = _write(tmp_path, f"corpus{ending}", pack(GOOD + b"\n" + line + b"\n" + GOOD))
    message = _message(path)
    for part in parts:
        assert part in message
    passed = Passed()
    assert _read(path, passed, on_bad_line="skip") == [Document(1, "fine"), Document(4, "fine")]
    assert passed.bad == 1
    assert passed.first_bad[0].startswith(f"{str(path)!r}, line 3 ")
    assert message.startswith(passed.first_bad[0])


def test_first_bad_lines_are_kept(tmp_path: Path) -> None:
    passed = Passed()
    assert _read(_write(tmp_path, "a.jsonl", b"x\n" * 100), passed, on_bad_line="skip") == []
    assert passed.bad == 100
    assert [reason.split("line ")[1][:2] for reason in passed.first_bad] == ["1 ", "2 ", "3 ", "4 ", "5 "]


@pytest.mark.parametrize("format", ["jsonl", "json", "separated", "text"])
def test_byte_order_mark_is_passed_over(tmp_path: Path, format: str) -> None:
    mark = b"\xef\xbb\xbf"
    content = _formatted([{"text": "a"}], format)
    assert _texts(_write(tmp_path, "corpus", mark + content), format=format) == ["a"]
    assert _texts(_write(tmp_path, "corpus.gz", gzip.compress(mark + content)), format=format) == ["a"]
    path = _write(tmp_path, "corpus", content + mark + content)
    if format in ("jsonl", "json"):  # anywhere else it is an error, or a part of the text
        _message(path, format=format)
    else:
        assert _texts(path, format=format) == ["a\ufeffa"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_not_utf8(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    content = GOOD * 10_000 + '{"text": "façade"}\n'.encode("latin-1") + GOOD
    path, passed = _write(tmp_path, f"corpus{ending}", pack(content)), Passed()
    assert "line 10001 is not UTF-8" in _message(path)
    assert len(_read(path, passed, on_bad_line="skip")) == 10_001
    assert passed.bad == 1


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path, passed = _write(tmp_path, "a.txt", f"a{SEPARATOR}façade{SEPARATOR}b".encode("latin-1")), Passed()
    assert "document 2 is not UTF-8" in _message(path)
    assert _read(path, passed, on_bad_line="skip") == [Document(1, "a"), Document(3, "b")]
    assert passed.bad == 1
    assert "document 1 is not UTF-8" in _message(path, format="text")


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("packing", PACKED)
def test_truncated_file(tmp_path: Path, packing: str, fraction: float) -> None:
    ending, pack = PACKINGS[packing]
    content = pack(PLAIN)
    path = _write(tmp_path, f"corpus{ending}", content[: int(len(content) * fraction)])
    assert "cannot be read after line" in _message(path, format="jsonl")
    passed = Passed()
    kept = _read(path, passed, format="jsonl", on_bad_line="skip")
    assert kept == EXPECTED[: len(kept)]
    assert passed.bad == 1
    assert passed.first_bad[0].endswith("the rest of the file is lost")
    if packing in ("gz-members", "zst-frames") and fraction == 0.9:
        assert len(kept) > 1000  # what is whole is kept


@pytest.mark.parametrize("pack", [_frames(gzip.compress), _frames(zstandard.compress)])
@pytest.mark.parametrize("format", ["json", "separated"])
def test_documents_before_the_cut_are_kept(tmp_path: Path, format: str, pack: Pack) -> None:
    texts = [random.Random(i).randbytes(50).hex() for i in range(2000)]
    path = _write(tmp_path, "corpus", pack(_formatted([{"text": text} for text in texts], format))[:-100])
    file = CorpusFile(str(path), 0, format, "gz" if path.read_bytes()[0] == 0x1F else "zst")
    kept = [document.text for document in read_documents(file, Reading(on_bad_line="skip"))]
    assert kept == texts[: len(kept)]
    assert len(kept) > 1500


@pytest.mark.parametrize("packing", ["gz", "zst", "zst-streamed"])
def test_every_truncation_of_one_line(tmp_path: Path, packing: str) -> None:
    ending, pack = PACKINGS[packing]
    content = pack(b'{"text": "hello"}\n')
    for length in range(1, len(content)):
        _message(_write(tmp_path, f"corpus{ending}", content[:length]))


@pytest.mark.parametrize("format", ["json", "parquet"])
def test_every_truncation_of_a_format(tmp_path: Path, format: str) -> None:
    content = _formatted([{"text": "hello ä"}, {"text": "b"}], format)
    for length in range(len(content)):
        path, passed = _write(tmp_path, "corpus", content[:length]), Passed()
        assert "cannot be read after" in _message(path, format=format)
        kept = [document.text for document in _read(path, passed, format=format, on_bad_line="skip")]
        assert kept == ["hello ä", "b"][: len(kept)]
        assert passed.bad == 1


@pytest.mark.parametrize("packing", PACKED)
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
    assert "cannot be read" in _message(_write(tmp_path, f"corpus{ending.replace('jsonl', 'json')}", PLAIN))


# ----------------------------------------------------------------------------------------------------------------- fuzz

words = st.text(st.characters(codec="utf-8"), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
objects = st.fixed_dictionaries(
    {}, optional={"text": scalars, "meta": st.dictionaries(st.sampled_from("ab"), scalars), "id": scalars}
)
ODD = [
    b"",
    b" ",
    b"[",
    b"]",
    b"{",
    b'{"text": "\\udc00"}',
    b"NaN",
    b"\0",
    SEPARATOR.encode(),
    b"\r",
    b'{"text":"' + b"x" * 9999,
]
ENCODINGS = st.sampled_from(["utf-8", "latin-1", "utf-16", "utf-8-sig"])
records = st.one_of(
    st.builds(lambda value, ascii: json.dumps(value, ensure_ascii=ascii).encode(), objects, st.booleans()),
    st.builds(lambda value, name: json.dumps(value, ensure_ascii=False).encode(name, "replace"), objects, ENCODINGS),
    st.sampled_from(ODD),
    st.binary(max_size=30),
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Files that are whole, nearly, or not at all of a format."""
    pieces = draw(st.lists(records, max_size=8))
    content = draw(
        st.sampled_from(
            [
                b"\n".join(pieces),
                b"[" + b",".join(pieces) + b"]",
                SEPARATOR.encode().join(pieces),
                _parquet({"text": [str(piece) for piece in pieces], "id": list(range(len(pieces)))}),
            ]
        )
    )
    content = draw(st.sampled_from(list(COMPRESSIONS.values())))(content)
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    for position in draw(st.lists(st.integers(0, 2000), max_size=3)):
        if position < len(content):
            content = content[:position] + draw(st.binary(max_size=3)) + content[position + 1 :]
    return content


@settings(max_examples=600, deadline=None)
@given(
    content=contents(),
    format=st.sampled_from(FORMATS),
    compression=st.sampled_from(sorted(COMPRESSIONS)),
    text_field=st.sampled_from(["text", "meta.a"]),
    filters=st.sampled_from(
        [{}, {"include": {"id": ["1", "True"]}}, {"exclude": {"meta.a": ["None", "x"]}, "id_field": "id"}]
    ),
)
@example(b"[" * 200_000, "json", "", "text", {})
@example(b"PAR1" + b"\xff" * 100 + b"PAR1", "parquet", "", "text", {})
def test_fuzz(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    format: str,
    compression: str,
    text_field: str,
    filters: dict[str, Any],
) -> None:
    if format in ("separated", "text"):
        filters = {}
    path = _write(tmp_path_factory.getbasetemp(), "fuzz", content)
    file = CorpusFile(str(path), len(content), format, compression)
    strict, lenient = (
        Reading(path=str(path), text_field=text_field, on_bad_line=way, **filters) for way in ("error", "skip")
    )
    passed = Passed()
    documents = list(read_documents(file, lenient, passed))
    for document in documents:
        assert document.text
        assert document.text.encode()
        assert (document.key is None) == ("id_field" not in filters)
    assert len(passed.first_bad) == min(passed.bad, 5)
    until_error = []
    try:
        for document in read_documents(file, strict):
            until_error.append(document)
        assert not passed.bad
        assert until_error == documents
    except MemSinksError:
        assert passed.bad
        assert until_error == documents[: len(until_error)]
    assert "\n" not in "".join(passed.first_bad)
    if not compression and format == "jsonl":
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        whole = sum(bool(line) and not line.isspace() for line in lines)
        assert whole == len(documents) + passed.bad + passed.empty + passed.filtered
    if not compression and format == "separated":
        *found, rest = content.removeprefix(b"\xef\xbb\xbf").split(SEPARATOR.encode())
        assert len(found) + bool(rest.strip(b"\r\n")) == len(documents) + passed.bad + passed.empty


@settings(max_examples=300, deadline=None)
@given(values=st.lists(objects | scalars, max_size=10), format=st.sampled_from(["jsonl", "json"]), ascii=st.booleans())
def test_nothing_is_lost_without_a_count(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], format: str, ascii: bool
) -> None:
    dumped = [json.dumps(value, ensure_ascii=ascii) for value in values]
    content = "\n".join(dumped) if format == "jsonl" else f"[{','.join(dumped)}]"
    path, passed = _write(tmp_path_factory.getbasetemp(), "lost", content.encode()), Passed()
    documents = _read(path, passed, format=format, on_bad_line="skip", exclude={"id": ["1"]})
    expected = [
        Document(number, value["text"])
        for number, value in enumerate(values, start=1)
        if isinstance(value, dict) and isinstance(value.get("text"), str) and value["text"]
        if value.get("id") not in ("1",) and str(value.get("id")) != "1"
    ]
    assert documents == expected
    assert len(values) == len(documents) + passed.bad + passed.empty + passed.filtered
