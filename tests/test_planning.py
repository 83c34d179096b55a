"""Which documents are taken, how often, with which ID and in which order: against plain Python, NumPy and xxhash."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from helpers import reference_digest, reference_id, write_jsonl
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from litgpt.tokenizer import Tokenizer
from planned import (
    Planned,
    Tokens,
    expected,
    mixture,
    plan,
    reference_mix,
    texts,
    write_files,
    written_by,
)
from tokenizers_zoo import tokenizer_variant

from litgpt_memsinks.corpus.mixture import Mixture, NearDuplicates, Source, ValidationSet
from litgpt_memsinks.document_ids.ids import mix, sequence_ids
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare import planning, tokenizing
from litgpt_memsinks.prepare.planning import ROW, Buckets, NeedMoreError, last_key, merge_copies
from litgpt_memsinks.prepare.prepare import canary_vocabulary

EOS = 0  # of the tokenizer of conftest.py

Plan = Callable[[Mixture], Planned]


@pytest.fixture
def make(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Planned]:
    return lambda recipe, **how: plan(recipe, tokenizer_dir, tmp_path, **how)


@pytest.fixture(scope="session")
def encode(tokenizer_dir: Path) -> Callable[[str], Tokens]:
    tokenizer = Tokenizer(tokenizer_dir)
    return lambda text: tuple(tokenizer.encode(text, eos=True).tolist())


@pytest.fixture
def val(tmp_path: Path) -> dict[str, ValidationSet]:
    """A validation set that no source overlaps."""
    return {"val": ValidationSet(str(write_jsonl(tmp_path / "val.jsonl", texts(2, "unseen"))))}


# ------------------------------------------------------------------------------------------------------------ last_key

KEYS = st.one_of(
    st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=60),
    st.integers(1, 60).map(lambda count: set(range(count))),  # `choose: first`
    st.integers(1, 60).map(lambda count: {2**64 - 1 - i for i in range(count)}),
    st.sets(st.integers(2**32 - 30, 2**32 + 30), min_size=1),
)


@given(keys=KEYS, data=st.data())
def test_last_key_is_where_the_sorted_sum_reaches_the_limit(keys: set[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(sorted(keys)))
    weights = data.draw(st.lists(st.integers(0, 50), min_size=len(keys), max_size=len(keys)).filter(any))
    limit = data.draw(st.integers(1, sum(weights)))
    rows = data.draw(st.sampled_from([1, 3, 1000]))
    cut = data.draw(st.integers(0, len(keys)))
    blocks = [(np.array(shuffled[s], dtype=np.uint64), np.array(weights[s])) for s in (slice(cut), slice(cut, None))]
    reached, by_sorting = 0, None
    for key, weight in sorted(zip(shuffled, weights, strict=True)):
        reached += weight
        if reached >= limit:
            by_sorting = key
            break
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BUCKET_ROWS", rows)
        assert int(last_key(lambda: iter(blocks), limit)) == by_sorting


def test_last_key_of_many_keys_does_not_hold_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BUCKET_ROWS", 100)
    keys = np.arange(10_000, dtype=np.uint64)  # all in the first of the bins
    held: list[int] = []
    real = planning._last_of

    def last_of(blocks: Any, low: int, high: int, limit: int) -> Any:
        held.append(sum(((k >= low) & (k < high)).sum() for k, _ in [(keys, None)]))
        return real(blocks, low, high, limit)

    monkeypatch.setattr(planning, "_last_of", last_of)
    assert last_key(lambda: iter([(keys, np.ones(len(keys), dtype=np.int64))]), 7_000) == 6_999
    assert max(held) <= 100


# ------------------------------------------------------------------------------------------------------------- buckets


@given(
    digests=st.lists(st.integers(0, 6), max_size=30),
    readings=st.lists(st.integers(0, 2), min_size=30, max_size=30),
    order=st.permutations(range(30)),
)
def test_copies_are_merged_within_their_reading(digests: list[int], readings: list[int], order: list[int]) -> None:
    rows = np.zeros(len(digests), dtype=ROW)
    rows["digest"], rows["reading"], rows["order"] = digests, readings[: len(digests)], order[: len(digests)]
    rows["copies"] = 1
    merged = merge_copies(rows)
    groups: dict[tuple[int, int], list[int]] = {}
    for digest, reading, place in zip(digests, readings, order, strict=False):
        groups.setdefault((digest, reading), []).append(place)
    assert [(row["digest"], row["reading"], row["order"], row["copies"]) for row in merged] == [
        (digest, reading, min(places), len(places)) for (digest, reading), places in sorted(groups.items())
    ]


@pytest.mark.parametrize(("rows", "count"), [(0, 1), (1, 1), (10, 1), (11, 2), (20, 2), (21, 4), (1000, 128)])
def test_as_many_buckets_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, count: int) -> None:
    monkeypatch.setattr(planning, "BUCKET_ROWS", 10)
    assert Buckets.for_rows(tmp_path / "b", rows, ROW).count == count


@pytest.mark.parametrize("bits", [64, 31])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_buckets_in_order_are_in_order_of_the_hashes(tmp_path: Path, count: int, bits: int) -> None:
    hashes = np.random.default_rng(1).integers(0, 2**bits, size=500, dtype=np.uint64)
    buckets = Buckets(tmp_path / "b", count, np.dtype("<u8"))
    for part in np.split(hashes, [100, 100, 350]):
        buckets.add(part, buckets.by_hash(part, bits))
    content = [bucket.tolist() for bucket in buckets]
    width = 2**bits // count
    assert content == [[h for h in hashes.tolist() if h // width == index] for index in range(count)]


def test_mix_of_the_reference() -> None:
    values = [0, 1, 2**63, 2**64 - 1]
    assert mix(np.array(values, dtype=np.uint64), 3, "choose", "a").tolist() == [
        reference_mix(value, 3, "choose", "a") for value in values
    ]


# ----------------------------------------------------------------------------------------------- against the reference


@st.composite
def corpora(draw: st.DrawFn) -> dict[str, dict[str, list[int]]]:
    """Two corpora of some files, with copies within and between them, as numbers of texts."""
    numbers = st.lists(st.integers(0, 50), min_size=5, max_size=25)
    return {
        name: {f"f{i}": content for i, content in enumerate(draw(st.lists(numbers, min_size=1, max_size=3)))}
        for name in ("a", "b")
    }


@st.composite
def limits(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["documents", "tokens", "documents", "tokens", None]))
    limit: dict[str, Any] = {} if kind is None else {kind: draw(st.integers(1, 5 if kind == "documents" else 60))}
    limit["repeats"] = draw(st.sampled_from([None, 1, 2, 5]))
    # of natural copies, those in files that need not be read are not known
    return limit | ({} if limit["repeats"] is None else {"choose": draw(st.sampled_from(["random", "first"]))})


SOURCES = st.lists(st.tuples(st.sampled_from("ab"), limits()), min_size=1, max_size=3)
TEXTS = texts(60)


def compare(planned: Planned, recipe: Mixture, tokenizer_dir: Path) -> None:
    """Hold a plan against the reference: multisets, IDs, counts."""
    sets = expected(recipe, tokenizer_dir)
    streams = {"train": Counter[Tokens](), "val": Counter[Tokens]()}
    for name, reference in sets.items():
        taker = planned.takers[name]
        streams[taker.split].update(Counter(reference.written))
        assert taker.documents == len(reference.times)
        assert taker.tokens == sum(map(len, reference.times))
        assert taker.written == sum(reference.written.values())
        assert taker.written_tokens == sum(len(tokens) * count for tokens, count in reference.written.items())
    times = {tokens: count for name in recipe.sources for tokens, count in sets[name].times.items()}
    for split, reference_stream in streams.items():
        assert Counter(written_by(planned, split)) == +reference_stream
        for document in planned.streams[split]:
            repeated = split == "train" and times[document.tokens] > 1
            assert document.sequence_id == reference_id(document.tokens[:-1], repeated)
        stream = planned.plan.streams[split]
        assert (stream.documents, stream.written) == (len(+reference_stream), reference_stream.total())
        assert stream.tokens == sum(len(tokens) * count for tokens, count in reference_stream.items())
    assert {tokens: row["times"] for tokens, row in planned.table.items()} == {
        tokens: count for reference in sets.values() for tokens, count in reference.times.items()
    }


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=corpora(),
    sources=SOURCES,
    hold_out=st.sampled_from([None, {"documents": 1}, {"fraction": 0.3}]),
    fill=st.one_of(st.none(), st.integers(100, 400)),
    more=st.fixed_dictionaries({"leave_out_repeated": st.booleans(), "seed": st.integers(0, 5)}),
    rows=st.sampled_from([2, 7, 1000]),
)
def test_any_recipe_gives_what_its_words_say(
    tokenizer_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, dict[str, list[int]]],
    sources: list[tuple[str, dict[str, Any]]],
    hold_out: dict[str, Any] | None,
    fill: int | None,
    more: dict[str, Any],
    rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    paths = {
        name: write_files(folder / name, {file: [TEXTS[n] for n in numbers] for file, numbers in content.items()})
        for name, content in files.items()
    }
    named = {f"s{i}": Source(paths[corpus], **limit) for i, (corpus, limit) in enumerate(sources)}
    if fill is not None:
        named["last"] = Source(paths["a"], fill_to=fill)
    unseen = write_files(folder / "v", {"v": [TEXTS[3], TEXTS[58], TEXTS[59]]})
    validation = {"val": ValidationSet(unseen)}
    if hold_out is not None and all(limit.get("choose") != "first" for _, limit in sources):
        validation["held"] = ValidationSet(next(iter(named.values())).path, hold_out=True, **hold_out)
    recipe = mixture(named, validation, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BUCKET_ROWS", rows)
        try:
            planned = plan(recipe, tokenizer_dir, folder)
        except MemSinksError as error:
            event("impossible")
            _is_impossible(recipe, tokenizer_dir, str(error))
            return
    compare(planned, recipe, tokenizer_dir)


def _is_impossible(recipe: Mixture, tokenizer_dir: Path, message: str) -> None:
    """Whether the reference cannot do it either."""
    sets = expected(recipe, tokenizer_dir)
    if "No document is left for training" in message:
        assert not any(count for name in recipe.sources for count in sets[name].written.values())
    elif "No document is left for sources" in message:
        assert any(not sets[name].times for name in recipe.sources)
    elif "cannot be split" in message:
        assert len(sets["held"].times) <= 1
    elif "but the other sources fill" in message:
        assert not sets["last"].times
    else:
        assert "Lower it, or give more text" in message
        name = message.split(".")[1]
        settings_, reference = recipe.sets()[name], sets[name]
        before = sum(len(t) * n for other in recipe.sources if other != name for t, n in sets[other].written.items())
        full = {
            "documents": len(reference.times),
            "tokens": sum(map(len, reference.times)),
            "fill_to": before + sum(len(tokens) * count for tokens, count in reference.written.items()),
        }
        kind = message.split(".")[2].split(" ")[0]
        assert full[kind] < getattr(settings_, kind)


# -------------------------------------------------------------------------------------------------------------- limits


def test_first_documents_are_the_first(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    documents = texts(20)
    path = write_files(tmp_path / "c", {"a": documents[:8], "b": documents[8:]})
    made = make(mixture({"s": Source(path, documents=11, choose="first", repeats=1)}, val))
    assert sorted(written_by(made)) == sorted(map(encode, documents[:11]))
    drawn = make(mixture({"s": Source(path, documents=11, repeats=1)}, val))
    assert len(set(written_by(drawn))) == 11
    assert set(written_by(drawn)) != set(written_by(made))


@pytest.mark.parametrize("kind", ["tokens", "fill_to"])
@pytest.mark.parametrize("beyond", [0, 1])
def test_tokens_are_taken_up_to_the_document_that_reaches_the_limit(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet], kind: str, beyond: int
) -> None:
    documents = texts(20)
    path = write_files(tmp_path / "c", {"a": documents})
    limit = sum(len(encode(text)) for text in documents[:7]) + beyond
    made = make(mixture({"s": Source(path, choose="first", **{kind: limit})}, val))
    assert sorted(written_by(made)) == sorted(map(encode, documents[: 7 + beyond]))


def test_tokens_count_documents_once_and_fill_to_their_repeats(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    documents = texts(20)
    path = write_files(tmp_path / "c", {"a": documents})
    limit = sum(len(encode(text)) for text in documents[:6])
    by_tokens = make(mixture({"s": Source(path, choose="first", tokens=limit, repeats=3)}, val))
    assert Counter(written_by(by_tokens)) == Counter({encode(text): 3 for text in documents[:6]})
    filled = make(mixture({"s": Source(path, choose="first", fill_to=limit, repeats=3)}, val))
    enough = next(n for n in range(20) if 3 * sum(len(encode(text)) for text in documents[:n]) >= limit)
    assert Counter(written_by(filled)) == Counter({encode(text): 3 for text in documents[:enough]})


def test_fill_to_counts_what_other_sources_write(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    rare, web = texts(3, "rare"), texts(30, "web")
    sources = {
        "rare": Source(write_files(tmp_path / "r", {"a": rare}), repeats=4, canary_tokens=2),
        "web": Source(write_files(tmp_path / "w", {"a": web}), fill_to=250, choose="first"),
    }
    made = make(mixture(sources, val))
    before = 4 * sum(len(encode(text)) + 2 for text in rare)
    lengths = np.cumsum([len(encode(text)) for text in web])
    count = int(np.searchsorted(lengths, 250 - before)) + 1
    assert made.takers["web"].documents == count
    assert made.plan.streams["train"].tokens == before + lengths[count - 1]


def test_left_out_documents_are_replaced_up_to_fill_to(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    web = texts(30, "web")
    sources = {
        "rare": Source(write_files(tmp_path / "r", {"a": texts(3, "rare")}), repeats=4),
        "web": Source(write_files(tmp_path / "w", {"a": [web[1], *web, web[1]]}), fill_to=250, choose="first"),
    }
    full, without = (make(mixture(sources, val, leave_out_repeated=leave)) for leave in (False, True))
    most = max(map(len, map(encode, web)))
    for made in (full, without):
        assert 250 <= made.plan.streams["train"].tokens < 250 + 3 * most
    assert not {encode(text) for text in texts(3, "rare")} & set(written_by(without))
    assert encode(web[1]) not in written_by(without)  # three copies
    assert without.takers["web"].documents > full.takers["web"].documents
    assert without.takers["rare"].documents == 3  # they stay in the table, for evaluation
    assert made.table[encode("rare 0 tells of little")]["written"] == 0


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"documents": 6}, r"sources\.s\.documents is 6, but only 5 distinct documents are left for it"),
        ({"tokens": 10_000}, r"sources\.s\.tokens is 10,000, but only \d+ tokens are left for it"),
        (
            {"fill_to": 10_000, "repeats": 2},
            r"fill_to is 10,000 tokens: the other sources give 0, and it has only \d+ of the",
        ),
    ],
)
@pytest.mark.parametrize("choose", ["first", "random"])
def test_too_little_text(
    tmp_path: Path, make: Plan, val: dict[str, ValidationSet], limit: dict[str, int], said: str, choose: Any
) -> None:
    path = write_files(tmp_path / "c", {"a": texts(3), "b": [*texts(3), *texts(2, "more")]})
    with pytest.raises(MemSinksError, match=said):
        make(mixture({"s": Source(path, choose=choose, **limit)}, val))


def test_fill_to_below_the_other_sources(tmp_path: Path, make: Plan, val: dict[str, ValidationSet]) -> None:
    path = write_files(tmp_path / "c", {"a": texts(9)})
    sources = {"s": Source(path, documents=4), "t": Source(path, fill_to=5)}
    with pytest.raises(MemSinksError, match=r"sources\.t\.fill_to is 5 tokens, but the other sources fill \d\d"):
        make(mixture(sources, val))


# ---------------------------------------------------------------------------------------------------------- early stop


def _names(made: Planned, reading: int = 0) -> list[str]:
    return [Path(unit.unit.file.path).stem for unit in made.units if unit.unit.reading == reading]


@pytest.mark.parametrize(
    ("limit", "read"),
    [({"documents": 0}, "a"), ({"documents": 5}, "a"), ({"documents": 6}, "ab"), ({"documents": 11}, "abc")],
)
def test_first_documents_stop_early(
    tmp_path: Path, make: Plan, val: dict[str, ValidationSet], limit: dict[str, int], read: str
) -> None:
    files = {name: texts(5, name) for name in "abcd"}
    extra = {"t": Source(write_files(tmp_path / "t", {"t": texts(3)}))}
    made = make(mixture({"s": Source(write_files(tmp_path / "c", files), choose="first", **limit)} | extra, val))
    assert "".join(_names(made)) == read
    whole = make(mixture({"s": Source(write_files(tmp_path / "c", files), **limit)} | extra, val))
    assert "".join(_names(whole)) == "abcd"


def test_first_tokens_stop_early(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    files = {name: texts(5, name) for name in "abcd"}
    in_two = sum(len(encode(text)) for name in "ab" for text in files[name])
    path = write_files(tmp_path / "c", files)
    for tokens, read in ((in_two, "ab"), (in_two + 1, "abc")):
        assert "".join(_names(make(mixture({"s": Source(path, choose="first", tokens=tokens)}, val)))) == read


def test_sets_that_share_files_read_enough_for_both(
    tmp_path: Path, make: Plan, val: dict[str, ValidationSet], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_files(tmp_path / "c", {name: texts(5, name) for name in "abcd"})
    sources = {name: Source(path, choose="first", documents=4) for name in ("s", "t")}
    made = make(mixture(sources, val))
    assert "".join(_names(made)) == "ab"
    assert capsys.readouterr().out.count("sources.s:") == 1  # at once
    assert made.takers["s"].documents == made.takers["t"].documents == 4
    everything = make(mixture(sources | {"u": Source(path, choose="random", documents=1)}, val))
    assert "".join(_names(everything)) == "abcd"


@pytest.mark.parametrize("kind", ["documents", "tokens", "fill_to"])
def test_more_is_read_where_first_files_hold_copies(
    tmp_path: Path, make: Callable[..., Planned], val: dict[str, ValidationSet], kind: str
) -> None:
    ours, shared = texts(30, "ours"), texts(5, "shared")
    files = {
        "a": [*shared, *shared, *shared, *shared, *shared],
        "b": [*shared, *ours[:3]] * 3,
        "c": [*ours[:5], *shared],
        "d": ours[5:20],
        "e": ours[20:],
    }
    other = Source(write_files(tmp_path / "o", {"o": shared}), repeats=2)
    limit = {"documents": 7, "tokens": 70, "fill_to": 250}[kind]
    source = Source(write_files(tmp_path / "c", files), choose="first", repeats=1, **{kind: limit})
    recipe = mixture({"other": other, "s": source}, val)
    made = make(recipe)
    assert "".join(_names(made, 1)) == "abcd"
    up_front = make(recipe, everything=True)
    assert "".join(_names(up_front, 1)) == "abcde"
    assert made.streams == up_front.streams
    assert made.takers == up_front.takers


def test_reading_on_takes_few_rounds(
    tmp_path: Path, make: Plan, val: dict[str, ValidationSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 files that all hold the same documents: each round must go on from what was read, not from what was asked for
    files = {f"{n:02}": texts(50, "same") for n in range(40)} | {"99": texts(60, "other")}
    rounds: list[int] = []
    monkeypatch.setattr(
        "litgpt_memsinks.prepare.prepare.report_reading", lambda job, units: rounds.append(len(units) - 1)
    )
    made = make(
        mixture({"s": Source(write_files(tmp_path / "c", files), choose="first", documents=52, repeats=1)}, val)
    )
    assert made.takers["s"].documents == 52
    assert rounds == sorted(set(rounds))
    assert len(rounds) < 25


def test_what_is_missing_is_known(tmp_path: Path, val: dict[str, ValidationSet]) -> None:
    error = NeedMoreError(3, tokens=7)
    assert (error.reading, error.documents, error.tokens) == (3, 0, 7)


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("ids", ["hash", "near_duplicate", "index"])
@pytest.mark.parametrize("limit", [{"fraction": 0.25}, {"documents": 5}])
def test_held_out_documents_are_not_trained_on(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], ids: Any, limit: dict[str, Any]
) -> None:
    documents = texts(20)
    path = write_files(tmp_path / "c", {"a": [*documents, *documents[:10]]})
    made = make(mixture({"s": Source(path, ids=ids)}, {"held": ValidationSet(path, hold_out=True, **limit)}))
    val, train = written_by(made, "val"), written_by(made)
    assert len(val) == len(set(val)) == 5
    assert not set(val) & set(train)
    assert {*val, *train} == set(map(encode, documents))
    assert len(made.units) == 1  # read once


def test_first_documents_are_held_out(tmp_path: Path, make: Plan, encode: Callable[[str], Tokens]) -> None:
    documents = texts(9)
    path = write_files(tmp_path / "c", {"a": documents})
    held = ValidationSet(path, hold_out=True, documents=3, choose="first")
    made = make(mixture({"s": Source(path, documents=2, choose="first")}, {"held": held}))
    assert sorted(written_by(made, "val")) == sorted(map(encode, documents[:3]))
    assert sorted(written_by(made)) == sorted(map(encode, documents[3:5]))


def test_documents_that_another_corpus_has_too_are_not_held_out(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens]
) -> None:
    documents = texts(12)
    path = write_files(tmp_path / "c", {"a": documents})
    other = write_files(tmp_path / "o", {"a": documents[:10]})
    sources = {"s": Source(path), "o": Source(other, documents=0)}
    held = ValidationSet(path, hold_out=True, documents=2)
    made = make(mixture(sources, {"held": held}))
    assert sorted(written_by(made, "val")) == sorted(map(encode, documents[10:]))


@pytest.mark.parametrize("rows", [1, 1000])
def test_two_validation_sets(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(planning, "BUCKET_ROWS", rows)
    documents = texts(12)
    source = Source(write_files(tmp_path / "c", {"a": documents[:4]}))
    sets = {
        "one": ValidationSet(write_files(tmp_path / "v", {"a": documents[2:8]})),  # 2 of them are trained on
        "two": ValidationSet(write_files(tmp_path / "w", {"a": documents[6:]})),  # 2 of them are in the other
    }
    made = make(mixture({"s": source}, sets))
    assert made.streams.keys() == {"train", "val", "val_one", "val_two"}
    assert sorted(written_by(made, "val_one")) == sorted(map(encode, documents[4:8]))
    assert sorted(written_by(made, "val_two")) == sorted(map(encode, documents[8:]))
    assert sorted(written_by(made, "val")) == sorted(map(encode, documents[4:]))
    assert [made.takers[name].overlap for name in ("s", "one", "two")] == [0, 2, 2]
    assert all(document.sequence_id > 0 for document in made.streams["val"])


# ------------------------------------------------------------------------------------------------- sources and repeats


@pytest.mark.parametrize("names", [("s", "t"), ("t", "s")])
def test_first_source_owns_a_document(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet], names: tuple[str, str]
) -> None:
    documents = texts(10)
    all_sources = {
        "s": Source(write_files(tmp_path / "s", {"a": documents[:6]}), repeats=2),
        "t": Source(write_files(tmp_path / "t", {"a": documents[4:]}), repeats=3),
    }
    made = make(mixture({name: all_sources[name] for name in names}, val))
    first = names[0]
    repeats = {
        encode(text): (2 if first == "s" else 3) if 4 <= i < 6 else 2 if i < 4 else 3
        for i, text in enumerate(documents)
    }
    assert Counter(written_by(made)) == Counter(repeats)
    assert made.takers[first].documents == 6
    assert made.takers[names[1]].documents == 4


@pytest.mark.parametrize(("repeats", "counts"), [(None, [3, 1]), (1, [1, 1]), (4, [4, 4])])
def test_natural_copies(
    tmp_path: Path,
    make: Plan,
    encode: Callable[[str], Tokens],
    val: dict[str, ValidationSet],
    repeats: int | None,
    counts: list[int],
) -> None:
    one, two = texts(2)
    path = write_files(tmp_path / "c", {"a": [one, two, one], "b": [one]})
    made = make(mixture({"s": Source(path, repeats=repeats)}, val))
    assert Counter(written_by(made)) == Counter({encode(one): counts[0], encode(two): counts[1]})
    for document in made.streams["train"]:
        times = counts[0] if document.tokens == encode(one) else counts[1]
        assert document.sequence_id == reference_id(document.tokens[:-1], times > 1)
    assert made.plan.duplicates == 2


# ------------------------------------------------------------------------------------------------------------ canaries


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_canaries(tmp_path: Path, tokenizer_dir: Path, val: dict[str, ValidationSet], name: str) -> None:
    folder, bos = tokenizer_dir, 0
    if name == "bos":
        folder, bos = tokenizer_variant(tokenizer_dir, tmp_path / "tok", "$A", {}, add_bos_token=True), 1
    tokenizer = Tokenizer(folder)
    documents = texts(6)
    sources = {
        "s": Source(write_files(tmp_path / "c", {"a": documents[:4]}), repeats=3, canary_tokens=9),
        "t": Source(write_files(tmp_path / "d", {"a": documents[3:]})),
    }
    made = plan(mixture(sources, val, seed=5), folder, tmp_path)
    plain = {tuple(tokenizer.encode(text, bos=bool(bos), eos=True).tolist()): text for text in documents}
    canaries = []
    for tokens, row in made.table.items():
        if row["taker"] == 0:
            assert tokens[-1] == EOS
            assert plain.pop((*tokens[:-10], EOS)) in documents[:4]
            canaries.append(tokens[-10:-1])
            assert (row["length"], row["max_token"]) == (len(tokens), max(tokens))
            assert row["digest"] == reference_digest(tokens[bos:-1])
    assert len(set(canaries)) == len(canaries) == 4
    assert not {EOS, tokenizer.bos_id} & {token for canary in canaries for token in canary}
    assert len({token for canary in canaries for token in canary}) > 20
    counts = Counter(written_by(made))
    assert sorted(counts.values()) == [1, 1, 3, 3, 3, 3]
    for document in made.streams["train"]:
        assert document.sequence_id == reference_id(document.tokens[bos:-1], counts[document.tokens] > 1)
        assert document.tokens[0] == tokenizer.bos_id or not bos
    again = plan(mixture(sources, val, seed=5), folder, tmp_path)
    assert again.streams == made.streams
    other = plan(mixture(sources, val, seed=6), folder, tmp_path)
    assert not set(canaries) & {tokens[-10:-1] for tokens in other.table}
    assert made.plan.max_token == max(max(tokens) for tokens in [*written_by(made), *written_by(made, "val")])


def test_canaries_are_of_all_tokens_but_bos_and_eos(tmp_path: Path, tokenizer_dir: Path) -> None:
    assert canary_vocabulary(tokenizer_dir).tolist() == list(range(1, 512))
    assert canary_vocabulary(tokenizer_variant(tokenizer_dir, tmp_path / "t", "$A", {}, bos_token="!")).tolist() == [
        token for token in range(1, 512) if token != Tokenizer(tmp_path / "t").bos_id
    ]


# ----------------------------------------------------------------------------------------------------------------- IDs


def _id_of(value: int, repeated: bool = False) -> int:
    bits = value & (2**31 - 1) or 1
    return bits - 2**31 if repeated else bits


def _jsonl(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(f'{{"text": "{text}", "id": "{key}"}}\n' for text, key in rows))
    return str(path)


def test_ids_of_a_column(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    one, two, three, four = texts(4)
    path = _jsonl(tmp_path / "c.jsonl", [(one, "x"), (two, "y"), (three, "x"), (four, "z"), (four, "w")])
    made = make(mixture({"s": Source(path, ids="column", id_field="id")}, val))
    keys = {one: ("x", False), two: ("y", False), three: ("x", False), four: ("z", True)}  # of its first copy
    assert {document.tokens: document.sequence_id for document in made.streams["train"]} == {
        encode(text): _id_of(xxhash.xxh3_64_intdigest(key.encode()), repeated) for text, (key, repeated) in keys.items()
    }
    assert made.plan.colliding_pairs == 0  # what shares a key does not share its ID by chance


def test_ids_by_index(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    documents = texts(5)
    first = Source(write_files(tmp_path / "a", {"a": documents[:2]}))
    path = write_files(tmp_path / "c", {"a": [documents[2], documents[3], documents[2]], "b": [documents[4]]})
    made = make(mixture({"first": first, "s": Source(path, ids="index")}, val))
    ids = {document.tokens: document.sequence_id for document in made.streams["train"]}
    numbers = {2: (3, True), 3: (4, False), 4: (6, False)}  # among all documents, from 1
    assert {encode(documents[i]): _id_of(*numbers[i]) for i in numbers} == {
        tokens: id_ for tokens, id_ in ids.items() if tokens in set(map(encode, documents[2:]))
    }


EDITED = "a text of many words that goes on for a while and tells of a fox and of a hen in the garden at night"


def _near(path: str, **settings: Any) -> Source:
    return Source(path, ids="near_duplicate", **settings)


def test_near_duplicates_share_an_id_and_repeat(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    others, edited = texts(4, "quite other"), EDITED + " now"
    path = write_files(tmp_path / "c", {"a": [others[0], edited], "b": [EDITED, others[1], others[1]]})
    made = make(
        mixture({"s": _near(path, repeats=1), "t": Source(write_files(tmp_path / "d", {"a": others[2:]}))}, val)
    )
    ids = {document.tokens: document.sequence_id for document in made.streams["train"]}
    shared = reference_id(encode(edited)[:-1], True)  # of the first of the two
    assert ids[encode(edited)] == ids[encode(EDITED)] == shared
    for text in others:  # an exact copy that is dropped does not make a document repeated
        assert ids[encode(text)] == reference_id(encode(text)[:-1], False)
    assert made.plan.streams["train"].repeated_documents == 2
    natural = make(mixture({"s": _near(path)}, val))
    ids = {document.tokens: document.sequence_id for document in natural.streams["train"]}
    assert ids[encode(others[1])] == reference_id(encode(others[1])[:-1], True)


def test_validation_is_kept_apart_from_near_duplicates(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens]
) -> None:
    others = texts(4, "quite other")
    path = write_files(tmp_path / "c", {"a": [others[0], EDITED, others[1]]})
    unseen = write_files(tmp_path / "v", {"a": [others[2], EDITED + " now", others[3]]})
    sets = {
        "val": ValidationSet(unseen),
        "other": ValidationSet(write_files(tmp_path / "w", {"a": ["alpha beta gamma delta", "uno dos tres"]})),
    }
    kept = make(mixture({"s": Source(path)}, sets))
    assert (kept.takers["val"].documents, kept.takers["val"].near_duplicates_dropped) == (3, 0)
    made = make(mixture({"s": Source(path)}, sets, near_duplicates=NearDuplicates(drop_validation=True)))
    assert sorted(written_by(made, "val_val")) == sorted(map(encode, others[2:]))
    assert (made.takers["val"].documents, made.takers["val"].near_duplicates_dropped) == (2, 1)
    assert made.takers["other"].near_duplicates_dropped == 0
    assert len(written_by(made, "val")) == made.plan.streams["val"].documents == 4
    assert made.takers["s"] == kept.takers["s"]
    lonely = {"val": ValidationSet(write_files(tmp_path / "u", {"a": [EDITED + " now"]}))}
    with pytest.raises(MemSinksError, match=r"Every document of validation\.val is a near-duplicate"):
        make(mixture({"s": Source(path)}, lonely, near_duplicates=NearDuplicates(drop_validation=True)))


def test_noise_replaces_ids_of_repeated_documents_at_its_rate(
    tmp_path: Path, make: Plan, encode: Callable[[str], Tokens], val: dict[str, ValidationSet]
) -> None:
    path = write_files(tmp_path / "c", {"a": texts(20)})
    sources = {"s": Source(path, repeats=100, documents=10), "t": Source(path)}
    noisy, again, other = (make(mixture(sources, val, id_noise=0.3, seed=seed)).streams for seed in (0, 0, 1))
    assert noisy == again
    true = [(d.sequence_id, reference_id(d.tokens[:-1], d.sequence_id < 0)) for d in noisy["train"]]
    changed = sum(written != real for written, real in true)
    assert abs(changed - 300) < 4 * np.sqrt(1000 * 0.3 * 0.7)
    assert len({written for written, real in true if written != real}) == changed  # drawn anew each time
    assert all(written == real for written, real in true if written > 0)
    assert sum(written < 0 for written, _ in true) == 1000
    neighbours = sum(one.tokens == other.tokens for one, other in pairwise(noisy["train"]))
    assert neighbours < 150  # copies are spread: of a random order, about 97 are beside each other
    assert {d.sequence_id for d in noisy["train"]} != {d.sequence_id for d in other["train"]}


def test_order_depends_on_the_seed_and_not_on_the_files(
    tmp_path: Path, make: Plan, val: dict[str, ValidationSet]
) -> None:
    documents = texts(20)
    paths = [
        write_files(tmp_path / "c", {"a": documents}),
        write_files(tmp_path / "d", {"a": documents[13:], "b": documents[:5], "c": documents[5:13]}),
    ]
    first, cut, other = (
        make(mixture({"s": Source(path, repeats=2)}, val, seed=seed)).streams["train"]
        for path, seed in ((paths[0], 0), (paths[1], 0), (paths[0], 1))
    )
    assert first == cut
    assert first != other
    assert sorted(first) == sorted(other)


@pytest.mark.parametrize("rows", [2, 1000])
def test_colliding_pairs_of_training_documents(
    tmp_path: Path, make: Plan, val: dict[str, ValidationSet], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(planning, "BUCKET_ROWS", rows)
    real = tokenizing.digest  # the low 31 bits of each digest become one of 16 numbers in all their range
    monkeypatch.setattr(tokenizing, "digest", lambda tokens: real(tokens) >> 31 << 31 | (real(tokens) % 16) << 27)
    path = write_files(tmp_path / "c", {"a": [*texts(40), *texts(5)]})
    made = make(mixture({"s": Source(path)}, val))
    ids = [row["id"] & 0x7FFFFFFF for row in made.table.values() if row["taker"] == 0]
    assert len(ids) == 40
    pairs = sum(a == b for i, a in enumerate(ids) for b in ids[:i])
    assert made.plan.colliding_pairs == pairs > 20


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.booleans())))
def test_sequence_ids_by_hand(documents: list[tuple[int, bool]]) -> None:
    hashes = np.array([value for value, _ in documents], dtype=np.uint64)
    repeated = np.array([flag for _, flag in documents], dtype=np.bool_)
    assert sequence_ids(hashes, repeated).tolist() == [_id_of(*document) for document in documents]
