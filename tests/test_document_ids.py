"""Document IDs against plain NumPy, struct and xxhash."""

import numpy as np
import pytest
import torch
import xxhash
from helpers import reference_digest, reference_id
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from litgpt_memsinks.data.data import deinterleave
from litgpt_memsinks.document_ids.ids import colliding_pairs, digest, interleave, mix, noisy_ids, sequence_ids

INT32 = st.integers(-(2**31), 2**31 - 1)
TOKENS = st_numpy.arrays(np.int32, st.integers(0, 40), elements=st.integers(0, 2**31 - 1))


def sequence_id(value: int, repeated: bool) -> int:
    (id_,) = sequence_ids(np.array([value], dtype=np.uint64), np.array([repeated]))
    return int(id_)


@given(TOKENS)
def test_digest_is_xxh3_of_little_endian_uint32(tokens: np.ndarray) -> None:
    assert digest(tokens) == reference_digest(tokens.tolist())


def test_digest_golden() -> None:
    # the published value of XXH3_64bits for no input; prepared data and checkpoints depend on it for ever
    assert digest(np.array([], dtype=np.int32)) == 0x2D06800538D394C2


def test_digest_depends_on_order_and_length() -> None:
    documents = ([1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3, 0], [0, 1, 2, 3])
    assert len({digest(np.array(document, dtype=np.int32)) for document in documents}) == len(documents)


@given(st.integers(0, 2**64 - 1))
def test_sequence_id_is_low_31_bits_and_sign(value: int) -> None:
    once, repeated = sequence_id(value, repeated=False), sequence_id(value, repeated=True)
    expected = int(np.uint64(value) & np.uint64(2**31 - 1)) or 1
    assert once == expected > 0
    assert repeated < 0
    assert np.int32(once) == once
    assert np.int32(repeated) == repeated  # NumPy raises OverflowError if it does not fit
    assert int(np.int32(repeated).view(np.uint32)) == expected + 2**31


@pytest.mark.parametrize("value", [0, 2**31, 2**63, 2**64 - 2**31])
def test_sequence_id_is_never_zero(value: int) -> None:
    assert sequence_id(value, repeated=False) == 1
    assert sequence_id(value, repeated=True) == 1 - 2**31


@given(TOKENS, st.booleans())
def test_reference_of_the_other_tests_agrees(tokens: np.ndarray, repeated: bool) -> None:
    assert sequence_id(digest(tokens), repeated) == reference_id(tokens.tolist(), repeated)


@given(st.lists(st.tuples(TOKENS, INT32), max_size=5))
def test_interleave_round_trip(documents: list[tuple[np.ndarray, int]]) -> None:
    tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(own for own, _ in documents)])
    ids = np.array([id_ for _, id_ in documents], dtype=np.int32)
    stream = interleave(tokens, ids, np.array([len(own) for own, _ in documents], dtype=np.int64))
    assert stream.dtype == np.int32
    assert stream.tolist() == [number for own, id_ in documents for token in own.tolist() for number in (token, id_)]
    pairs = deinterleave(torch.from_numpy(stream)[None])
    assert pairs[0, :, 0].tolist() == tokens.tolist()
    assert pairs[0, :, 1].tolist() == [id_ for own, id_ in documents for _ in own]


def test_mixed_numbers_are_uniform_and_unrelated() -> None:
    hashes = np.arange(20_000, dtype=np.uint64)  # as unlike random as can be
    first, second = mix(hashes, 0, "order"), mix(hashes, 0, "noise")
    assert (first == mix(hashes, 0, "order")).all()
    assert len(np.unique(first)) == len(hashes)
    for drawn in (first, second):
        ones = np.array([(drawn >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)])
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(hashes))
    ranks = [np.argsort(np.argsort(drawn)) for drawn in (first, second, mix(hashes, 1, "order"), hashes)]
    correlations = np.corrcoef(ranks)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(len(hashes))


def test_mix_golden() -> None:
    # splitmix64's published first number from seed 0 is the finaliser of its increment
    increment = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    purpose = np.uint64(xxhash.xxh3_64_intdigest(b"()"))
    with np.errstate(over="ignore"):
        assert mix(increment - purpose)[0] == 0xE220A8397B1DCDAF


IDS = np.where(np.arange(4000) % 2 == 0, -1, 1).astype(np.int32) * np.arange(1, 4001, dtype=np.int32)


def _drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, size=len(IDS), dtype=np.uint64)


def test_no_noise_changes_nothing() -> None:
    np.testing.assert_array_equal(noisy_ids(IDS, 0.0, _drawn(0)), IDS)


def test_full_noise_replaces_exactly_the_repeated() -> None:
    noisy = noisy_ids(IDS, 1.0, _drawn(0))
    assert noisy.dtype == np.int32
    np.testing.assert_array_equal(noisy != IDS, IDS < 0)


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_noise_keeps_sign_and_names_a_document(seed: int, probability: float) -> None:
    noisy = noisy_ids(IDS, probability, _drawn(seed))
    np.testing.assert_array_equal(np.sign(noisy), np.sign(IDS))
    assert ((noisy & 0x7FFFFFFF) != 0).all()


def test_noise_draws_from_all_31_bits() -> None:
    drawn = noisy_ids(np.full(4000, -5, dtype=np.int32), 1.0, _drawn(1)) & 0x7FFFFFFF
    assert len(np.unique(drawn)) > 3990
    ones = np.array([(drawn >> bit & 1).mean() for bit in range(31)])
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(4000)


def test_noise_rate() -> None:
    repeated = IDS[IDS < 0]
    changed = (noisy_ids(repeated, 0.5, _drawn(2)[: len(repeated)]) != repeated).sum()
    assert abs(changed - 0.5 * len(repeated)) < 4 * np.sqrt(0.25 * len(repeated))


def test_noise_is_a_function_of_the_seed() -> None:
    first, again, other = (noisy_ids(IDS, 0.5, _drawn(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("digests", "pairs"),
    [
        ([], 0),
        ([7], 0),
        ([7, 8, 9], 0),
        ([7, 7 + 2**31], 1),
        ([7, 7 + 2**31, 7 + 2**40], 3),
        ([7, 7 + 2**31, 7 + 2**40, 7 + 2**63], 6),
        ([7, 7 + 2**31, 9, 9 + 2**50], 2),
        ([0, 1], 1),  # both become document 1
        ([0, 2**31, 1], 3),
    ],
)
def test_colliding_pairs(digests: list[int], pairs: int) -> None:
    assert colliding_pairs(np.array(digests, dtype=np.uint64)) == pairs


def test_colliding_pairs_meets_the_birthday_estimate() -> None:
    digests = np.random.default_rng(5).integers(0, 2**64, size=300_000, dtype=np.uint64)
    expected = len(digests) ** 2 / 2 / 2**31  # about 21
    assert abs(colliding_pairs(digests) - expected) < 5 * np.sqrt(expected)
