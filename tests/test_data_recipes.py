"""Every mixture recipe is what the real command parses, says what it says it does, and writes exactly that in small."""

import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zstandard
from helpers import Written, read_written

from litgpt_memsinks.__main__ import build_parser
from litgpt_memsinks.corpus.mixture import Mixture, NearDuplicates, Reading, Source, ValidationSet
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import prepare

REPOSITORY = Path(__file__).parent.parent
RECIPES = REPOSITORY / "recipes" / "data"
SAMPLES = REPOSITORY.parent / "shared" / "data"  # real text, where a machine has it
ALL = sorted(RECIPES.rglob("*.yaml"))
FAMILIES = {"smollm360": 1_000_000_000, "smollm1.7b": 2_000_000_000}
REPEATS = {"": 10, "_20repeats": 20, "_deduplicated": 1}
MIXTURES = {f"{family}_slimpajama_tinystories{arm}" for family in FAMILIES for arm in REPEATS}
SMALL_FILL = {"smollm360": 2_000_000, "smollm1.7b": 2_200_000}

STORY, PAGE, CANARY = 100, 4000, 64  # tokens of the made-up documents, EOS included
EOS = 0  # of the tokenizer of conftest.py


def path_of(name: str, small: bool = False) -> Path:
    return RECIPES / "small" / f"{name}.yaml" if small else RECIPES / f"{name}.yaml"


def parse(recipe: Path, out_dir: Path = Path("out"), tokenizer_dir: Path = Path("tokenizer")) -> dict[str, Any]:
    """The settings that `litgpt-memsinks prepare --config RECIPE` calls its function with."""
    command = ["prepare", "--config", recipe, "--out_dir", out_dir, "--tokenizer_dir", tokenizer_dir]
    parser = build_parser("prepare")
    settings = parser.instantiate_classes(parser.parse_args([str(part) for part in command])).prepare.as_dict()
    settings.pop("config")
    return settings


def mixture(recipe: Path) -> Mixture:
    settings = parse(recipe)
    return Mixture(settings["sources"], settings["validation"], settings["near_duplicates"], seed=settings["seed"])


def flat(value: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {where: value}
    return {key: item for name, part in value.items() for key, item in flat(part, f"{where}.{name}").items()}


def differing(one: Path, other: Path) -> set[str]:
    """Names of the settings in which two recipes differ."""
    first, second = (flat(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in (one, other))
    keys = first.keys() | second.keys()
    return {key.lstrip(".") for key in keys if first.get(key, "absent") != second.get(key, "absent")}


# ----------------------------------------------------------------------------------------------------------- as written


def test_there_are_the_papers_mixtures_in_both_sizes() -> None:
    names = {*MIXTURES, "ts_repetition", "ts_canary"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == names
    assert {path.stem for path in (RECIPES / "small").glob("*.yaml")} == names


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_is_parsed_by_the_command_and_makes_sense(recipe: Path) -> None:
    settings = mixture(recipe)
    settings.check()
    assert all(isinstance(source, Source) for source in settings.sources.values())
    assert settings.near_duplicates.drop_validation  # TinyStories has many edited copies of one story
    for reading in settings.sets().values():
        assert isinstance(reading.path, str)
        assert reading.path.startswith("corpora/")


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: str(path.relative_to(RECIPES)))
def test_header_says_how_to_run_the_recipe(recipe: Path) -> None:
    header = [line for line in recipe.read_text(encoding="utf-8").split("\nsources:")[0].splitlines() if line]
    assert all(line.startswith("#") for line in header)
    text = " ".join(line.removeprefix("#").strip().rstrip("\\") for line in header)
    assert f"prepare --config {recipe.relative_to(REPOSITORY)} " in text
    (out_dir,) = set(re.findall(r"--out_dir (\S+)", text))
    assert f"Writes: {out_dir}, " in " ".join(text.split())


def test_each_recipe_has_its_own_folder() -> None:
    folders = [re.findall(r"--out_dir (\S+)", path.read_text(encoding="utf-8"))[0] for path in ALL]
    assert len(set(folders)) == len(ALL)


def test_training_recipe_reads_what_the_mixture_writes() -> None:
    training = (REPOSITORY / "recipes" / "smollm360_memsinks.yaml").read_text(encoding="utf-8")
    name = "smollm360_slimpajama_tinystories"
    assert f"prepare --config recipes/data/{name}.yaml" in training
    data_path = yaml.safe_load(training)["data"]["init_args"]["data_path"]
    assert f"--out_dir {data_path}\n" in path_of(name).read_text(encoding="utf-8")
    budget = yaml.safe_load(training)["train"]["max_tokens"]
    assert mixture(path_of(name)).sources["slimpajama_train"].fill_to == budget


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("arm", sorted(REPEATS))
def test_slimpajama_with_tinystories_is_the_papers(family: str, arm: str) -> None:
    settings = mixture(path_of(f"{family}_slimpajama_tinystories{arm}"))
    stories, pages = settings.sources["tinystories_train"], settings.sources["slimpajama_train"]
    assert list(settings.sources) == ["tinystories_train", "slimpajama_train"]  # stories first, then fill (App. I)
    assert (stories.documents, stories.repeats, stories.ids) == (5000, REPEATS[arm], "hash")
    assert (pages.fill_to, pages.repeats, pages.ids) == (FAMILIES[family], None, "hash")
    assert pages.choose == "first"  # stops reading early: the whole of SlimPajama is 895 GB
    assert pages.exclude == {"meta.redpajama_set_name": ["RedPajamaGithub"]}
    assert set(settings.validation) == {"tinystories", "slimpajama"}
    assert settings.validation["slimpajama"].exclude == pages.exclude


@pytest.mark.parametrize(("name", "canary"), [("ts_repetition", 0), ("ts_canary", CANARY)])
def test_tinystories_settings_are_the_papers(name: str, canary: int) -> None:
    settings = mixture(path_of(name))
    repeated, once = settings.sources["repeated"], settings.sources["once"]
    assert list(settings.sources) == ["repeated", "once"]
    assert (repeated.documents, repeated.repeats, repeated.canary_tokens) == (100, 128, canary)
    assert (once.documents, once.repeats, once.canary_tokens) == (20_000, 1, 0)
    assert repeated.ids == once.ids == "index"  # App. G
    assert set(settings.validation) == {"tinystories"}


@pytest.mark.parametrize("small", [False, True])
def test_arms_of_a_family_differ_in_nothing_they_need_not(small: bool) -> None:
    for family in FAMILIES:
        base = path_of(f"{family}_slimpajama_tinystories", small)
        for arm in ("_20repeats", "_deduplicated"):
            other = path_of(f"{family}_slimpajama_tinystories{arm}", small)
            assert differing(base, other) == {"sources.tinystories_train.repeats"}
    sizes = (path_of(f"{family}_slimpajama_tinystories", small) for family in FAMILIES)
    assert differing(*sizes) == {"sources.slimpajama_train.fill_to"}
    assert differing(path_of("ts_repetition", small), path_of("ts_canary", small)) == {"sources.repeated.canary_tokens"}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_small_recipe_differs_in_size_and_paths_only(recipe: Path) -> None:
    settings = {key.rsplit(".", 1)[1] for key in differing(recipe, path_of(recipe.stem, small=True))}
    assert settings <= {"path", "documents", "fill_to"}


# --------------------------------------------------------------------------------------------------------------- as run


def words_of_one_token(tokenizer_dir: Path) -> list[str]:
    """Words that are one token behind a space."""
    vocabulary = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = [token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{2,}", token)]
    assert len(words) > 80
    return sorted(words)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A folder with `corpora/` in the real ones' formats: stories of 100 tokens, pages of 4,000.

    Of the validation pages, one is a copy of a page that is trained on, and two are copies but for some words.
    """
    root = tmp_path_factory.mktemp("made_up")
    words = np.array(words_of_one_token(tokenizer_dir))
    generator = np.random.default_rng(0)

    def texts(count: int, tokens: int) -> list[str]:
        return [" " + " ".join(row) for row in words[generator.integers(len(words), size=(count, tokens - 1))]]

    def edited(text: str) -> str:
        parts = text[1:].split(" ")
        parts[::40] = reversed(parts[::40])
        return " " + " ".join(parts)

    def write_pages(path: Path, pages: list[tuple[str, str]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        objects = [{"text": text, "meta": {"redpajama_set_name": name}} for text, name in pages]
        content = "".join(json.dumps(page) + "\n" for page in objects).encode()
        path.write_bytes(zstandard.compress(content, 1))

    stories = root / "corpora" / "tinystories"
    stories.mkdir(parents=True)
    for name, count in (("train", 5200), ("validation", 130)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(count, STORY))
        (stories / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    pages = root / "corpora" / "slimpajama"
    train = texts(750, PAGE)
    for number in range(5):
        mine = [(text, "RedPajamaC4") for text in train[number * 150 : (number + 1) * 150]]
        mine.insert(7, (texts(1, PAGE)[0], "RedPajamaGithub"))
        write_pages(pages / f"train/chunk{number // 3 + 1}/example_train_{number}.jsonl.zst", mine)
    validation = [train[3], edited(train[4]), edited(train[5]), *texts(50, PAGE)]
    write_pages(
        pages / "validation/chunk1/example_holdout_0.jsonl.zst", [(text, "RedPajamaCommonCrawl") for text in validation]
    )
    return root


def run(recipe: Path, root: Path, tokenizer_dir: Path, out_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.chdir(root)
    manifest = prepare(**parse(recipe, out_dir, tokenizer_dir))
    assert manifest is not None
    return manifest


def times_written(written: list[Written]) -> Counter[tuple[int, int]]:
    """How many documents have how many tokens and occur how often."""
    counts = Counter(written)
    return Counter((len(document.tokens), count) for document, count in counts.items())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("arm", sorted(REPEATS))
def test_small_slimpajama_with_tinystories(
    family: str, arm: str, corpora: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = path_of(f"{family}_slimpajama_tinystories{arm}", small=True)
    manifest = run(recipe, corpora, tokenizer_dir, tmp_path / "out", monkeypatch)
    repeats, total = REPEATS[arm], SMALL_FILL[family]
    pages = (total - 200 * repeats * STORY) // PAGE
    assert manifest.splits["train"].tokens == total
    written = read_written(tmp_path / "out" / "train", EOS)
    assert times_written(written) == {(STORY, repeats): 200, (PAGE, 1): pages}
    assert {len(document.tokens) for document in written if document.sequence_id < 0} <= {STORY}
    assert sum(document.sequence_id < 0 for document in written) == (200 * repeats if repeats > 1 else 0)
    source = manifest.sources["slimpajama_train"]
    assert (source.files, len(manifest.inputs["slimpajama_train"])) == (4, 5)  # it stops reading when it has enough
    assert (source.read, source.filtered) == (4 * 150, 4)  # one page of GitHub in each
    assert manifest.splits["val_tinystories"].documents == 100
    assert manifest.sources["slimpajama"].overlap == 1
    assert manifest.sources["slimpajama"].near_duplicates_dropped == 2
    assert manifest.splits["val_slimpajama"].documents == 40 - 2
    assert manifest.splits["val"].documents == 100 + 38


@pytest.mark.parametrize(("name", "canary"), [("ts_repetition", 0), ("ts_canary", CANARY)])
def test_small_tinystories_settings(
    name: str, canary: int, corpora: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = run(path_of(name, small=True), corpora, tokenizer_dir, tmp_path / "out", monkeypatch)
    written = read_written(tmp_path / "out" / "train", EOS)
    assert times_written(written) == {(STORY + canary, 128): 25, (STORY, 1): 5000}
    assert manifest.splits["train"].tokens == 25 * 128 * (STORY + canary) + 5000 * STORY
    # sequence IDs number the stories of the file from 1, minus 2**31 where they repeat
    ids = {document.sequence_id % 2**31 for document in written}
    assert len(ids) == 5025
    assert ids <= set(range(1, 5201))
    assert sum(document.sequence_id < 0 for document in written) == 25 * 128
    assert manifest.splits["val"].documents == 100


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no sample of the real text at {SAMPLES}")
def test_small_recipe_on_real_text(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "tinystories").symlink_to(SAMPLES / "tinystories")
    (tmp_path / "corpora" / "slimpajama").symlink_to(SAMPLES / "slimpajama_like")
    recipe = path_of("smollm360_slimpajama_tinystories_20repeats", small=True)
    manifest = run(recipe, tmp_path, tokenizer_dir, tmp_path / "out", monkeypatch)
    train, stories = manifest.splits["train"], manifest.sources["tinystories_train"]
    assert train.repeated_documents == stories.documents == 200
    assert train.repeated_tokens == stories.written_tokens == 20 * stories.tokens
    longest = max(len(document.tokens) for document in read_written(tmp_path / "out" / "train", EOS))
    assert 2_000_000 <= train.tokens < 2_000_000 + longest
    assert manifest.sources["slimpajama_train"].files < len(manifest.inputs["slimpajama_train"]) == 4
    assert 90 <= manifest.splits["val_tinystories"].documents <= 100
    assert manifest.splits["val_slimpajama"].documents == 40


# ------------------------------------------------------------------------------------------------------------ the guide


@pytest.mark.parametrize("settings", [Reading, Source, ValidationSet, NearDuplicates, Mixture])
def test_guide_has_every_setting_of_a_recipe(settings: type) -> None:
    rows = (REPOSITORY / "docs" / "preparing_data.md").read_text(encoding="utf-8").splitlines()
    explained = {name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {field.name for field in fields(settings)} <= explained


def test_guide_names_files_that_exist() -> None:
    guide = (REPOSITORY / "docs" / "preparing_data.md").read_text(encoding="utf-8")
    for name in {*re.findall(r"recipes/\S+\.yaml", guide), *re.findall(r"\]\((?!http)([^)#]+)", guide)}:
        assert (REPOSITORY / name).is_file() or (REPOSITORY / "docs" / name).is_file(), name
