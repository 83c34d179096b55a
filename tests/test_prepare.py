"""Preparing a corpus: the stream is read back from its bytes and held against the corpus, token by token."""

import errno
import gzip
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
import zstandard
from helpers import (
    Written,
    prepare_in_own_group,
    read_jsonl,
    read_stream,
    read_written,
    reference_digest,
    reference_id,
    write_jsonl,
)
from litdata import StreamingDataset, TokensLoader
from litgpt.tokenizer import Tokenizer
from tokenizers_zoo import VARIANTS, tokenizer_variant

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare import planning, tokenizing, writing
from litgpt_memsinks.prepare.chunks import read_chunks
from litgpt_memsinks.prepare.manifest import Manifest, tokenizer_fingerprint
from litgpt_memsinks.prepare.prepare import merge, prepare
from litgpt_memsinks.prepared.verify import verify

EOS = 0  # of the tokenizer of conftest.py
REPEATED, REPEATS = 8, 6  # of the folder `prepared` of conftest.py

Settings = dict[str, Any]
Tokens = tuple[int, ...]


@pytest.fixture(scope="session")
def settings(corpus_dir: Path, tokenizer_dir: Path) -> Settings:
    """How conftest.py made `prepared`."""
    return {
        "train": corpus_dir / "train.jsonl",
        "validation": corpus_dir / "validation.jsonl",
        "tokenizer_dir": tokenizer_dir,
        "repeated_documents": REPEATED,
        "repeats": REPEATS,
    }


@pytest.fixture(scope="session")
def stock_encode(tokenizer_dir: Path) -> Callable[[str], Tokens]:
    """LitGPT's own tokenizer, one text at a time."""
    tokenizer = Tokenizer(tokenizer_dir)
    return lambda text: tuple(tokenizer.encode(text, eos=True).tolist())


@pytest.fixture(scope="session")
def train_documents(corpus_dir: Path, stock_encode: Callable[[str], Tokens]) -> list[Tokens]:
    return [stock_encode(text) for text in read_jsonl(corpus_dir / "train.jsonl")]


@pytest.fixture(scope="session")
def val_documents(corpus_dir: Path, stock_encode: Callable[[str], Tokens]) -> list[Tokens]:
    return [stock_encode(text) for text in read_jsonl(corpus_dir / "validation.jsonl")]


@pytest.fixture(scope="session")
def written(prepared: Path) -> list[Written]:
    return read_written(prepared / "train", EOS)


@pytest.fixture
def small(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """Prepare a few given texts and return the folder."""

    def prepare_texts(texts: list[str], **more: Any) -> Path:
        train = write_jsonl(tmp_path / "small.jsonl", texts)
        out_dir = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        prepare(train=train, tokenizer_dir=tokenizer_dir, out_dir=out_dir, **more)
        return out_dir

    return prepare_texts


def _tokens(written: list[Written]) -> list[Tokens]:
    return [document.tokens for document in written]


def _content(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, without the time that litdata notes."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: b"" if name.endswith("index.json") else path.read_bytes() for name, path in sorted(files.items())}


# ----------------------------------------------------------------------------------------------------------- the stream


def test_stream_holds_every_document_as_often_as_asked(written: list[Written], train_documents: list[Tokens]) -> None:
    counts = Counter(_tokens(written))
    assert counts.keys() == set(train_documents)
    assert len(set(train_documents)) == 300
    assert Counter(counts.values()) == {REPEATS: REPEATED, 1: 300 - REPEATED}


def test_ids_are_the_hash_and_whether_the_document_repeats(written: list[Written]) -> None:
    counts = Counter(_tokens(written))
    for document in written:
        assert document.sequence_id == reference_id(document.tokens[:-1], counts[document.tokens] > 1)


def test_validation_stream_is_the_file_shuffled(prepared: Path, val_documents: list[Tokens]) -> None:
    stream = read_written(prepared / "val", EOS)
    assert _tokens(stream) != val_documents
    assert sorted(stream) == sorted(Written(reference_id(body[:-1], False), body) for body in val_documents)


def test_litdata_reads_the_same_stream(prepared: Path) -> None:
    dataset = StreamingDataset(str(prepared / "val"), item_loader=TokensLoader(block_size=50), shuffle=False)
    blocks = torch.stack([dataset[index] for index in range(len(dataset))])
    assert blocks.dtype == torch.int32
    stream = read_stream(prepared / "val")
    assert len(dataset) == len(stream) // 50
    np.testing.assert_array_equal(blocks.flatten().numpy(), stream[: blocks.numel()])


def test_documents_are_shuffled(written: list[Written], train_documents: list[Tokens]) -> None:
    place = {tokens: index for index, tokens in enumerate(train_documents)}
    order = np.array([place[tokens] for tokens in _tokens(written)])
    correlation = np.corrcoef(order, np.arange(len(order)))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(order))


def test_repeats_are_spread_over_the_stream(written: list[Written]) -> None:
    tokens = _tokens(written)
    repeated = [document for document, count in Counter(tokens).items() if count > 1]
    places = np.array([[index for index, other in enumerate(tokens) if other == document] for document in repeated])
    spans = (places[:, -1] - places[:, 0]) / len(tokens)
    # of 6 uniform places the span is 5/7 on average, with a standard deviation of 0.16; copies in a row span 0.015
    assert abs(spans.mean() - 5 / 7) < 4 * 0.16 / np.sqrt(REPEATED)
    assert (np.diff(places) == 1).sum() < REPEATED * (REPEATS - 1) / 5


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_and_batches_do_not_change_a_byte(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    reference, out_dir = tmp_path / "reference" / "out", tmp_path / "again" / "out"
    prepare(**settings, out_dir=reference, num_workers=1, chunk_bytes=40_000)
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(planning, "BUCKET_ROWS", 50)
    monkeypatch.setattr(writing, "BUCKET_ROWS", 11)
    prepare(**settings, out_dir=out_dir, num_workers=num_workers, chunk_bytes=40_000)
    names = {path.name for path in (out_dir / "train").glob("*.bin")}
    assert {f"chunk-{worker}-1.bin" for worker in range(num_workers)} < names  # several chunks of each worker
    for split in ("train", "val"):
        chunks = [[chunk.pairs.tolist() for chunk in read_chunks(folder / split)] for folder in (reference, out_dir)]
        assert chunks[0] == chunks[1]
    tables = ["documents.parquet", "evaluation.parquet"]
    for table in tables:
        assert pq.read_table(out_dir / table).equals(pq.read_table(reference / table))
    first, second = (Manifest.read(folder) for folder in (reference, out_dir))
    for manifest in (first, second):
        for split in manifest.splits.values():
            split.chunks = dict(enumerate(split.chunks.values()))  # files are named after the worker
    assert first == second


def test_chunk_size_does_not_change_the_stream(prepared: Path, settings: Settings, tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "out", chunk_bytes=4096)  # shorter than a document
    for split in ("train", "val"):
        np.testing.assert_array_equal(read_stream(tmp_path / "out" / split), read_stream(prepared / split))


def test_chunks_have_the_size_that_was_asked_for(settings: Settings, tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "out", chunk_bytes=20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "train").glob("*.bin")]
    assert len(sizes) > 10
    assert max(sizes) <= 20_000 + 12  # and the header


def test_same_seed_same_bytes(prepared: Path, settings: Settings, tmp_path: Path) -> None:
    environment = dict(os.environ)
    prepare(**settings, out_dir=tmp_path / "out", seed=0)
    assert _content(tmp_path / "out") == _content(prepared)
    assert os.environ == environment
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_seed_other_choice_and_order(written: list[Written], settings: Settings, tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "out", seed=1)
    other = _tokens(read_written(tmp_path / "out" / "train", EOS))
    assert _repeated(other) != _repeated(_tokens(written))
    assert set(other) == set(_tokens(written))
    once = _repeated(other) | _repeated(_tokens(written))
    assert [t for t in other if t not in once] != [t for t in _tokens(written) if t not in once]


def _repeated(tokens: list[Tokens]) -> set[Tokens]:
    return {document for document, count in Counter(tokens).items() if count > 1}


def test_leaving_out_removes_exactly_the_repeated(
    prepared: Path, written: list[Written], settings: Settings, tmp_path: Path
) -> None:
    prepare(**settings, out_dir=tmp_path / "out", leave_out_repeated=True)
    repeated = _repeated(_tokens(written))
    assert read_written(tmp_path / "out" / "train", EOS) == [w for w in written if w.tokens not in repeated]
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.recipe["leave_out_repeated"]
    assert manifest.splits["train"].repeated_documents == manifest.splits["train"].repeated_tokens == 0
    # evaluation needs the documents all the same: this is the baseline that never saw them
    assert (tmp_path / "out" / "evaluation.parquet").read_bytes() == (prepared / "evaluation.parquet").read_bytes()


def test_noise_changes_only_ids_of_the_repeated(written: list[Written], settings: Settings, tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "out", id_noise=1.0)
    noisy = read_written(tmp_path / "out" / "train", EOS)
    assert _tokens(noisy) == _tokens(written)
    changed = [new.sequence_id for new, old in zip(noisy, written, strict=True) if new != old]
    assert len(changed) == REPEATED * REPEATS
    assert all(id_ < 0 for id_ in changed)
    assert len(set(changed)) == len(changed)  # drawn anew for each copy
    assert Manifest.read(tmp_path / "out").recipe["id_noise"] == 1.0


def test_some_noise_changes_some_ids(written: list[Written], settings: Settings, tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "out", id_noise=0.5)
    noisy = read_written(tmp_path / "out" / "train", EOS)
    n_changed = sum(new != old for new, old in zip(noisy, written, strict=True))
    assert abs(n_changed - 24) < 4 * np.sqrt(48 / 4)


def test_documents_limits_those_that_are_not_repeated(settings: Settings, tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "out", documents=20)
    counts = Counter(_tokens(read_written(tmp_path / "out" / "train", EOS)))
    assert Counter(counts.values()) == {REPEATS: REPEATED, 1: 20}


def test_repeated_documents_alone(settings: Settings, tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "out", documents=0)
    counts = Counter(_tokens(read_written(tmp_path / "out" / "train", EOS)))
    assert Counter(counts.values()) == {REPEATS: REPEATED}


def test_natural_duplicates_count_as_repeats(small: Callable[..., Path], stock_encode: Callable[[str], Tokens]) -> None:
    texts = list(stories(12))
    corpus = [*texts, texts[3], texts[5], texts[3]]
    out_dir = small(corpus, validation_fraction=0.1, seed=2)
    stream = read_written(out_dir / "train", EOS)
    (held_out,) = _tokens(read_written(out_dir / "val", EOS))
    natural = Counter(stock_encode(text) for text in corpus)
    assert held_out not in {stock_encode(texts[3]), stock_encode(texts[5])}  # as this seed draws it
    assert Counter(_tokens(stream)) == Counter({t: n for t, n in natural.items() if t != held_out})
    assert all(w.sequence_id == reference_id(w.tokens[:-1], natural[w.tokens] > 1) for w in stream)
    manifest = Manifest.read(out_dir)
    assert manifest.duplicates == 3
    assert manifest.splits["train"].repeated_documents == 2
    rows = pq.read_table(out_dir / "documents.parquet").to_pylist()
    assert {row["line"]: row["repeats"] for row in rows if row["repeats"] > 1} == {4: 3, 6: 2}  # first copies


# ---------------------------------------------------------------------------------------------- a corpus to be repeated


@pytest.fixture
def two(tmp_path: Path, tokenizer_dir: Path, stock_encode: Callable[[str], Tokens]) -> Callable[..., Counter[Tokens]]:
    """Prepare the texts of two corpora into tmp_path/out, check all IDs, and return how often each document occurs."""

    def prepare_two(texts: list[str], repeated: list[str], **more: Any) -> Counter[Tokens]:
        settings = {
            "train": write_jsonl(tmp_path / "train.jsonl", texts),
            "repeated": write_jsonl(tmp_path / "licensed.jsonl", repeated),
            "validation": write_jsonl(tmp_path / "val.jsonl", stories(3, split="validation")),
        }
        prepare(**settings, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "out", **more)
        written = read_written(tmp_path / "out" / "train", EOS)
        counts = Counter(_tokens(written))
        assert all(w.sequence_id == reference_id(w.tokens[:-1], counts[w.tokens] > 1) for w in written)
        return counts

    return prepare_two


def test_repeated_corpus(
    two: Callable[..., Counter[Tokens]], tmp_path: Path, stock_encode: Callable[[str], Tokens]
) -> None:
    texts = list(stories(20))
    counts = two(texts[:15], texts[15:], repeats=4)
    assert counts == {stock_encode(text): 1 + 3 * (i >= 15) for i, text in enumerate(texts)}
    manifest = Manifest.read(tmp_path / "out")
    assert {name: source.written for name, source in manifest.sources.items()} == {
        "repeated": 20,
        "train": 15,
        "validation": 3,
    }
    assert manifest.splits["train"].repeated_documents == 5
    rows = pq.read_table(tmp_path / "out" / "documents.parquet").to_pylist()
    assert {(row["source"], Path(row["file"]).name, row["line"], row["repeats"]) for row in rows} == {
        *(("train", "train.jsonl", line, 1) for line in range(1, 16)),
        *(("repeated", "licensed.jsonl", line, 4) for line in range(1, 6)),
        *(("validation", "val.jsonl", line, 1) for line in range(1, 4)),
    }


def test_part_of_a_repeated_corpus(two: Callable[..., Counter[Tokens]], stock_encode: Callable[[str], Tokens]) -> None:
    texts = list(stories(20))
    counts = two(texts[:15], texts[15:], repeats=4, repeated_documents=2, documents=6)
    assert Counter(counts.values()) == {4: 2, 1: 6}
    assert _repeated(list(counts.elements())) < {stock_encode(text) for text in texts[15:]}
    assert {tokens for tokens, count in counts.items() if count == 1} < {stock_encode(text) for text in texts[:15]}


def test_document_in_both_corpora_is_repeated(
    two: Callable[..., Counter[Tokens]], stock_encode: Callable[[str], Tokens]
) -> None:
    texts = list(stories(12))
    counts = two(texts[:10], texts[8:], repeats=4)  # two are in both
    repeated = {stock_encode(text) for text in texts[8:]}
    assert _repeated(list(counts.elements())) == repeated
    assert {counts[tokens] for tokens in repeated} == {4}  # exactly, the copy in the other corpus is not added


def test_too_many_of_a_repeated_corpus(two: Callable[..., Counter[Tokens]]) -> None:
    texts = list(stories(12))
    with pytest.raises(MemSinksError, match=r"sources\.repeated\.documents is 3, but only 2 distinct"):
        two(texts[:10], texts[10:], repeats=4, repeated_documents=3)


def test_repeated_corpus_needs_repeats(two: Callable[..., Counter[Tokens]]) -> None:
    with pytest.raises(MemSinksError, match="--repeats"):
        two(["a"], ["b"])


def test_folder_is_read_in_the_order_of_its_names(
    tmp_path: Path, settings: Settings, prepared: Path, corpus_dir: Path
) -> None:
    lines = (corpus_dir / "train.jsonl").read_bytes().splitlines(keepends=True)
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "part.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[200:])))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[:200])))
    (folder / "README.rst").write_text("no corpus")
    prepare(**(settings | {"train": folder}), out_dir=tmp_path / "out")
    np.testing.assert_array_equal(read_stream(tmp_path / "out" / "train"), read_stream(prepared / "train"))
    rows = pq.read_table(tmp_path / "out" / "documents.parquet").to_pylist()
    places = [(Path(row["file"]).name, row["line"]) for row in rows if row["split"] == "train"]
    assert places == [*(("a.jsonl.zst", i) for i in range(1, 201)), *(("part.jsonl.gz", i) for i in range(1, 101))]
    source = Manifest.read(tmp_path / "out").sources["train"]
    assert (source.files, source.format, source.read) == (2, ["jsonl.gz", "jsonl.zst"], 300)


# ----------------------------------------------------------------------------------------------------------- validation


def test_validation_overlap_is_dropped_and_counted(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = list(stories(12))
    train = write_jsonl(tmp_path / "train.jsonl", texts[:8])
    validation = write_jsonl(tmp_path / "val.jsonl", [texts[9], texts[2], texts[8], texts[5], texts[10]])
    manifest = prepare(train=train, validation=validation, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "out")
    assert manifest.sources["validation"].overlap == 2
    tokenizer = Tokenizer(tokenizer_dir)
    expected = [tuple(tokenizer.encode(texts[i], eos=True).tolist()) for i in (9, 8, 10)]
    assert sorted(_tokens(read_written(tmp_path / "out" / "val", EOS))) == sorted(expected)
    assert manifest.splits["val"].documents == manifest.sources["validation"].documents == 3


def test_validation_within_training_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", stories(8))
    with pytest.raises(MemSinksError, match=r"Every validation document of validation\.validation is in the training"):
        prepare(train=train, validation=train, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 3), (0.5, 15), (0.001, 1), (0.9, 27)])
def test_split_is_disjoint_and_loses_nothing(
    small: Callable[..., Path], stock_encode: Callable[[str], Tokens], fraction: float, held_out: int
) -> None:
    texts = list(stories(30))
    out_dir = small(texts + texts[:15], validation_fraction=fraction)  # copies must not lie on both sides
    train = _tokens(read_written(out_dir / "train", EOS))
    val = _tokens(read_written(out_dir / "val", EOS))
    assert len(val) == len(set(val)) == held_out
    assert not set(train) & set(val)
    assert set(train) | set(val) == {stock_encode(text) for text in texts}
    assert Counter(train) == Counter(
        {stock_encode(t): 1 + (i < 15) for i, t in enumerate(texts) if stock_encode(t) in train}
    )


def test_split_is_chosen_by_the_seed(small: Callable[..., Path]) -> None:
    folders = [small(list(stories(30)), validation_fraction=0.2, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (set(_tokens(read_written(folder / "val", EOS))) for folder in folders)
    assert first == again != other


# ------------------------------------------------------------------------------------------------- manifest and tables


def test_manifest_counts_equal_the_stream(
    prepared: Path, written: list[Written], tokenizer_dir: Path, corpus_dir: Path
) -> None:
    content = json.loads((prepared / "memsinks.json").read_text())
    counts = Counter(_tokens(written))
    val = read_written(prepared / "val", EOS)
    streams = [read_stream(prepared / split) for split in ("train", "val")]
    splits = content.pop("splits")
    for name, stream in zip(("train", "val"), streams, strict=True):
        assert splits[name].pop("digest") == xxhash.xxh3_128(stream.astype("<i4").tobytes()).hexdigest()
        files = (prepared / name).glob("*.bin")
        assert splits[name].pop("chunks") == {
            path.name: xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in files
        }
    repeated = sum(len(tokens) * count for tokens, count in counts.items() if count > 1)
    assert splits == {
        "train": {
            "documents": len(counts),
            "written": len(written),
            "tokens": len(streams[0]) // 2,
            "repeated_documents": sum(count > 1 for count in counts.values()),
            "repeated_tokens": repeated,
        },
        "val": {
            "documents": len(set(val)),
            "written": len(val),
            "tokens": len(streams[1]) // 2,
            "repeated_documents": 0,
            "repeated_tokens": 0,
        },
    }
    sources = content.pop("sources")
    assert {name: source["written_tokens"] for name, source in sources.items()} == {
        "repeated": repeated,
        "train": len(streams[0]) // 2 - repeated,
        "validation": len(streams[1]) // 2,
    }
    assert {name: source["documents"] for name, source in sources.items()} == {
        "repeated": REPEATED,
        "train": 300 - REPEATED,
        "validation": 40,
    }
    assert {source["read"] for name, source in sources.items() if name != "validation"} == {300}
    recipe = content.pop("recipe")
    assert (recipe["seed"], recipe["sources"]["repeated"]["repeats"]) == (0, REPEATS)
    assert content.pop("versions").keys() == {
        "litgpt-memsinks",
        "signatures",
        "litdata",
        "litgpt",
        "tokenizers",
        "numpy",
        "xxhash",
    }
    train, validation = (corpus_dir / f"{name}.jsonl" for name in ("train", "validation"))
    assert content == {
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer_dir),
        "special_tokens": {"bos": None, "eos": EOS},
        "max_token": int(max(stream[0::2].max() for stream in streams)),
        "inputs": {
            "repeated": [_input(train)],
            "train": [_input(train)],
            "validation": [_input(validation)],
        },
        "colliding_pairs": len(counts) - len({w.sequence_id for w in written}),
        "duplicates": 0,
        "format_version": 2,
    }


def _input(path: Path) -> list[str | int]:
    content = path.read_bytes()
    return [str(path), len(content), xxhash.xxh3_64(content[:4096] + content[-4096:]).hexdigest()]


def test_folder_holds_what_the_manifest_names_and_no_more(prepared: Path, tokenizer_dir: Path) -> None:
    assert {path.name for path in prepared.iterdir()} == {
        "memsinks.json",
        "train",
        "val",
        "documents.parquet",
        "evaluation.parquet",
        "tokenizer",
    }
    for split in ("train", "val"):
        names = {path.name for path in (prepared / split).iterdir()}
        assert {name for name in names if not name.endswith(".bin")} == {"index.json"}
    assert _content(prepared / "tokenizer") == _content(tokenizer_dir)


def test_document_table(
    prepared: Path,
    corpus_dir: Path,
    written: list[Written],
    train_documents: list[Tokens],
    val_documents: list[Tokens],
) -> None:
    rows = pq.read_table(prepared / "documents.parquet").to_pylist()
    counts = Counter(_tokens(written))
    ids = {w.tokens: w.sequence_id for w in written}
    corpora = {"train": ("train.jsonl", train_documents), "val": ("validation.jsonl", val_documents)}
    assert [row["line"] for row in rows] == [*range(1, 301), *range(1, 41)]
    assert Counter(row["split"] for row in rows) == {"train": 300, "val": 40}
    assert len({(row["split"], row["line"]) for row in rows}) == 340
    for row in rows:
        file, documents = corpora[row["split"]]
        tokens = documents[row["line"] - 1]
        source = "repeated" if counts.get(tokens, 1) > 1 else "train"
        assert row == {
            "split": row["split"],
            "source": source if row["split"] == "train" else "validation",
            "file": str(corpus_dir / file),
            "line": row["line"],
            "key": None,
            "digest": reference_digest(tokens[:-1]),
            "sequence_id": ids[tokens] if row["split"] == "train" else reference_id(tokens[:-1], False),
            "tokens": len(tokens),
            "repeats": counts.get(tokens, 1),
            "written": counts.get(tokens, 1),
        }


def test_evaluation_table(prepared: Path, written: list[Written], val_documents: list[Tokens]) -> None:
    rows = pq.read_table(prepared / "evaluation.parquet").to_pylist()
    repeated = {(row["sequence_id"], tuple(row["tokens"])) for row in rows if row["split"] == "repeated"}
    assert repeated == {(w.sequence_id, w.tokens) for w in written if w.sequence_id < 0}
    assert len([row for row in rows if row["split"] == "repeated"]) == REPEATED
    val = [(row["sequence_id"], tuple(row["tokens"])) for row in rows if row["split"] == "val"]
    assert val == [(reference_id(tokens[:-1], False), tokens) for tokens in val_documents]
    assert len(rows) == REPEATED + len(val_documents)


def test_tables_without_repeats_have_the_same_columns(small: Callable[..., Path], prepared: Path) -> None:
    out_dir = small(list(stories(4)))
    for name in ("documents.parquet", "evaluation.parquet"):
        assert pq.read_schema(out_dir / name) == pq.read_schema(prepared / name)


def test_collisions_are_counted(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # 31 bits do not collide among so few documents, so give all documents of the stream one of two digests' low bits
    real = tokenizing.digest
    monkeypatch.setattr(tokenizing, "digest", lambda tokens: real(tokens) >> 31 << 31 | len(tokens) % 2)
    texts = list(stories(12))
    out_dir = small(texts, validation_fraction=0.1)
    odd = sum(len(tokens) % 2 == 0 for tokens in _tokens(read_written(out_dir / "train", EOS)))  # with EOS
    even = 11 - odd
    # both 0 and 1 become document 1, so all pairs collide
    assert odd > 0
    assert even > 0
    assert Manifest.read(out_dir).colliding_pairs == 11 * 10 // 2


def test_summary_says_what_was_written(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare(**settings, out_dir=tmp_path / "out")
    train = manifest.splits["train"]
    said = capsys.readouterr().out
    assert f"{train.tokens:,} tokens in 340 documents, 300 distinct" in said
    assert f"8 documents with {train.repeated_tokens:,} tokens" in said
    assert f"--data.data_path {tmp_path / 'out'}" in said


@pytest.mark.parametrize("name", VARIANTS)
def test_digest_is_over_the_text_alone(
    tokenizer_dir: Path, stock_encode: Callable[[str], Tokens], tmp_path: Path, name: str
) -> None:
    texts = list(stories(6))
    folder = tmp_path / "tokenizer"
    template, use_bos, change = VARIANTS[name]
    tokenizer_variant(tokenizer_dir, folder, template, change, add_bos_token=use_bos)
    prepare(train=write_jsonl(tmp_path / "c.jsonl", texts), tokenizer_dir=folder, out_dir=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "documents.parquet").to_pylist()
    bos = Tokenizer(folder).bos_id
    bodies = {line: list(stock_encode(text)[:-1]) for line, text in enumerate(texts, start=1)}
    assert {row["line"]: row["digest"] for row in table} == {
        line: reference_digest(body) for line, body in bodies.items()
    }
    for split in ("train", "val"):
        for document in read_written(tmp_path / "out" / split, EOS):
            assert (document.tokens[0] == bos) == use_bos
    assert {row["line"]: row["tokens"] for row in table} == {
        line: len(body) + 1 + use_bos for line, body in bodies.items()
    }


# --------------------------------------------------------------------------------------------------------------- errors

OUT_OF_RANGE = [
    ({"repeats": 3}, "repeats is 3, but no document repeats"),
    ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
    ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ({"validation_fraction": -0.5}, "validation_fraction is -0.5"),
    ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
    ({"documents": -1}, "documents is -1"),
    ({"repeated_documents": -1}, "repeated_documents is -1"),
    ({"repeats": 0}, "repeats is 0"),
    ({"repeated_documents": 3, "repeats": 1}, "--repeats"),
    ({"id_noise": -0.1}, "id_noise is -0.1"),
    ({"id_noise": 1.1}, "id_noise is 1.1"),
    ({"id_noise": float("nan")}, "id_noise is nan"),
    ({"chunk_bytes": 0}, "chunk_bytes is 0"),
    ({"chunk_bytes": 4095}, "chunk_bytes is 4095"),
    ({"num_workers": 0}, "num_workers is 0"),
    ({"num_workers": -1}, "num_workers is -1"),
    ({"seed": -1}, "seed is -1"),
]


def _refusal(out_dir: Path, **settings: Any) -> str:
    """The one-line error of preparing with these settings, which may leave tokens for a next try."""
    before = _beside(out_dir)
    with pytest.raises(MemSinksError) as caught:
        prepare(out_dir=out_dir, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert _beside(out_dir) == before
    return message


def _beside(out_dir: Path) -> list[Path]:
    return sorted(path for path in out_dir.parent.iterdir() if path.name != f".{out_dir.name}.work")


@pytest.mark.parametrize(("wrong", "part"), OUT_OF_RANGE, ids=str)
def test_setting_out_of_range(
    tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path, wrong: Settings, part: str
) -> None:
    train = corpus_dir / "train.jsonl"
    assert part in _refusal(tmp_path / "out", train=train, tokenizer_dir=tokenizer_dir, **wrong)


TOO_MANY = [
    ({"documents": 293}, "sources.train.documents is 293, but only 292 distinct"),
    ({"documents": 0, "repeated_documents": 301}, "sources.repeated.documents is 301, but only 300 distinct"),
    ({"repeated_documents": 301}, "sources.repeated.documents is 301, but only 300 distinct"),
]


@pytest.mark.parametrize(("wrong", "part"), TOO_MANY, ids=str)
def test_too_many_documents(tmp_path: Path, settings: Settings, wrong: Settings, part: str) -> None:
    assert part in _refusal(tmp_path / "out", **(settings | wrong))


@pytest.mark.parametrize(
    "wrong", [{"repeated_documents": 0, "repeats": 1, "documents": 0}, {"documents": 0, "leave_out_repeated": True}]
)
def test_no_document_left(tmp_path: Path, settings: Settings, wrong: Settings) -> None:
    assert "No document is left" in _refusal(tmp_path / "out", **(settings | wrong))


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', '{"text": "<|endoftext|>"}\n'])
@pytest.mark.parametrize("which", ["train", "validation"])
def test_empty_corpus(tmp_path: Path, settings: Settings, which: str, content: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    message = _refusal(tmp_path / "out", **(settings | {which: empty}))
    assert f"{str(empty)!r} holds no document with text" in message


def test_one_document_cannot_be_split(tmp_path: Path, tokenizer_dir: Path) -> None:
    train = write_jsonl(tmp_path / "c.jsonl", ["one", "one"])
    assert "cannot be split" in _refusal(tmp_path / "out", train=train, tokenizer_dir=tokenizer_dir)


@pytest.mark.parametrize("which", ["train", "validation"])
def test_broken_corpus_is_named_by_line(tmp_path: Path, settings: Settings, which: str) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": 5}\n')
    message = _refusal(tmp_path / "out", **(settings | {which: broken}))
    assert f"{str(broken)!r}, line 2 has a int" in message
    assert "missing.jsonl" in _refusal(tmp_path / "out", **(settings | {which: tmp_path / "missing.jsonl"}))


def test_text_that_no_tokenizer_takes(tmp_path: Path, tokenizer_dir: Path) -> None:
    train = tmp_path / "c.jsonl"
    train.write_text('{"text": "fine"}\n{"text": "half a pair: \\ud83d"}\n')
    assert "line 2" in _refusal(tmp_path / "out", train=train, tokenizer_dir=tokenizer_dir)


def test_missing_tokenizer(tmp_path: Path, settings: Settings) -> None:
    message = _refusal(tmp_path / "out", **(settings | {"tokenizer_dir": tmp_path / "missing"}))
    assert "has no tokenizer.json or tokenizer.model" in message
    assert "litgpt download" in message


def test_tokenizer_without_eos(tmp_path: Path, settings: Settings, tokenizer_dir: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", folder)
    assert "no eos_token" in _refusal(tmp_path / "out", **(settings | {"tokenizer_dir": folder}))


def test_tokenizer_that_wants_a_bos_it_has_not(tmp_path: Path, settings: Settings, tokenizer_dir: Path) -> None:
    folder = tokenizer_variant(tokenizer_dir, tmp_path / "tokenizer", "$A", {}, add_bos_token=True, bos_token=None)
    assert "bos" in _refusal(tmp_path / "out", **(settings | {"tokenizer_dir": folder}))


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "precious").write_text("data")
    missing = tmp_path / "missing.jsonl"  # as would be the tokenizer in tmp_path: reading them gives other errors
    assert "exists and is not overwritten" in _refusal(out_dir, train=missing, tokenizer_dir=tmp_path)
    assert (out_dir / "precious").read_text() == "data"
    assert len(list(out_dir.iterdir())) == 1


# -------------------------------------------------------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def clean_process() -> multiprocessing.context.ForkServerContext:
    """Starts processes from one that has imported the package and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["litgpt_memsinks.prepare.prepare"])
    return context


def _is_whole(folder: Path) -> bool:
    splits = Manifest.read(folder).splits
    return all(len(read_stream(folder / name)) == 2 * split.tokens for name, split in splits.items())


def _any(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


MOMENTS = [
    ".out.work/units/.*.incomplete/records.bin",
    ".out.work/units/*/unit.json",
    ".out.work/plan/documents/0.bin",
    ".out.work/plan/streams/train.bin",
    ".out.*.incomplete/train/*.bin",
    ".out.*.incomplete/val/index.json",
    ".out.*.incomplete/documents.parquet",
]


def _kill_at(moment: str, settings: Settings, context: multiprocessing.context.ForkServerContext) -> bool:
    """Start prepare(), kill -9 its process group at ``moment``, and return whether this came before it ended."""
    out_dir: Path = settings["out_dir"]
    process = context.Process(target=prepare_in_own_group, args=(settings,))
    process.start()
    assert process.pid is not None
    while process.is_alive() and not _any(out_dir.parent, moment):
        pass
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    assert process.exitcode or out_dir.exists()
    return not out_dir.exists()


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_leaves_no_folder_that_is_not_whole(
    tmp_path: Path,
    settings: Settings,
    prepared: Path,
    clean_process: multiprocessing.context.ForkServerContext,
    moment: str,
) -> None:
    settings = settings | {"out_dir": tmp_path / "out", "chunk_bytes": 8192}
    for _ in range(10):
        if _kill_at(moment, settings, clean_process):
            break
        assert _is_whole(tmp_path / "out")  # it was faster than this test
        shutil.rmtree(tmp_path / "out")
    else:
        pytest.fail("it ended each time before it could be killed")
    assert all(path.name == ".out.work" or path.match(".out.*.incomplete") for path in tmp_path.iterdir())
    prepare(**settings)
    assert _is_whole(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    np.testing.assert_array_equal(read_stream(tmp_path / "out" / "train"), read_stream(prepared / "train"))


# ---------------------------------------------------------------------------------------- what a review has found wrong


def test_files_of_one_name_are_not_taken_for_each_other(
    tmp_path: Path, tokenizer_dir: Path, stock_encode: Callable[[str], Tokens]
) -> None:
    ends = [f"end {n} " * 900 for n in (1, 2)]  # longer than what is looked at
    for folder, word in (("a", "alpha"), ("b", "bravo")):
        (tmp_path / "corpus" / folder).mkdir(parents=True)
        write_jsonl(tmp_path / "corpus" / folder / "part.jsonl", [ends[0], f"only {word}", ends[1]])
    prepare(
        train=tmp_path / "corpus",
        validation=write_jsonl(tmp_path / "v.jsonl", ["unseen"]),
        tokenizer_dir=tokenizer_dir,
        out_dir=tmp_path / "out",
    )
    counts = Counter(_tokens(read_written(tmp_path / "out" / "train", EOS)))
    assert counts == {stock_encode(ends[0]): 2, stock_encode(ends[1]): 2} | {
        stock_encode(f"only {word}"): 1 for word in ("alpha", "bravo")
    }


def test_bos_that_litgpt_tells_by_the_folders_name(tmp_path: Path, tokenizer_dir: Path, corpus_dir: Path) -> None:
    folder = tokenizer_variant(tokenizer_dir, tmp_path / "Llama-3-small", "$A", {})
    assert Tokenizer(folder).use_bos
    out_dir = tmp_path / "out"
    prepare(train=corpus_dir / "train.jsonl", tokenizer_dir=folder, out_dir=out_dir)
    assert not Tokenizer(out_dir / "tokenizer").use_bos  # LitGPT's own view of the copy
    assert {document.tokens[0] for document in read_written(out_dir / "train", EOS)} == {Tokenizer(folder).bos_id}
    verify(out_dir)
    settings = {
        "sources": {"train": Source(str(corpus_dir / "train.jsonl"))},
        "validation": {"v": ValidationSet(str(corpus_dir / "validation.jsonl"))},
        "tokenizer_dir": folder,
    }
    prepare(**settings, out_dir=tmp_path / "x", shard="0/1")
    shutil.rmtree(tmp_path / "x.shard-0-of-1" / "units")
    merge([tmp_path / "x.shard-0-of-1"], tmp_path / "x")  # reads again, with the copy of the tokenizer
    verify(tmp_path / "x")


def test_chunks_are_listed_in_the_order_of_the_stream(
    prepared: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = litdata.optimize

    def as_older_releases(**arguments: Any) -> None:
        real(**arguments)
        path = Path(arguments["output_dir"]) / "index.json"
        index = json.loads(path.read_text())
        index["chunks"].sort(key=lambda chunk: chunk["filename"])
        path.write_text(json.dumps(index))

    monkeypatch.setattr(litdata, "optimize", as_older_releases)
    prepare(**settings, out_dir=tmp_path / "out", chunk_bytes=4096, num_workers=1)
    assert len(list((tmp_path / "out" / "train").glob("*.bin"))) > 20  # chunk-0-10 comes before chunk-0-2 as text
    np.testing.assert_array_equal(read_stream(tmp_path / "out" / "train"), read_stream(prepared / "train"))


def test_file_system_without_locks_is_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("litgpt_memsinks.prepare.prepare.fcntl.lockf", no_locks)
    assert "cannot lock files (No locks available)" in _refusal(tmp_path / "out", **settings)


@pytest.mark.parametrize("damage", ["", "{", '{"model": 5}'])
def test_damaged_tokenizer_is_one_line(tmp_path: Path, settings: Settings, tokenizer_dir: Path, damage: str) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    (folder / "tokenizer.json").write_text(damage)
    assert "cannot be loaded" in _refusal(tmp_path / "out", **(settings | {"tokenizer_dir": folder}))


def test_held_out_of_a_corpus_that_two_sources_read(tmp_path: Path, tokenizer_dir: Path, corpus_dir: Path) -> None:
    path = str(corpus_dir / "train.jsonl")
    manifest = prepare(
        out_dir=tmp_path / "out",
        tokenizer_dir=tokenizer_dir,
        sources={"near": Source(path, ids="near_duplicate", documents=10, repeats=5), "once": Source(path)},
        validation={"held": ValidationSet(path, hold_out=True, documents=20)},
    )
    assert {name: source.documents for name, source in manifest.sources.items()} == {
        "near": 10,
        "once": 270,
        "held": 20,
    }
