"""Looking documents up by text, file, ID and source: every row is held against the document table and the corpus."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from console import memsinks
from helpers import read_jsonl, with_bos, write_jsonl
from rich.console import Console

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.prepared import lookup as lookup_module
from litgpt_memsinks.prepared.lookup import lookup, spellings

Row = dict[str, Any]
Look = Callable[..., list[Row]]
FOREIGN = "This text is in no corpus."


@pytest.fixture
def look(prepared: Path, capsys: pytest.CaptureFixture[str]) -> Look:
    """The JSON lines that a lookup prints."""

    def rows(**settings: Any) -> list[Row]:
        capsys.readouterr()
        lookup(settings.pop("data_path", prepared), json=True, **settings)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return rows


@pytest.fixture(scope="session")
def table(prepared: Path) -> list[Row]:
    return pq.read_table(prepared / "documents.parquet").to_pylist()


@pytest.fixture(scope="session")
def texts(corpus_dir: Path) -> list[str]:
    return read_jsonl(corpus_dir / "train.jsonl")


def test_a_text_is_found(look: Look, table: list[Row], texts: list[str]) -> None:
    by_line = {row["line"]: row for row in table if row["split"] == "train"}
    for line in (1, 17, 300):
        assert look(text=texts[line - 1]) == [by_line[line]]


def test_a_text_is_found_behind_a_bos(tmp_path: Path, tokenizer_dir: Path, look: Look) -> None:
    texts = list(stories(6))
    tokenizer = with_bos(tokenizer_dir, tmp_path / "tokenizer")
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    prepare(tmp_path / "out", tokenizer, train=str(corpus), validation_fraction=0.2, num_workers=1)
    assert [look(data_path=tmp_path / "out", text=text)[0]["line"] for text in texts] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("change", [str.upper, lambda text: text + " ", lambda text: text[:-1], lambda text: ""])
def test_another_text_is_not_found(look: Look, texts: list[str], change: Callable[[str], str]) -> None:
    with pytest.raises(MemSinksError, match=r"has exactly this text|Give one of"):
        look(text=change(texts[0]))


@pytest.mark.parametrize("repeated", [True, False])
def test_an_id_is_found_with_and_without_its_sign(look: Look, table: list[Row], repeated: bool) -> None:
    row = next(row for row in table if (row["repeats"] > 1) == repeated)
    assert (row["sequence_id"] < 0) == repeated
    assert look(id=row["sequence_id"]) == [row]
    assert look(id=row["sequence_id"] % 2**31) == [row]
    with pytest.raises(MemSinksError, match="There is no document with the ID"):
        look(id=row["sequence_id"] - 2**31 if not repeated else row["sequence_id"] + 1)


@pytest.mark.parametrize("wrong", [0, 2**31, -(2**31), 2**40])
def test_no_document_has_such_an_id(wrong: int) -> None:
    with pytest.raises(MemSinksError, match=f"id is {wrong}, but"):
        spellings(wrong)


def test_a_source_is_listed(look: Look, prepared: Path, table: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("repeated", "train", "validation"):
        own = [row for row in table if row["source"] == source]
        assert look(source=source, limit=0) == own
        assert look(source=source, limit=5) == own[:5]
    lookup(prepared, source="train", limit=5)
    assert "These are 5 of 292 documents of the source 'train'" in capsys.readouterr().err


def test_all_of_a_source_needs_no_note(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lookup(prepared, source="repeated", limit=8)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 9


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_a_corpus_is_looked_up_text_by_text(
    look: Look, prepared: Path, texts: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_module, "_TEXTS", 4)  # so that there are several batches
    asked = [texts[4], FOREIGN, texts[7], texts[4], "Another.", texts[0], "A third."]
    path = write_jsonl(tmp_path / "c.jsonl", asked)
    if name.endswith("gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    rows = look(file=path)
    assert [row["text"] for row in rows] == [f"{path}:{line}" for line in range(1, 8)]
    assert [row["found"] for row in rows] == [True, False, True, True, False, True, False]
    assert [row["line"] for row in rows] == [5, None, 8, 5, None, 1, None]
    assert lookup(prepared, file=path) == 4


def test_the_number_of_hits_is_said(
    prepared: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lookup(prepared, file=write_jsonl(tmp_path / "c.jsonl", [texts[4], FOREIGN])) == 1
    captured = capsys.readouterr()
    assert f"1 of 2 texts are documents of {str(prepared)!r}." in captured.err
    assert len(captured.out.splitlines()) == 3
    with pytest.raises(MemSinksError, match="None of the 2 texts is a document"):
        lookup(prepared, file=write_jsonl(tmp_path / "d.jsonl", [FOREIGN, "Another."]))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.story"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_text_file_is_one_text(look: Look, texts: list[str], tmp_path: Path, name: str, end: str) -> None:
    (tmp_path / name).write_bytes((texts[3] + end).encode())
    assert [(row["found"], row["line"]) for row in look(file=tmp_path / name)] == [(True, 4)]


def test_a_field_and_a_format_can_be_named(look: Look, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"story": texts[2]}))
    assert [row["line"] for row in look(file=tmp_path / "c.jsonl", text_field="story")] == [3]
    (tmp_path / "c.txt").write_text("\n<|endoftext|>\n".join(texts[:3]))
    assert [row["line"] for row in look(file=tmp_path / "c.txt", format="separated")] == [1, 2, 3]


def test_lines_for_programs_and_a_table_for_people(
    prepared: Path, table: list[Row], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = table[0]
    lookup(prepared, id=row["sequence_id"])
    names, values = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert dict(zip(names, values, strict=True)) == {n: "" if v is None else str(v) for n, v in row.items()}
    monkeypatch.setattr(lookup_module, "Console", lambda: Console(force_terminal=True, width=400))
    lookup(prepared, id=row["sequence_id"])
    output = capsys.readouterr().out
    assert "\t" not in output
    assert str(row["digest"]) in output


def test_cells_stay_on_their_line() -> None:
    assert lookup_module._cell("a\tb\n\x1b[0m") == "a\\tb\\n\\x1b[0m"
    assert lookup_module._cell("Ünï [bold]") == "Ünï [bold]"


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A source with canaries, IDs by key, and noise."""
    folder = tmp_path_factory.mktemp("canaries")
    rows = [{"text": text, "key": "ab"[index % 2]} for index, text in enumerate(stories(8))]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"told": Source(str(folder / "c.jsonl"), repeats=2, canary_tokens=3, ids="column", id_field="key")}
    write_jsonl(folder / "v.jsonl", [FOREIGN])
    validation = {"held": ValidationSet(str(folder / "v.jsonl"))}
    prepare(folder / "out", tokenizer_dir, source, validation, id_noise=0.5, num_workers=1)
    return folder / "out"


def test_canaries_are_said_to_hide_texts(canaries: Path, look: Look, capsys: pytest.CaptureFixture[str]) -> None:
    hint = "Documents of told have canaries appended, so they are found by --id or --source only."
    with pytest.raises(MemSinksError, match=hint):
        lookup(canaries, text=next(stories(1)))
    assert [row["source"] for row in look(data_path=canaries, text=FOREIGN)] == ["held"]
    lookup(canaries, file=canaries.parent / "v.jsonl")
    assert hint in capsys.readouterr().err


def test_documents_that_share_an_id_are_all_found(canaries: Path, look: Look) -> None:
    ids = {row["sequence_id"] for row in pq.read_table(canaries / "documents.parquet").to_pylist() if row["key"] == "a"}
    (sequence_id,) = ids
    assert [row["line"] for row in look(data_path=canaries, id=sequence_id)] == [1, 3, 5, 7]
    with pytest.raises(MemSinksError, match="With ID noise, it may be a random one"):
        lookup(canaries, id=sequence_id + 1)


REFUSED = [
    ({}, "Give one of --text, --file, --id and --source, not none."),
    ({"text": "a", "id": 1}, "not text and id."),
    ({"source": "other"}, "There is no source 'other' in "),
    ({"source": "train", "limit": -1}, "limit is -1"),
    ({"file": Path("missing.jsonl")}, "There is no file"),
]


@pytest.mark.parametrize(("settings", "part"), REFUSED, ids=str)
def test_bad_input_is_one_line(prepared: Path, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(MemSinksError) as caught:
        lookup(prepared, **settings)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_source_names_those_there_are(prepared: Path) -> None:
    with pytest.raises(MemSinksError, match="It has repeated, train, validation"):
        lookup(prepared, source="other")


def test_a_folder_without_its_table(prepared: Path, tmp_path: Path) -> None:
    shutil.copy(prepared / "memsinks.json", tmp_path)
    with pytest.raises(MemSinksError, match=r"documents\.parquet' is missing"):
        lookup(tmp_path, id=1)
    with pytest.raises(MemSinksError, match="There is no prepared data"):
        lookup(tmp_path / "nothing", id=1)


def test_the_console_script(prepared: Path, table: list[Row]) -> None:
    found = memsinks("lookup", prepared, "--id", table[0]["sequence_id"] % 2**31, "--json", "true")
    assert json.loads(found.stdout) == table[0]
    # YAML would read a comment here
    missing = memsinks("lookup", prepared, "--text", "# Heading", check=False)
    assert missing.returncode == 1
    assert missing.stdout.startswith("Error: No document of ")
