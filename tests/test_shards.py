"""Preparing on several machines: shards that are merged are what one machine would have made, byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from planned import texts, write_files

from litgpt_memsinks.corpus.mixture import NearDuplicates, Source, ValidationSet
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare import prepare as prepare_module
from litgpt_memsinks.prepare import tokenizing
from litgpt_memsinks.prepare.chunks import read_chunks
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import merge, prepare

Settings = dict[str, Any]


def settings_of(corpus: Path, tokenizer_dir: Path) -> Settings:
    """A recipe with a bit of everything: limits, repeats, a column, a hold-out, near-duplicates."""
    sources = {
        "rare": Source(str(corpus / "rare"), repeats=3, ids="column", id_field="text", canary_tokens=2),
        "near": Source(str(corpus / "near"), ids="near_duplicate", documents=20),
        "web": Source(str(corpus / "web"), fill_to=2000, choose="first", repeats=1),
    }
    validation = {"held": ValidationSet(str(corpus / "near"), hold_out=True, fraction=0.1)}
    return {"sources": sources, "validation": validation, "tokenizer_dir": tokenizer_dir, "chunk_bytes": 4096}


def write_corpus(folder: Path) -> Path:
    near = texts(15, "near")
    write_files(folder / "rare", {"r": texts(5, "rare")})
    write_files(folder / "near", {"a": near, "b": [f"{text} indeed" for text in near], "c": texts(9, "far")})
    web = {f"w{i:02}": texts(12, f"web {i}") for i in range(20)}
    # the first files hold what other sources take, so that more must be read than it seemed
    write_files(folder / "web", {"00": texts(5, "rare") * 6, "01": texts(5, "rare") * 6} | web)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("shards") / "corpus")


@pytest.fixture(scope="module")
def settings(corpus: Path, tokenizer_dir: Path) -> Settings:
    return settings_of(corpus, tokenizer_dir)


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    prepare(**settings, out_dir=out_dir, num_workers=2)
    return out_dir


@pytest.fixture(scope="module")
def three(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_shards(tmp_path_factory.mktemp("three"), 3, settings)


def make_shards(folder: Path, count: int, settings: Settings) -> list[Path]:
    for index in range(count):
        assert prepare(**settings, out_dir=folder / "out", shard=f"{index}/{count}", num_workers=1) is None
    return [folder / f"out.shard-{index}-of-{count}" for index in range(count)]


def same(first: Path, second: Path) -> None:
    """All that was prepared is equal, but for the names of chunks, which are the workers'."""
    manifests = [Manifest.read(folder) for folder in (first, second)]
    for split in manifests[0].splits:
        chunks = [[chunk.checksum for chunk in read_chunks(folder / split)] for folder in (first, second)]
        assert chunks[0] == chunks[1]
    for manifest in manifests:
        for made in manifest.splits.values():
            made.chunks = {}
    assert manifests[0] == manifests[1]
    for name in ("documents.parquet", "evaluation.parquet"):
        assert pq.read_table(first / name).equals(pq.read_table(second / name))
    tokenizers = [
        {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()} for folder in (first, second)
    ]
    assert tokenizers[0] == tokenizers[1]
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}


def test_recipe_of_these_tests_has_a_bit_of_everything(whole: Path) -> None:
    sources = Manifest.read(whole).sources
    assert 11 <= sources["web"].files <= 13  # of 22
    assert len(list(read_chunks(whole / "train"))) > 3
    assert sum(source.written_tokens for source in sources.values() if source.split == "train") >= 2000
    ids = pq.read_table(whole / "documents.parquet").to_pylist()
    near = [row["sequence_id"] for row in ids if row["source"] == "near"]
    assert len(set(near)) < len(near)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_merged_shards_are_the_whole(three: list[Path], whole: Path, tmp_path: Path, num_workers: int) -> None:
    merge(three[::-1], tmp_path / "merged", num_workers)
    same(tmp_path / "merged", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_two_shards_without_the_corpus(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    settings = settings_of(corpus, tokenizer_dir)
    settings["sources"].pop("web")
    prepare(**settings, out_dir=tmp_path / "whole", num_workers=2)
    shards = make_shards(tmp_path, 2, settings)
    shutil.rmtree(corpus)
    merge([*shards, shards[0]], tmp_path / "merged", 1)
    same(tmp_path / "merged", tmp_path / "whole")


def test_shards_read_each_file_once(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    log = tmp_path / "read.log"
    real = tokenizing.read_documents

    def logged(file: Any, *arguments: Any) -> Any:
        with open(log, "a") as out:
            out.write("/".join(Path(file.path).parts[-2:]) + "\n")
        return real(file, *arguments)

    monkeypatch.setattr(tokenizing, "read_documents", logged)
    shards = make_shards(tmp_path, 3, settings)
    in_shards = log.read_text().split()
    assert len(set(in_shards)) == len(in_shards)
    assert {"near/a.jsonl", "near/b.jsonl", "near/c.jsonl", "rare/r.jsonl"} < set(in_shards)
    assert len(in_shards) < 20  # the limited source is not read to its end
    log.write_text("")
    merge(shards, tmp_path / "merged", 1)
    # only what the shards lack is read, among it files that they had begun when they had enough
    finished = {path.name.split("-jsonl")[0] for folder in shards for path in (folder / "units").iterdir()}
    in_merge = {Path(name).stem for name in log.read_text().split()}
    assert not in_merge & finished


def test_more_shards_than_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_files(tmp_path / "c", {"a": texts(9)})
    settings = {
        "sources": {"s": Source(corpus)},
        "validation": {"held": ValidationSet(corpus, hold_out=True, documents=2)},
        "tokenizer_dir": tokenizer_dir,
    }
    prepare(**settings, out_dir=tmp_path / "whole")
    manifest = merge(make_shards(tmp_path, 2, settings), tmp_path / "merged", 1)
    assert manifest.splits["train"].digest == Manifest.read(tmp_path / "whole").splits["train"].digest


def test_finished_shard_is_recognised(
    three: list[Path], settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "read_units", None)
    out_dir = three[0].parent / "out"
    prepare(**settings, out_dir=out_dir, shard="0/3")
    assert f"{str(three[0])!r} is prepared already. Nothing to do." in capsys.readouterr().out
    with pytest.raises(MemSinksError, match=r"was prepared otherwise: recipe\.seed: 0 -> 1\. Remove it"):
        prepare(**settings, out_dir=out_dir, shard="0/3", seed=1)


def test_killed_shard_goes_on(settings: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = prepare_module.read_units

    def interrupted(units: Any, *arguments: Any) -> Any:
        done = real(units, *arguments)
        read.extend(unit.name for unit in units)
        if units[0].reading == 1:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "read_units", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(**settings, out_dir=tmp_path / "out", shard="0/2", num_workers=1)
    units = tmp_path / ".out.shard-0-of-2.work" / "units"
    half_written = units / ".half.123456789.incomplete"  # as kill -9 leaves it
    half_written.mkdir()
    assert sorted(path.name for path in units.iterdir() if not path.name.startswith(".")) == sorted(set(read))
    times = {path.parent.name: path.stat().st_mtime_ns for path in units.glob("*/unit.json")}
    shards = make_shards(tmp_path, 2, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name for folder in shards]
    kept = {path.parent.name: path.stat().st_mtime_ns for path in (shards[0] / "units").glob("*/unit.json")}
    assert times.items() <= kept.items()
    assert not list((shards[0] / "units").glob(".*"))
    merge(shards, tmp_path / "merged", 1)
    same(tmp_path / "merged", whole)


# --------------------------------------------------------------------------------------------------------------- errors


def refusal(function: Callable[..., object], *arguments: Any, **settings: Any) -> str:
    with pytest.raises(MemSinksError) as caught:
        function(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_shards(three: list[Path], tmp_path: Path) -> None:
    message = refusal(merge, three[:1], tmp_path / "out")
    assert message == "Of 3 shards, [1, 2] are missing. Prepare them: --shard 1/3."
    assert "There are no shards" in refusal(merge, [], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_shard_of_another_recipe(settings: Settings, three: list[Path], tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "other", shard="1/3", seed=4)
    other = tmp_path / "other.shard-1-of-3"
    message = refusal(merge, [three[0], other, three[2]], tmp_path / "out")
    assert f"{str(other)!r} is of another recipe than {str(three[0])!r}: recipe.seed: 0 -> 4" in message


def test_shard_of_another_count(settings: Settings, three: list[Path], tmp_path: Path) -> None:
    prepare(**settings, out_dir=tmp_path / "other", shard="1/2")
    message = refusal(merge, [*three, tmp_path / "other.shard-1-of-2"], tmp_path / "out")
    assert "shard count" in message


@pytest.mark.parametrize("content", [None, "{", "[]", '{"shard": [0, 1]}'])
def test_unfinished_or_broken_shard(three: list[Path], tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "shard"
    folder.mkdir()
    if content is not None:
        (folder / "shard.json").write_text(content)
    message = refusal(merge, [folder], tmp_path / "out")
    assert f"{str(folder)!r} is no finished shard" in message or "cannot be read" in message
    assert "no finished shard" in refusal(merge, [*three[:2], tmp_path / "none"], tmp_path / "out")


@pytest.mark.parametrize("shard", ["3/3", "a/3", "1", "-1/3", "1/0", "1/3/4", "", "1/ 3"])
def test_shard_is_i_of_n(settings: Settings, tmp_path: Path, shard: str) -> None:
    message = refusal(prepare, **settings, out_dir=tmp_path / "out", shard=shard)
    assert f"shard is {shard!r}, but it must be i/n" in message


def test_merge_does_not_overwrite(three: list[Path], whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "exists and is not overwritten" in refusal(merge, three, tmp_path)


def test_finished_merge_is_recognised(
    three: list[Path], whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_module, "read_units", None)
    assert merge(three, whole) == Manifest.read(whole)  # the one of prepare is the same
    assert "is prepared already" in capsys.readouterr().out


def test_shard_says_what_it_is_of(three: list[Path]) -> None:
    content = json.loads((three[1] / "shard.json").read_text())
    assert content["shard"] == [1, 3]
    assert content["recipe"]["near_duplicates"]["threshold"] == NearDuplicates().threshold
