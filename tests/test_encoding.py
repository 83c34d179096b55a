"""Encoding many documents at once, against LitGPT's own tokenizer, one text at a time."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litgpt.tokenizer import Tokenizer
from tokenizers_zoo import SHAPES, VARIANTS, tokenizer_variant

from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.prepare import encoding
from litgpt_memsinks.prepare.encoding import Encoder, load_tokenizer

EOS = 0  # of the tokenizer of conftest.py


def _variant(source: Path, folder: Path, name: str) -> Path:
    template, use_bos, change = VARIANTS[name]
    return tokenizer_variant(source, folder / name, template, change, add_bos_token=use_bos)


@pytest.fixture(scope="session")
def encoders(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    """One for each variant and shape, which keep the words they have seen from test to test."""
    folder = tmp_path_factory.mktemp("encoders")
    folders = {name: _variant(tokenizer_dir, folder, name) for name in VARIANTS}
    for name, (change, _) in SHAPES.items():
        folders[name] = tokenizer_variant(tokenizer_dir, folder / f"shape-{name}", "$A", change)
    return {name: Encoder(load_tokenizer(path)) for name, path in folders.items()}


def _stock(tokenizer: Tokenizer, text: str) -> list[int]:
    """LitGPT's encoding. Of a processor that adds EOS by itself, LitGPT drops it although it was asked for EOS."""
    tokens = tokenizer.encode(text, eos=True).tolist()
    return tokens if tokens[-1:] == [tokenizer.eos_id] else [*tokens, tokenizer.eos_id]


ODD_TEXTS = [
    "a",
    "",
    " ",
    "  a",
    "a  b",
    "a b ",
    "a b  ",
    "a \n b",
    "a\n b \nc",
    "a \t b",
    "a\xa0 b \xa0c",
    "a \u3000b",
    "a \x1c b\x85 c",
    "\n\n",
    "x 1234567 y12 3",
    "e\u0301 é \u0301a",
    "漢字🙂\u200d🏽",
    "\x00\x07",
    "\ufeffx",
    "don't " * 50,
    "I'm 'S 's",
    "\u202eabc",
    "ﬁ",
    "\U0010ffff",
    "the <x> end  <x>a",
    "a<|endoftext|> b <|endoftext|>c",
    "<s>",
    "<s> a <s>",
    "a b " * 100,
    "long" * 100 + " " + "word" * 100,
]


@pytest.mark.parametrize("name", [*VARIANTS, *SHAPES])
def test_largest_token_is_that_of_the_file(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    content = json.loads(encoder.tokenizer.processor.to_str())
    ids = {*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])}
    assert encoder.largest_token == max(ids)


@pytest.mark.parametrize("name", [*VARIANTS, *SHAPES])
def test_encoding_equals_litgpts(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    texts = ODD_TEXTS + list(stories(5))
    expected = [_stock(encoder.tokenizer, text) for text in texts]
    for _ in range(2):  # new words, then known ones
        encoded = encoder(texts)
        assert [tokens.tolist() for tokens in encoded] == expected
        assert {tokens.dtype for tokens in encoded} == {np.dtype(np.int32)}


@pytest.mark.parametrize("name", VARIANTS)
def test_bos_is_in_front_if_litgpt_puts_it_there(encoders: dict[str, Encoder], name: str) -> None:
    encoder = encoders[name]
    assert {tokens[0] == encoder.tokenizer.bos_id for tokens in encoder(list(stories(5)))} == {VARIANTS[name][1]}


PIECES = st.sampled_from(
    [" ", "  ", "\n", "\t", "\xa0", "the", "a", "'s", "12", ".", "é", "e\u0301", "<x>", "<s>", "字"]
)


@given(
    texts=st.lists(
        st.one_of(
            st.text(st.characters(codec="utf-8"), min_size=1), st.lists(PIECES, min_size=1, max_size=12).map("".join)
        ),
        max_size=8,
    ),
    name=st.sampled_from([*sorted(VARIANTS), *sorted(SHAPES)]),
)
def test_encoding_equals_litgpts_on_any_text(encoders: dict[str, Encoder], texts: list[str], name: str) -> None:
    encoder = encoders[name]
    assert [tokens.tolist() for tokens in encoder(texts)] == [_stock(encoder.tokenizer, text) for text in texts]


@pytest.mark.parametrize("name", SHAPES)
def test_which_tokenizers_encode_by_words(encoders: dict[str, Encoder], name: str) -> None:
    assert encoders[name].by_words is SHAPES[name][1]


def test_a_tokenizer_that_adds_other_tokens_encodes_whole_texts(tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = tokenizer_variant(tokenizer_dir, tmp_path / "adds", "<s> $A", {}, bos_token=None)
    encoder = Encoder(load_tokenizer(folder))  # <s> is added, but is no BOS for LitGPT
    assert not encoder.by_words
    assert encoder(["a b"])[0].tolist() == _stock(encoder.tokenizer, "a b")


def test_words_are_encoded_once(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(load_tokenizer(tokenizer_dir))
    asked: list[str] = []
    learn = Encoder._learn
    monkeypatch.setattr(Encoder, "_learn", lambda self, missed: (asked.extend(missed), learn(self, missed))[1])
    encoder(["the cat saw the dog", "the cat  sat"])
    assert sorted(asked) == sorted(
        [" the", "cat", "saw", "the", "dog", "cat  sat"]
    )  # the first piece has a space in front
    asked.clear()
    encoder(["the dog saw the cat", "the cat  sat"])
    assert asked == ["cat  sat"]  # two spaces: not one word, so not kept


def test_threads_share_an_encoder(tokenizer_dir: Path) -> None:
    """As `prepare` does where there are more cores than files."""
    encoder = Encoder(load_tokenizer(tokenizer_dir))
    batches = [[f"{text} {number} x{index}" for index, text in enumerate(stories(40))] for number in range(32)]
    expected = [[tokens.tolist() for tokens in Encoder(encoder.tokenizer)(batch)] for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # they take turns all the time
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(encoder, batches))
    finally:
        sys.setswitchinterval(interval)
    assert [[tokens.tolist() for tokens in batch] for batch in found] == expected


def test_table_of_words_is_bounded(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_WORDS", 10)
    encoder = Encoder(load_tokenizer(tokenizer_dir))
    texts = list(stories(20))
    expected = [_stock(encoder.tokenizer, text) for text in texts]
    assert [tokens.tolist() for tokens in encoder(texts)] == expected
    assert len(encoder._table) == 10
    assert [tokens.tolist() for tokens in encoder(texts)] == expected


@pytest.mark.parametrize("text", ["the end<|endoftext|>", "one<|endoftext|>two", "<|endoftext|>begin"])
def test_a_document_ends_in_eos_even_if_its_text_does(tokenizer_dir: Path, text: str) -> None:
    (tokens,) = Encoder(load_tokenizer(tokenizer_dir))([text])
    assert tokens[-1] == EOS
    assert tokens[-2] != EOS


def test_text_is_not_cut(tokenizer_dir: Path, tmp_path: Path) -> None:
    # as files have it that were saved from a fine-tuning script
    cut = {"truncation": {"max_length": 4, "strategy": "LongestFirst", "direction": "Right", "stride": 0}}
    encoder = Encoder(load_tokenizer(tokenizer_variant(tokenizer_dir, tmp_path / "cuts", "$A", cut)))
    text = next(stories(1))
    assert encoder([text])[0].tolist() == Tokenizer(tokenizer_dir).encode(text, eos=True).tolist()
