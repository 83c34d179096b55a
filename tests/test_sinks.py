"""The mask against its definition in NumPy (`make_golden_masks.py`), bit for bit, and against chance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_memsinks.sinks.masks import MASK_VERSION, document_bits, fmix32, only_repeated, sink_mask, threshold
from tests.make_golden_masks import DOCUMENTS, SETTINGS, packed, reference_fmix32, reference_mask

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
EXTREMES = (0, 1, -1, 2, -2, 65536, INT_MAX - 1, INT_MAX, INT_MIN, INT_MIN + 1)
int32s = st.sampled_from(EXTREMES) | st.integers(INT_MIN, INT_MAX)
probabilities = st.sampled_from((0.0, 1e-12, 2**-33, 2**-32, 0.3, 0.5, 1 - 2**-53, 1.0)) | st.floats(0, 1)

# Made by `python tests/make_golden_masks.py`, for each MASK_VERSION, (n_sink, p, seed) and ID. Trained checkpoints
# depend on these bits: a new function needs a new MASK_VERSION and a table of its own, and never changes an old one.
# fmt: off
GOLDEN_MASKS = {
    1: {
        (45, 0.3, 0): {
            0: "000000000000",
            1: "216026101000",
            -1: "840095101080",
            2: "000e281f10a0",
            3: "886030610d80",
            65536: "40af0d140810",
            12345678: "0011a29010a0",
            -12345678: "b446210009d8",
            2147483647: "840095101080",
            -2147483648: "000000000000",
            -2147483647: "216026101000",
        },
        (45, 0.3, 7): {
            0: "000000000000",
            1: "6101e0020120",
            -1: "801194922c00",
            2: "911c100b0018",
            3: "0824cc9962e0",
            65536: "9684a04e2580",
            12345678: "21ae41c45418",
            -12345678: "18d841960848",
            2147483647: "801194922c00",
            -2147483648: "000000000000",
            -2147483647: "6101e0020120",
        },
        (45, 0.3, -7): {
            0: "000000000000",
            1: "007440920080",
            -1: "06066a4f0520",
            2: "4a80c8208490",
            3: "0622c1805488",
            65536: "5ac410119a00",
            12345678: "c16e30142380",
            -12345678: "224204820550",
            2147483647: "06066a4f0520",
            -2147483648: "000000000000",
            -2147483647: "007440920080",
        },
        (17, 0.5, 2147483647): {
            0: "000000",
            1: "e40d00",
            -1: "362080",
            2: "463400",
            3: "17da80",
            65536: "597e80",
            12345678: "f0a200",
            -12345678: "026880",
            2147483647: "362080",
            -2147483648: "000000",
            -2147483647: "e40d00",
        },
        (33, 0.9, -2147483648): {
            0: "0000000000",
            1: "fdffff6f00",
            -1: "ffffd7ff80",
            2: "ffff7cdf80",
            3: "efffff7f80",
            65536: "ffffff7780",
            12345678: "ffdfefff80",
            -12345678: "ffeffeef80",
            2147483647: "ffffd7ff80",
            -2147483648: "0000000000",
            -2147483647: "fdffff6f00",
        },
        (7, 0.01, 123456): {
            0: "00",
            1: "04",
            -1: "00",
            2: "00",
            3: "00",
            65536: "00",
            12345678: "00",
            -12345678: "00",
            2147483647: "00",
            -2147483648: "00",
            -2147483647: "04",
        },
    },
}
# fmt: on

# MurmurHash3_x86_32 of no bytes is its finaliser applied to the seed; from the published vectors of that hash.
FMIX32_VECTORS = {0: 0, 1: 0x514E28B7, 0xFFFFFFFF: 0x81F16F39}


def signed(value: int) -> int:
    """The int32 with the bits of an unsigned 32-bit number."""
    return value - 2**32 if value >= 2**31 else value


def test_golden_masks() -> None:
    golden = GOLDEN_MASKS[MASK_VERSION]
    assert set(golden) == set(SETTINGS)
    for setting, masks in golden.items():
        assert set(masks) == set(DOCUMENTS)
        rows = sink_mask(torch.tensor(list(masks)), *setting)
        assert dict(zip(masks, (packed(row.numpy()) for row in rows), strict=True)) == masks


def test_finaliser_has_the_published_values() -> None:
    expected = [signed(value) for value in FMIX32_VECTORS.values()]
    hashed = fmix32(torch.tensor([signed(value) for value in FMIX32_VECTORS], dtype=torch.int32))
    assert hashed.dtype == torch.int32
    assert hashed.tolist() == expected
    assert reference_fmix32(np.array(list(FMIX32_VECTORS), dtype=np.uint32)).tolist() == list(FMIX32_VECTORS.values())


@settings(deadline=None)
@given(
    ids=st.lists(int32s, min_size=1, max_size=17),
    n_sink=st.integers(0, 67),
    active_probability=probabilities,
    seed=int32s,
)
def test_eager_equals_numpy(ids: list[int], n_sink: int, active_probability: float, seed: int) -> None:
    mask = sink_mask(torch.tensor(ids, dtype=torch.int32), n_sink, active_probability, seed)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(ids), n_sink)
    np.testing.assert_array_equal(mask.numpy(), reference_mask(np.array(ids), n_sink, active_probability, seed))


@pytest.mark.parametrize(
    ("shape", "n_sink", "active_probability", "seed"),
    [((3, 7), 131, 0.3, 0), ((1, 61), 37, 0.9, INT_MIN), ((5, 13), 65, 0.05, -123456789), ((3, 5), 63, 0.5, 7)],
    ids=str,
)
def test_compiled_equals_numpy(shape: tuple[int, ...], n_sink: int, active_probability: float, seed: int) -> None:
    rng = np.random.default_rng(n_sink)
    ids = rng.integers(INT_MIN, INT_MAX, shape, dtype=np.int32, endpoint=True)
    ids.reshape(-1)[: len(EXTREMES)] = EXTREMES
    compiled = torch.compile(sink_mask, dynamic=False, fullgraph=True)
    mask = compiled(torch.from_numpy(ids), n_sink, active_probability, seed)
    np.testing.assert_array_equal(mask.numpy(), reference_mask(ids, n_sink, active_probability, seed))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_mask_has_one_row_per_id(shape: tuple[int, ...]) -> None:
    ids = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    mask = sink_mask(ids, 9, 0.5)
    assert mask.shape == (*shape, 9)
    assert torch.equal(mask.reshape(-1, 9), torch.stack([sink_mask(value, 9, 0.5) for value in ids.reshape(-1)]))


@pytest.mark.parametrize("active_probability", [0.0, 0.3, 1.0])
def test_no_sinks_is_an_empty_mask(active_probability: float) -> None:
    mask = sink_mask(torch.tensor([[0, 1, -5]]), 0, active_probability)
    assert mask.shape == (1, 3, 0)
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("active_probability", [0.3, 1.0])
@pytest.mark.parametrize("no_document", [0, INT_MIN], ids=["zero", "zero that repeats"])
def test_no_document_has_no_sinks(no_document: int, active_probability: float) -> None:
    mask = sink_mask(torch.tensor([no_document, 1], dtype=torch.int32), 1280, active_probability)
    assert not mask[0].any()
    assert mask[1].any()


@pytest.mark.parametrize(("active_probability", "on"), [(0.0, False), (1.0, True)])
def test_certain_probabilities(active_probability: float, on: bool) -> None:
    ids = torch.tensor([value for value in EXTREMES if value not in (0, INT_MIN)], dtype=torch.int32)
    assert sink_mask(ids, 1280, active_probability).eq(on).all()


def unmixed(h: int) -> int:
    """The inverse of the finaliser on unsigned 32-bit numbers."""
    h ^= h >> 16
    h = h * pow(0xC2B2AE35, -1, 2**32) % 2**32
    h ^= (h >> 13) ^ (h >> 26)
    h = h * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return h ^ (h >> 16)


def document_whose_neuron_hashes_to(value: int, neuron: int) -> int:
    """The 32 bits of the ID for which a neuron's number, which is compared with the threshold, is ``value``."""
    key = int(reference_fmix32(np.array([neuron * 0x9E3779B9 % 2**32], dtype=np.uint32))[0])
    return (unmixed(unmixed(unmixed(value) ^ key)) - 0x9E3779B9) % 2**32


def test_probability_one_switches_on_even_the_largest_hash() -> None:
    """No int32 threshold lies above INT_MAX, so that this neuron of 2**32 is on by the special case of 1 only."""
    neuron, document = next(
        (neuron, document)
        for neuron in range(64)
        if 0 < (document := document_whose_neuron_hashes_to(INT_MAX, neuron)) < 2**31
    )
    assert sink_mask(torch.tensor(document), neuron + 1, 1.0)[neuron]
    assert not sink_mask(torch.tensor(document), neuron + 1, 1 - 2**-53)[neuron]


@settings(deadline=None)
@given(document=st.integers(0, INT_MAX), n_sink=st.integers(1, 67), seed=int32s)
def test_sign_bit_does_not_choose_sinks(document: int, n_sink: int, seed: int) -> None:
    once, repeats = sink_mask(torch.tensor([document, signed(document + 2**31)]), n_sink, 0.5, seed)
    assert torch.equal(once, repeats)


@settings(deadline=None)
@given(ids=st.lists(int32s, min_size=1, max_size=9), high=st.integers(-(2**31), 2**31 - 1))
def test_only_the_low_bits_of_wide_ids_count(ids: list[int], high: int) -> None:
    narrow = sink_mask(torch.tensor(ids, dtype=torch.int32), 33, 0.3)
    assert torch.equal(sink_mask(torch.tensor(ids, dtype=torch.int64), 33, 0.3), narrow)
    wide = torch.tensor([value % 2**32 + high * 2**32 for value in ids], dtype=torch.int64)
    assert torch.equal(sink_mask(wide, 33, 0.3), narrow)


@settings(deadline=None)
@given(ids=st.lists(int32s, min_size=1))
def test_document_bits(ids: list[int]) -> None:
    bits = document_bits(torch.tensor(ids, dtype=torch.int64))
    assert bits.dtype == torch.int32
    assert bits.tolist() == [value % 2**31 for value in ids]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_only_repeated(dtype: torch.dtype) -> None:
    kept = only_repeated(torch.tensor([[0, 1, INT_MAX], [-1, INT_MIN, -7]], dtype=dtype))
    assert kept.dtype == torch.int32
    assert kept.tolist() == [[0, 0, 0], [-1, INT_MIN, -7]]


@pytest.mark.parametrize(
    ("active_probability", "value"),
    [
        (0.5, 0),
        (0.25, -(2**30)),
        (0.75, 2**30),
        (0.3, -858_993_459),  # 0.3 * 2**32 = 1288490188.8
        (2**-32, INT_MIN + 1),
        (0.0, INT_MIN),
        (1.0, INT_MAX),
    ],
)
def test_threshold(active_probability: float, value: int) -> None:
    assert threshold(active_probability) == value


# What follows compares with independent coin flips. N_SINK and p are those of SmolLM-360M at g = 0.5.
N_SINK, P, N_DOCUMENTS = 1280, 0.3, 8192
ID_SETS = {
    "sequential": np.arange(1, N_DOCUMENTS + 1),
    "random": np.random.default_rng(0).choice(INT_MAX, N_DOCUMENTS, replace=False) + 1,
    "multiples of 65536": np.arange(1, N_DOCUMENTS + 1) * 65536,
}


@pytest.fixture(scope="module", params=ID_SETS)
def masks(request: pytest.FixtureRequest) -> np.ndarray:
    """bool of shape (N_DOCUMENTS, N_SINK)."""
    return sink_mask(torch.from_numpy(ID_SETS[request.param]), N_SINK, P).numpy()


def assert_overlaps_by_chance(first: np.ndarray, second: np.ndarray) -> None:
    """The numbers of sinks that are on in both of many pairs of masks are binomial, in mean and variance."""
    both = np.count_nonzero(first & second, axis=1)
    mean, variance = N_SINK * P**2, N_SINK * P**2 * (1 - P**2)
    assert abs(both.mean() - mean) < 3.5 * np.sqrt(variance / len(both))
    assert 0.9 < both.var() / variance < 1.1


def test_activation_rate(masks: np.ndarray) -> None:
    assert abs(masks.mean() - P) < 3.5 * np.sqrt(P * (1 - P) / masks.size)


@pytest.mark.parametrize("axis", [0, 1], ids=["over documents", "over neurons"])
def test_spread_of_activation_rates(masks: np.ndarray, axis: int) -> None:
    """No neuron is on for more documents, and no document has more sinks, than chance allows."""
    assert 0.9 < masks.mean(axis=axis).var() / (P * (1 - P) / masks.shape[axis]) < 1.1


def test_documents_have_distinct_masks(masks: np.ndarray) -> None:
    assert len(np.unique(np.packbits(masks, axis=1), axis=0)) == N_DOCUMENTS


def test_neighbours_overlap_by_chance(masks: np.ndarray) -> None:
    assert_overlaps_by_chance(masks[:-1], masks[1:])


@pytest.mark.parametrize("seed", [1, -1, INT_MIN])
def test_another_seed_gives_independent_masks(seed: int) -> None:
    ids = torch.from_numpy(ID_SETS["sequential"])
    assert_overlaps_by_chance(sink_mask(ids, N_SINK, P, seed=0).numpy(), sink_mask(ids, N_SINK, P, seed=seed).numpy())
