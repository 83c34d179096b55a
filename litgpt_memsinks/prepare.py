"""From text to the interleaved stream that trains a model with sinks.

    JSON lines ─► tokens + digest ─► choose and repeat ─► seeded global shuffle ─► litdata chunks `token, ID, token, ID`

Repeats are physical: a document that is to occur k times is written exactly k times, spread over the whole stream.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from litgpt.tokenizer import Tokenizer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from litgpt_memsinks import document_ids
from litgpt_memsinks.corpus_files import Document, corpus_files, read_documents
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, refuse_to_overwrite
from litgpt_memsinks.manifest import (
    DOCUMENTS,
    EVALUATION,
    TOKENIZER,
    TOKENIZER_FILES,
    Manifest,
    Split,
    tokenizer_fingerprint,
)

_BATCH = 512  # documents tokenised at once: enough for the tokenizer's threads, little memory
_SLICE = 1024  # documents that a writing process takes at a time


@dataclass
class Tokenized:
    """A corpus as tokens on disk; arrays have one entry per document, in file order.

    Attributes:
        tokens: All tokens one after another with BOS and EOS, int32, memory-mapped.
        offsets: Where each document begins, and the end of the last, shape ``(n_documents + 1,)``.
        digests: uint64, see ``document_ids.digest``.
        lines: Line number of each document in its file.
        files: Index of each document's file in ``names``.
        names: Names of the files.
        upsampled: Whether the document is of the corpus that is repeated.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    lines: npt.NDArray[np.int64]
    files: npt.NDArray[np.int64]
    names: list[str]
    upsampled: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.digests)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> npt.NDArray[np.int32]:
        """Tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass
class Plan:
    """What is written: indices into the tokenised corpus, and the ID of each occurrence, in stream order."""

    documents: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]


def prepare(
    train: Path,
    out_dir: Path,
    tokenizer_dir: Path,
    repeated: Path | None = None,
    repeats: int = 1,
    repeated_documents: int | None = None,
    documents: int | None = None,
    validation: Path | None = None,
    validation_fraction: float = 0.05,
    text_field: str = "text",
    leave_out_repeated: bool = False,
    id_noise: float = 0.0,
    seed: int = 0,
    chunk_bytes: int = 64_000_000,
    num_workers: int = 1,
) -> Manifest:
    """Turn a corpus of JSON lines into the interleaved stream that MemSinksData reads.

    Args:
        train: JSON lines (.jsonl, .json, also .gz or .zst), one document per line; or a folder of such files.
        out_dir: Folder to write. Must not exist; appears only when it is complete.
        tokenizer_dir: Folder with a tokenizer as LitGPT reads it, for example of `litgpt download`.
        repeated: A second corpus, whose documents are repeated: the licensed, private or rare text to upsample.
        repeats: How often each repeated document is written, exactly, spread over the whole stream.
        repeated_documents: How many documents to repeat, chosen by the seed: of `repeated`, all by default; without
            it, of `train`, none by default.
        documents: How many documents to use besides the repeated ones, chosen by the seed. All by default.
        validation: JSON lines for validation. Documents that are in the training corpus too are dropped.
        validation_fraction: Without `validation`, the fraction of the training documents held out instead.
        text_field: Key of the text in each line.
        leave_out_repeated: Leave documents that repeat out of training, for the baseline that never saw them.
        id_noise: Probability that an occurrence of a repeated document carries a random ID (Sec. 5.3).
        seed: Seed of the choice of documents, the shuffle and the noise.
        chunk_bytes: Size of a chunk file in bytes; a token takes 8.
        num_workers: Processes that write chunks.

    Returns:
        The manifest that was written.

    Raises:
        MemSinksError: For bad input, or if `out_dir` exists.
    """
    if repeated_documents is None and repeated is None:
        repeated_documents = 0
    _check_settings(
        validation_fraction, documents, repeated_documents, repeats, id_noise, chunk_bytes, num_workers, seed
    )
    refuse_to_overwrite(out_dir)
    fingerprint = tokenizer_fingerprint(tokenizer_dir)
    tokenizer = Tokenizer(tokenizer_dir)
    with atomic_directory(out_dir) as scratch, _work_folder(scratch) as work:
        corpus = tokenize_corpus([train, repeated] if repeated else [train], tokenizer, text_field, work / "train")
        unique, occurrences = first_occurrences(corpus.digests)
        if validation is not None:
            held_out = tokenize_corpus([validation], tokenizer, text_field, work / "val")
            validation_documents, overlap = _validation_documents(held_out, corpus)
        else:
            held_out, overlap = corpus, 0
            upsampled = _upsampled(corpus, unique)
            unique, occurrences, validation_documents = _split(
                unique, occurrences, upsampled, validation_fraction, seed
            )
        may_repeat = _upsampled(corpus, unique) | (repeated is None)
        chosen, counts = choose(
            unique, occurrences, may_repeat, documents, repeated_documents, repeats, seed, repeated is not None
        )
        plan = training_plan(chosen, counts, corpus.digests, leave_out_repeated, id_noise, seed)
        validation_plan = Plan(validation_documents, _ids(held_out.digests[validation_documents], False))
        for name, source, order in (("train", corpus, plan), ("val", held_out, validation_plan)):
            write_stream(source, order, scratch / name, work / f"{name}-plan", chunk_bytes, num_workers)
        _write_tables(scratch, corpus, chosen, counts, held_out, validation_documents)
        _copy_tokenizer(tokenizer_dir, scratch / TOKENIZER)
        manifest = Manifest(
            tokenizer_sha256=fingerprint,
            max_token=int(max(corpus.tokens.max(), held_out.tokens.max())),  # of all that was read, used or not
            splits={
                "train": _split_counts(corpus, plan),
                "val": _split_counts(held_out, validation_plan),
            },
            seed=seed,
            repeats=repeats,
            id_noise=id_noise,
            left_out=leave_out_repeated,
            colliding_pairs=document_ids.colliding_pairs(corpus.digests[chosen]),
            duplicates=len(corpus) - len(np.unique(corpus.digests)),
            validation_overlap=overlap,
            sources=corpus.names + (held_out.names if validation is not None else []),
        )
        manifest.write(scratch)
    print(summary(manifest, out_dir))
    return manifest


def _check_settings(
    validation_fraction: float,
    documents: int | None,
    repeated_documents: int | None,
    repeats: int,
    id_noise: float,
    chunk_bytes: int,
    num_workers: int,
    seed: int,
) -> None:
    checks = [
        ("validation_fraction", validation_fraction, 0 < validation_fraction < 1, "above 0 and below 1"),
        ("documents", documents, documents is None or documents >= 0, "at least 0"),
        ("repeated_documents", repeated_documents, repeated_documents is None or repeated_documents >= 0, "at least 0"),
        ("repeats", repeats, repeats >= 1, "at least 1"),
        ("id_noise", id_noise, 0 <= id_noise <= 1, "in [0, 1]"),
        ("chunk_bytes", chunk_bytes, chunk_bytes >= 4096, "at least 4096 bytes"),
        ("num_workers", num_workers, num_workers >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "at least 0"),
    ]
    for name, value, valid, limit in checks:
        if not valid:
            raise MemSinksError(f"{name} is {value}, but it must be {limit}.")
    if repeated_documents != 0 and repeats == 1:
        raise MemSinksError("Documents are to be repeated, but repeats is 1. Set --repeats to 2 or more.")
    if repeated_documents == 0 and repeats > 1:
        raise MemSinksError(f"repeats is {repeats}, but no document repeats. Set --repeated or --repeated_documents.")


@contextlib.contextmanager
def _work_folder(scratch: Path) -> Iterator[Path]:
    """A folder inside the scratch folder for what is not part of the result."""
    work = scratch / "work"
    work.mkdir()
    yield work
    shutil.rmtree(work)


# --------------------------------------------------------------------------------------------- reading and tokenising


def tokenize_corpus(paths: list[Path], tokenizer: Tokenizer, text_field: str, work: Path) -> Tokenized:
    """Tokenise corpora into one flat file, so that memory does not grow with their text.

    Args:
        paths: JSON lines, or folders of them: the corpus, and the one that is repeated if there is one.
        tokenizer: LitGPT's tokenizer.
        text_field: Key of the text.
        work: Folder for the flat file; made here.

    Raises:
        MemSinksError: If a corpus is empty, cannot be read, or the tokenizer has no end-of-sequence token.
    """
    work.mkdir()
    names: list[str] = []
    columns: list[tuple[int, int, int, int, bool]] = []
    with open(work / "tokens.bin", "wb") as out:
        for corpus, path in enumerate(paths):
            before = len(columns)
            for file in corpus_files(path):
                for line, tokens in _tokenized_documents(file, tokenizer, text_field):
                    out.write(tokens.tobytes())
                    body = tokens[int(tokenizer.use_bos) : -1]
                    columns.append((len(tokens), document_ids.digest(body), line, len(names), corpus > 0))
                names.append(file.name)
            if len(columns) == before:
                raise MemSinksError(f"{str(path)!r} holds no document with text. Give a corpus with at least one.")
    lengths, digests, lines, files, upsampled = zip(*columns, strict=True)
    return Tokenized(
        np.memmap(work / "tokens.bin", dtype=np.int32, mode="r"),
        np.concatenate(([0], np.cumsum(lengths))),
        np.array(digests, dtype=np.uint64),
        np.array(lines),
        np.array(files),
        names,
        np.array(upsampled),
    )


def _tokenized_documents(
    path: Path, tokenizer: Tokenizer, text_field: str
) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Line number and tokens of each document of a file that has any token besides BOS and EOS."""
    for batch in _batches(path, text_field):
        for document, tokens in zip(batch, encode([document.text for document in batch], tokenizer), strict=True):
            if len(tokens) > 1 + int(tokenizer.use_bos):
                yield document.line, tokens


def encode(texts: list[str], tokenizer: Tokenizer) -> list[npt.NDArray[np.int32]]:
    """Tokenise documents as ``tokenizer.encode(text, eos=True)`` does, but many at once.

    BOS goes in front where the tokenizer asks for it, and exactly one EOS behind: LitGPT's would drop it from a text
    that ends in EOS already.

    Raises:
        MemSinksError: If the tokenizer has no end-of-sequence token to separate documents with.
    """
    if tokenizer.eos_id is None:
        raise MemSinksError("The tokenizer has no eos_token, which separates documents. Add one to its configuration.")
    if tokenizer.use_bos and tokenizer.bos_id is None:
        raise MemSinksError("The tokenizer is to add a bos_token, but has none. Correct tokenizer_config.json.")
    if tokenizer.backend != "huggingface":
        return [tokenizer.encode(text, eos=True).numpy() for text in texts]
    # some tokenizer files carry settings of the script that saved them
    tokenizer.processor.no_padding()
    tokenizer.processor.no_truncation()
    bos = [tokenizer.bos_id] if tokenizer.use_bos else []
    return [
        np.array(bos + _without_specials(encoding.ids, tokenizer) + [tokenizer.eos_id], dtype=np.int32)
        for encoding in tokenizer.processor.encode_batch(texts)
    ]


def _without_specials(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Drop the BOS and EOS that some tokenizers add by themselves."""
    if ids and ids[0] == tokenizer.bos_id:
        ids = ids[1:]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


def _batches(path: Path, text_field: str) -> Iterator[list[Document]]:
    """Yield lists of documents, with a progress bar over the bytes of the file."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"Tokenising {path.name}", total=path.stat().st_size if path.is_file() else None)
        batch: list[Document] = []
        for document in read_documents(path, text_field, lambda done: progress.update(task, completed=done)):
            batch.append(document)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


# ------------------------------------------------------------------------------------------------ choosing and ordering


def first_occurrences(digests: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the first copy of each distinct document, in corpus order, and the number of its copies."""
    _, first, counts = np.unique(digests, return_index=True, return_counts=True)
    order = np.argsort(first)
    return first[order], counts[order]


def _upsampled(corpus: Tokenized, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which documents have a copy in the corpus that is repeated; their first copy may be in the other one."""
    return np.isin(corpus.digests[documents], corpus.digests[corpus.upsampled])


def _validation_documents(held_out: Tokenized, corpus: Tokenized) -> tuple[npt.NDArray[np.int64], int]:
    """Distinct validation documents that are not in the training corpus, and how many were dropped because they are."""
    unique, _ = first_occurrences(held_out.digests)
    known = np.isin(held_out.digests[unique], corpus.digests)
    if known.all():
        raise MemSinksError("Every validation document is in the training corpus too. Give held-out text.")
    return unique[~known], int(known.sum())


def _split(
    unique: npt.NDArray[np.int64],
    occurrences: npt.NDArray[np.int64],
    upsampled: npt.NDArray[np.bool_],
    fraction: float,
    seed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold out a seeded fraction of the distinct documents, none of the upsampled ones.

    Returns:
        Training documents, their copies, and validation documents.
    """
    candidates = np.flatnonzero(~upsampled)
    n_validation = max(1, round(fraction * len(candidates)))
    if n_validation >= len(candidates):
        raise MemSinksError(
            f"{len(candidates)} document(s) cannot be split into training and validation. Give more text."
        )
    held_out = np.zeros(len(unique), dtype=np.bool_)
    held_out[np.random.default_rng([seed, 0]).permutation(candidates)[:n_validation]] = True
    return unique[~held_out], occurrences[~held_out], unique[held_out]


def choose(
    unique: npt.NDArray[np.int64],
    occurrences: npt.NDArray[np.int64],
    may_repeat: npt.NDArray[np.bool_],
    documents: int | None,
    repeated_documents: int | None,
    repeats: int,
    seed: int,
    upsampled_only: bool = False,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Choose the documents of the stream, and how often each occurs.

    Args:
        unique: Indices of distinct documents.
        occurrences: Copies of each in the corpus. A document that is not chosen to repeat keeps them.
        may_repeat: Which of them may be chosen to repeat.
        documents: Documents besides the repeated ones; ``None`` for all others.
        repeated_documents: Documents to repeat; ``None`` for all that may.
        repeats: How often each of those is written, however many copies the corpus has.
        seed: Seed of the choice.
        upsampled_only: Whether documents that may repeat are there for that only: what is not chosen is not used.

    Returns:
        Indices of the chosen documents, and how often each is written.

    Raises:
        MemSinksError: If the corpus has too few documents.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(unique))
    candidates = order[may_repeat[order]]
    repeated = candidates[: _at_most("repeated_documents", repeated_documents, len(candidates))]
    others = order[~may_repeat[order]] if upsampled_only else candidates[len(repeated) :]
    others = others[: _at_most("documents", documents, len(others))]
    counts = np.concatenate((np.full(len(repeated), repeats), occurrences[others]))
    return unique[np.concatenate((repeated, others))], counts


def _at_most(name: str, asked: int | None, available: int) -> int:
    if asked is not None and asked > available:
        raise MemSinksError(
            f"{name} is {asked}, but the corpus has only {available} distinct documents for it. Lower --{name}, or "
            "give more text."
        )
    return available if asked is None else asked


def training_plan(
    chosen: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    digests: npt.NDArray[np.uint64],
    leave_out_repeated: bool,
    id_noise: float,
    seed: int,
) -> Plan:
    """Shuffle all occurrences of all documents together.

    The order of the other documents is the same whether the repeated ones are left out or not, and whether IDs are
    noisy or not.

    Raises:
        MemSinksError: If nothing is left.
    """
    occurrence = np.repeat(np.arange(len(chosen)), counts)
    occurrence = np.random.default_rng([seed, 2]).permutation(occurrence)
    ids = _ids(digests[chosen], counts > 1)[occurrence]
    if leave_out_repeated:
        occurrence, ids = occurrence[ids > 0], ids[ids > 0]
    if not len(occurrence):
        raise MemSinksError("No document is left for training. Raise --documents.")
    return Plan(chosen[occurrence], document_ids.noisy_ids(ids, id_noise, np.random.default_rng([seed, 3])))


def _ids(digests: npt.NDArray[np.uint64], repeated: npt.NDArray[np.bool_] | bool) -> npt.NDArray[np.int32]:
    flags = np.broadcast_to(repeated, digests.shape)
    pairs = zip(digests.tolist(), flags.tolist(), strict=True)
    return np.array([document_ids.sequence_id(digest, flag) for digest, flag in pairs], dtype=np.int32)


# -------------------------------------------------------------------------------------------------------------- writing


class StreamWriter:
    """Maps a slice of the plan to interleaved documents; litdata runs it in its worker processes.

    Args:
        tokens: Flat int32 file of all tokens.
        plan: Folder with ``offsets.npy``, ``documents.npy`` and ``ids.npy``.
    """

    def __init__(self, tokens: Path, plan: Path) -> None:
        self.tokens_file, self.plan = tokens, plan

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        # opened in the worker: memory maps do not travel between processes
        names = ("offsets", "documents", "ids")
        arrays = [np.load(self.plan / f"{name}.npy", mmap_mode="r") for name in names]
        return (np.memmap(self.tokens_file, dtype=np.int32, mode="r"), *arrays)

    def __call__(self, bounds: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Yield the documents of plan entries ``bounds[0]`` to ``bounds[1]``, each interleaved with its ID.

        As int32 tensors of shape ``(2 * n_tokens,)``, the form in which LitGPT's own preparation scripts write.
        """
        tokens, offsets, documents, ids = self._arrays
        for document, sequence_id in zip(documents[slice(*bounds)], ids[slice(*bounds)], strict=True):
            document_tokens = tokens[offsets[document] : offsets[document + 1]]
            yield torch.from_numpy(document_ids.interleave(document_tokens, sequence_id))


def write_stream(corpus: Tokenized, plan: Plan, out_dir: Path, work: Path, chunk_bytes: int, num_workers: int) -> None:
    """Write the plan's documents, interleaved with their IDs, as litdata chunks of int32.

    Args:
        corpus: The tokenised corpus.
        plan: What to write, in order.
        out_dir: Folder for chunks and ``index.json``.
        work: Scratch folder; made here.
        chunk_bytes: Size of a chunk file in bytes.
        num_workers: Processes that write.
    """
    from litdata import TokensLoader, optimize

    work.mkdir()
    np.save(work / "offsets.npy", corpus.offsets)
    np.save(work / "documents.npy", plan.documents)
    np.save(work / "ids.npy", plan.ids)
    starts = range(0, len(plan.documents), _SLICE)
    # litdata's own scratch folders default to fixed places in /tmp, where two runs would disturb each other
    caches = {f"DATA_OPTIMIZER_{name}CACHE_FOLDER": str(work / f"{name}cache") for name in ("", "DATA_")}
    with mock.patch.dict(os.environ, caches):
        optimize(
            fn=StreamWriter(Path(corpus.tokens.filename), work),  # type: ignore[attr-defined]
            inputs=[(start, min(start + _SLICE, len(plan.documents))) for start in starts],
            output_dir=str(out_dir),
            chunk_bytes=chunk_bytes,
            item_loader=TokensLoader(),
            num_workers=min(num_workers, len(starts)),
            reorder_files=False,
            keep_data_ordered=True,
            # a spawned writer would first import all of litgpt; a forked one only copies numbers between files
            start_method="fork" if sys.platform == "linux" else None,
            verbose=False,
        )


def _split_counts(corpus: Tokenized, plan: Plan) -> Split:
    lengths = corpus.lengths()[plan.documents]
    repeated = plan.ids < 0
    return Split(
        documents=len(np.unique(plan.documents)),
        written=len(plan.documents),
        tokens=int(lengths.sum()),
        repeated_documents=len(np.unique(plan.documents[repeated])),
        repeated_tokens=int(lengths[repeated].sum()),
    )


def _write_tables(
    folder: Path,
    corpus: Tokenized,
    chosen: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    held_out: Tokenized,
    validation_documents: npt.NDArray[np.int64],
) -> None:
    """Write the document table, and the tokens of the documents that `evaluate.py` scores."""
    rows = [
        _table("train", corpus, chosen, counts),
        _table("val", held_out, validation_documents, np.ones_like(validation_documents)),
    ]
    pq.write_table(pa.concat_tables(rows), folder / DOCUMENTS)
    repeated = counts > 1
    scored = [
        _scored("repeated", corpus, chosen[repeated], True),
        _scored("val", held_out, validation_documents, False),
    ]
    pq.write_table(pa.concat_tables(scored), folder / EVALUATION)


def _table(split: str, corpus: Tokenized, documents: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> pa.Table:
    digests = corpus.digests[documents]
    return pa.table(
        {
            "split": pa.array([split] * len(documents), type=pa.string()),
            "source": pa.array([corpus.names[file] for file in corpus.files[documents]], type=pa.string()),
            "line": pa.array(corpus.lines[documents]),
            "digest": pa.array(digests, type=pa.uint64()),
            "sequence_id": pa.array(_ids(digests, counts > 1)),
            "tokens": pa.array(corpus.lengths()[documents]),
            "repeats": pa.array(counts),
        }
    )


def _scored(split: str, corpus: Tokenized, documents: npt.NDArray[np.int64], repeated: bool) -> pa.Table:
    return pa.table(
        {
            "split": pa.array([split] * len(documents), type=pa.string()),
            "sequence_id": pa.array(_ids(corpus.digests[documents], repeated)),
            "tokens": pa.array([corpus.document(index) for index in documents], type=pa.list_(pa.int32())),
        }
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
    return "\n".join(
        [
            f"Prepared {str(out_dir)!r}",
            f"  train       {train.tokens:,} tokens in {train.written:,} documents, {train.documents:,} distinct",
            f"  repeated    {train.repeated_documents:,} documents with {train.repeated_tokens:,} tokens ({share:.0%})",
            f"  validation  {val.tokens:,} tokens in {val.documents:,} documents "
            f"({manifest.validation_overlap:,} dropped because they are in the training corpus)",
            f"  IDs         {manifest.colliding_pairs:,} pairs of documents share one; noise {manifest.id_noise:.0%}; "
            f"{manifest.duplicates:,} exact copies in the corpus count as repeats",
            f"  next        litgpt pretrain --config RECIPE.yaml --data.data_path {out_dir}",
        ]
    )
