import hashlib
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import litgpt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_memsinks.corpus import embedded as corpus
from litgpt_memsinks.corpus.embedded import END_OF_TEXT, stories, train_tokenizer, write_corpus
from litgpt_memsinks.errors import MemSinksError

# If a change of the stories is meant, replace it: figures in the documentation may then change too.
FIRST_STORY_SHA256 = "8f2d441e03bedb0062759aa068715fdfde49226e31beb23f8d252015ebe3d027"


@pytest.fixture(scope="module")
def train_stories() -> list[str]:
    return list(stories(2000))


@pytest.fixture(scope="module")
def tokenizer_dir(train_stories: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("corpus") / "tokenizer"
    train_tokenizer(train_stories, out_dir)
    return out_dir


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> litgpt.Tokenizer:
    return litgpt.Tokenizer(tokenizer_dir)


def test_stories_are_deterministic() -> None:
    assert list(stories(20, seed=3)) == list(stories(20, seed=3))
    assert list(stories(20, seed=3)) != list(stories(20, seed=4))
    assert hashlib.sha256(next(stories(1)).encode()).hexdigest() == FIRST_STORY_SHA256


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_story_does_not_depend_on_their_number(split: corpus.Split) -> None:
    assert list(stories(10, split=split)) == list(islice(stories(50, split=split), 10))


def test_no_story_is_repeated_within_or_across_splits() -> None:
    train, validation = set(stories(20_000)), set(stories(500, split="validation"))
    assert len(train) == 20_000
    assert len(validation) == 500
    assert not train & validation


def test_a_story_drawn_again_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join([word] * 60) for word in "abcdefgh"]
    train_texts = [text for text in texts if hashlib.sha256(text.encode()).digest()[0] >= corpus._FIRST_TRAIN_BYTE]
    drawn = iter([train_texts[0], train_texts[0], "too short", *texts])
    monkeypatch.setattr(corpus, "_story", lambda rng: next(drawn))
    assert list(stories(3)) == train_texts[:3]


def _five_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[offset:] for offset in range(5)), strict=False))


def test_few_stories_are_near_copies(train_stories: list[str]) -> None:
    train = [_five_grams(text) for text in train_stories]
    holders = defaultdict(list)
    for index, grams in enumerate(train):
        for gram in grams:
            holders[gram].append(index)
    similarities = []
    for text in stories(256, split="validation"):
        grams = _five_grams(text)
        shared = Counter(index for gram in grams for index in holders.get(gram, ()))
        similarities.append(max(n / (len(grams) + len(train[i]) - n) for i, n in shared.items()))
    assert statistics.median(similarities) < 0.25
    assert max(similarities) < 0.6


def test_stories_fit_a_block_of_128(train_stories: list[str], tokenizer: litgpt.Tokenizer) -> None:
    words = [len(text.split()) for text in train_stories]
    tokens = sorted(len(tokenizer.encode(text)) for text in train_stories)
    assert corpus.MIN_WORDS <= min(words) <= max(words) <= corpus.MAX_WORDS
    assert 75 < statistics.mean(tokens) < 110
    assert tokens[int(0.95 * len(tokens))] < 127


def test_stories_are_well_formed(train_stories: list[str]) -> None:
    for text in train_stories:
        assert not re.search(r"[{}\[\]<>|]|\s\s|\s[.,!?]", text), text
        assert not re.search(r"\b(\w+) \1\b", text, flags=re.IGNORECASE), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"(?:^|[.!?] |\.\" )\"?[a-z]", text), text
        assert text.count('"') % 2 == 0, text
        assert re.search(r"[.!?]\"?$", text), text


def test_stories_are_varied(train_stories: list[str]) -> None:
    names = [name for name in (*corpus.GIRLS, *corpus.BOYS) if any(name in text for text in train_stories)]
    assert len(names) >= 60
    assert len(corpus.PLOTS) >= 10


def test_every_wording_can_be_told() -> None:
    rng = corpus.Random(0)
    for beats in corpus._plots():
        for wording in (wording for _, wordings in beats for wording in wordings):
            for _ in range(20):
                corpus._expand(wording, rng).format_map(corpus._Cast(rng))


@pytest.mark.parametrize(("number", "split"), [(0, "train"), (-5, "validation"), (3, "test")])
def test_stories_refuse_at_once(number: int, split: corpus.Split) -> None:
    with pytest.raises(MemSinksError, match=rf"{number if number < 1 else split!r}.* must be .*\.$"):
        stories(number, split=split)


def test_write_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", documents=7, validation_documents=4, seed=2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "train.jsonl", "validation.jsonl"]
    for split, number in (("train", 7), ("validation", 4)):
        lines = (tmp_path / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{"text": text} for text in stories(number, 2, split)]


def test_write_corpus_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MemSinksError, match="exists"):
        write_corpus(tmp_path, documents=2, validation_documents=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_write_corpus_leaves_nothing_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(number: int, seed: int, split: corpus.Split) -> Iterator[str]:
        yield "one"
        if split == "validation":
            raise OSError("No space left on device")

    monkeypatch.setattr(corpus, "stories", failing)
    with pytest.raises(OSError, match="No space"):
        write_corpus(tmp_path / "data", documents=2, validation_documents=2)
    assert not list(tmp_path.iterdir())


def test_write_corpus_refuses_zero_documents(tmp_path: Path) -> None:
    with pytest.raises(MemSinksError, match="is 0, but must be at least 1"):
        write_corpus(tmp_path / "data", documents=2, validation_documents=0)
    assert not list(tmp_path.iterdir())


def test_litgpt_loads_the_tokenizer(tokenizer: litgpt.Tokenizer) -> None:
    assert tokenizer.vocab_size == 1024
    assert tokenizer.eos_id == tokenizer.bos_id == tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.use_bos is False
    assert 0 not in tokenizer.encode("Once there was a fox.").tolist()
    assert tokenizer.encode("Once", bos=True, eos=True).tolist()[::2] == [0, 0]


def test_tokenizer_config(tokenizer_dir: Path) -> None:
    assert sorted(path.name for path in tokenizer_dir.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["bos_token"] == config["eos_token"] == END_OF_TEXT
    assert config["add_bos_token"] is False


def test_round_trip_of_stories(train_stories: list[str], tokenizer: litgpt.Tokenizer) -> None:
    for text in train_stories[:200]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1).filter(lambda text: END_OF_TEXT not in text))
def test_round_trip_of_any_text(tokenizer: litgpt.Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_in_a_text_is_the_special_token(tokenizer: litgpt.Tokenizer) -> None:
    """As in every LitGPT tokenizer: a text cannot hold the characters of a special token as such."""
    assert tokenizer.encode(f"a{END_OF_TEXT}b").tolist() == [*tokenizer.encode("a"), 0, *tokenizer.encode("b")]


@pytest.mark.parametrize(
    "text", [" two  spaces ", "a\r\n\tb", "naïve café", "👩‍👩‍👧", "日本語", "\x00\ufeff\u202e", "a ."]
)
def test_round_trip_of_odd_text(tokenizer: litgpt.Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_deterministic(train_stories: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(train_stories), tmp_path / "again")
    for path in tokenizer_dir.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_smallest_vocabulary_is_the_bytes(tmp_path: Path) -> None:
    train_tokenizer(["Once there was a fox."], tmp_path / "t", vocab_size=257)
    tokenizer = litgpt.Tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("fox é")) == 6


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["text"], 256, "is 256, but must be at least 257"),
        ([], 1024, "0 texts"),
        (["", ""], 1024, "0 texts"),
    ],
)
def test_train_tokenizer_refuses(texts: list[str], vocab_size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(MemSinksError, match=message):
        train_tokenizer(texts, tmp_path / "t", vocab_size)
    assert not list(tmp_path.iterdir())


def test_train_tokenizer_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(MemSinksError, match="exists"):
        train_tokenizer(["text"], tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
