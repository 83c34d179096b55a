"""Recipes: what is refused, and how a YAML file becomes one."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt_memsinks.__main__ import build_parser
from litgpt_memsinks.corpus.mixture import Mixture, NearDuplicates, Source, ValidationSet, deduplicated
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import prepare
from tests.helpers import read_written

Change = dict[str, Any]
NAN = float("nan")


def recipe(**changes: Any) -> Mixture:
    settings: Change = {"sources": {"web": Source("w")}, "validation": {"val": ValidationSet("v")}} | changes
    return Mixture(**settings)


def refusal(made: Mixture) -> str:
    with pytest.raises(MemSinksError) as caught:
        made.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


READING = [
    ({"path": ""}, "web.path is ''"),
    ({"path": []}, "web.path is []"),
    ({"path": ["a", ""]}, "web.path is ['a', '']"),
    ({"text_field": ""}, "web.text_field is empty"),
    ({"separator": ""}, "web.separator is empty"),
    ({"include": {"a": ["1"], "b": []}, "exclude": {"b": []}}, "web has 'b' in include and in exclude"),
]
SOURCE = [
    ({"repeats": 0}, "sources.web.repeats is 0, but it must be at least 1"),
    ({"tokens": 0}, "sources.web.tokens is 0"),
    ({"fill_to": 0}, "sources.web.fill_to is 0"),
    ({"documents": -1}, "sources.web.documents is -1, but it must be at least 0"),
    ({"canary_tokens": -1}, "sources.web.canary_tokens is -1"),
    ({"documents": 1, "tokens": 1}, "sources.web has documents and tokens. Keep one"),
    ({"documents": 0, "fill_to": 1}, "sources.web has documents and fill_to. Keep one"),
    ({"tokens": 1, "fill_to": 1}, "sources.web has tokens and fill_to. Keep one"),
    ({"ids": "column"}, "sources.web.ids is 'column', but sources.web.id_field is not set"),
]
VALIDATION = [
    ({"documents": 0}, "validation.web.documents is 0, but it must be at least 1"),
    ({"fraction": 0.0}, "validation.web.fraction is 0.0"),
    ({"fraction": 1.0}, "validation.web.fraction is 1.0"),
    ({"fraction": NAN}, "validation.web.fraction is nan"),
    ({"fraction": 0.5, "documents": 3}, "validation.web has documents and fraction. Keep one"),
    ({"hold_out": True}, "validation.web.hold_out takes every document away"),
]
NEAR = [
    ({"threshold": 0.0}, "near_duplicates.threshold is 0.0"),
    ({"threshold": 1.01}, "near_duplicates.threshold is 1.01"),
    ({"threshold": NAN}, "near_duplicates.threshold is nan"),
    ({"shingle_size": 0}, "near_duplicates.shingle_size is 0"),
    ({"permutations": 15}, "near_duplicates.permutations is 15"),
    ({"seed": -1}, "near_duplicates.seed is -1"),
]
WHOLE = [
    ({"sources": {}}, "There is no source to train on"),
    ({"validation": {}}, "There is no validation set"),
    ({"validation": {"web": ValidationSet("v")}}, "both called 'web'"),
    ({"sources": {"a": Source("a", fill_to=5), "b": Source("b")}}, "sources.a has fill_to, but is not the last"),
    ({"sources": {"a/b": Source("a")}}, "'a/b' is no name"),
    ({"sources": {"": Source("a")}}, "'' is no name"),
    ({"validation": {"..": ValidationSet("a")}}, "'..' is no name"),
    ({"id_noise": -0.01}, "id_noise is -0.01"),
    ({"id_noise": 1.01}, "id_noise is 1.01"),
    ({"id_noise": NAN}, "id_noise is nan"),
    ({"seed": -1}, "seed is -1, but it must be at least 0"),
    ({"chunk_bytes": 4095}, "chunk_bytes is 4095, but it must be at least 4096"),
    ({"chunk_bytes": 2_000_000_001}, "chunk_bytes is 2000000001, but it must be at most"),
    (
        {"validation": {"val": ValidationSet("w", hold_out=True, documents=1, text_field="x")}},
        "validation.val.hold_out takes documents from a source's files, but no source reads 'w' like it",
    ),
]


@pytest.mark.parametrize(("wrong", "part"), READING + SOURCE, ids=str)
def test_wrong_source(wrong: Change, part: str) -> None:
    assert part in refusal(recipe(sources={"web": Source(**({"path": "w"} | wrong))}))


@pytest.mark.parametrize(("wrong", "part"), READING + VALIDATION, ids=str)
def test_wrong_validation_set(wrong: Change, part: str) -> None:
    sets = {"web": ValidationSet(**({"path": "w"} | wrong))}
    assert part in refusal(recipe(sources={"s": Source("w")}, validation=sets))


@pytest.mark.parametrize(("wrong", "part"), NEAR, ids=str)
def test_wrong_near_duplicates(wrong: Change, part: str) -> None:
    assert part in refusal(recipe(near_duplicates=NearDuplicates(**wrong)))


@pytest.mark.parametrize(("wrong", "part"), WHOLE, ids=str)
def test_wrong_recipe(wrong: Change, part: str) -> None:
    assert part in refusal(recipe(**wrong))


ALLOWED = [
    {},
    {"sources": {"web-1_a": Source(["a", "b"], documents=0, canary_tokens=0, repeats=1)}},
    {"sources": {"a": Source("a", tokens=1), "b": Source("b", fill_to=1)}},
    {"sources": {"a": Source("a", ids="column", id_field="x")}},
    {"validation": {"val": ValidationSet("w", hold_out=True, fraction=0.5)}},
    {"validation": {"val": ValidationSet("w", hold_out=True, documents=1), "b": ValidationSet("b", documents=1)}},
    {"near_duplicates": NearDuplicates(threshold=1.0, shingle_size=1, permutations=16, seed=0)},
    {"id_noise": 1.0, "seed": 0, "chunk_bytes": 4096},
    {"id_noise": 0.0, "chunk_bytes": 2_000_000_000},
]


@pytest.mark.parametrize("right", ALLOWED, ids=str)
def test_what_is_at_the_limits_is_allowed(right: Change) -> None:
    recipe(**right).check()


def test_labels_and_sets_in_order() -> None:
    made = recipe(sources={"b": Source("b"), "a": Source("a")})
    assert list(made.sets()) == ["b", "a", "val"]
    assert [made.label(name) for name in made.sets()] == ["sources.b", "sources.a", "validation.val"]


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"sources": {"a": Source("a"), "b": Source("b", ids="near_duplicate")}}, True),
        ({"near_duplicates": NearDuplicates(drop_validation=True)}, True),
    ],
)
def test_signatures_are_made_only_if_they_are_compared(changes: Change, needed: bool) -> None:
    assert recipe(**changes).needs_signatures() is needed


# ------------------------------------------------------------------------------------------------------- a recipe file

RECIPE = """
sources:
  rare:
    path: [books/*.jsonl.zst, more.parquet]
    format: jsonl
    text_field: body.text
    include: {license: [cc0, "by"]}
    exclude: {lang: [de]}
    id_field: isbn
    ids: column
    repeats: 100
    tokens: 1000000
    choose: first
    on_bad_line: skip
    canary_tokens: 7
  web: {path: web, fill_to: 5000000000}
validation:
  unseen: {path: web, hold_out: true, fraction: 0.01}
  other: {path: val.jsonl, documents: 3}
near_duplicates: {threshold: 0.7, drop_validation: true}
leave_out_repeated: true
id_noise: 0.25
seed: 3
chunk_bytes: 8192
"""


def parse(path: Path, *more: str) -> Change:
    parser = build_parser("prepare")
    arguments = ["prepare", "--config", str(path), "--out_dir", "o", "--tokenizer_dir", "t", *more]
    settings = parser.instantiate_classes(parser.parse_args(arguments))
    return settings.prepare.as_dict()


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_recipe_file_becomes_dataclasses(recipe_file: Path) -> None:
    settings = parse(recipe_file)
    rare = Source(
        path=["books/*.jsonl.zst", "more.parquet"],
        format="jsonl",
        text_field="body.text",
        include={"license": ["cc0", "by"]},
        exclude={"lang": ["de"]},
        id_field="isbn",
        ids="column",
        repeats=100,
        tokens=1_000_000,
        choose="first",
        on_bad_line="skip",
        canary_tokens=7,
    )
    assert settings["sources"] == {"rare": rare, "web": Source("web", fill_to=5_000_000_000)}
    assert list(settings["sources"]) == ["rare", "web"]  # the order in which they choose
    assert settings["validation"] == {
        "unseen": ValidationSet("web", hold_out=True, fraction=0.01),
        "other": ValidationSet("val.jsonl", documents=3),
    }
    assert settings["near_duplicates"] == NearDuplicates(threshold=0.7, drop_validation=True)
    others = {name: settings[name] for name in ("leave_out_repeated", "id_noise", "seed", "chunk_bytes")}
    assert others == {"leave_out_repeated": True, "id_noise": 0.25, "seed": 3, "chunk_bytes": 8192}


def test_flag_overrides_recipe_file(recipe_file: Path) -> None:
    assert parse(recipe_file, "--seed", "9", "--leave_out_repeated", "false")["seed"] == 9


WRONG_FIELDS = [
    (["sources", "web", "repeat"], 3),
    (["sources", "web", "hold_out"], True),
    (["validation", "other", "repeats"], 3),
    (["near_duplicates", "treshold"], 0.5),
    (["sauces"], {"a": 1}),
    (["sources", "web", "choose"], "last"),
    (["sources", "web", "ids"], "digest"),
    (["sources", "web", "format"], "csv"),
    (["sources", "rare", "repeats"], "many"),
]


@pytest.mark.parametrize(("place", "value"), WRONG_FIELDS, ids=str)
def test_wrong_name_or_value_is_named(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], place: list[str], value: Any
) -> None:
    content = yaml.safe_load(RECIPE)
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    recipe_file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SystemExit):
        parse(recipe_file)
    said = capsys.readouterr().err
    assert place[-1] in said


def test_deduplicated_is_every_document_once_at_the_same_token_budget(
    corpus_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = str(corpus_dir / "train.jsonl")
    sources = {"repeated": Source(path, documents=8, repeats=6), "once": Source(path, documents=100)}
    budget = None
    found = []
    for name in ("repeats", "deduplicated"):
        settings = sources if budget is None else deduplicated(sources, budget)
        out_dir = tmp_path / name
        prepare(
            out_dir,
            tokenizer_dir,
            sources=settings,
            validation={"val": ValidationSet(str(corpus_dir / "validation.jsonl"))},
        )
        manifest = Manifest.read(out_dir)
        budget = manifest.splits["train"].tokens
        found.append(read_written(out_dir / "train", eos=0))
    repeats, once = (Counter(document.tokens for document in written) for written in found)
    assert sorted(repeats.values()) == [1] * 100 + [6] * 8
    assert set(once.values()) == {1}
    assert set(repeats) < set(once)
    wanted = sum(len(document.tokens) for document in found[0])
    given = sum(len(document.tokens) for document in found[1])
    assert wanted <= given < wanted + max(map(len, once))
    assert all(document.sequence_id > 0 for document in found[1])  # nothing repeats
    assert sources["once"].documents == 100  # a copy was changed
