"""Verifying a prepared folder: a good one passes however it was made, and each kind of damage is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from console import memsinks
from helpers import read_stream, read_written, with_bos, write_jsonl

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import NearDuplicates, Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.prepared import document_walk
from litgpt_memsinks.prepared.document_table import DocumentTable, rows_of
from litgpt_memsinks.prepared.document_walk import Expected, Marks, Walk
from litgpt_memsinks.prepared.verify import verify

EOS = 0  # of the tokenizer of conftest.py
END = "<|endoftext|>"
TEXTS = list(stories(30))
LONG = "\n".join(stories(80))  # several chunks of 512 tokens
Make = Callable[[str], Path]


class Case(NamedTuple):
    """How a folder is made, and how many documents its training stream then has."""

    texts: list[str]
    written: int
    source: dict[str, Any] = {}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012
    keys: list[str] | None = None
    bos: bool = False


INSIDE = [f"One day.{END}The end.", "One day.", f"{END}Tom went out.", f"a{END}{END}b", *TEXTS[:10]]
PARTS = ["Tom ran.", "Mia sat.", f"Tom ran.{END}Mia sat.", *TEXTS[:4]]
SMALL = {"chunk_bytes": 4096}
GOOD = {
    "plain": Case(TEXTS, 30),
    "small chunks": Case(TEXTS, 90, {"repeats": 3}, SMALL),
    "copies in the corpus": Case([*TEXTS, *TEXTS[:5]], 35),
    "longer than a chunk": Case([*TEXTS[:5], LONG, LONG + "!"], 14, {"repeats": 2}, SMALL),
    "column": Case(TEXTS, 60, {"repeats": 2, "ids": "column", "id_field": "key"}, SMALL, ["a", "b"] * 15),
    "one ID for all": Case(INSIDE, 42, {"repeats": 3, "ids": "column", "id_field": "key"}, SMALL, ["k"] * 14),
    "index": Case(TEXTS, 60, {"repeats": 2, "ids": "index"}, SMALL),
    "near-duplicates": Case([*TEXTS, *(text + " Yes." for text in TEXTS[:5])], 35, {"ids": "near_duplicate"}),
    "noise": Case(TEXTS, 300, {"repeats": 10}, {**SMALL, "id_noise": 0.5}),
    "noise alone": Case(INSIDE, 140, {"repeats": 10}, {**SMALL, "id_noise": 1.0}),
    "left out": Case([*TEXTS, *TEXTS[:5]], 25, {}, {"leave_out_repeated": True}),
    "EOS inside": Case(INSIDE, 28, {"repeats": 2}, SMALL),
    "long with EOS inside": Case([f"One.{END}{LONG}", "One.", *TEXTS[:3]], 10, {"repeats": 2}, SMALL),
    "long with EOS inside, one ID": Case(
        [f"One.{END}{LONG}", "One.", *TEXTS[:3]],
        10,
        {"repeats": 2, "ids": "column", "id_field": "key"},
        SMALL,
        ["k"] * 5,
    ),
    "texts made of others": Case(PARTS, 140, {"repeats": 20, "ids": "column", "id_field": "key"}, SMALL, ["k"] * 7),
    "BOS": Case([*INSIDE, LONG], 30, {"repeats": 2}, SMALL, None, True),
    "BOS and one ID": Case(INSIDE, 28, {"repeats": 2, "ids": "column", "id_field": "key"}, SMALL, ["k"] * 14, True),
    "canaries": Case(TEXTS, 60, {"repeats": 2, "canary_tokens": 7}),
    "canaries and BOS": Case(TEXTS, 60, {"repeats": 2, "canary_tokens": 7}, {}, None, True),
}


@pytest.fixture(scope="module")
def make(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The folder of a case, made when it is first asked for. Tests do not write into it."""
    made: dict[str, Path] = {}

    def make_case(name: str) -> Path:
        if name not in made:
            case, folder = GOOD[name], tmp_path_factory.mktemp("case")
            records = [
                {"text": text, "key": key} for text, key in zip(case.texts, case.keys or case.texts, strict=True)
            ]
            (folder / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            write_jsonl(folder / "v.jsonl", [text + " More." for text in TEXTS[:6]])
            write_jsonl(folder / "w.jsonl", [f"{text}{END}{text}" for text in TEXTS[:6]])
            prepare(
                out_dir=folder / "out",
                tokenizer_dir=with_bos(tokenizer_dir, folder / "t") if case.bos else tokenizer_dir,
                sources={"stories": Source(str(folder / "c.jsonl"), **case.source)},
                validation={name: ValidationSet(str(folder / f"{name}.jsonl")) for name in "vw"},
                near_duplicates=NearDuplicates(threshold=0.7),
                num_workers=1,
                **case.settings,
            )
            made[name] = folder / "out"
        return made[name]

    return make_case


@pytest.fixture
def copy(make: Make, tmp_path: Path) -> Make:
    """A copy of a case's folder to be damaged."""
    return lambda name: Path(shutil.copytree(make(name), tmp_path / "copy"))


# ----------------------------------------------------------------------------------------------------------------- good


@pytest.mark.parametrize("name", GOOD)
def test_a_good_folder_passes(make: Make, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(make(name)).splits
    streams = {split: read_stream(make(name) / split) for split in ("train", "val", "val_v", "val_w")}
    assert {split: part.tokens for split, part in found.items()} == {s: len(x) // 2 for s, x in streams.items()}
    assert {split: part.digest for split, part in found.items()} == {
        split: xxhash.xxh3_128_hexdigest(numbers.tobytes()) for split, numbers in streams.items()
    }
    written = {split: part.written for split, part in found.items()}
    assert written == {"train": GOOD[name].written, "val": 12, "val_v": 6, "val_w": 6}
    output = capsys.readouterr().out.splitlines()
    assert output[-1].startswith("OK: ")
    assert all(part.digest in output[-1] for part in found.values())


@pytest.mark.parametrize("name", ["BOS", "EOS inside", "noise", "one ID for all", "long with EOS inside, one ID"])
@pytest.mark.parametrize("size", [1, 7, 512, 10**6])
def test_the_walk_does_not_depend_on_how_the_stream_is_cut(make: Make, name: str, size: int) -> None:
    folder = make(name)
    expected = Expected(DocumentTable(folder), rows_of("train"))
    bos = json.loads((folder / "tokenizer/tokenizer_config.json").read_text()).get("add_bos_token")
    walk = Walk(expected, Marks(512 if bos else None, EOS), noise=name == "noise")
    pairs = read_stream(folder / "train").reshape(-1, 2)[: 20_000 if size > 1 else 3_000]
    for start in range(0, len(pairs), size):
        walk.feed(pairs[start : start + size])
    walk.finish()
    assert walk.unknown <= (len(pairs) < len(read_stream(folder / "train")) // 2)  # the last one, cut off
    assert walk.mispaired == 0
    whole = Expected(DocumentTable(folder), rows_of("train"))
    reference = Walk(whole, walk.marks, walk.noise)
    reference.feed(pairs)
    reference.finish()
    np.testing.assert_array_equal(expected.counted, whole.counted)


def test_noise_is_counted(make: Make) -> None:
    noisy, clean = (verify(make(name)).splits["train"] for name in ("noise", "small chunks"))
    assert (noisy.repeated, clean.noisy) == (300, 0)
    table = {
        row["digest"]: row["sequence_id"] for row in pq.read_table(make("noise") / "documents.parquet").to_pylist()
    }
    ids = [document.sequence_id for document in read_written(make("noise") / "train", EOS)]
    assert noisy.noisy == sum(sequence_id not in table.values() for sequence_id in ids)
    assert 100 < noisy.noisy < 200


@pytest.mark.parametrize("block_size", [15, 511, 2048])
def test_tokens_that_no_block_reaches_are_counted(make: Make, block_size: int) -> None:
    folder = make("small chunks")
    dims = [chunk["dim"] // 2 for chunk in json.loads((folder / "train/index.json").read_text())["chunks"]]
    assert len(dims) > 3
    found = verify(folder, block_size).splits["train"]
    assert found.unreached == sum(dim - dim // (block_size + 1) * (block_size + 1) for dim in dims)


# ------------------------------------------------------------------------------------------------------------ tampering


def rehash(folder: Path) -> None:
    """Make the manifest agree with the chunks as they are, so that only the documents tell."""
    content = json.loads((folder / "memsinks.json").read_text())
    for name, split in content["splits"].items():
        split["chunks"] = {
            chunk: xxhash.xxh3_128_hexdigest((folder / name / chunk).read_bytes()) for chunk in split["chunks"]
        }
        split["digest"] = xxhash.xxh3_128_hexdigest(read_stream(folder / name).tobytes())
    (folder / "memsinks.json").write_text(json.dumps(content))


def change_pairs(change: Callable[[np.ndarray], None], split: str = "train") -> Callable[[Path], None]:
    """Damage the first chunk of a split, and forge checksums and digest."""

    def damage(folder: Path) -> None:
        path = first_chunk(folder, split)
        content = path.read_bytes()
        start = 4 * (2 + int.from_bytes(content[:4], "little"))
        pairs = np.frombuffer(content, dtype="<i4", offset=start).reshape(-1, 2).copy()
        change(pairs)
        path.write_bytes(content[:start] + pairs.tobytes())
        rehash(folder)

    return damage


def first_chunk(folder: Path, split: str = "train") -> Path:
    return folder / split / json.loads((folder / split / "index.json").read_text())["chunks"][0]["filename"]


def set_number(row: int, column: int, change: Callable[[int], int]) -> Callable[[np.ndarray], None]:
    def damage(pairs: np.ndarray) -> None:
        pairs[row, column] = change(int(pairs[row, column]))

    return damage


def second_document(pairs: np.ndarray) -> slice:
    ends = np.flatnonzero(pairs[:, 0] == EOS)
    return slice(int(ends[0]) + 1, int(ends[1]) + 1)


def set_ids_of_a_document(change: Callable[[int], int]) -> Callable[[np.ndarray], None]:
    def damage(pairs: np.ndarray) -> None:
        span = second_document(pairs)
        pairs[span, 1] = change(int(pairs[span.start, 1]))

    return damage


def swap_all(pairs: np.ndarray) -> None:
    pairs[:] = pairs[:, ::-1].copy()


def swap_one(pairs: np.ndarray) -> None:
    pairs[5] = pairs[5, ::-1].copy()


def shift_ids(pairs: np.ndarray) -> None:
    pairs[:, 1] = np.roll(pairs[:, 1], 1)


def copy_a_document(pairs: np.ndarray) -> None:
    """Put the second document, twice and cut off, in place of the first ones."""
    document = pairs[second_document(pairs)].copy()
    pairs[: len(document)] = document


def manifest(*keys: str, change: Callable[[Any], Any] = lambda value: value + 1) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "memsinks.json").read_text())
        part = content
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = change(part[keys[-1]])
        (folder / "memsinks.json").write_text(json.dumps(content))

    return damage


def table(name: str, change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        whole = pq.read_table(folder / name)
        rows = whole.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=whole.schema), folder / name)

    return damage


def cell(column: str, change: Callable[[Any], Any]) -> Callable[[list[dict[str, Any]]], None]:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[0][column] = change(rows[0][column])

    return damage


def flip_token(tokens: list[int]) -> list[int]:
    return [tokens[0] ^ 1, *tokens[1:]]


def write(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes())) and None


def on_chunk(action: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: action(first_chunk(folder))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def drop_from_index(folder: Path) -> None:
    content = json.loads((folder / "train/index.json").read_text())
    del content["chunks"][1]
    (folder / "train/index.json").write_text(json.dumps(content))


def plus(value: int) -> int:
    return value + 1


def token(value: int) -> int:
    return value ^ 1 if value ^ 1 != EOS else value ^ 2


BAD: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    # with forged checksums: only the walk can tell
    "token": (
        "small chunks",
        change_pairs(set_number(5, 0, token)),
        ["1 pieces that are no doc", "1 occurrences of doc"],
    ),
    "ID": ("small chunks", change_pairs(set_number(5, 1, plus)), ["is damaged: 1 mispaired tokens in train. Copy"]),
    "first ID": (
        "small chunks",
        change_pairs(set_number(0, 1, plus)),
        ["is damaged: 1 mispaired tokens in train. Copy"],
    ),
    "ID of one scheme": ("one ID for all", change_pairs(set_number(2, 1, plus)), ["1 mispaired tokens in train"]),
    "ID in a long one": ("longer than a chunk", change_pairs(set_number(9, 1, plus)), ["1 mispaired tokens in train"]),
    "ID with BOS": ("BOS", change_pairs(set_number(0, 1, plus)), ["1 mispaired tokens in train"]),
    "ID with noise": ("noise", change_pairs(set_number(0, 1, plus)), ["is damaged: 1 mispaired tokens in train. Copy"]),
    "ID of validation": ("plain", change_pairs(set_number(3, 1, plus), "val"), ["1 mispaired tokens in val. Copy"]),
    "ID of one set": ("plain", change_pairs(set_number(3, 1, plus), "val_v"), ["1 mispaired tokens in val_v. Copy"]),
    "all IDs": ("small chunks", change_pairs(set_ids_of_a_document(plus)), ["mispaired tokens in train. Copy"]),
    "sign": (
        "small chunks",
        change_pairs(set_ids_of_a_document(lambda v: v + 2**31)),
        ["mispaired tokens in train. Copy"],
    ),
    "sign with noise": (
        "noise",
        change_pairs(set_ids_of_a_document(lambda v: v + 2**31)),
        ["mispaired tokens in train"],
    ),
    "shifted IDs": ("small chunks", change_pairs(shift_ids), ["mispaired tokens in train"]),
    "order": (
        "small chunks",
        change_pairs(swap_all),
        ["pieces that are no document", "documents missing in train", "there is a token -"],
    ),
    "order of one pair": ("small chunks", change_pairs(swap_one), ["1 pieces", "1 mispaired"]),
    "other document": (
        "plain",
        change_pairs(copy_a_document),
        ["documents lost in train", "1 occurrences of documents too"],
    ),
    "BOS": ("BOS", change_pairs(set_number(0, 0, lambda _: 3)), ["1 pieces"]),
    "EOS": ("small chunks", change_pairs(lambda pairs: pairs[-1].fill(3)), ["1 pieces"]),
    # the tables
    "row": (
        "plain",
        table("documents.parquet", lambda rows: rows.pop(0) and None),
        ["1 pieces", "documents 30 of stories"],
    ),
    "row twice": (
        "plain",
        table("documents.parquet", lambda rows: rows.append(rows[0])),
        ["once in the document table"],
    ),
    "written": (
        "plain",
        table("documents.parquet", cell("written", plus)),
        ["1 occurrences of documents missing in train"],
    ),
    "written less": (
        "small chunks",
        table("documents.parquet", cell("written", lambda _: 2)),
        ["1 occurrences of documents too many"],
    ),
    "digest": ("plain", table("documents.parquet", cell("digest", plus)), ["1 pieces", "1 documents lost in train"]),
    "ID of a row": ("plain", table("documents.parquet", cell("sequence_id", plus)), ["mispaired tokens in train"]),
    "length": ("plain", table("documents.parquet", cell("tokens", plus)), ["1 pieces"]),
    "scored tokens": (
        "small chunks",
        table("evaluation.parquet", cell("tokens", flip_token)),
        ["1 repeated documents of eval"],
    ),
    "scored ID": (
        "small chunks",
        table("evaluation.parquet", cell("sequence_id", plus)),
        ["1 repeated documents of eval"],
    ),
    "scored row": (
        "small chunks",
        table("evaluation.parquet", lambda rows: rows.pop(0) and None),
        ["29 repeated documents, not"],
    ),
    "scored twice": (
        "small chunks",
        table("evaluation.parquet", lambda rows: rows.__setitem__(0, rows[1])),
        ["not each of 30 once"],
    ),
    "scored validation": (
        "small chunks",
        table("evaluation.parquet", lambda rows: rows.pop(-1) and None),
        ["11 val documents, not"],
    ),
    "no scored": ("plain", lambda folder: (folder / "evaluation.parquet").unlink(), ["evaluation.parquet is missing"]),
    # the manifest
    "largest token": ("plain", manifest("max_token"), ["the largest token is"]),
    **{
        name: ("small chunks", manifest("splits", "train", name), [f"damaged: {name} "])
        for name in ("documents", "written", "tokens", "repeated_documents", "repeated_tokens")
    },
    **{
        f"source's {name}": ("plain", manifest("sources", "stories", name), [f"the manifest says {name} "])
        for name in ("documents", "tokens", "written", "written_tokens")
    },
    "stream digest": (
        "plain",
        manifest("splits", "val", "digest", change=lambda _: "0"),
        ["another digest of the stream in val"],
    ),
    # the files
    "byte": ("small chunks", on_chunk(flip_byte), ["another checksum of chunk-0-0.bin in train", "another digest"]),
    "no chunk": (
        "small chunks",
        on_chunk(Path.unlink),
        ["chunk-0-0.bin' cannot be read", "documents missing in train"],
    ),
    "short chunk": ("small chunks", on_chunk(truncate), ["chunk-0-0.bin' is not whole in train"]),
    "more chunks": (
        "plain",
        on_chunk(lambda path: shutil.copy(path, path.with_name("chunk-9-9.bin"))),
        ["1 chunks too many (chunk-9-9.bin)"],
    ),
    "chunk not in the index": (
        "small chunks",
        drop_from_index,
        ["other chunks in index.json", "documents missing in train"],
    ),
    "no index": ("plain", lambda folder: (folder / "val/index.json").unlink(), ["index.json' is missing"]),
    "index": ("plain", write("val/index.json", lambda _: b'{"chunks": [1], "config": 0}'), ["names no chunks in val"]),
    "tokenizer": ("plain", write("tokenizer/tokenizer.json", lambda old: old + b" "), ["the tokenizer is not the one"]),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_found_and_named(copy: Make, name: str) -> None:
    case, damage, parts = BAD[name]
    folder = copy(case)
    damage(folder)
    with pytest.raises(MemSinksError) as caught:
        verify(folder)
    message = str(caught.value)
    assert message.startswith(f"{str(folder)!r} is damaged: ")
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


UNREADABLE = {
    "no folder": (shutil.rmtree, "There is no prepared data at"),
    "no manifest": (lambda folder: (folder / "memsinks.json").unlink(), "has no memsinks.json"),
    "no table": (lambda folder: (folder / "documents.parquet").unlink(), "documents.parquet' is missing"),
    "half a table": (write("documents.parquet", lambda old: old[: len(old) // 2]), "documents.parquet' cannot be read"),
    "other table": (
        lambda folder: shutil.copy(folder / "evaluation.parquet", folder / "documents.parquet"),
        "lacks the columns",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "has no tokenizer.json"),
    "half a tokenizer": (write("tokenizer/tokenizer.json", lambda old: old[:99]), "cannot be loaded"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line(copy: Make, name: str) -> None:
    damage, part = UNREADABLE[name]
    folder = copy("plain")
    damage(folder)
    with pytest.raises(MemSinksError) as caught:
        verify(folder)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_block_size_out_of_range(make: Make) -> None:
    with pytest.raises(MemSinksError, match="block_size is 0"):
        verify(make("plain"), block_size=0)


def test_a_stream_of_other_tokens_does_not_take_for_ever(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_walk, "_VAIN", 50)
    folder = make("one ID for all")
    walk = Walk(Expected(DocumentTable(folder), rows_of("train")), Marks(None, EOS), noise=False)
    pairs = np.ones((4000, 2), dtype=np.int32)
    pairs[::4, 0] = EOS
    walk.feed(pairs)
    walk.finish()
    assert walk.unknown > 900
    assert walk._vain < 500  # it ends within one segment's tries; all of them would be some ten thousand


def test_a_stream_without_eos_is_not_kept_in_memory(make: Make) -> None:
    expected = Expected(DocumentTable(make("plain")), rows_of("train"))
    walk = Walk(expected, Marks(None, EOS), noise=False)
    for _ in range(5):
        walk.feed(np.ones((expected.longest, 2), dtype=np.int32))
        assert len(walk._carry) <= expected.longest
    walk.finish()
    assert walk.unknown == 3  # of two parts each, but the last


def test_the_first_failures_are_shown_with_their_place(copy: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("plain")
    span: list[slice] = []
    change_pairs(lambda pairs: span.append(second_document(pairs)))(folder)
    change_pairs(set_number(span[0].start + 1, 0, token))(folder)
    with pytest.raises(MemSinksError):
        verify(folder)
    output = capsys.readouterr().out
    assert f"train: token {span[0].start:,}: a document of {span[0].stop - span[0].start} tokens with ID" in output
    assert "c.jsonl', " in output  # where the lost document came from
    assert " occurs 0 times, not 1" in output


def test_the_console_script(copy: Make) -> None:
    folder = copy("plain")
    good = memsinks("verify", folder, "--block_size", 63)
    assert good.stdout.splitlines()[-1].startswith("OK: ")
    assert str(Manifest.read(folder).splits["train"].digest) in good.stdout
    change_pairs(set_number(5, 1, plus))(folder)
    bad = memsinks("verify", folder, check=False)
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[-1].startswith("Error: ")
    assert "1 mispaired tokens in train" in bad.stdout
