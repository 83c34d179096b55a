"""The loader's pairs against stock LitGPT, and every folder that must be refused."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import read_jsonl, read_stream
from litdata import TokensLoader
from litdata.streaming.writer import BinaryWriter
from litgpt.data import LitData
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.corpus.embedded import stories, train_tokenizer
from litgpt_memsinks.data.data import MemSinksData, collate_pairs, deinterleave
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.chunks import read_index
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import prepare

B, T = 2, 16


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, tokenizer_dir: Path) -> Path:
    """The folder `prepared` again in many chunks, whose ends cut documents and blocks."""
    folder = tmp_path_factory.mktemp("chunked") / "data"
    prepare(
        train=corpus_dir / "train.jsonl",
        validation=corpus_dir / "validation.jsonl",
        tokenizer_dir=tokenizer_dir,
        out_dir=folder,
        repeated_documents=8,
        repeats=6,
        chunk_bytes=30_000,
    )
    assert len(list((folder / "train").glob("*.bin"))) > 10
    return folder


def _connected(data: LitData, batch_size: int, max_seq_length: int) -> LitData:
    data.connect(batch_size=batch_size, max_seq_length=max_seq_length)
    return data


# ------------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_are_pairs(prepared: Path, split: str) -> None:
    data = _connected(MemSinksData(data_path=prepared, num_workers=0), B, T)
    batches = list(getattr(data, f"{split}_dataloader")())
    assert {(tuple(batch.shape), batch.dtype) for batch in batches} == {((B, T + 1, 2), torch.int32)}
    assert len(batches) == len(read_stream(prepared / split)) // (2 * (T + 1)) // B  # the last, partial one is dropped


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("folder", ["prepared", "chunked"])
def test_rows_are_those_of_litgpt(request: pytest.FixtureRequest, folder: str, split: str, num_workers: int) -> None:
    settings: dict[str, Any] = {
        "data_path": request.getfixturevalue(folder),
        "split_names": ("train", "val"),
        "seed": 7,
        "num_workers": num_workers,
    }
    ours = getattr(_connected(MemSinksData(**settings), B, T), f"{split}_dataloader")()
    stock = getattr(_connected(LitData(**settings), B, 2 * (T + 1) - 1), f"{split}_dataloader")()
    assert len(ours) == len(stock) > 50
    pairs = torch.stack(list(ours))
    rows = torch.stack(list(stock))
    assert rows.shape == (len(pairs), B, 2 * (T + 1))
    torch.testing.assert_close(pairs.flatten(2), rows, rtol=0, atol=0)


def test_validation_is_in_stored_order(prepared: Path) -> None:
    data = _connected(MemSinksData(data_path=prepared, num_workers=0), 1, T)
    pairs = torch.cat(list(data.val_dataloader())).reshape(-1, 2).numpy()
    np.testing.assert_array_equal(pairs, read_stream(prepared / "val").reshape(-1, 2)[: len(pairs)])


def test_training_is_shuffled_by_the_seed(prepared: Path) -> None:
    def rows(seed: int) -> torch.Tensor:
        data = _connected(MemSinksData(data_path=prepared, num_workers=0, seed=seed), 1, T)
        return torch.cat(list(data.train_dataloader())).flatten(1)

    first, again, other = rows(1), rows(1), rows(2)
    stored = torch.from_numpy(read_stream(prepared / "train")[: first.numel()].reshape(first.shape).copy())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, stored)
    assert sorted(first.tolist()) == sorted(other.tolist()) == sorted(stored.tolist())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_token_is_mispaired(chunked: Path, corpus_dir: Path, tokenizer_dir: Path, num_workers: int) -> None:
    tokenizer = Tokenizer(tokenizer_dir)
    texts = {str(path): read_jsonl(path) for path in corpus_dir.glob("*.jsonl")}
    allowed: dict[str, set[tuple[int, int]]] = {"train": set(), "val": set()}
    for row in pq.read_table(chunked / "documents.parquet").to_pylist():
        tokens = tokenizer.encode(texts[row["file"]][row["line"] - 1], eos=True).tolist()
        allowed[row["split"]] |= {(token, row["sequence_id"]) for token in tokens}
    data = _connected(MemSinksData(data_path=chunked, num_workers=num_workers), B, T)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        pairs = {tuple(pair) for pair in torch.cat(list(loader)).reshape(-1, 2).tolist()}
        assert pairs <= allowed[split]
        assert len(pairs) > 0.9 * len(allowed[split])  # and nearly all are seen: block ends at chunk ends lose a few


def test_stock_slices_keep_pairs_together(prepared: Path) -> None:
    # litgpt.pretrain.fit cuts inputs and targets so
    data = _connected(MemSinksData(data_path=prepared, num_workers=0), B, T)
    batch = next(iter(data.train_dataloader()))
    inputs, targets = batch[:, 0:T].contiguous().long(), batch[:, 1 : (T + 1)].contiguous().long()
    assert inputs.shape == targets.shape == (B, T, 2)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize(("batch_size", "max_seq_length"), [(1, 1), (3, 64)])
def test_connect_sets_the_sizes(prepared: Path, batch_size: int, max_seq_length: int) -> None:
    data = _connected(MemSinksData(data_path=prepared, num_workers=0), batch_size, max_seq_length)
    assert next(iter(data.train_dataloader())).shape == (batch_size, max_seq_length + 1, 2)


def test_loading_leaves_the_folder_alone(chunked: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in chunked.rglob("*") if path.is_file()}
    data = _connected(MemSinksData(data_path=chunked, num_workers=2), B, T)
    assert sum(1 for _ in data.train_dataloader()) > 100
    assert {path: path.stat().st_mtime_ns for path in chunked.rglob("*") if path.is_file()} == before


# --------------------------------------------------------------------------------------------------------- plain pieces


def test_deinterleave_is_a_view() -> None:
    rows = torch.arange(12, dtype=torch.int32).view(2, 6)
    pairs = deinterleave(rows)
    assert pairs.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert pairs.data_ptr() == rows.data_ptr()


def test_odd_rows_are_refused() -> None:
    with pytest.raises(MemSinksError, match=r"Row length 5 is odd.*litgpt-memsinks prepare"):
        deinterleave(torch.zeros(2, 5, dtype=torch.int32))


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_collate(make: Callable[[list[int]], Any]) -> None:
    rows = [make([1, -10, 2, -10]), make([3, 30, 4, 2**31 - 1])]
    assert collate_pairs(rows).tolist() == [[[1, -10], [2, -10]], [[3, 30], [4, 2**31 - 1]]]


@pytest.mark.parametrize(("name", "value"), [("split_names", None), ("num_workers", -1)])
def test_settings_are_checked(prepared: Path, name: str, value: Any) -> None:
    data = MemSinksData(data_path=prepared, **{name: value})
    with pytest.raises(MemSinksError, match=rf"data\.{name} is"):
        data.check(padded_vocab_size=512, block_size=16, batch_size=2)


def test_tokenizer_of_the_folder(prepared: Path, tokenizer_dir: Path) -> None:
    given = MemSinksData(data_path=str(prepared)).tokenizer_dir
    assert (given / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


# ------------------------------------------------------------------------------------------------------ what is refused


def _check(folder: Path, **more: Any) -> Manifest:
    settings = {"padded_vocab_size": 512, "block_size": T, "batch_size": B} | more
    return MemSinksData(data_path=folder).check(**settings)


def test_good_folders_pass(prepared: Path, chunked: Path, tokenizer_dir: Path) -> None:
    for folder in (prepared, chunked):
        assert _check(folder, tokenizer_dir=tokenizer_dir) == _check(folder) == Manifest.read(folder)


def test_moved_folder_passes(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "moved")
    _check(tmp_path / "moved")


def _edit(name: str, edit: Callable[[Any], object]) -> Callable[[Path], None]:
    """Edit the content of a JSON file in place."""

    def edit_json(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return edit_json


_manifest = partial(_edit, "memsinks.json")
_index = partial(_edit, "train/index.json")


def _cut(name: str, fraction: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (path,) = folder.glob(name)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * fraction)])

    return cut


def _write_litdata(folder: Path, dtype: torch.dtype) -> None:
    """A stream as litdata itself writes it."""
    writer = BinaryWriter(str(folder), chunk_bytes=1_000_000, item_loader=TokensLoader())
    for index in range(20):
        writer[index] = torch.arange(200).to(dtype)
    writer.done()
    writer.merge(1)


def _plain_stream(folder: Path) -> None:
    shutil.rmtree(folder)
    for split in ("train", "val"):
        _write_litdata(folder / split, torch.int32)


def _narrow_chunks(folder: Path) -> None:
    shutil.rmtree(folder / "val")
    _write_litdata(folder / "val", torch.uint16)


def _delete(name: str) -> Callable[[Path], None]:
    def delete(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.unlink() if path.is_file() else shutil.rmtree(path)

    return delete


# What happened to the folder, and what the error must say
BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (shutil.rmtree, ["There is no prepared data at", "litgpt-memsinks prepare --train", "--out_dir"]),
    "plain stream": (_plain_stream, ["has no memsinks.json", "litgpt-memsinks prepare"]),
    "half-written manifest": (_cut("memsinks.json", 0.5), ["memsinks.json' is not JSON"]),
    "binary manifest": (lambda folder: (folder / "memsinks.json").write_bytes(b"\xff\xfe"), ["is not JSON"]),
    "list as manifest": (lambda folder: (folder / "memsinks.json").write_text("[1]"), ["format version None"]),
    "other version": (_manifest(lambda m: m.update(format_version=1)), ["has format version 1", "reads 2"]),
    "manifest lacks a field": (_manifest(lambda m: m.pop("max_token")), ["lacks or adds ['max_token']"]),
    "manifest has another field": (_manifest(lambda m: m.update(more=1)), ["lacks or adds ['more']"]),
    "manifest's splits are junk": (_manifest(lambda m: m.update(splits=5)), ["memsinks.json"]),
    "manifest's split lacks a field": (_manifest(lambda m: m["splits"]["val"].pop("tokens")), ["memsinks.json"]),
    "manifest's split has another field": (_manifest(lambda m: m["splits"]["val"].update(more=1)), ["memsinks.json"]),
    "no train folder": (_delete("train"), ["train", "index.json' is missing"]),
    "no val folder": (_delete("val"), ["val", "index.json' is missing"]),
    "no index": (_delete("val/index.json"), ["val", "index.json' is missing"]),
    "list as index": (lambda folder: (folder / "val" / "index.json").write_text("[1]"), ["index.json"]),
    "index without chunks": (_index(lambda i: i.pop("chunks")), ["index.json"]),
    "half-written index": (_cut("train/index.json", 0.5), ["index.json"]),
    "no chunk": (_delete("train/chunk-0-0.bin"), ["chunk-0-0.bin' is missing"]),
    "half-written chunk": (_cut("train/chunk-0-0.bin", 0.5), ["chunk-0-0.bin"]),
    "empty chunk": (_cut("val/chunk-0-0.bin", 0.0), ["chunk-0-0.bin"]),
    "chunk lacks one number": (_cut("val/chunk-0-0.bin", 0.99999), ["chunk-0-0.bin"]),
    "uint16": (_narrow_chunks, ["no_header_tensor:20", "not int32"]),
    "int64": (_index(lambda i: i["config"].update(data_format=["no_header_tensor:17"])), ["not int32"]),
    "several columns": (_index(lambda i: i["config"].update(data_format=["int", "str"])), ["not int32"]),
    "stream of another run": (_index(lambda i: i["chunks"].clear()), ["train"]),
}


def _refusal(folder: Path, **more: Any) -> str:
    with pytest.raises(MemSinksError) as caught:
        _check(folder, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_refused(prepared: Path, tmp_path: Path, case: str) -> None:
    break_it, parts = BROKEN[case]
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    _check(folder)
    break_it(folder)
    message = _refusal(folder)
    assert str(folder) in message
    for part in parts:
        assert part in message


def test_other_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    train_tokenizer(stories(50, seed=1), tmp_path / "other", vocab_size=300)
    message = _refusal(prepared, tokenizer_dir=tmp_path / "other")
    assert str(tmp_path / "other") in message
    assert str(prepared / "tokenizer") in message


def test_missing_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    assert "has no tokenizer.json" in _refusal(prepared, tokenizer_dir=tmp_path)


def test_token_beyond_the_vocabulary_is_refused(prepared: Path) -> None:
    largest = max(int(read_stream(prepared / split)[0::2].max()) for split in ("train", "val"))
    _check(prepared, padded_vocab_size=largest + 1)
    message = _refusal(prepared, padded_vocab_size=largest)
    assert f"token {largest}" in message
    assert f"below {largest}" in message


@pytest.mark.parametrize("length", [T, 1000])
@pytest.mark.parametrize("folder", ["prepared", "chunked"])
def test_too_few_blocks_are_refused_exactly_where_litdata_has_none(
    request: pytest.FixtureRequest, folder: str, length: int
) -> None:
    path: Path = request.getfixturevalue(folder)
    block = 2 * (length + 1)
    blocks = sum(chunk["dim"] // block for chunk in read_index(path / "val")["chunks"])
    _check(path, batch_size=blocks, block_size=length)
    data = _connected(MemSinksData(data_path=path, num_workers=0), blocks, length)
    assert len(list(data.val_dataloader())) == 1
    message = _refusal(path, batch_size=blocks + 1, block_size=length)
    assert f"holds {blocks} blocks of {length + 1} tokens, but" in message
    assert str(blocks + 1) in message
    assert re.search(r"train\.max_seq_length.*train\.micro_batch_size", message)


def test_split_names_are_followed(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "held_out")
    data = MemSinksData(data_path=tmp_path / "data", split_names=("train", "held_out"), num_workers=0)
    data.check(512, T, B)
    assert torch.cat(list(_connected(data, 1, T).val_dataloader())).shape[1:] == (T + 1, 2)
