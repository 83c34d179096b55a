"""Signatures against sets of shingles, clusters against all pairs and a union-find of dictionaries."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from make_golden_signatures import TEXTS, golden

from litgpt_memsinks.bench import near_duplicate_table
from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import NearDuplicates
from litgpt_memsinks.document_ids import near_duplicates
from litgpt_memsinks.document_ids.near_duplicates import (
    SignatureFile,
    bands,
    cluster,
    near_any,
    shingles,
    signatures,
    similarity,
)
from litgpt_memsinks.errors import MemSinksError
from tests.console import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
LOOSE = NearDuplicates(threshold=0.3, permutations=128)
"""With 64 bands of 2: of similarity 0.3, 99.8 % of the pairs share one."""

# Made by tests/make_golden_signatures.py. Which documents share an ID depends on these: they may only change together
# with SIGNATURE_VERSION.
GOLDEN_SIGNATURES = {
    (2, 128, 1): {
        "empty": (3305354416, "cef1a3d747e2624e"),
        "word": (3389014693, "33bf364e2dd0e52b"),
        "story": (3263091554, "a9630c8b36358f73"),
        "chinese": (3459921136, "00ba05fb43b9970a"),
        "accents": (3296748318, "13b677f6819ebecc"),
        "emoji": (4261824264, "9fb8a406718eb0c7"),
        "surrogate": (3342750787, "3afb89ea712ab176"),
        "long": (9807173, "43993c39041354c2"),
    },
    (3, 128, 1): {
        "empty": (3305354416, "cef1a3d747e2624e"),
        "word": (3389014693, "33bf364e2dd0e52b"),
        "story": (3249750163, "edf4139cfb92d814"),
        "chinese": (779189858, "5314990995b6a6a0"),
        "accents": (3233368178, "1394657b0c6a0963"),
        "emoji": (4261824264, "9fb8a406718eb0c7"),
        "surrogate": (3306556763, "b6c65cd8b53a8b81"),
        "long": (1040477, "8e796d5dfa509468"),
    },
    (2, 16, 7): {
        "empty": (3803039333, "b20dfebd18073bea"),
        "word": (4094480707, "33051f66d59ff1bb"),
        "story": (2089085330, "1233c3d336338d24"),
        "chinese": (810477048, "0284f04b4a49ec07"),
        "accents": (2324449785, "17bdca4e91d9add7"),
        "emoji": (3733530386, "351127e28e2f60b6"),
        "surrogate": (3386416757, "af05168a2929703e"),
        "long": (730675, "1f20964ae24b7de1"),
    },
    (1, 100, 4294967295): {
        "empty": (3330993587, "25a7e08da0a2009a"),
        "word": (4026123052, "11ddb361eca1e5ec"),
        "story": (3376960657, "d2647d138ac3dbfb"),
        "chinese": (3253928819, "d69c28dd95c1594b"),
        "accents": (2091684710, "5a25894e0f5c3b5d"),
        "emoji": (3350612723, "0ea014ba7f4331d1"),
        "surrogate": (3280886287, "925ff44c5808b2f7"),
        "long": (8580058, "13d682e6731af729"),
    },
}


def write(folder: Path, rows: np.ndarray, cuts: Iterable[int] = ()) -> list[SignatureFile]:
    """The rows as files that begin at 0 and at each cut."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, part in enumerate(np.split(rows, list(cuts))):
        part.astype("<u4").tofile(folder / f"{number}.bin")
        files.append(SignatureFile(folder / f"{number}.bin", len(part)))
    return files


def clusters(
    folder: Path, rows: np.ndarray, how: NearDuplicates, cuts: Iterable[int] = (), wanted: np.ndarray | None = None
) -> np.ndarray:
    files = write(folder / "parts", rows, cuts)
    return np.fromfile(cluster(files, how, folder, wanted), dtype="<i8")


def brute_force(rows: np.ndarray, threshold: float) -> np.ndarray:
    """The first of each document's connected component, over all pairs."""
    component = {number: {number} for number in range(len(rows))}
    for first in range(len(rows)):
        for second in range(first):
            if (rows[first] == rows[second]).sum() >= threshold * rows.shape[1] - 1e-9:
                joined = component[first] | component[second]
                component.update(dict.fromkeys(joined, joined))
    return np.array([min(component[number]) for number in range(len(rows))])


def partition(of: np.ndarray, names: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(names[of == first].tolist()) for first in np.unique(of)}


def noisy(rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Signatures of which so many numbers are others."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(rows.shape) < share, random_rows(len(rows), rows.shape[1], seed + 1000), rows)


def random_rows(n: int, permutations: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (n, permutations), dtype=np.uint32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows and many partitions, so that all borders are crossed."""
    monkeypatch.setattr(near_duplicates, "_BLOCK_BYTES", 61 * 4 * 128)
    monkeypatch.setattr(near_duplicates, "_PARTITION_BYTES", 24 * 40)


# --- shingles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("Tom ran -- and Tom ran!", 2, ["tom ran", "ran and", "and tom", "tom ran"]),
        ("Tom ran", 1, ["tom", "ran"]),
        ("Tom ran", 2, ["tom ran"]),
        ("Tom ran", 3, ["tom ran"]),
        ("x_1 = 0x2F", 2, ["x_1 0x2f"]),
        ("", 2, [""]),
        (" \n", 2, [""]),
        ("?! ", 2, ["?!"]),
        ("一匹小马 ran", 2, ["一 匹", "匹 小", "小 马", "马 ran"]),
        ("ネコだ", 2, ["ネ コ", "コ だ"]),
        ("ab\U00020000c", 1, ["ab", "\U00020000", "c"]),
        ("고양이가 잔다", 1, ["고양이가", "잔다"]),
        ("De\u0301ja\u0300 VU", 2, ["déjà vu"]),  # decomposed
    ],
)
def test_shingles(text: str, size: int, expected: list[str]) -> None:
    assert shingles(text, size) == expected


@given(st.text(), st.integers(1, 5))
def test_shingles_are_never_none(text: str, size: int) -> None:
    assert len(shingles(text, size)) >= 1


# --- signatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [3, 12, 60, 400, 3000])
@pytest.mark.parametrize("edits", [1, 0.1, 0.4, 1.0])
def test_signatures_estimate_the_similarity_of_sets(words: int, edits: float) -> None:
    rng = Random(words)
    first = [f"w{rng.randrange(1000)}" for _ in range(words)]
    second = list(first)
    for place in rng.sample(range(words), 1 if edits == 1 else round(edits * words)):
        second[place] = f"new{place}"
    sets = [set(pairwise(text)) for text in (first, second)]
    exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    one, other = signatures([" ".join(first), " ".join(second)], NearDuplicates(shingle_size=2, permutations=1024))
    sigma = (exact * (1 - exact) / 1024) ** 0.5
    assert abs(similarity(one, other) - exact) <= 4 * sigma


def test_signatures_have_no_bias() -> None:
    pairs = [
        [f"{pair}x{word}" for word in (*range(80), *range(side, side + 40))]
        for pair in range(300)
        for side in (90, 200)
    ]
    rows = signatures([" ".join(words) for words in pairs], NearDuplicates(shingle_size=1))
    estimates = similarity(rows[0::2], rows[1::2])
    exact = 80 / 160
    assert abs(estimates.mean() - exact) <= 4 * (exact * (1 - exact) / 128 / 300) ** 0.5


def test_golden_signatures() -> None:
    assert {setting: golden(*setting) for setting in GOLDEN_SIGNATURES} == GOLDEN_SIGNATURES


def test_signatures_do_not_depend_on_the_processor() -> None:
    script = REPOSITORY / "tests" / "make_golden_signatures.py"
    environment = ENVIRONMENT | {"RENSA_FORCE_KERNEL": "scalar"}  # instead of the best that the processor has
    printed = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert ast.literal_eval(printed.stdout.removeprefix("GOLDEN_SIGNATURES = ")) == GOLDEN_SIGNATURES


def test_a_signature_depends_on_its_text_alone() -> None:
    texts = list(TEXTS.values())
    together = signatures(texts, NearDuplicates())
    assert together.dtype == np.uint32
    assert together.shape == (len(texts), 128)
    for text, row in zip(texts, together, strict=True):
        assert (signatures([text], NearDuplicates()) == row).all()
    assert signatures([], NearDuplicates()).shape == (0, 128)


def test_huge_texts_are_signed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = signatures([TEXTS["long"]], NearDuplicates())
    for size in (10**6, 1000, 77):
        monkeypatch.setattr(near_duplicates, "_HASHES_AT_ONCE", size)
        assert (signatures([TEXTS["long"]], NearDuplicates()) == expected).all()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux shows a process's threads, and forks")
def test_a_process_forked_after_signing_can_sign() -> None:
    code = """
import multiprocessing, os
from litgpt_memsinks.corpus.mixture import NearDuplicates
from litgpt_memsinks.document_ids.near_duplicates import signatures
texts = [" ".join(map(str, range(n, n + size))) for n, size in enumerate([100] * 400 + [150000])]
def work(_):
    return int(signatures(texts, NearDuplicates()).sum(dtype="u8"))
threads = len(os.listdir("/proc/self/task"))
here = work(0)
assert len(os.listdir("/proc/self/task")) == threads
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map_async(work, [0]).get(60) == [here])
"""
    output = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "True"


def test_another_version_of_rensa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    near_duplicates._minhash.cache_clear()
    monkeypatch.setattr(near_duplicates, "ALGORITHM", 3)
    with pytest.raises(MemSinksError, match="signatures of version 2, but 3 is needed"):
        signatures(["text"], NearDuplicates())


# --- bands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("permutations", [16, 100, 128, 256])
def test_bands_are_the_best(threshold: float, permutations: int) -> None:
    def cost(rows: int) -> float:  # Simpson's rule, where bands() takes midpoints
        def simpson(low: float, high: float, wanted: bool) -> float:
            s = np.linspace(low, high, 2001)
            shared = 1 - (1 - s**rows) ** (permutations // rows)
            y = 1 - shared if wanted else shared
            return float((y[0] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum() + y[-1]) * (high - low) / 6000)

        return 0.9 * simpson(threshold, 1, True) + 0.1 * simpson(0, threshold, False)

    n_bands, rows = bands(threshold, permutations)
    assert n_bands == permutations // rows
    assert cost(rows) <= min(map(cost, range(1, permutations + 1))) + 1e-6


def test_bands_of_equal_documents() -> None:
    assert bands(1.0, 128) == (1, 128)


# --- clusters -----------------------------------------------------------------------------------------------------


def chains(seed: int) -> list[str]:
    """Documents, and copies of copies of them, each with a few words changed."""
    rng = Random(seed)
    texts = []
    for document in range(40):
        words = [f"{document}x{rng.randrange(500)}" for _ in range(rng.randrange(5, 120))]
        for _ in range(rng.choice([1, 1, 2, 5, 15])):
            texts.append(" ".join(words))
            for place in rng.sample(range(len(words)), len(words) // 10):
                words[place] = f"new{rng.randrange(10**9)}"
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_all_pairs(tmp_path: Path, seed: int) -> None:
    rows = signatures(chains(seed), LOOSE)
    expected = brute_force(rows, LOOSE.threshold)
    assert 30 < len(np.unique(expected)) < 100  # neither none nor all are joined
    assert clusters(tmp_path, rows, LOOSE).tolist() == expected.tolist()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(3))
def test_clusters_across_blocks_partitions_and_files(tmp_path: Path, seed: int) -> None:
    rows = signatures(chains(seed), LOOSE)
    cuts = [0, 1, 1, 30, len(rows) // 2, len(rows)]  # some files are empty
    assert clusters(tmp_path, rows, LOOSE, cuts).tolist() == brute_force(rows, LOOSE.threshold).tolist()


@settings(deadline=None, max_examples=60)
@given(
    rows=st_numpy.arrays(np.uint32, st.tuples(st.integers(0, 30), st.just(16)), elements=st.integers(0, 2)),
    threshold=st.sampled_from([0.3, 0.5, 0.75, 1.0]),
)
def test_only_near_duplicates_are_joined(tmp_path_factory, rows: np.ndarray, threshold: float) -> None:
    how = NearDuplicates(threshold=threshold, permutations=16)
    found = clusters(tmp_path_factory.mktemp("clusters"), rows, how)
    allowed = brute_force(rows, threshold)
    for first in np.unique(found):
        members = np.flatnonzero(found == first)
        assert members[0] == first
        assert len(np.unique(allowed[members])) == 1
    for first in range(len(rows)):  # equal signatures are always found
        same = (rows == rows[first]).all(axis=1)
        assert len(np.unique(found[same])) == 1


def crowded() -> np.ndarray:
    """600 signatures that all share four bands, as of one boilerplate, and are otherwise alone or some of 100 pairs."""
    rows = random_rows(500, 128, seed=1)
    rows = np.concatenate([rows, noisy(rows[:100], 0.15, seed=2)])
    rows[:, :20] = 7
    return rows


def test_pairs_in_crowded_buckets_are_found(tmp_path: Path) -> None:
    rows = crowded()
    found = clusters(tmp_path, rows, NearDuplicates(threshold=0.6))
    assert found.tolist() == [*range(500), *range(100)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threshold", [0.15, 0.3, 0.6])
def test_clusters_depend_on_the_set_of_signatures_alone(tmp_path: Path, threshold: float, monkeypatch) -> None:
    # at 0.15 the boilerplate alone makes about half of the pairs near-duplicates, far more than are compared
    how = NearDuplicates(threshold=threshold)
    rows = np.concatenate([crowded(), crowded()[::3]])
    names = np.arange(len(rows))
    expected = partition(clusters(tmp_path, rows, how), names)
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(rows))
        cuts = sorted(order[: 3 * seed].tolist())
        assert partition(clusters(tmp_path, rows[order], how, cuts), order) == expected
    monkeypatch.setattr(near_duplicates, "_PARTITION_BYTES", 1 << 20)
    monkeypatch.setattr(near_duplicates, "_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(near_duplicates, "_BANDS_AT_ONCE", 3)
    assert partition(clusters(tmp_path, rows, how), names) == expected


def pairs_of_one_band(pairs: int) -> np.ndarray:
    """Signatures of which all share the first of 25 bands of 5, and no other; two at a time are of similarity 0.8."""
    rows = np.repeat(random_rows(pairs, 128, seed=3), 2, axis=0)
    rows[:, 5::5] = random_rows(2 * pairs, 25, seed=4)
    rows[:, :5] = 7
    assert bands(0.6, 128) == (25, 5)
    return rows


@pytest.mark.parametrize("rows_at_once", [5, 1000])
def test_all_documents_of_a_bucket_are_compared(tmp_path: Path, rows_at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BLOCK_BYTES", rows_at_once * 4 * 128)
    rows = np.tile(pairs_of_one_band(9)[:17], (40, 1))  # equal documents do not count
    found = clusters(tmp_path, rows, NearDuplicates(threshold=0.6))
    assert found.tolist() == [number // 2 * 2 for number in range(17)] * 40


def test_who_is_compared_in_a_crowded_bucket_does_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = pairs_of_one_band(200)
    expected = partition(clusters(tmp_path, rows, NearDuplicates(threshold=0.6)), np.arange(400))
    assert 200 < len(expected) < 400  # some are missed: this is what cluster() documents
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(400)
        assert partition(clusters(tmp_path, rows[order], NearDuplicates(threshold=0.6)), order) == expected


def test_documents_that_are_not_wanted_are_alone(tmp_path: Path) -> None:
    rows = signatures(chains(0), LOOSE)
    wanted = np.random.default_rng(0).random(len(rows)) < 0.6
    numbers = np.flatnonzero(wanted)
    expected = np.arange(len(rows))
    expected[wanted] = numbers[np.searchsorted(numbers, numbers)][brute_force(rows[wanted], LOOSE.threshold)]
    assert clusters(tmp_path, rows, LOOSE, wanted=wanted).tolist() == expected.tolist()
    none = np.zeros(len(rows), dtype=np.bool_)
    assert clusters(tmp_path, rows, LOOSE, wanted=none).tolist() == list(range(len(rows)))


@pytest.mark.parametrize("cuts", [(), (0,), (0, 0)])
def test_no_documents(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    assert clusters(tmp_path, np.empty((0, 128), np.uint32), NearDuplicates(), cuts).tolist() == []
    assert np.fromfile(cluster([], NearDuplicates(), tmp_path), dtype="<i8").tolist() == []


def test_a_single_document(tmp_path: Path) -> None:
    assert clusters(tmp_path, random_rows(1, 128, 0), NearDuplicates()).tolist() == [0]


def test_equal_documents_take_seconds(tmp_path: Path) -> None:
    rows = np.repeat(random_rows(1, 128, 0), 200_000, axis=0)
    start = time.perf_counter()
    found = clusters(tmp_path, rows, NearDuplicates())
    assert time.perf_counter() - start < 30  # 0.3 s; all pairs would take hours
    assert not found.any()


def test_near_duplicates_that_all_share_a_bucket_take_seconds(tmp_path: Path) -> None:
    rows = noisy(np.repeat(random_rows(1, 128, 0), 50_000, axis=0), 0.05, seed=1)
    start = time.perf_counter()
    found = clusters(tmp_path, rows, NearDuplicates())
    assert time.perf_counter() - start < 60  # 2 s
    assert not found.any()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "parts", random_rows(3, 128, 0))
    message = "has 1536 bytes, but 4 signatures of 128 numbers take 2048"
    for files in ([SignatureFile(file.path, 4)], [file, SignatureFile(file.path, 4)]):
        with pytest.raises(MemSinksError, match=message):
            cluster(files, NearDuplicates(), tmp_path)
        with pytest.raises(MemSinksError, match=message):
            near_any(files, random_rows(1, 128, 0), NearDuplicates())
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_nothing_is_left_but_the_result(tmp_path: Path) -> None:
    stale = tmp_path / ".clusters.bin.999999999.incomplete"  # of a process that was killed
    stale.mkdir()
    (stale / "parent.bin").write_bytes(b"half")
    clusters(tmp_path, random_rows(100, 128, 0), NearDuplicates())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters.bin", "parts"]


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    code = """
import sys, tracemalloc
from pathlib import Path
import numpy as np
from litgpt_memsinks.document_ids import near_duplicates
from litgpt_memsinks.corpus.mixture import NearDuplicates
near_duplicates._BLOCK_BYTES = near_duplicates._PARTITION_BYTES = 1 << 18
work, n = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
with open(work / "signatures.bin", "wb") as file:
    for _ in range(n // 1000):  # equal, similar and different documents, and in one bucket of all for one band
        rows = rng.integers(0, 2**32, (1000, 32), dtype=np.uint32)
        rows[:, :6] = 7
        rows[100:200] = rows[:100]
        rows[200:300, 5:] = rows[:100, 5:]
        rows[300:400] = 1
        rows.tofile(file)
files = [near_duplicates.SignatureFile(work / "signatures.bin", n)]
tracemalloc.start()
path = near_duplicates.cluster(files, NearDuplicates(permutations=32), work)
print(tracemalloc.get_traced_memory()[1])
assert np.unique(np.fromfile(path, dtype="<i8")).size == n // 1000 * 700 + 1
"""
    peaks = []
    for n in (5_000, 50_000):
        (tmp_path / str(n)).mkdir()
        command = [sys.executable, "-c", code, tmp_path / str(n), str(n)]
        output = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
        peaks.append(int(output))
    assert peaks[1] <= 1.2 * peaks[0]


# --- validation ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
def test_near_any_finds_what_all_pairs_find(tmp_path: Path) -> None:
    texts = chains(7)
    rows = signatures(texts, LOOSE)
    rows, reference = rows[::2], np.concatenate([rows[1::2], rows[:3], rows[:3], random_rows(20, 128, 0)])
    expected = (similarity(reference[:, None], rows[None]) >= LOOSE.threshold).any(axis=1)
    assert 10 < expected.sum() < len(expected) - 20
    done: list[int] = []
    found = near_any(write(tmp_path, rows, [5, 5, 40]), reference, LOOSE, done.append)
    assert found.tolist() == expected.tolist()
    assert sum(done) == len(rows)


def test_near_any_of_selected_documents(tmp_path: Path, small_blocks: None) -> None:
    rows = random_rows(200, 128, 0)
    chosen = np.random.default_rng(0).random(200) < 0.5
    found = near_any(
        write(tmp_path, rows, [90]), rows, NearDuplicates(), selected=lambda start, stop: chosen[start:stop]
    )
    assert found.tolist() == chosen.tolist()


def test_near_any_of_edited_and_of_other_stories(tmp_path: Path) -> None:
    train, other = list(stories(300)), list(stories(60, split="validation"))
    rng = Random(0)
    copies = [near_duplicate_table.edited(text, 0.05, rng) for text in train[:50]]
    files = write(tmp_path, signatures(train, NearDuplicates()))
    found = near_any(files, signatures(copies + other, NearDuplicates()), NearDuplicates())
    assert found.tolist() == [True] * 50 + [False] * 60


def test_near_any_of_nothing(tmp_path: Path) -> None:
    rows, none = random_rows(3, 128, 0), np.empty((0, 128), np.uint32)
    assert near_any(write(tmp_path / "none", none), rows, NearDuplicates()).tolist() == [False] * 3
    assert near_any([], rows, NearDuplicates()).tolist() == [False] * 3
    assert near_any(write(tmp_path / "three", rows), none, NearDuplicates()).tolist() == []


def test_near_any_of_equal_documents_takes_seconds(tmp_path: Path) -> None:
    rows = np.repeat(random_rows(1, 128, 0), 100_000, axis=0)
    start = time.perf_counter()
    assert near_any(write(tmp_path, rows), rows[:5000], NearDuplicates()).all()
    assert time.perf_counter() - start < 30


# --- the table ----------------------------------------------------------------------------------------------------


def test_recall_table() -> None:
    texts = list(stories(150))
    none, some, all_ = near_duplicate_table.recall_table(texts, NearDuplicates(), shares=(0, 0.05, 1.0))
    assert none == (0, 1.0, 1.0)
    assert 0.6 < some.jaccard < 0.95
    assert some.found == 1
    assert all_.jaccard < 0.3
    assert all_.found == 0
    assert near_duplicate_table.merges(texts, NearDuplicates()) == (0, 1)
    assert near_duplicate_table.merges([texts[0], *texts, texts[1]], NearDuplicates()) == (4, 2)


def test_edits_are_as_many_as_named() -> None:
    text = " ".join(f"w{number}" for number in range(10_000))
    copy = near_duplicate_table.edited(text, 0.1, Random(0))
    kept = set(pairwise(text.split())) & set(pairwise(copy.split()))
    # neither word of a pair is replaced or deleted, and there is no new one behind the first
    assert len(kept) / 9999 == pytest.approx(0.9 * (1 - 0.1 * 2 / 3), abs=0.01)
    for unedited in (text, "Once upon a time.\n\n  The  end.\n"):  # with what lies between its words
        assert near_duplicate_table.edited(unedited, 0, Random(0)) == unedited
    assert near_duplicate_table.edited("a\n\nb\n\nc\n\nd", 0.25, Random(0)).count("\n\n") in (2, 3)  # or one deleted


def test_table_from_the_command_line(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"body": "a b c d e f g h"}\n\n{"body": "a b c d e f g h"}\n{"body": "other words"}\n', "utf-8")
    command = [sys.executable, "-m", "litgpt_memsinks.bench.near_duplicate_table", corpus, "--text-field", "body"]
    output = subprocess.run(
        [*command, "--shares", "0", "1"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    assert "2 different documents" in output
    assert "| 0% | 1.000 | 100.00% | 0.00% |" in output
