"""What was removed, from what, and what is left of it? One JSON file and one page beside the checkpoint that is left.

The certificate states what can be computed again from the two checkpoints and the prepared data: digests, which hidden
neurons are gone, and losses before and after. `verify_removal.py` does so. It is not signed: its own digest shows that
it was edited, not who wrote it.
"""

from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from litgpt_memsinks.certificate.affected import coverage, documents_of, found_by_weights, neurons, numbers
from litgpt_memsinks.certificate.before_after import Settings, measure
from litgpt_memsinks.certificate.difference import Difference, Kind, compare
from litgpt_memsinks.certificate.page import page
from litgpt_memsinks.data.scored import read_scored
from litgpt_memsinks.digests import (
    CERTIFICATE,
    CONTENT,
    PAGE,
    content_sha256,
    file_sha256,
    folder_sha256,
    tree_sha256,
)
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import refuse_to_overwrite, write_json, write_text
from litgpt_memsinks.model.checkpoint import CONFIG, WEIGHTS
from litgpt_memsinks.prepare.manifest import EVALUATION, MANIFEST, Manifest

FORMAT = 1
"""Version of the certificate's keys. A reader refuses any other."""
PACKAGES = ("litgpt-memsinks", "litgpt", "torch")


def write_certificate(
    before: Path,
    after: Path,
    out: Path,
    rule: str,
    kind: Kind | None = None,
    removed_ids: Sequence[int] | None = None,
    kept_ids: Sequence[int] | None = None,
    data_path: Path | None = None,
    settings: Settings | None = None,
    after_name: Path | None = None,
) -> Path:
    """Compare two checkpoints, measure both, and write ``certificate.json`` and ``certificate.md``.

    Args:
        before: Checkpoint with sinks.
        after: What was made of it, which may be a scratch folder yet.
        out: Folder for the two files, such as `after`.
        rule: One sentence that says what was to be removed or kept.
        kind: What was done. What the weights say must agree; by default they decide.
        removed_ids: Sequence IDs of the documents whose sinks were removed, of kind ``remove``; signs do not count.
        kept_ids: The same of documents whose sinks were kept, of kind ``keep``.
        data_path: Prepared folder that the model was trained on. Without it, losses are not measured.
        settings: How losses are measured.
        after_name: Where `after` will be, if it is a scratch folder.

    Returns:
        The JSON file.

    Raises:
        MemSinksError: If `after` is not `before` with sinks removed; if `kind` or the IDs do not agree with the
            weights; or if own sinks do not help (the wrong-map gate), so that `data_path` is of another model.
    """
    (settings := settings or Settings()).check()
    for name in (CERTIFICATE, PAGE):
        refuse_to_overwrite(out / name)
    difference = compare(before, after)
    claimed = _claimed(difference, kind, removed_ids, kept_ids, after)
    repeated = None if data_path is None else read_scored(data_path, "repeated").sequence_ids
    ids = claimed
    if claimed is None and repeated is not None:
        ids = found_by_weights(difference, repeated)
    facts = neurons(difference, ids)
    if claimed is not None:
        _check_claim(facts, difference.kind)
    content = {
        "format": FORMAT,
        "kind": difference.kind,
        "rule": _text(rule),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in PACKAGES},
        "before": digests(before, before),
        "after": digests(after, after_name or after),
        "data": None if data_path is None else data_digests(data_path),
        "documents": documents_of(difference.kind, ids, data_path),
        "neurons": facts,
        "coverage": coverage(difference, ids, repeated),
        **measure(before, after, difference.kind, ids, data_path, settings),
    }
    content[CONTENT] = content_sha256(content)
    write_text(out / PAGE, page(content))
    write_json(out / CERTIFICATE, content)
    return out / CERTIFICATE


def certify(
    before: Path,
    after: Path,
    data_path: Path | None = None,
    out_dir: Path | None = None,
    block_size: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> None:
    """Find out what became of a checkpoint with sinks, and write a certificate of removal.

    All weights are compared bit by bit: which sinks are gone is read off them. Which documents that concerns is found
    among the repeated documents of the prepared data.

    Args:
        before: Checkpoint with sinks.
        after: What drop_sinks or remove made of it.
        data_path: Folder of `litgpt-memsinks prepare` that the model was trained on. Without it, losses are not
            measured, and documents are not named.
        out_dir: Folder for certificate.json and certificate.md. By default `after`.
        block_size: Most tokens of a document that are scored. The model's context length by default.
        limit: Most documents of each group that are scored. All by default.
        device: Where to compute, cpu or cuda.

    Raises:
        MemSinksError: If `after` is anything else than `before` with sinks removed, or `data_path` is of another model.
    """
    path = write_certificate(
        before,
        after,
        out_dir or after,
        rule="Not stated. What is gone was found by comparing the weights.",
        data_path=data_path,
        settings=Settings(block_size, limit, device),
    )
    print(path.with_name(PAGE).read_text(encoding="utf-8"))
    print(f"Certificate: {path}")


def _claimed(
    difference: Difference,
    kind: Kind | None,
    removed_ids: Sequence[int] | None,
    kept_ids: Sequence[int] | None,
    after: Path,
) -> list[int] | None:
    """Numbers of the documents that were named, if what is said fits the weights."""
    found = difference.kind
    given = {"remove": removed_ids, "keep": kept_ids}
    named = [name for name, ids in given.items() if ids is not None]
    if (kind or found) != found or any(name != found for name in named):
        raise MemSinksError(
            f"{str(after)!r} was to be of kind {kind or named[0]!r}, but by its weights it is {found!r}. Nothing is "
            "certified: make it again."
        )
    ids = given.get(found)
    return None if ids is None else numbers(ids)


def _check_claim(facts: dict[str, Any], kind: Kind) -> None:
    """Sinks that are gone, or kept, must be those of the documents that were named."""
    outside, left = facts["outside_documents"], facts["left_of_documents"]
    if outside or (left and kind == "keep"):
        verb = "removed" if kind == "remove" else "kept"
        raise MemSinksError(
            f"The sinks that were {verb} are not those of the documents: {outside:,} belong to none of them, and "
            f"{left:,} of theirs were not {verb}. Nothing is certified: make the checkpoint again."
        )


def label(folder: Path) -> str:
    """A folder's name with its parent's: enough to recognise it, and nothing else of the machine."""
    return _text("/".join(folder.absolute().parts[-2:]))


def _text(value: str) -> str:
    """Text that JSON and UTF-8 can hold: names of files may be any bytes."""
    return value.encode("utf-8", "replace").decode()


def digests(folder: Path, name: Path) -> dict[str, Any]:
    """What identifies a checkpoint folder.

    Args:
        folder: The checkpoint.
        name: Its name for people.
    """
    files = folder_sha256(folder, f"Digesting {label(name)}")
    return {
        "folder": label(name),
        "weights_sha256": files[WEIGHTS],
        "weights_bytes": (folder / WEIGHTS).stat().st_size,
        "config_sha256": files[CONFIG],
        "tree_sha256": tree_sha256(files),
        "files": len(files),
    }


def data_digests(data_path: Path) -> dict[str, Any]:
    """What identifies a prepared folder, and the documents in it that are scored."""
    manifest = Manifest.read(data_path)
    return {
        "folder": label(data_path),
        "manifest_sha256": file_sha256(data_path / MANIFEST),
        "evaluation_sha256": file_sha256(data_path / EVALUATION),
        "stream_digest": manifest.splits["train"].digest,
    }
