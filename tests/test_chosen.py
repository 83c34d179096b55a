"""Which documents are meant: held against the document table and the corpus, and nothing is passed over silently."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import read_jsonl, write_jsonl

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.document_ids.near_duplicates import shingles
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.prepared.chosen import choose, read_ids
from litgpt_memsinks.prepared.similar import nearest

Row = dict[str, Any]


@pytest.fixture(scope="session")
def table(prepared: Path) -> list[Row]:
    return pq.read_table(prepared / "documents.parquet").to_pylist()


@pytest.fixture(scope="session")
def repeated(table: list[Row]) -> list[Row]:
    return [row for row in table if row["repeats"] > 1]


@pytest.fixture(scope="session")
def texts(corpus_dir: Path) -> list[str]:
    return read_jsonl(corpus_dir / "train.jsonl")


def numbers(rows: list[Row]) -> list[int]:
    return sorted(row["sequence_id"] % 2**31 for row in rows)


def test_by_ids_with_and_without_their_sign(prepared: Path, table: list[Row], repeated: list[Row]) -> None:
    once = next(row for row in table if row["repeats"] == 1 and row["split"] == "train")
    some = [repeated[3], once, repeated[0]]
    asked = f"{repeated[3]['sequence_id']}, {once['sequence_id']} {repeated[0]['sequence_id'] % 2**31},"
    chosen = choose(prepared, ids=asked)
    assert chosen.ids == numbers(some)
    assert sorted(chosen.rows["digest"].to_pylist()) == sorted(row["digest"] for row in some)
    assert chosen.missing == []
    assert choose(None, ids=asked).ids == chosen.ids
    assert str(once["sequence_id"]) in chosen.rule


def test_by_ids_in_a_file(prepared: Path, repeated: list[Row], tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("".join(f"{row['sequence_id']}\n" for row in repeated[:3]))
    assert choose(prepared, ids=f"@{tmp_path / 'ids'}").ids == numbers(repeated[:3])


def test_by_source(prepared: Path, table: list[Row], repeated: list[Row]) -> None:
    assert choose(prepared, source="repeated").ids == numbers(repeated)
    assert choose(prepared, source="train").rows.to_pylist() == [row for row in table if row["source"] == "train"]


def test_by_text_and_by_documents(prepared: Path, table: list[Row], texts: list[str], tmp_path: Path) -> None:
    rows = {row["line"]: row for row in table if row["split"] == "train"}
    assert choose(prepared, text=texts[16]).rows.to_pylist() == [rows[17]]
    file = write_jsonl(tmp_path / "c.jsonl", [texts[4], texts[0], texts[4]])
    assert choose(prepared, documents=file).ids == numbers([rows[5], rows[1]])
    (tmp_path / "one.txt").write_text(texts[8] + "\n")
    assert choose(prepared, documents=tmp_path / "one.txt").ids == numbers([rows[9]])


def test_what_is_missing_stops_or_is_said(
    prepared: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", [texts[4], "Another.", texts[7], "A third."])
    with pytest.raises(MemSinksError, match=rf"^2 of what .*{file}:2, {file}:4\. Correct .*--missing pass\.$"):
        choose(prepared, documents=file)
    capsys.readouterr()
    chosen = choose(prepared, documents=file, missing="pass")
    assert chosen.missing == [f"{file}:2", f"{file}:4"]
    assert chosen.ids == choose(prepared, documents=write_jsonl(tmp_path / "d.jsonl", [texts[4], texts[7]])).ids
    assert chosen.rule.endswith("2 of which are not in the training stream")
    assert f"Passed over, because not trained on: {file}:2, {file}:4." in capsys.readouterr().err


def test_validation_documents_are_not_trained_on(prepared: Path, corpus_dir: Path, table: list[Row]) -> None:
    held_out = next(row for row in table if row["split"] == "val")
    for selector in (
        {"ids": str(held_out["sequence_id"])},
        {"text": read_jsonl(corpus_dir / "validation.jsonl")[held_out["line"] - 1]},
        {"documents": corpus_dir / "validation.jsonl"},
    ):
        with pytest.raises(MemSinksError, match="Nothing was trained on it"):
            choose(prepared, **selector, missing="pass")
    with pytest.raises(MemSinksError, match=r"no source 'validation' to train on\. It has repeated, train"):
        choose(prepared, source="validation")


def test_documents_left_out_of_the_stream_are_not_trained_on(
    corpus_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    corpus = corpus_dir / "train.jsonl"
    prepare(tmp_path / "out", tokenizer_dir, train=corpus, repeated_documents=3, repeats=2, leave_out_repeated=True)
    with pytest.raises(MemSinksError, match="Nothing was trained on it"):
        choose(tmp_path / "out", source="repeated")


def edited(text: str) -> str:
    words = text.split()
    return " ".join(["Otherwise", *words[1:-3]])


def test_near_duplicates_of_a_missing_text_are_shown(
    prepared: Path, repeated: list[Row], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    row = repeated[2]
    with pytest.raises(MemSinksError):
        choose(prepared, text=edited(texts[row["line"] - 1]))
    said = " ".join(capsys.readouterr().err.split())
    assert f"Similar to it: {row['sequence_id']} of repeated (" in said
    assert "only the repeated documents were searched" in said
    with pytest.raises(MemSinksError):
        choose(prepared, text="No story has these words.")
    assert "Nothing similar was found" in capsys.readouterr().err


def test_similarities_are_those_of_the_sets_of_shingles(prepared: Path, repeated: list[Row], texts: list[str]) -> None:
    for row in repeated[:3]:
        original = texts[row["line"] - 1]
        first, second = set(shingles(original, 2)), set(shingles(edited(original), 2))
        near = nearest(prepared, [edited(original)])[0][0]
        assert near.sequence_id == row["sequence_id"]
        assert near.similarity == pytest.approx(len(first & second) / len(first | second), abs=0.15)
    assert nearest(prepared, [texts[repeated[0]["line"] - 1]])[0][0].similarity == 1
    assert nearest(prepared, [next(stories(1, seed=99)), "x"])[1] == []


JUNK = [
    ({}, "not none."),
    ({"ids": "5", "text": "a"}, "not --ids and --text."),
    ({"ids": "5,x7"}, "ids has 'x7'"),
    ({"ids": ","}, "ids has ''"),
    ({"ids": "5.0"}, "ids has '5.0'"),
    ({"ids": "0"}, "id is 0"),
    ({"ids": "4294967296"}, "id is 4294967296"),
    ({"ids": "9" * 5000}, "is no sequence ID"),
    ({"ids": "@nowhere"}, "cannot be read as text"),
    ({"source": "other"}, "has no source 'other'"),
    ({"documents": Path("missing.jsonl")}, "There is no file"),
    ({"ids": "5", "missing": "maybe"}, "missing is 'maybe'"),
]


@pytest.mark.parametrize(("settings", "part"), JUNK, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(prepared: Path, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(MemSinksError) as caught:
        choose(prepared, **settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_one_line(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(b"\xff\xfe5\n7")
    with pytest.raises(MemSinksError, match="cannot be read as text"):
        read_ids(f"@{tmp_path / 'ids'}")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(MemSinksError, match="holds no text"):
        choose(prepared, documents=tmp_path / "empty.jsonl")
    shutil.copy(prepared / "memsinks.json", tmp_path)
    with pytest.raises(MemSinksError, match=r"documents\.parquet' is missing"):
        choose(tmp_path, ids="5")
    with pytest.raises(MemSinksError, match="Without --data_path only --ids"):
        choose(None, source="train")
