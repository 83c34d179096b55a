"""Plans without the chunks, in this process: fast enough to try many recipes. And a reference of what they must be."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import xxhash
from helpers import Written, reference_digest, write_jsonl
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.corpus.mixture import Mixture, Reading, Source, ValidationSet
from litgpt_memsinks.prepare import prepare as prepare_module
from litgpt_memsinks.prepare.planning import ENTRY, Plan, Taker
from litgpt_memsinks.prepare.prepare import Job, first_wanted, make_or_read_more
from litgpt_memsinks.prepare.tokenizing import Done, Unit, UnitReader, find_unit

Tokens = tuple[int, ...]


class Planned(NamedTuple):
    """What a recipe comes to."""

    takers: dict[str, Taker]
    streams: dict[str, list[Written]]
    table: dict[Tokens, dict[str, Any]]
    """Rows of the document table by the document's tokens as written"""
    units: list[Done]
    plan: Plan


def written_by(planned: Planned, split: str = "train") -> list[Tokens]:
    return [document.tokens for document in planned.streams[split]]


def texts(count: int, word: str = "doc") -> list[str]:
    """Short texts, no two alike."""
    return [f"{word} {number} tells of {'very ' * (number % 4)}little" for number in range(count)]


def write_files(folder: Path, files: dict[str, Iterable[str]]) -> str:
    """Files of a corpus; returns the folder as a recipe names it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_jsonl(folder / f"{name}.jsonl", content)
    return str(folder)


def mixture(sources: dict[str, Source], validation: dict[str, ValidationSet], **settings: Any) -> Mixture:
    made = Mixture(sources, validation, **settings)
    made.check()
    return made


def read_serially(
    units: Sequence[Unit],
    reader: UnitReader,
    stores: Sequence[Path],
    num_workers: int,
    enough: Callable[[list[Done]], bool] = lambda done: False,
) -> list[Done]:
    """`read_units`, one file after the other."""
    done: list[Done] = []
    for unit in units:
        if find_unit(unit, stores) is None:
            reader(unit, lambda position, tokens: None, lambda: False)
        found = find_unit(unit, stores)
        assert found is not None
        done.append(found)
        if enough(done):
            break
    return done


def plan(recipe: Mixture, tokenizer_dir: Path, work: Path, everything: bool = False) -> Planned:
    """Read and plan as `prepare` does, or with ``everything`` read up front."""
    job = Job.of(recipe, tokenizer_dir)
    scratch = Path(tempfile.mkdtemp(dir=work))
    wanted: Any = (lambda job: [None] * len(job.readings)) if everything else first_wanted
    patches = {"read_units": read_serially, "first_wanted": wanted}
    with mock.patch.multiple(prepare_module, **patches):
        units, takers, made = make_or_read_more(job, scratch / "plan", [scratch / "units"], 1)
    streams = {name: list(occurrences(stream.entries, made.token_files)) for name, stream in made.streams.items()}
    table = {}
    for bucket in made.chosen:
        for row in bucket:
            tokens = _tokens(made.token_files[row["unit"]], int(row["offset"]), int(row["length"]))
            table[tokens] = {name: row[name].item() for name in row.dtype.names}
    return Planned({taker.name: taker for taker in takers}, streams, table, units, made)


def occurrences(entries: Path, token_files: Sequence[Path]) -> Iterator[Written]:
    """Documents in the order of a plan."""
    for unit, offset, length, id_ in np.fromfile(entries, dtype=ENTRY)[["unit", "offset", "length", "id"]].tolist():
        yield Written(id_, _tokens(token_files[unit], offset, length))


def _tokens(path: Path, offset: int, length: int) -> Tokens:
    assert path.suffix == ".u2"  # as few tokens as the tests' tokenizers have
    return tuple(np.fromfile(path, dtype="<u2", count=length, offset=2 * offset).tolist())


# ----------------------------------------------------------------------------------------------------------- reference


def reference_mix(value: int, *salt: str | int) -> int:
    """`document_ids.mix` in Python's integers: splitmix64 of the value and a hash of the purpose."""
    mask = 2**64 - 1
    state = (value + xxhash.xxh3_64_intdigest(repr(salt).encode())) & mask
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


class Expected(NamedTuple):
    """What a set takes: its documents, how often each is to occur, and how often it is written."""

    times: dict[Tokens, int]
    written: dict[Tokens, int]


def read_texts(path: str) -> list[str]:
    files = sorted(Path(path).glob("*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def expected(recipe: Mixture, tokenizer_dir: Path) -> dict[str, Expected]:
    """What each set takes, by the words of `mixture.py`, one document at a time. All files are read."""
    tokenizer = Tokenizer(tokenizer_dir)
    readings: list[Reading] = []
    for settings in recipe.sets().values():
        if settings.reading() not in readings:
            readings.append(settings.reading())
    content = [[tuple(tokenizer.encode(text, eos=True).tolist()) for text in read_texts(str(r.path))] for r in readings]
    taken: set[Tokens] = set()
    result: dict[str, Expected] = {}
    rank = {name: 0 if getattr(s, "hold_out", False) else 2 for name, s in recipe.validation.items()}
    for name in sorted(recipe.sets(), key=lambda name: rank.get(name, 1)):
        settings = recipe.sets()[name]
        index = readings.index(settings.reading())
        elsewhere = {tokens for other, documents in enumerate(content) if other != index for tokens in documents}
        free = [tokens for tokens in dict.fromkeys(content[index]) if tokens not in taken]
        if rank.get(name) == 0:
            free = [tokens for tokens in free if tokens not in elsewhere]
        if settings.choose == "random":
            free.sort(key=lambda tokens: reference_mix(reference_digest(tokens[:-1]), recipe.seed, "choose", name))
        before = sum(
            len(tokens) * count
            for other in recipe.sources
            for tokens, count in (result[other].written if other in result else {}).items()
        )
        result[name] = _take(settings, free, content[index], before, recipe.leave_out_repeated)
        taken |= result[name].times.keys()
    return result


def _take(
    settings: Source | ValidationSet, free: list[Tokens], corpus: list[Tokens], before: int, leave_out: bool
) -> Expected:
    result = Expected({}, {})
    is_source = isinstance(settings, Source)
    limits = {name: getattr(settings, name, None) for name in ("documents", "tokens", "fill_to", "fraction")}
    if limits["fraction"] is not None:
        limits["documents"] = max(1, round(limits["fraction"] * len(free)))
    distinct, total = 0, before
    for tokens in free:
        if (
            (limits["documents"] is not None and len(result.times) >= limits["documents"])
            or (limits["tokens"] is not None and distinct >= limits["tokens"])
            or (limits["fill_to"] is not None and total >= limits["fill_to"])
        ):
            break
        repeats = settings.repeats if isinstance(settings, Source) else 1
        result.times[tokens] = corpus.count(tokens) if repeats is None else repeats
        result.written[tokens] = 0 if leave_out and is_source and result.times[tokens] > 1 else result.times[tokens]
        distinct += len(tokens)
        total += len(tokens) * result.written[tokens]
    return result
