"""Does a certificate of removal hold? Everything in it that can be computed again is, from the files it names.

The rule, the date and the versions are words: only a signature of the file vouches for them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt_memsinks.certificate.affected import coverage, documents_of, neurons, numbers
from litgpt_memsinks.certificate.before_after import Losses, Settings, gate_of, grouped, losses
from litgpt_memsinks.certificate.certificate import data_digests, digests
from litgpt_memsinks.certificate.difference import compare
from litgpt_memsinks.certificate.file import read_certificate
from litgpt_memsinks.data.scored import read_scored
from litgpt_memsinks.digests import CERTIFICATE, CONTENT, content_sha256
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import CONFIG, WEIGHTS

_WIDTH = 160  # of a table that is not on a terminal
_NAMED = 4  # failures named in the error
_SAID = {True: ("yes", "green"), False: ("NO", "bold red"), None: ("not checked", "yellow")}


@dataclass
class Check:
    """One statement of a certificate."""

    name: str
    """What it is about"""
    holds: bool | None
    """Whether it does; ``None`` if it was not checked"""
    found: str
    """What was found, or why it was not checked"""


def verify_removal(
    certificate: Path,
    before: Path | None = None,
    after: Path | None = None,
    data_path: Path | None = None,
    device: str | None = None,
) -> None:
    """Compute a certificate of removal again, and say line by line what holds.

    It ends with status 1 if anything does not hold. What is not given is not checked, and that is said. Losses may
    differ by 0.001 nats per token in float32, and by 0.02 in 16 bits. The rule, the date and the versions are words,
    which cannot be checked.

    Args:
        certificate: certificate.json, or the folder with it.
        before: Checkpoint before removal.
        after: Checkpoint after it. By default the folder of the certificate, if it is one.
        data_path: Prepared folder that the losses were measured on.
        device: Where to compute, cpu or cuda. As it was measured by default.

    Raises:
        MemSinksError: If anything does not hold, or cannot be read.
    """
    path = certificate / CERTIFICATE if certificate.is_dir() else certificate
    content = read_certificate(path)
    if after is None and (path.parent / WEIGHTS).is_file():
        after = path.parent
    checks = _Checks(content, before, after, data_path, device).run()
    _print(checks)
    if failed := [check for check in checks if check.holds is False]:
        more = f"; and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        reasons = "; ".join(f"{check.name}: {check.found}" for check in failed[:_NAMED])
        raise MemSinksError(
            f"{str(path)!r} does not hold ({reasons}{more}). Do not rely on it: make a new one with "
            "`litgpt-memsinks certify` from files that you trust."
        )
    unchecked = sum(check.holds is None for check in checks)
    print(
        f"OK: {len(checks) - unchecked} statements of {str(path)!r} hold"
        + (f"; {unchecked} were NOT checked, see above." if unchecked else ".")
    )


# ------------------------------------------------------------------------------------------------------------- checking


class _Checks:
    """Computes a certificate again.

    Args:
        content: The certificate.
        before: Checkpoint before removal, if given.
        after: Checkpoint after it, if given.
        data_path: Prepared folder, if given.
        device: Where to compute; as the certificate says by default.
    """

    def __init__(
        self,
        content: dict[str, Any],
        before: Path | None,
        after: Path | None,
        data_path: Path | None,
        device: str | None,
    ) -> None:
        self.content, self.data_path, self.device = content, data_path, device
        self.folders = {"before": before, "after": after}
        self.checks: list[Check] = []
        kind = content["kind"]
        listed = content["documents"]["kept" if kind == "keep" else "removed"]
        self.ids = None if listed is None else numbers(entry["id"] for entry in listed)

    def run(self) -> list[Check]:
        """Check everything that what is given allows."""
        self.equal("the certificate's own digest", self.content[CONTENT], content_sha256(self.content))
        sides = {side: self.checkpoint(side, folder) for side, folder in self.folders.items()}
        data = self.data()
        if all(sides.values()):
            self.weights(data)
        else:
            self.skip("which sinks are gone", "needs both checkpoints, as certified")
        self.losses(sides, data)
        return self.checks

    def equal(self, name: str, certified: Any, found: Any) -> bool:
        """Note whether a value is what it should be."""
        same = bool(certified == found) and type(certified) is type(found)
        text = _short(found) if same else f"{_short(found)}, certified {_short(certified)}"
        self.checks.append(Check(name, same, text))
        return same

    def skip(self, name: str, reason: str) -> None:
        """Note that something was not checked."""
        self.checks.append(Check(name, None, reason))

    def all_equal(self, name: str, certified: dict[str, Any], found: dict[str, Any]) -> bool:
        """Note whether every value of a part is what it should be; names of folders do not count."""
        keys = [key for key in {**certified, **found} if key != "folder"]
        return all([self.equal(f"{name}, {_words(key)}", certified.get(key), found.get(key)) for key in keys])

    def checkpoint(self, side: str, folder: Path | None) -> bool:
        """Check a folder's digests; whether its weights and configuration are those that were certified."""
        if folder is None:
            self.skip(f"checkpoint {side}", f"not given: --{side} DIR")
            return False
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            raise MemSinksError(
                f"{str(folder)!r} is not a LitGPT checkpoint: it has no {missing[0]}. Name the right one."
            )
        found = digests(folder, folder)
        self.all_equal(side, self.content[side], found)
        return all(found[key] == self.content[side][key] for key in ("weights_sha256", "config_sha256"))

    def data(self) -> bool:
        """Check the prepared folder; whether its documents are those that were scored."""
        if self.content["data"] is None:
            self.skip("data and losses", "the certificate was made without data")
            return False
        if self.data_path is None:
            self.skip("data", "not given: --data_path DIR")
            return False
        return self.all_equal("data", self.content["data"], data_digests(self.data_path))

    def weights(self, data: bool) -> None:
        """Compare the checkpoints bit by bit, and set the documents against what is gone."""
        before, after = self.folders["before"], self.folders["after"]
        assert before is not None  # both were checked
        assert after is not None
        try:
            difference = compare(before, after)
        except MemSinksError as error:
            self.checks.append(Check("which sinks are gone", False, str(error)))
            return
        self.equal("kind of removal, by the weights", self.content["kind"], difference.kind)
        if difference.kind != self.content["kind"]:
            return
        self.all_equal("neurons", self.content["neurons"], neurons(difference, self.ids))
        repeated = read_scored(self.data_path, "repeated").sequence_ids if data and self.data_path else None
        found = coverage(difference, self.ids, repeated)
        if repeated is None and self.content["data"] is not None:
            found.pop("others")
            self.skip("coverage, others", "needs the data, as certified")
        self.all_equal("coverage", {key: self.content["coverage"][key] for key in found}, found)
        if repeated is not None or self.content["data"] is None:
            listed = documents_of(difference.kind, self.ids, self.data_path if repeated is not None else None)
            for key, documents in listed.items():
                self.equal(f"documents {key}, and their digests", self.content["documents"][key], documents)

    def losses(self, sides: dict[str, bool], data: bool) -> None:
        """Score the documents again."""
        certified = self.content["losses"]
        if certified is None:
            return
        settings = self.content["settings"]
        measured = Settings(settings["block_size"], settings["limit"], self.device or settings["device"])
        groups = None
        for side, folder in self.folders.items():
            if not (data and sides[side]) or folder is None or self.data_path is None:
                self.skip(f"losses {side}", f"needs the data and the checkpoint {side}, as certified")
                continue
            measured.check()
            groups = groups or grouped(self.data_path, self.content["kind"], self.ids, measured.limit)
            found, used = losses(folder, groups, self.data_path, measured)
            if side == "before":
                used |= {"device": settings["device"]}
                self.all_equal("settings", settings, used)
                self.gate(found, used["tolerance"])
            self.close(side, certified[side], found, used["tolerance"])

    def close(self, side: str, certified: Losses, found: Losses, tolerance: float) -> None:
        """Compare losses, a line for each."""
        for group in dict.fromkeys([*found, *certified]):
            for state in dict.fromkeys([*found.get(group, {}), *certified.get(group, {})]):
                name = f"loss {side}, {group}, {state}"
                old, new = certified.get(group, {}).get(state), found.get(group, {}).get(state)
                if old is None or new is None:
                    self.checks.append(Check(name, False, "certified only" if old else "not certified"))
                    continue
                counts = all(old.get(key) == new[key] for key in ("targets", "documents"))
                self.near(name, old["loss"], new["loss"], tolerance, counts)

    def gate(self, found: Losses, tolerance: float) -> None:
        """Compare the wrong-map gate, which must be passed."""
        certified, gate = self.content["gate"], gate_of(found)
        for state in ("own", "placebo"):
            counts = certified["documents"] == gate["documents"]
            self.near(f"wrong-map gate, {state}", certified[state], gate[state], tolerance, counts)
        passed = gate["own"] < gate["placebo"]
        self.checks.append(Check("wrong-map gate, own < placebo", passed, f"{gate['own']} and {gate['placebo']}"))

    def near(self, name: str, certified: float, found: float, tolerance: float, counts: bool) -> None:
        """Note whether a loss is what it should be, and of as many documents."""
        text = f"{found:.6f}, certified {certified:.6f}" + (
            "" if counts else ", of other numbers of documents or tokens"
        )
        self.checks.append(Check(name, counts and abs(found - certified) <= tolerance, text))


def _words(key: str) -> str:
    return key.replace("_sha256", " SHA-256").replace("_", " ")


def _short(value: Any) -> str:
    text = str(value)
    text = text if text.isprintable() else ascii(text)  # a certificate may hold anything
    return text if len(text) <= 40 else f"{text[:16]}... ({len(text)} characters)"


def _print(checks: list[Check]) -> None:
    table = Table(box=None)
    for name in ("statement", "holds", "found"):
        table.add_column(name, overflow="fold")
    for check in checks:
        word, style = _SAID[check.holds]
        table.add_row(Text(check.name), Text(word, style), Text(check.found))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
