"""Inspecting a prepared folder: the summary's numbers, and a block's documents as the stream has them."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from console import memsinks
from helpers import read_jsonl, read_stream, read_written, with_bos, write_jsonl
from litdata import StreamingDataset, TokensLoader
from rich.console import Console

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.prepared import inspect_data
from litgpt_memsinks.prepared.inspect_data import inspect, read_block

EOS = 0
END = "<|endoftext|>"
ODD = "[bold]not markup[/bold] \x1b[31m"
TEXTS = list(stories(12))


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any, **settings: Any) -> str:
    capsys.readouterr()
    inspect(*arguments, **settings)
    return capsys.readouterr().out


def headers(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("── document ")]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Two sources, one with an ID per key and one with noise alone, three validation sets, and small chunks."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [{"text": text, "key": "ab"[index % 2]} for index, text in enumerate(TEXTS)]
    (folder / "keyed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "oops\n")
    write_jsonl(folder / "odd.jsonl", ["Once.", f"One day.{END}The end."])
    write_jsonl(folder / "x.jsonl", [ODD])
    write_jsonl(folder / "v.jsonl", [text + " More." for text in TEXTS[:3]])
    write_jsonl(folder / "w.jsonl", [text + " Less." for text in TEXTS[:3]])
    prepare(
        out_dir=folder / "out",
        tokenizer_dir=tokenizer_dir,
        sources={
            "keyed": Source(str(folder / "keyed.jsonl"), ids="column", id_field="key", on_bad_line="skip"),
            "odd": Source(str(folder / "odd.jsonl"), repeats=3),
        },
        validation={name: ValidationSet(str(folder / f"{name}.jsonl")) for name in "vwx"},
        id_noise=1.0,
        chunk_bytes=4096,
        num_workers=1,
    )
    return folder / "out"


def test_summary_has_the_numbers_of_the_corpora(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(capsys, mixed)
    table = {tuple(line.split()[:2]): line.split() for line in output.splitlines() if line}
    stream = len(read_stream(mixed / "train")) // 2
    repeated = sum(
        row["tokens"] * 3 for row in pq.read_table(mixed / "documents.parquet").to_pylist() if row["source"] == "odd"
    )
    chunks = len(list((mixed / "train").glob("*.bin")))
    share = f"{repeated / stream:.1%}"
    assert table["train", "18"] == ["train", "18", "14", "2", f"{stream:,}", f"{repeated:,}", share, str(chunks)]
    assert table["val_v", "3"][:3] == ["val_v", "3", "3"]
    size = (mixed.parent / "keyed.jsonl").stat().st_size
    assert table["keyed", "jsonl"] == ["keyed", "jsonl", "1", f"{size:,}", "12", "0", "0", "1"]
    assert table["odd", "train"][2] == "2"
    assert table["odd", "train"][4:6] == ["×3", share]
    assert "keyed by column, odd by hash; noise 100.0%" in output
    assert "Bad in keyed: " in output
    assert "line 13" in output
    assert all(split.digest in output for split in Manifest.read(mixed).splits.values())


def test_summary_reads_no_stream_and_no_table(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(mixed / "memsinks.json", tmp_path)
    assert "18" in shown(capsys, tmp_path)


def test_summary_of_a_baseline_and_of_canaries(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[2:6])
    sources = {
        "again": Source(str(tmp_path / "a.jsonl"), repeats=2),
        "once": Source(str(tmp_path / "b.jsonl"), canary_tokens=5),
    }
    validation = {"v": ValidationSet(str(tmp_path / "b.jsonl"), documents=1, hold_out=True)}
    with pytest.raises(MemSinksError):  # the folder is not there yet
        inspect(tmp_path / "out")
    prepare(tmp_path / "out", tokenizer_dir, sources, validation, leave_out_repeated=True, num_workers=1)
    output = shown(capsys, tmp_path / "out")
    assert "left out" in output
    assert "Repeated documents are left out of training" in output
    assert "Canaries: 5 random tokens behind each document of once" in output


# ------------------------------------------------------------------------------------------------------------ one block


@pytest.mark.parametrize("block_size", [15, 63])
def test_blocks_are_those_of_litdata(mixed: Path, block_size: int) -> None:
    dataset = StreamingDataset(
        str(mixed / "train"), item_loader=TokensLoader(block_size=2 * (block_size + 1)), shuffle=False
    )
    blocks = [read_block(mixed / "train", number, block_size) for number in range(len(dataset))]
    assert {block.blocks for block in blocks} == {len(dataset)}
    assert len(list((mixed / "train").glob("*.bin"))) > 2
    for number, block in enumerate(blocks):
        np.testing.assert_array_equal(block.pairs.flatten(), dataset[number].numpy())


def test_a_block_shows_its_documents(prepared: Path, corpus_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(capsys, prepared, block=0, block_size=1023)
    texts = read_jsonl(corpus_dir / "train.jsonl")
    rows = {row["sequence_id"]: row for row in pq.read_table(prepared / "documents.parquet").to_pylist()}
    position = 0
    found = headers(output)
    written = read_written(prepared / "train", EOS)
    for number, (header, document) in enumerate(zip(found, written, strict=False), start=1):
        row = rows[document.sequence_id]
        inside = min(len(document.tokens), 1024 - position)
        whole = "whole" if inside == len(document.tokens) else f"a part of {len(document.tokens)} tokens"
        assert header == (
            f"── document {number}: id {document.sequence_id}, ×{row['repeats']}, {row['source']}, "
            f"{row['file']}:{row['line']}, {whole}, {inside} tokens in this block ──"
        )
        body = output.split(header + "\n")[1].split("\n── document")[0]
        text = texts[row["line"] - 1] + END
        assert body.rstrip("\n") == text if whole == "whole" else text.startswith(body.rstrip("\n"))
        position += inside
    assert position == 1024
    assert len(found) > 3
    assert "\x1b" not in output  # no colours in a pipe


def test_a_block_that_begins_within_a_document(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = read_written(prepared / "train", EOS)[0]
    (header,) = headers(shown(capsys, prepared, block=1, block_size=15))
    assert f"id {first.sequence_id}, " in header
    assert f"a part of {len(first.tokens)} tokens, 16 tokens in this block" in header


def test_a_whole_document_is_known_behind_a_bos(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = with_bos(tokenizer_dir, tmp_path / "tokenizer")
    write_jsonl(tmp_path / "c.jsonl", [*TEXTS[:4], f"One day.{END}The end."])
    write_jsonl(tmp_path / "v.jsonl", TEXTS[4:5])
    source, validation = Source(str(tmp_path / "c.jsonl")), ValidationSet(str(tmp_path / "v.jsonl"))
    prepare(tmp_path / "out", tokenizer, {"c": source}, {"v": validation}, num_workers=1)
    size = Manifest.read(tmp_path / "out").splits["train"].tokens
    output = shown(capsys, tmp_path / "out", block=0, block_size=size - 1)
    assert len(headers(output)) == 5
    assert all(", whole, " in header for header in headers(output))
    assert f"\n<s>One day.{END}The end.{END}\n" in output


def test_documents_end_at_eos_and_at_another_id() -> None:
    pairs = np.array([[5, 1], [EOS, 1], [6, 1], [7, 2], [EOS, 2]], dtype=np.int32)
    pieces = inspect_data._segments(pairs, EOS)
    assert [(piece.start, piece.tokens.tolist(), piece.sequence_id) for piece in pieces] == [
        (0, [5, EOS], 1),
        (2, [6], 1),
        (3, [7, EOS], 2),
    ]


def all_blocks(folder: Path, capsys: pytest.CaptureFixture[str], size: int = 255) -> str:
    last = read_block(folder / "train", 0, size).blocks
    return "".join(shown(capsys, folder, block=number, block_size=size) for number in range(last))


def test_noise_and_shared_ids_are_said_to_be_so(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = all_blocks(mixed, capsys)
    ids = {row["sequence_id"]: row for row in pq.read_table(mixed / "documents.parquet").to_pylist()}
    keyed = {sequence_id for sequence_id, row in ids.items() if row["source"] == "keyed"}
    assert len(keyed) == 2
    for header in headers(output):
        sequence_id = int(header.split("id ")[1].split(",")[0])
        if sequence_id in keyed:
            assert "of 6 documents with this ID" in header
        else:
            assert "a random ID instead of " in header or "an ID that the table does not have (noise?)" in header
    assert "a random ID instead of " in output
    assert "one of 6 documents" in output  # parts at the ends of blocks
    assert ", of 6 documents" in output  # whole ones, known by their tokens


def test_a_text_with_eos_inside_is_one_document(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = all_blocks(mixed, capsys)
    bodies = [part.partition(" ──\n")[2] for part in output.split("── document")]
    assert f"One day.{END}The end.{END}" in {body.split("\nBlock")[0].rstrip("\n") for body in bodies}


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_in_a_text_is_markup_or_a_command(
    mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(
        inspect_data, "Console", lambda **_: Console(force_terminal=terminal, color_system="standard", width=80)
    )
    size = Manifest.read(mixed).splits["val_x"].tokens
    output = shown(capsys, mixed, block=0, split="val_x", block_size=size - 1)
    assert ODD.replace("\x1b", "\u241b") + END in output
    assert "\x1b[31m" not in output
    assert ("\x1b[33m" in output) == terminal
    assert ("\x1b" in output) == terminal


def test_documents_in_a_row_have_other_colours(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        inspect_data, "Console", lambda **_: Console(force_terminal=True, color_system="standard", width=80)
    )
    parts = shown(capsys, prepared, block=0, block_size=1023).split("── document ")
    colours = [part.rsplit("\x1b[0m\n", 2)[-2].split("m")[0] for part in parts[1:-1]]
    assert len(colours) > 3
    assert all(colour != other for colour, other in itertools.pairwise(colours))


def test_other_splits(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, suffix in (("val_v", " More."), ("val_w", " Less.")):
        output = shown(capsys, mixed, block=0, split=split, block_size=255)
        assert f", {split[-1]}, {mixed.parent / split[-1]}.jsonl:" in output
        assert suffix + END in output


REFUSED = [
    ({"block": 10**6}, "block is 1000000, but "),
    ({"block": -1}, "block is -1, but "),
    ({"block": 0, "block_size": 0}, "block_size is 0"),
    ({"block": 0, "block_size": 10**6}, "has 0 of 1,000,001 tokens"),
    ({"block": 0, "split": "test"}, "There is no split 'test' in "),
]


@pytest.mark.parametrize(("settings", "part"), REFUSED, ids=str)
def test_what_is_not_there(mixed: Path, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(MemSinksError) as caught:
        inspect(mixed, **settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_chunk_that_is_not_whole(mixed: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "copy"))
    path = folder / "train/chunk-0-0.bin"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MemSinksError, match=r"chunk-0-0\.bin' (cannot be read|is not whole)"):
        inspect(folder, block=0, block_size=63)


def test_the_console_script(prepared: Path) -> None:
    assert "train" in memsinks("inspect", prepared).stdout
    refused = memsinks("inspect", prepared, "--block", 10**6, check=False)
    assert refused.returncode == 1
    assert refused.stdout.startswith("Error: block is 1000000")
