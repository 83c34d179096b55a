"""What is read, how often it is written, and what is held out: the settings of `prepare`, as recipes name them.

A recipe (`recipes/data/`) lists sources in the order in which they choose their documents: a document belongs to the
first source that takes it, whatever other files hold a copy.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from litgpt_memsinks.errors import MemSinksError

Format = Literal["auto", "jsonl", "json", "parquet", "separated", "text"]
"""``jsonl``: an object per line; ``json``: an array of objects; ``parquet``; ``separated``: a text file of documents
with ``separator`` between them; ``text``: each file is one document. ``auto`` tells by the ending and what a file
begins with, and is an error where that is not clear. All but parquet may be packed: a last ending .gz or .zst."""
IdScheme = Literal["hash", "column", "index", "near_duplicate"]
Choice = Literal["random", "first"]
_MOST_REPEATS = 1_000_000  # its occurrences are in memory at once
_MOST_CHUNK_BYTES = 2_000_000_000  # litdata's chunk files count bytes in 32 bits


@dataclass
class Reading:
    """Which files, and where the text is in them."""

    path: str | list[str] = ""
    """File, folder or pattern (**, *, ?), or a list of them; local, or a URL that fsspec opens (s3://, hf://, ...)"""
    format: Format = "auto"
    """How documents lie in a file"""
    text_field: str = "text"
    """Field of the text; dots lead into nested objects. Plain text has no fields"""
    include: dict[str, list[str]] = field(default_factory=dict)
    """Read only documents whose field (dots lead into nested objects) has one of these values; none that lack it"""
    exclude: dict[str, list[str]] = field(default_factory=dict)
    """Pass over documents whose field has one of these values"""
    separator: str = "<|endoftext|>"
    """What stands between two documents of a `separated` file, with or without line ends around it"""
    id_field: str | None = None
    """Field kept in the document table as `key`, and what `ids: column` makes IDs of"""
    on_bad_line: Literal["error", "skip"] = "error"
    """Stop at a document that cannot be read, or pass over it and count it; what is behind damage is lost"""

    def reading(self) -> "Reading":
        """These settings alone, without those of a source or a validation set."""
        return Reading(**{item.name: getattr(self, item.name) for item in fields(Reading)})

    def check_reading(self, where: str) -> None:
        """Raise if the settings make no sense.

        Args:
            where: How the recipe names these settings.

        Raises:
            MemSinksError: Naming the setting, its value and what it may be.
        """
        paths = [self.path] if isinstance(self.path, str) else self.path
        if not paths or not all(paths):
            raise MemSinksError(f"{where}.path is {self.path!r}. Name a file, a folder or a pattern.")
        if not self.text_field:
            raise MemSinksError(f"{where}.text_field is empty. Name the field of the text.")
        if not self.separator:
            raise MemSinksError(f"{where}.separator is empty. Name what stands between two documents.")
        for name in sorted(self.include.keys() & self.exclude.keys()):
            raise MemSinksError(f"{where} has {name!r} in include and in exclude. Keep one of them.")


@dataclass
class Source(Reading):
    """Documents to train on."""

    repeats: int | None = None
    """How often each document is written, exactly; by default as often as the files hold it"""
    documents: int | None = None
    """How many different documents to take; all by default"""
    tokens: int | None = None
    """How many tokens of different documents to take, up to the document that reaches it; all by default"""
    fill_to: int | None = None
    """Take documents until the whole training stream, repeats included, has so many tokens. Of one source, the last"""
    choose: Choice = "random"
    """Under a limit: documents drawn by the seed, which reads all files; or the first ones, which stops early"""
    ids: IdScheme = "hash"
    """Documents that share an ID share their sinks. `hash`: equal tokens; `column`: equal `id_field`; `index`: none;
    `near_duplicate`: near-duplicates"""
    canary_tokens: int = 0
    """Random tokens appended to each document (TS-Canary, Sec. 3)"""

    def check(self, where: str) -> None:
        """Raise if the settings make no sense; see ``check_reading``.

        Raises:
            MemSinksError: Naming the setting, its value and what it may be.
        """
        self.check_reading(where)
        if self.repeats is not None and self.repeats > _MOST_REPEATS:
            raise MemSinksError(f"{where}.repeats is {self.repeats}, but it must be at most {_MOST_REPEATS:,}.")
        _check_at_least(where, 1, repeats=self.repeats, tokens=self.tokens, fill_to=self.fill_to)
        _check_at_least(where, 0, documents=self.documents, canary_tokens=self.canary_tokens)
        limits = [name for name in ("documents", "tokens", "fill_to") if getattr(self, name) is not None]
        if len(limits) > 1:
            raise MemSinksError(f"{where} has {' and '.join(limits)}. Keep one limit.")
        if self.ids == "column" and self.id_field is None:
            raise MemSinksError(f"{where}.ids is 'column', but {where}.id_field is not set. Name the field.")


@dataclass
class ValidationSet(Reading):
    """Documents to validate on. Those that are trained on are dropped from it, unless it holds them out."""

    documents: int | None = None
    """How many different documents to take; all by default"""
    fraction: float | None = None
    """Which fraction of the different documents to take"""
    choose: Choice = "random"
    """Under a limit: documents drawn by the seed, or the first ones"""
    hold_out: bool = False
    """Take documents from the files of a source, before it chooses: none of them is trained on"""

    def check(self, where: str) -> None:
        """Raise if the settings make no sense; see ``check_reading``.

        Raises:
            MemSinksError: Naming the setting, its value and what it may be.
        """
        self.check_reading(where)
        _check_at_least(where, 1, documents=self.documents)
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise MemSinksError(f"{where}.fraction is {self.fraction}, but it must be above 0 and below 1.")
        if self.fraction is not None and self.documents is not None:
            raise MemSinksError(f"{where} has documents and fraction. Keep one limit.")
        if self.hold_out and self.fraction is None and self.documents is None:
            raise MemSinksError(f"{where}.hold_out takes every document away from training. Set fraction or documents.")


@dataclass
class NearDuplicates:
    """What counts as a near-duplicate: MinHash over word shingles, see `near_duplicates.py`.

    With the defaults nearly all copies are found of which up to 10 % of the words were edited, and hardly any of which
    20 % were; `docs/near_duplicates.md` has the measurements, and how to make them on a corpus of your own.
    """

    threshold: float = 0.6
    """Least Jaccard similarity of two near-duplicates' sets of shingles. Lower finds more heavily edited copies, and
    takes more different documents for copies"""
    shingle_size: int = 2
    """Words in a shingle. An edited word changes so many shingles, so longer ones need a lower threshold"""
    permutations: int = 128
    """Numbers in a MinHash signature: more are more exact and take more disk, 4 bytes each per document"""
    seed: int = 1
    """Seed of the hash functions"""
    drop_validation: bool = False
    """Drop validation documents that are near-duplicates of documents that are trained on"""

    def check(self) -> None:
        """Raise if the settings make no sense.

        Raises:
            MemSinksError: Naming the setting, its value and what it may be.
        """
        if not 0 < self.threshold <= 1:
            raise MemSinksError(f"near_duplicates.threshold is {self.threshold}, but it must be above 0, at most 1.")
        _check_at_least("near_duplicates", 1, shingle_size=self.shingle_size)
        _check_at_least("near_duplicates", 16, permutations=self.permutations)
        _check_at_least("near_duplicates", 0, seed=self.seed)


@dataclass
class Mixture:
    """A whole recipe: what decides which tokens and IDs are written, and in which order."""

    sources: dict[str, Source]
    """Training documents, in the order in which they choose"""
    validation: dict[str, ValidationSet]
    """Validation documents by the name of their set"""
    near_duplicates: NearDuplicates = field(default_factory=NearDuplicates)
    """What counts as a near-duplicate"""
    leave_out_repeated: bool = False
    """Leave documents that repeat out of training"""
    id_noise: float = 0.0
    """Probability that an occurrence of a repeated document carries a random ID (Sec. 5.3)"""
    seed: int = 0
    """Seed of the choice of documents, the shuffle, canaries and the noise"""
    chunk_bytes: int = 64_000_000
    """Size of a chunk file in bytes; a token takes 8"""

    def check(self) -> None:
        """Raise if the settings make no sense.

        Raises:
            MemSinksError: Naming the setting, its value and what it may be.
        """
        if not self.sources:
            raise MemSinksError("There is no source to train on. Give --train CORPUS, or a recipe with sources.")
        if not self.validation:
            raise MemSinksError("There is no validation set. Name one, or hold one out of a source (hold_out).")
        for name, source in self.sources.items():
            source.check(f"sources.{name}")
        for name, validation in self.validation.items():
            validation.check(f"validation.{name}")
            if validation.hold_out and validation.reading() not in [
                source.reading() for source in self.sources.values()
            ]:
                raise MemSinksError(
                    f"validation.{name}.hold_out takes documents from a source's files, but no source reads "
                    f"{validation.path!r} like it. Give it the path, text_field, include, ... of that source."
                )
        if both := sorted(self.sources.keys() & self.validation.keys()):
            raise MemSinksError(f"A source and a validation set are both called {both[0]!r}. Give each its own name.")
        for name in list(self.sources)[:-1]:
            if self.sources[name].fill_to is not None:
                raise MemSinksError(f"sources.{name} has fill_to, but is not the last source. Put it last.")
        for name in (*self.sources, *self.validation):
            if not name.replace("-", "").replace("_", "").isalnum():
                raise MemSinksError(f"{name!r} is no name for a source. Use letters, digits, - and _.")
        if not 0 <= self.id_noise <= 1:
            raise MemSinksError(f"id_noise is {self.id_noise}, but it must be in [0, 1].")
        _check_at_least("", 0, seed=self.seed)
        _check_at_least("", 4096, chunk_bytes=self.chunk_bytes)
        if self.chunk_bytes > _MOST_CHUNK_BYTES:
            raise MemSinksError(f"chunk_bytes is {self.chunk_bytes}, but it must be at most {_MOST_CHUNK_BYTES}.")
        self.near_duplicates.check()

    def sets(self) -> "dict[str, Source | ValidationSet]":
        """All sources and validation sets by name."""
        return {**self.sources, **self.validation}

    def label(self, name: str) -> str:
        """How the recipe names a source or validation set."""
        return f"{'sources' if name in self.sources else 'validation'}.{name}"

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for the manifest and for comparing recipes."""
        return asdict(self)

    def needs_signatures(self) -> bool:
        """Whether any document is compared with others by its MinHash signature."""
        return self.near_duplicates.drop_validation or any(
            source.ids == "near_duplicate" for source in self.sources.values()
        )


def deduplicated(sources: dict[str, Source], tokens: int) -> dict[str, Source]:
    """The same sources with every document written once, and more of the last one: the paper's "deduplicated" (App. I).

    For ``prepare``'s recipe of the baseline that sees no repeats at the same token budget. Each source but the last
    chooses the documents that it chose before.

    Args:
        sources: As in ``Mixture``.
        tokens: Of the training stream with repeats, as its manifest counts them; the new stream ends with the document
            that reaches them. `prepare` refuses a last source with too little text.
    """
    once = {name: replace(source, repeats=1) for name, source in sources.items()}
    last = list(once)[-1]
    return {**once, last: replace(once[last], documents=None, tokens=None, fill_to=tokens)}


def _check_at_least(where: str, least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            prefix = f"{where}." if where else ""
            raise MemSinksError(f"{prefix}{name} is {value}, but it must be at least {least}.")
