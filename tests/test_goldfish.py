"""Which targets the Goldfish loss leaves out: against the same in Python's integers, and as properties of texts."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash

from litgpt_memsinks import MemSinksData, MemSinksError
from litgpt_memsinks.config import GoldfishArgs
from litgpt_memsinks.data.data import collate_goldfish, collate_pairs
from litgpt_memsinks.data.goldfish import left_out
from litgpt_memsinks.pretrain.pretrain import pair_cross_entropy

GOLDFISH = GoldfishArgs(k=4, context_width=5)


def random_tokens(*shape: int, seed: int = 0, vocabulary: int = 500) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape).astype(np.int32)


def packed(*shape: int, seed: int = 1) -> np.ndarray:
    """IDs of documents of 1 to 12 tokens, one after another in each row."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, np.prod(shape))
    return np.repeat(rng.integers(-(2**31), 2**31, len(lengths)), lengths)[: np.prod(shape)].reshape(shape).astype("i4")


def context_of(tokens: list[int], ids: list[int], place: int, width: int) -> list[int] | None:
    """The tokens that decide, or ``None`` where none do."""
    begin = place
    while begin and ids[begin - 1] == ids[place]:
        begin -= 1
    if begin == place or (begin == 0 and place < width):
        return None
    return tokens[max(begin, place - width) : place]


def reference(context: list[int], goldfish: GoldfishArgs) -> bool:
    """splitmix64's finaliser of a polynomial over the context, all in integers without bounds."""
    state = 0
    for token in context:
        state = (state * 0x9E3779B97F4A7C15 + token + 1) % 2**64
    state = (state + xxhash.xxh3_64_intdigest(repr(("goldfish", goldfish.seed)).encode())) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ (state >> shift)) * factor % 2**64
    return state * goldfish.k < 2**64 - 2**64 % goldfish.k


@pytest.mark.parametrize(
    "goldfish", [GOLDFISH, GoldfishArgs(2, 1), GoldfishArgs(3, 13, seed=7), GoldfishArgs(50, 39)], ids=str
)
def test_equals_the_reference(goldfish: GoldfishArgs) -> None:
    tokens, ids = random_tokens(6, 40), packed(6, 40)
    ids[0] = 9  # a document longer than its row
    found = left_out(tokens, ids, goldfish)
    decided = 0
    for row, column in np.ndindex(tokens.shape):
        context = context_of(tokens[row].tolist(), ids[row].tolist(), column, goldfish.context_width)
        decided += context is not None
        assert found[row, column] == (context is not None and reference(context, goldfish)), (row, column)
    assert decided > 100


def whole(tokens: np.ndarray, goldfish: GoldfishArgs = GOLDFISH, document: int = 3) -> list[bool]:
    """For a text of one document in the middle of a row, after another."""
    row = np.concatenate((random_tokens(8, seed=9), tokens))[None]
    ids = np.repeat([1, document], [8, len(tokens)]).astype(np.int32)[None]
    return left_out(row, ids, goldfish)[0, 8:].tolist()


def test_a_text_loses_the_same_targets_in_every_document_at_every_place() -> None:
    text = random_tokens(200)
    expected = whole(text)
    assert any(expected)
    assert whole(text, document=-(2**31) + 5) == expected
    for before in (1, 2, 17):  # in the middle of a document, and at another place of the row
        longer = np.concatenate((random_tokens(before, seed=before), text))
        assert whole(longer)[before + GOLDFISH.context_width :] == expected[GOLDFISH.context_width :]
    cut = left_out(text[None, 50:], np.full((1, 150), 3, dtype=np.int32), GOLDFISH)[0].tolist()
    width = GOLDFISH.context_width
    assert cut == [False] * width + expected[50 + width :]  # a row that begins within the text


def test_one_in_k_is_left_out() -> None:
    for k in (2, 4, 10):
        share = np.mean(whole(random_tokens(40_000), GoldfishArgs(k)))
        assert share == pytest.approx(1 / k, abs=4 * (1 / k / 40_000) ** 0.5)


def test_order_counts() -> None:
    """A product of tokens, or their sum, is the same in every order; this hash agrees with itself only by chance."""
    one = [whole(text)[-1] for text in random_tokens(3000, 6)]
    other = [whole(np.append(text[:5][::-1], text[5:]))[-1] for text in random_tokens(3000, 6)]
    same = np.mean(np.array(one) == np.array(other))
    assert same == pytest.approx(0.25**2 + 0.75**2, abs=0.04)


def test_tokens_within_the_width_count_and_no_others() -> None:
    text = random_tokens(2000)
    changes: Counter[int] = Counter()
    expected = whole(text)
    for place in range(100, 1900, 20):
        changed = text.copy()
        changed[place] += 1
        differing = np.flatnonzero(np.array(whole(changed)) != expected) - place
        changes.update(differing.tolist())
    assert set(changes) == {1, 2, 3, 4, 5}  # not the token itself
    assert min(changes.values()) > 10


def test_another_seed_leaves_out_others() -> None:
    text = random_tokens(4000)
    first, second = (np.array(whole(text, GoldfishArgs(4, seed=seed))) for seed in (0, 1))
    assert np.mean(first & second) == pytest.approx(1 / 16, abs=0.02)


# ---- in training only


def batches(prepared: Any, goldfish: GoldfishArgs, split: str) -> torch.Tensor:
    data = MemSinksData(data_path=prepared, num_workers=0, goldfish=goldfish)
    data.connect(batch_size=4, max_seq_length=32)
    data.setup()
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    return torch.cat([batch for _, batch in zip(range(5), loader, strict=False)])


def test_training_batches_have_their_targets_and_validation_is_as_it_was(prepared: Any) -> None:
    plain, triples = (batches(prepared, goldfish, "train") for goldfish in (GoldfishArgs(), GOLDFISH))
    assert plain.shape == (20, 33, 2)
    assert triples.shape == (20, 33, 3)
    assert torch.equal(triples[..., :2], plain)
    expected = left_out(plain[..., 0].numpy(), plain[..., 1].numpy(), GOLDFISH)
    ignored = triples[..., 2] == -100
    assert np.array_equal(ignored.numpy(), expected)
    assert 0.1 < expected.mean() < 0.3
    assert torch.equal(triples[..., 2][~ignored], plain[..., 0][~ignored])
    assert torch.equal(batches(prepared, GOLDFISH, "val"), batches(prepared, GoldfishArgs(), "val"))


@pytest.mark.parametrize("chunk_size", [0, 128])
def test_loss_is_the_mean_over_the_targets_that_are_left(chunk_size: int) -> None:
    rows = [torch.from_numpy(np.stack((random_tokens(31, seed=s), packed(1, 31)[0]), 1).reshape(-1)) for s in range(4)]
    batch = collate_goldfish(rows, GOLDFISH)
    logits = torch.randn(4, 30, 500, generator=torch.Generator().manual_seed(0))
    kept = torch.from_numpy(~left_out(batch[..., 0].numpy(), batch[..., 1].numpy(), GOLDFISH))[:, 1:]
    targets = batch[:, 1:].long()
    expected = F.cross_entropy(logits[kept], targets[..., 0][kept])
    assert not kept.all()
    torch.testing.assert_close(pair_cross_entropy(logits, targets, chunk_size=chunk_size), expected)
    pairs = collate_pairs(rows)[:, 1:].long()
    assert not torch.allclose(pair_cross_entropy(logits, pairs, chunk_size=chunk_size), expected)


REFUSED = [
    (GoldfishArgs(k=1), "goldfish.k is 1, but it must be 0 (leave out none) or an integer from 2 on."),
    (GoldfishArgs(k=-4), "goldfish.k is -4, but"),
    (GoldfishArgs(k=2.5), "goldfish.k is 2.5, but"),  # type: ignore[arg-type]
    (GoldfishArgs(k=4, context_width=0), "goldfish.context_width is 0, but it must be at least 1 and less than"),
    (GoldfishArgs(k=4, context_width=32), "goldfish.context_width is 32, but it must be at least 1 and less than"),
    (GoldfishArgs(k=4, seed=0.5), "goldfish.seed is 0.5, but it must be an integer."),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("goldfish", "message"), REFUSED, ids=str)
def test_settings_out_of_range_are_refused(prepared: Any, goldfish: GoldfishArgs, message: str) -> None:
    with pytest.raises(MemSinksError) as caught:
        MemSinksData(data_path=prepared, goldfish=goldfish).check(512, 32, 4)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_limits_are_accepted(prepared: Any) -> None:
    for goldfish in (GoldfishArgs(), GoldfishArgs(2, 1, -3), GoldfishArgs(10**6, 31)):
        MemSinksData(data_path=prepared, goldfish=goldfish).check(512, 32, 4)
    GoldfishArgs().check(8)  # rows shorter than the default width, which nothing reads then
