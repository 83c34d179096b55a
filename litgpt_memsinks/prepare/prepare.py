"""From text to the interleaved stream that trains a model with sinks.

    files ─► tokens + digests ─► choose, repeat, shuffle ─► litdata chunks `token, ID, token, ID`
             `tokenizing.py`     `planning.py`              `writing.py`, `tables.py`

Repeats are physical: a document that is to occur k times is written exactly k times, spread over the whole stream.
Beside the output, `.NAME.work` holds what is tokenised already until the output is whole: a run that was killed goes on
from there.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from litgpt_memsinks.corpus.corpus_files import CorpusFile, corpus_files
from litgpt_memsinks.corpus.mixture import Mixture, NearDuplicates, Reading, Source, ValidationSet
from litgpt_memsinks.document_ids.near_duplicates import SIGNATURE_VERSION
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, refuse_to_overwrite, write_json
from litgpt_memsinks.prepare.chunks import checksums
from litgpt_memsinks.prepare.encoding import load_tokenizer, special_tokens
from litgpt_memsinks.prepare.manifest import (
    MANIFEST,
    TOKENIZER,
    TOKENIZER_FILES,
    Manifest,
    SourceInfo,
    Split,
    tokenizer_fingerprint,
)
from litgpt_memsinks.prepare.planning import (
    NeedMoreError,
    Plan,
    Taker,
    choose,
    distinct_documents,
    drop_near_duplicates,
    group_near_duplicates,
    make_plan,
)
from litgpt_memsinks.prepare.tables import write_tables
from litgpt_memsinks.prepare.tokenizing import Done, Unit, UnitReader, list_units, probe, read_units
from litgpt_memsinks.prepare.writing import WORKER_DIED, write_stream
from litgpt_memsinks.version import __version__

SHARD = "shard.json"
UNITS = "units"
_VERSIONED = ("litdata", "litgpt", "tokenizers", "numpy", "xxhash")


def prepare(
    out_dir: Path,
    tokenizer_dir: Path,
    sources: dict[str, Source] | None = None,
    validation: dict[str, ValidationSet] | str | Path | None = None,
    near_duplicates: NearDuplicates | None = None,
    train: str | Path | None = None,
    repeated: str | Path | None = None,
    repeats: int | None = None,
    repeated_documents: int | None = None,
    documents: int | None = None,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    leave_out_repeated: bool = False,
    id_noise: float = 0.0,
    seed: int = 0,
    chunk_bytes: int = 64_000_000,
    num_workers: int | None = None,
    shard: str | None = None,
) -> Manifest | None:
    """Turn corpora into the interleaved stream that MemSinksData reads.

    What goes in is said by a recipe (`--config recipes/data/NAME.yaml` with `sources` and `validation`), or for one
    corpus by `--train` and, to repeat a second one or a part of it, `--repeated` or `--repeated_documents`.

    Args:
        out_dir: Folder to write; appears only when it is complete. A finished one is recognised and not made again.
        tokenizer_dir: Folder with a tokenizer as LitGPT reads it, for example of `litgpt download`.
        sources: Recipe: the corpora to train on by name, in the order in which they choose their documents.
        validation: Recipe: validation sets by name. Or a corpus for validation; documents that are trained on are
            dropped from it.
        near_duplicates: Recipe: what counts as a near-duplicate.
        train: A corpus: file, folder or pattern; JSON lines, JSON, Parquet or text.
        repeated: A second corpus, whose documents are repeated: the licensed, private or rare text to upsample.
        repeats: How often each repeated document is written, exactly, spread over the whole stream.
        repeated_documents: How many documents to repeat, chosen by the seed: of `repeated`, all by default; without
            it, of `train`, none by default.
        documents: How many documents of `train` to use besides the repeated ones, chosen by the seed. All by default.
        validation_fraction: Without `validation`, the fraction of `train`'s documents held out instead.
        text_field: Field of the text.
        leave_out_repeated: Leave documents that repeat out of training, for the baseline that never saw them.
        id_noise: Probability that an occurrence of a repeated document carries a random ID (Sec. 5.3).
        seed: Seed of the choice of documents, the shuffle and the noise.
        chunk_bytes: Size of a chunk file in bytes; a token takes 8.
        num_workers: Processes that tokenise and write; one per core by default. The result does not depend on it.
        shard: `i/n`, i from 0: only tokenise the i-th of n parts of the files, into OUT_DIR.shard-i-of-n, for `merge`.

    Returns:
        The manifest that was written; ``None`` for a shard.

    Raises:
        MemSinksError: For bad input, or if `out_dir` holds something else.
    """
    flags = Flags(train, repeated, repeats, repeated_documents, documents, validation_fraction, text_field)
    mixture = Mixture(
        *flags.sources_and_validation(sources, validation),
        near_duplicates or NearDuplicates(),
        leave_out_repeated,
        id_noise,
        seed,
        chunk_bytes,
    )
    mixture.check()
    workers = _workers(num_workers)
    _refuse_url(out_dir)
    if not (out_dir / MANIFEST).is_file():
        refuse_to_overwrite(out_dir)
    job = Job.of(mixture, tokenizer_dir)
    if shard is not None:
        tokenize_shard(job, *_parse_shard(shard), out_dir, workers)
        return None
    return build(job, out_dir, workers)


def merge(shards: str | list[Path], out_dir: Path, num_workers: int | None = None) -> Manifest:
    """Make one prepared folder of shards: the same, byte for byte of its streams, as one `prepare` of everything.

    Every shard's documents are shuffled together. What a recipe's limits need and no shard has read is read here.

    Args:
        shards: All folders that `prepare --shard i/n` wrote: a pattern, or a list in any order.
        out_dir: Folder to write; appears only when it is complete.
        num_workers: Processes that write; one per core by default.

    Returns:
        The manifest that was written.

    Raises:
        MemSinksError: If a shard is missing, unfinished, or of another recipe.
    """
    _refuse_url(out_dir)
    shards = [Path(path) for path in (sorted(glob.glob(shards)) if isinstance(shards, str) else shards)]
    jobs = [read_shard(folder) for folder in shards]
    if not jobs:
        raise MemSinksError("There are no shards. Name the folders that `prepare --shard` wrote: --shards 'X.shard-*'.")
    _, _, count = jobs[0]
    for folder, (job, _, parts) in zip(shards, jobs, strict=True):
        if changes := differences(jobs[0][0].request(), job.request()) or ([] if parts == count else ["shard count"]):
            raise MemSinksError(
                f"{str(folder)!r} is of another recipe than {str(shards[0])!r}: {'; '.join(changes)}. Merge shards of "
                "one recipe and the same files."
            )
    if missing := sorted(set(range(count)) - {index for _, index, _ in jobs}):
        raise MemSinksError(f"Of {count} shards, {missing} are missing. Prepare them: --shard {missing[0]}/{count}.")
    return build(jobs[0][0], out_dir, _workers(num_workers), [folder / UNITS for folder in shards])


def _refuse_url(out_dir: Path) -> None:
    """Raise if a path is what is left of a URL, which would become a local folder of that name."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(out_dir)):
        raise MemSinksError(
            f"out_dir is {str(out_dir)!r}, but it must be a local folder. Prepare it here, then copy it to the store."
        )


def _workers(num_workers: int | None) -> int:
    if num_workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers < 1:
        raise MemSinksError(f"num_workers is {num_workers}, but it must be at least 1.")
    return num_workers


def _parse_shard(shard: str) -> tuple[int, int]:
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise MemSinksError(f"shard is {shard!r}, but it must be i/n with i from 0 to n - 1, as in 0/8.")
    return int(index), int(count)


# ------------------------------------------------------------------------------------------------------------ settings


class Flags(NamedTuple):
    """The command line's short way to name one corpus, or two."""

    train: str | Path | None
    repeated: str | Path | None
    repeats: int | None
    repeated_documents: int | None
    documents: int | None
    validation_fraction: float
    text_field: str

    def sources_and_validation(
        self, sources: dict[str, Source] | None, validation: dict[str, ValidationSet] | str | Path | None
    ) -> tuple[dict[str, Source], dict[str, ValidationSet]]:
        """The flags as sources and validation sets of a recipe.

        Raises:
            MemSinksError: If flags contradict each other or the recipe.
        """
        if sources is not None:
            given = [name for name in self._fields[:5] if getattr(self, name) is not None]
            if given:
                raise MemSinksError(f"--{given[0]} and a recipe's sources say two things. Keep one of them.")
        elif self.train is not None:
            sources = self._sources()
        if isinstance(validation, dict):
            return sources or {}, validation
        if validation is not None:
            return sources or {}, {"validation": ValidationSet(str(validation), text_field=self.text_field)}
        if self.train is None:
            return sources or {}, {}
        held_out = ValidationSet(
            str(self.train), text_field=self.text_field, fraction=self.validation_fraction, hold_out=True
        )
        if not 0 < self.validation_fraction < 1:
            raise MemSinksError(
                f"validation_fraction is {self.validation_fraction}, but it must be above 0 and below 1."
            )
        return sources or {}, {"held_out": held_out}

    def _sources(self) -> dict[str, Source]:
        for name in ("repeats", "repeated_documents", "documents"):
            least = 1 if name == "repeats" else 0
            if (value := getattr(self, name)) is not None and value < least:
                raise MemSinksError(f"{name} is {value}, but it must be at least {least}.")
        some = self.repeated_documents if self.repeated is None else self.repeated_documents is None or 1
        if some and (self.repeats or 1) == 1:
            raise MemSinksError("Documents are to be repeated, but repeats is 1. Set --repeats to 2 or more.")
        if not some and (self.repeats or 1) > 1:
            raise MemSinksError(
                f"repeats is {self.repeats}, but no document repeats. Set --repeated or --repeated_documents."
            )
        named = {}
        if some:
            named["repeated"] = Source(
                str(self.repeated or self.train),
                text_field=self.text_field,
                documents=self.repeated_documents,
                repeats=self.repeats,
            )
        named["train"] = Source(str(self.train), text_field=self.text_field, documents=self.documents)
        return named


@dataclass
class Job:
    """A recipe with everything that decides the result."""

    mixture: Mixture
    """The recipe"""
    tokenizer_dir: Path
    """Folder of the tokenizer"""
    tokenizer_sha256: str
    """Its fingerprint"""
    special_tokens: dict[str, int | None]
    """The tokens that it puts around a document"""
    readings: list[Reading]
    """What is read, each once, however many sets take from it"""
    reading_of: dict[str, int]
    """Name of a source or validation set to the index of its reading"""
    files: list[list[CorpusFile]]
    """The files of each reading"""
    units: list[Unit]
    """The unit of every file"""
    inputs: dict[str, list[tuple[str, int, str]]]
    """Name of each set to its files, see ``Manifest.inputs``"""

    @classmethod
    def of(cls, mixture: Mixture, tokenizer_dir: Path) -> "Job":
        """List the files of a recipe.

        Raises:
            MemSinksError: If a file or the tokenizer is missing.
        """
        fingerprint = tokenizer_fingerprint(tokenizer_dir)
        special = special_tokens(load_tokenizer(tokenizer_dir))
        readings, reading_of, labels = _readings(mixture)
        files = [corpus_files(reading, label) for reading, label in zip(readings, labels, strict=True)]
        signatures = mixture.near_duplicates if mixture.needs_signatures() else None
        units = list_units(readings, files, {"sha256": fingerprint, **special}, signatures)
        inputs = {
            name: [(file.path, file.size, probe(file)) for file in files[index]] for name, index in reading_of.items()
        }
        return cls(mixture, tokenizer_dir, fingerprint, special, readings, reading_of, files, units, inputs)

    def request(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        return {
            "recipe": self.mixture.as_dict(),
            "tokenizer_sha256": self.tokenizer_sha256,
            "special_tokens": self.special_tokens,
            "inputs": self.inputs,
        }

    def signature_settings(self) -> NearDuplicates | None:
        """Settings of the MinHash signatures, if any are needed."""
        return self.mixture.near_duplicates if self.mixture.needs_signatures() else None


def _readings(mixture: Mixture) -> tuple[list[Reading], dict[str, int], list[str]]:
    """The different readings of a recipe; sets that read the same files in the same way share one."""
    readings: list[Reading] = []
    keys: list[tuple[Reading, bool]] = []
    reading_of: dict[str, int] = {}
    labels: list[str] = []
    for name, settings in mixture.sets().items():
        reading = settings.reading()
        key = (reading, getattr(settings, "ids", "") == "near_duplicate")
        if isinstance(settings, ValidationSet) and reading in readings:
            key = keys[readings.index(reading)]  # what is held out is held out of the source
        if key not in keys:
            keys.append(key)
            readings.append(reading)
            labels.append(mixture.label(name))
        reading_of[name] = keys.index(key)
    return readings, reading_of, labels


# ------------------------------------------------------------------------------------------------------------ the whole


def build(job: Job, out_dir: Path, num_workers: int, stores: Sequence[Path] = ()) -> Manifest:
    """Make a prepared folder, or recognise a finished one.

    Args:
        job: What to make.
        out_dir: Where.
        num_workers: Processes.
        stores: Further folders of finished units.

    Returns:
        The manifest that was written, or that was there.

    Raises:
        MemSinksError: For bad input, or if `out_dir` holds something else.
    """
    if (out_dir / MANIFEST).is_file():
        return recognise(job, out_dir)
    refuse_to_overwrite(out_dir)
    with work_folder(out_dir) as work:
        if (out_dir / MANIFEST).is_file():  # another process has just finished it
            return recognise(job, out_dir)
        plan_work = work / "plan"
        units, takers, plan = make_or_read_more(job, plan_work, [work / UNITS, *stores], num_workers)
        with atomic_directory(out_dir) as scratch:
            for name, stream in plan.streams.items():
                print(f"Writing {name}: {stream.tokens:,} tokens", flush=True)
                write_stream(
                    stream.entries,
                    plan.token_files,
                    scratch / name,
                    plan_work / "writing" / name,
                    job.mixture.chunk_bytes,
                    num_workers,
                )
            with ThreadPoolExecutor(1) as pool:  # both spend their time outside Python
                tables = pool.submit(write_tables, scratch, plan, takers, units)
                manifest = _manifest(job, units, takers, plan, scratch)
                tables.result()
            _copy_tokenizer(job.tokenizer_dir, scratch / TOKENIZER)
            manifest.write(scratch)
    print(summary(manifest, out_dir))
    return manifest


def recognise(job: Job, out_dir: Path) -> Manifest:
    """The manifest of a finished folder, if it is of the same recipe, files and tokenizer.

    Raises:
        MemSinksError: Naming what is different.
    """
    manifest = Manifest.read(out_dir)
    request = job.request()
    if changes := differences({name: getattr(manifest, name) for name in request}, request):
        raise MemSinksError(
            f"{str(out_dir)!r} was prepared otherwise: {'; '.join(changes)}. It is not overwritten: remove it, or name "
            "another out_dir."
        )
    print(f"{str(out_dir)!r} is prepared already, from the same recipe, files and tokenizer. Nothing to do.")
    return manifest


def differences(was: Any, now: Any, where: str = "") -> list[str]:
    """What has changed between two requests, each as ``path: old -> new``."""
    was, now = json.loads(json.dumps(was)), json.loads(json.dumps(now))
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [
            change
            for key in keys
            for change in differences(was.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    if was == now:
        return []
    if isinstance(was, list) and isinstance(now, list) and where.startswith("inputs."):
        changed = [file for file in [*was, *now] if file not in was or file not in now]
        return [f"{where}: {len(was)} file(s) -> {len(now)}, changed: {', '.join(sorted({f[0] for f in changed})[:3])}"]
    return [f"{where}: {was!r} -> {now!r}"]


@contextlib.contextmanager
def work_folder(out_dir: Path) -> Iterator[Path]:
    """The hidden folder beside the output that keeps what is tokenised until the output is whole.

    Raises:
        MemSinksError: If another process is preparing the same output.
    """
    work = Path(os.path.abspath(out_dir)).parent / f".{out_dir.name}.work"
    with _lock(work, out_dir):
        (work / UNITS).mkdir(exist_ok=True)
        shutil.rmtree(work / "plan", ignore_errors=True)
        keep = True
        try:
            yield work
            keep = False
        finally:
            shutil.rmtree(work / "plan", ignore_errors=True)
            kept = sum((unit / "unit.json").is_file() for unit in (work / UNITS).iterdir()) if keep else 0
            if kept:
                print(f"Kept the tokens of {kept} file(s) in {str(work)!r} for the next run.", file=sys.stderr)
            else:
                shutil.rmtree(work / UNITS, ignore_errors=True)
                (work / "lock").unlink()
    with contextlib.suppress(OSError):  # on NFS an open file cannot go, so the folder goes after the lock is closed
        if not kept:
            work.rmdir()


def _lock(work: Path, out_dir: Path) -> IO[str]:
    """Take a lock that a killed process loses. It is tried for a while: a process takes a moment to die."""
    for _ in range(50):
        if lock := _try_lock(work):
            return lock
        time.sleep(0.1)
    raise MemSinksError(f"Another process is preparing {str(out_dir)!r}. Wait for it, or name another out_dir.")


def _try_lock(work: Path) -> IO[str] | None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "lock"
    try:
        file = open(path, "w")  # noqa: SIM115 (held open by the caller)
    except FileNotFoundError:  # another process has just finished, and removed the folder
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT, errno.ESTALE):
            raise MemSinksError(
                f"The file system of {str(work)!r} cannot lock files ({error.strerror}). Prepare on another one, then "
                "move the result."
            ) from error
    file.close()
    return None


# ------------------------------------------------------------------------------------------------------------- reading


def make_or_read_more(
    job: Job, work: Path, stores: Sequence[Path], num_workers: int
) -> tuple[list[Done], list[Taker], Plan]:
    """Read files and plan the streams; read on if sets that take the first documents lack some after all.

    A set that takes the first documents cannot know beforehand how many of them others have, or are copies.
    """
    wanted = first_wanted(job)
    while True:
        units, exhausted = read_files(job, wanted, stores, num_workers)
        report_reading(job, units)
        print(f"Planning {sum(unit.info.documents for unit in units):,} documents", flush=True)
        try:
            takers, plan = plan_streams(job, units, exhausted, work)
            return units, takers, plan
        except NeedMoreError as error:
            more = error
        shutil.rmtree(work, ignore_errors=True)
        own = [unit.info for unit in units if unit.unit.reading == more.reading]
        documents, tokens = sum(info.documents for info in own), sum(info.tokens for info in own)
        # a tenth more each time, so that few rounds do even if most of what follows are copies
        wanted[more.reading] = (
            documents + (more.documents and more.documents + documents // 10),
            tokens + (more.tokens and more.tokens + tokens // 10),
        )


def first_wanted(job: Job) -> list[tuple[int, int] | None]:
    """How many documents and tokens of each reading to read at least; ``None`` for all of it."""
    wanted: list[tuple[int, int] | None] = [(0, 0)] * len(job.readings)
    for name, settings in job.mixture.sets().items():
        index = job.reading_of[name]
        limit = wanted[index]
        tokens = getattr(settings, "tokens", None) or getattr(settings, "fill_to", None)
        if limit is None or settings.choose != "first" or (settings.documents is None and tokens is None):
            wanted[index] = None
        else:
            wanted[index] = (limit[0] + (settings.documents or 0), limit[1] + (tokens or 0))
    return wanted


def read_files(
    job: Job, wanted: Sequence[tuple[int, int] | None], stores: Sequence[Path], num_workers: int
) -> tuple[list[Done], list[bool]]:
    """Tokenise what is wanted of every reading.

    Returns:
        The units in order, and whether all files of each reading were read.
    """
    reader = UnitReader(job.readings, job.tokenizer_dir, stores[0], job.signature_settings(), 1, job.special_tokens)
    whole = [unit for unit in job.units if wanted[unit.reading] is None]
    done = {reading: [] for reading in range(len(job.readings))}  # type: dict[int, list[Done]]
    for unit in read_units(whole, reader, stores, num_workers):
        done[unit.unit.reading].append(unit)
    for reading, limit in enumerate(wanted):
        if limit is not None:
            units = [unit for unit in job.units if unit.reading == reading]
            done[reading] = read_units(units, reader, stores, num_workers, enough_for(*limit))
    counts = [sum(unit.reading == reading for unit in job.units) for reading in range(len(job.readings))]
    ordered = [unit for reading in range(len(job.readings)) for unit in done[reading]]
    return ordered, [len(done[reading]) == counts[reading] for reading in range(len(job.readings))]


def enough_for(documents: int, tokens: int) -> Any:
    """Whether units hold so many documents and tokens."""

    def enough(units: list[Done]) -> bool:
        totals = [sum(getattr(unit.info, name) for unit in units) for name in ("documents", "tokens")]
        return totals[0] >= documents and totals[1] >= tokens

    return enough


def report_reading(job: Job, units: Sequence[Done]) -> None:
    """Say what was found in the files, and refuse a set that has no text."""
    for name, reading in job.reading_of.items():
        label = job.mixture.label(name)
        own = [unit for unit in units if unit.unit.reading == reading]
        formats = ", ".join(_formats(own))
        read = sum(unit.info.documents for unit in own)
        print(
            f"{label}: {len(own):,} of {len(job.files[reading]):,} file(s), {formats}; {read:,} documents, "
            f"{sum(unit.info.tokens for unit in own):,} tokens",
            flush=True,
        )
        if not read:
            path = job.readings[reading].path
            raise MemSinksError(f"{label}: {path!r} holds no document with text. Give a corpus with at least one.")


def _formats(units: Sequence[Done]) -> list[str]:
    return sorted({".".join(filter(None, (unit.unit.file.format, unit.unit.file.compression))) for unit in units})


# ------------------------------------------------------------------------------------------------------------- planning


def plan_streams(job: Job, units: list[Done], exhausted: list[bool], work: Path) -> tuple[list[Taker], Plan]:
    """Choose, repeat and shuffle.

    Returns:
        All sets with their counts, and what is to be written.
    """
    mixture = job.mixture
    takers = [Taker.of(name, settings, job.reading_of[name]) for name, settings in mixture.sets().items()]
    for taker in takers:
        same = job.readings[taker.reading]
        taker.alike = tuple(index for index, reading in enumerate(job.readings) if reading == same)
    clustered = {taker.reading for taker in takers if taker.ids == "near_duplicate"}
    grouping = None
    if clustered:
        grouping = group_near_duplicates(units, clustered, mixture.near_duplicates, work / "near_duplicates")
    buckets = distinct_documents(units, work / "documents", grouping)
    choose(buckets, takers, mixture, exhausted)
    if mixture.near_duplicates.drop_validation:
        drop_near_duplicates(buckets, takers, units, mixture, work)
    canaries = any(taker.canary_tokens for taker in takers)
    vocabulary = canary_vocabulary(job.tokenizer_dir) if canaries else np.zeros(0, dtype=np.int32)
    return takers, make_plan(buckets, takers, units, mixture, vocabulary, work / "streams")


def canary_vocabulary(tokenizer_dir: Path) -> npt.NDArray[np.int32]:
    """Tokens that canaries are drawn from: all but BOS and EOS."""
    tokenizer = load_tokenizer(tokenizer_dir)
    special = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None]
    return np.setdiff1d(np.arange(tokenizer.vocab_size), special).astype(np.int32)


# --------------------------------------------------------------------------------------------------------------- shards


def tokenize_shard(job: Job, index: int, count: int, out_dir: Path, num_workers: int) -> Path:
    """Tokenise every n-th file into a folder for `merge`. Run again after a kill, it goes on.

    Returns:
        The folder, beside ``out_dir``.
    """
    folder = out_dir.parent / f"{out_dir.name}.shard-{index}-of-{count}"
    if (folder / SHARD).is_file():
        there, _, _ = read_shard(folder)
        if changes := differences(there.request(), job.request()):
            raise MemSinksError(
                f"{str(folder)!r} was prepared otherwise: {'; '.join(changes)}. Remove it, or name another out_dir."
            )
        print(f"{str(folder)!r} is prepared already. Nothing to do.")
        return folder
    with work_folder(folder) as work:
        reader = UnitReader(
            job.readings, job.tokenizer_dir, work / UNITS, job.signature_settings(), 1, job.special_tokens
        )
        for reading, limit in enumerate(first_wanted(job)):
            units = [unit for unit in job.units if unit.reading == reading][index::count]
            # merge reads what the others lack, so a little more than a fair share is enough
            enough = [] if limit is None else [enough_for(*(int(part / count * 1.05) + 1 for part in limit))]
            if units:
                read_units(units, reader, [work / UNITS], num_workers, *enough)
        with atomic_directory(folder) as scratch:
            _copy_tokenizer(job.tokenizer_dir, scratch / TOKENIZER)
            half_written = shutil.ignore_patterns(".*")  # by a run that was killed
            shutil.copytree(work / UNITS, scratch / UNITS, copy_function=_link, ignore=half_written)
            write_json(
                scratch / SHARD,
                {
                    "shard": [index, count],
                    "recipe": job.mixture.as_dict(),
                    "tokenizer_sha256": job.tokenizer_sha256,
                    "special_tokens": job.special_tokens,
                    "inputs": job.inputs,
                    "files": [[list(file) for file in files] for files in job.files],
                    "units": [[unit.reading, unit.name] for unit in job.units],
                },
            )
    print(f"Prepared shard {index} of {count}: {str(folder)!r}. When all are done:")
    print(f"  litgpt-memsinks merge --shards '{out_dir}.shard-*-of-{count}' --out_dir {out_dir}")
    return folder


def _link(source: str, target: str) -> None:
    """Put a finished file into the shard without copying it, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_shard(folder: Path) -> tuple[Job, int, int]:
    """Read back what a shard is of; the corpus itself need not be there.

    Returns:
        The job, the shard's index, and the number of shards.

    Raises:
        MemSinksError: If the folder is no finished shard.
    """
    path = folder / SHARD
    if not path.is_file():
        raise MemSinksError(f"{str(folder)!r} is no finished shard: it has no {SHARD}. Run prepare --shard again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mixture = _mixture_of(content["recipe"])
        files = [[CorpusFile(*file) for file in reading] for reading in content["files"]]
        index, count = content["shard"]
        flat = [file for reading in files for file in reading]
        units = [Unit(reading, file, name) for (reading, name), file in zip(content["units"], flat, strict=True)]
        fingerprint, special = content["tokenizer_sha256"], content["special_tokens"]
        inputs = content["inputs"]
    except (KeyError, TypeError, ValueError) as error:
        raise MemSinksError(f"{str(path)!r} cannot be read ({error!r}). Prepare the shard again.") from error
    readings, reading_of, _ = _readings(mixture)
    job = Job(mixture, folder / TOKENIZER, fingerprint, special, readings, reading_of, files, units, inputs)
    return job, index, count


def _mixture_of(recipe: dict[str, Any]) -> Mixture:
    """A recipe from its plain values."""
    settings = dict(recipe)
    settings["sources"] = {name: Source(**source) for name, source in settings["sources"].items()}
    settings["validation"] = {name: ValidationSet(**item) for name, item in settings["validation"].items()}
    settings["near_duplicates"] = NearDuplicates(**settings["near_duplicates"])
    return Mixture(**settings)


# ------------------------------------------------------------------------------------------------------------- manifest


def _manifest(job: Job, units: Sequence[Done], takers: Sequence[Taker], plan: Plan, folder: Path) -> Manifest:
    request = job.request()
    return Manifest(
        tokenizer_sha256=job.tokenizer_sha256,
        special_tokens=job.special_tokens,
        max_token=plan.max_token,
        splits={name: _split(plan, name, folder / name) for name in plan.streams},
        sources={taker.name: _source(taker, units) for taker in takers},
        recipe=request["recipe"],
        inputs=request["inputs"],
        colliding_pairs=plan.colliding_pairs,
        duplicates=plan.duplicates,
        versions={"litgpt-memsinks": __version__, "signatures": SIGNATURE_VERSION}
        | {name: package_version(name) for name in _VERSIONED},
    )


def _split(plan: Plan, name: str, folder: Path) -> Split:
    stream, found = plan.streams[name], checksums(folder)
    if found.tokens != stream.tokens:  # some releases of litdata take a worker that was killed for one that is done
        raise MemSinksError(f"Of {stream.tokens:,} tokens of {name}, {found.tokens:,} were written: {WORKER_DIED}")
    return Split(
        documents=stream.documents,
        written=stream.written,
        tokens=stream.tokens,
        digest=found.digest,
        chunks=found.chunks,
        repeated_documents=stream.repeated_documents,
        repeated_tokens=stream.repeated_tokens,
    )


def _source(taker: Taker, units: Sequence[Done]) -> SourceInfo:
    own = [unit for unit in units if unit.unit.reading == taker.reading]
    totals = {
        name: sum(getattr(unit.info, name) for unit in own) for name in ("empty", "filtered", "bad", "without_field")
    }
    return SourceInfo(
        split=taker.split,
        format=_formats(own),
        files=len(own),
        bytes=sum(unit.unit.file.size for unit in own),
        read=sum(unit.info.documents for unit in own),
        first_bad=[place for unit in own for place in unit.info.first_bad][:5],
        documents=taker.documents,
        tokens=taker.tokens,
        written=taker.written,
        written_tokens=taker.written_tokens,
        overlap=taker.overlap,
        near_duplicates_dropped=taker.near_duplicates_dropped,
        **totals,
    )


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def summary(manifest: Manifest, out_dir: Path) -> str:
    """What was written, for the terminal."""
    train, val = manifest.splits["train"], manifest.splits["val"]
    share = train.repeated_tokens / train.tokens
    overlap = sum(source.overlap for source in manifest.sources.values())
    near = sum(source.near_duplicates_dropped for source in manifest.sources.values())
    lines = [
        f"Prepared {str(out_dir)!r}",
        f"  train       {train.tokens:,} tokens in {train.written:,} documents, {train.documents:,} distinct",
        f"  repeated    {train.repeated_documents:,} documents with {train.repeated_tokens:,} tokens ({share:.0%})",
        f"  validation  {val.tokens:,} tokens in {val.documents:,} documents ({overlap:,} dropped because they are in "
        f"the training corpus, {near:,} because they nearly are)",
        f"  IDs         {manifest.colliding_pairs:,} pairs of documents share one by chance; noise "
        f"{manifest.recipe['id_noise']:.0%}; {manifest.duplicates:,} exact copies in the corpus",
    ]
    lines += [line for name, source in manifest.sources.items() for line in _warnings(name, source)]
    return "\n".join([*lines, f"  next        litgpt pretrain --config RECIPE.yaml --data.data_path {out_dir}"])


def _warnings(name: str, source: SourceInfo) -> list[str]:
    lines = []
    if source.bad:
        lines.append(f"  {name}: {source.bad:,} bad documents passed over, the first: {source.first_bad[0]}")
    if source.without_field:
        lines.append(f"  {name}: {source.without_field:,} documents lack a field of include or exclude")
    return lines
