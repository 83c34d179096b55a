"""What comes out, word by word? Continuations of the same documents side by side, with what is the documents' own."""

import re
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from litgpt_memsinks.report.results import Mapping, Results, printable

MARKED_WORDS = 3
"""Shortest run of words that counts as taken from the document"""
EXAMPLES = 4


class Version(NamedTuple):
    """What one model in one state made of a prompt."""

    label: str
    spans: list[tuple[str, bool]]
    """Text, and whether it is the document's"""
    kept: int
    words: int


class Example(NamedTuple):
    """A document, and how models go on with it."""

    prefix: str
    truth: str
    versions: list[Version]


def examples(results: Results) -> list[Example]:
    """Continuations side by side: standard training's, the subject's with own sinks on, and with sinks dropped."""
    shown = [
        (results.role("standard"), "dropped", "standard training"),
        (results.subject, "own", "own sinks on"),
        (results.subject, "dropped", "sinks dropped"),
    ]
    by_document: dict[Any, dict[str, Mapping]] = {}
    length = None
    for arm, state, label in shown:
        for model in results.of(arm)[:1] if arm else []:
            for entry in model["parts"].get("extraction", []):
                length = length or (entry.get("prefix"), entry.get("suffix"))
                same = (entry.get("prefix"), entry.get("suffix")) == length
                if same and entry.get("state") == state and entry.get("prompt") != "wrong":
                    for example in entry.get("examples") or []:
                        by_document.setdefault(example.get("document"), {}).setdefault(label, example)
    fullest = sorted(by_document.values(), key=len, reverse=True)[:EXAMPLES]
    return [_example(versions) for versions in fullest]


def _example(versions: dict[str, Mapping]) -> Example:
    first = next(iter(versions.values()))
    truth = printable(first.get("truth") or "")
    return Example(
        printable(first.get("prefix") or ""),
        truth,
        [version_of(label, truth, printable(example.get("generated") or "")) for label, example in versions.items()],
    )


def version_of(label: str, truth: str, generated: str) -> Version:
    """A continuation with its runs of ``MARKED_WORDS`` words or more that the document has in the same order."""
    words: list[str] = re.findall(r"\S+\s*", generated)
    bare = [word.strip() for word in words]
    spans: list[tuple[str, bool]] = []
    place, kept = 0, 0
    for block in SequenceMatcher(None, truth.split(), bare, autojunk=False).get_matching_blocks():
        if block.size < min(MARKED_WORDS, len(bare)):
            continue
        spans += [
            ("".join(words[place : block.b]), False),
            ("".join(words[block.b : block.b + block.size]), True),
        ]
        place, kept = block.b + block.size, kept + block.size
    spans.append(("".join(words[place:]), False))
    return Version(label, [(text, taken) for text, taken in spans if text], kept, len(bare))
