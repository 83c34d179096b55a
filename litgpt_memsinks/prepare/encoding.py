"""Texts to tokens as LitGPT encodes them, but many at once, and each word only once.

A byte-level BPE tokenizer first cuts a text into words, and a single space between two words always begins a new one.
So what lies between such spaces can be encoded by itself, and most of it has been seen before: a table of the frequent
words makes encoding several times faster than the tokenizer alone. Tokenizers of which this is not known to hold encode
whole texts. Either way every token comes from the tokenizer itself.
"""

import json
import re
import threading
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.errors import MemSinksError

_WORDS, _LONGEST_WORD = 200_000, 64  # kept in the table: some 40 MB; longer words rarely come again
_BETWEEN_WORDS = re.compile(r" (?<=\S )(?=\S)")
"""A single space between two characters that are no blanks: each begins a word. It is looked for first, which is three
times as fast as to look behind at every character."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|{_OTHERS}"
    for digits in ("{1,3}", "")  # Llama 3, Qwen 2
}
"""Regular expressions of pre-tokenizers that begin a new word at a single space."""


def load_tokenizer(tokenizer_dir: Path, special: dict[str, int | None] | None = None) -> Tokenizer:
    """Load a tokenizer as LitGPT does, and check that it can separate documents.

    Args:
        tokenizer_dir: Its folder.
        special: Tokens of ``special_tokens`` that it is to use. LitGPT goes by the folder's name, too, when it decides
            whether to put BOS in front, and a copy has another name.

    Raises:
        MemSinksError: If the tokenizer cannot be loaded, has no end-of-sequence token, or wants a BOS that it has not.
    """
    try:
        tokenizer = Tokenizer(tokenizer_dir)
    except Exception as error:
        # tokenizers raises Exception itself, LitGPT what a damaged or unusual file brings about
        if type(error) is not Exception and not isinstance(error, (ValueError, KeyError, ImportError, OSError)):
            raise
        raise MemSinksError(
            f"The tokenizer at {str(tokenizer_dir)!r} cannot be loaded: {' '.join(str(error).split()) or repr(error)}. "
            "Download it again, or mend its files."
        ) from error
    if special is not None:
        tokenizer.use_bos, tokenizer.eos_id = special["bos"] is not None, special["eos"]
        tokenizer.bos_id = special["bos"] if tokenizer.use_bos else tokenizer.bos_id
    if tokenizer.eos_id is None:
        raise MemSinksError("The tokenizer has no eos_token, which separates documents. Add one to its configuration.")
    if tokenizer.use_bos and tokenizer.bos_id is None:
        raise MemSinksError("The tokenizer is to add a bos_token, but has none. Correct tokenizer_config.json.")
    if tokenizer.backend == "huggingface":
        # some tokenizer files carry settings of the script that saved them
        tokenizer.processor.no_padding()
        tokenizer.processor.no_truncation()
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The tokens that LitGPT puts around a text: they are of other files than the tokenizer's fingerprint is."""
    return {"bos": tokenizer.bos_id if tokenizer.use_bos else None, "eos": tokenizer.eos_id}


class Encoder:
    """Encodes documents as ``tokenizer.encode(text, eos=True)`` does.

    BOS goes in front where the tokenizer asks for it, and exactly one EOS behind: LitGPT's would drop it from a text
    that ends in EOS already.

    Args:
        tokenizer: Of ``load_tokenizer``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.by_words = tokenizer.backend == "huggingface" and begins_words_at_spaces(tokenizer)
        self._table = _Table()
        self._start = np.array([tokenizer.bos_id] if tokenizer.use_bos else [], dtype=np.int32).tobytes()
        self._end = np.array([tokenizer.eos_id], dtype=np.int32).tobytes()
        if self.by_words:
            added = tokenizer.processor.encode("").ids
            self._adds_bos, self._adds_eos = tokenizer.bos_id in added, tokenizer.eos_id in added

    @cached_property
    def largest_token(self) -> int:
        """The largest token that there is."""
        if self.tokenizer.backend != "huggingface":
            return int(self.tokenizer.vocab_size) - 1
        ids = [*self.tokenizer.processor.get_vocab().values(), self.tokenizer.bos_id or 0, self.tokenizer.eos_id or 0]
        return int(max(ids))

    def __call__(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Encode documents.

        Returns:
            One int32 array ``(n_tokens,)`` for each.
        """
        if self.tokenizer.backend != "huggingface":
            return [self.tokenizer.encode(text, eos=True).numpy().astype(np.int32) for text in texts]
        if self.by_words:
            bodies = self._encode_words(texts)
        else:
            encodings = self.tokenizer.processor.encode_batch_fast(list(texts))
            bodies = [self._trim(_bytes(encoding.ids)) for encoding in encodings]
        return [np.frombuffer(self._start + body + self._end, dtype=np.int32) for body in bodies]

    def _encode_words(self, texts: Sequence[str]) -> list[bytes]:
        """Tokens of the texts without BOS and EOS."""
        missed = self._table.note_missed()
        documents: list[list[bytes | str]] = [list(map(self._table.__getitem__, pieces(text))) for text in texts]
        new = self._learn(list(missed))
        return [self._trim(_join(parts, new), self._adds_bos, self._adds_eos) for parts in documents]

    def _learn(self, missed: list[str]) -> dict[str, bytes]:
        """Encode the pieces that were not in the table, and keep them for later texts while there is room."""
        words = [piece[1:] if piece[0] == " " else f" {piece}" for piece in missed]
        encodings = self.tokenizer.processor.encode_batch_fast(words, add_special_tokens=False)
        new: dict[str, bytes] = {}
        for piece, encoding in zip(missed, encodings, strict=True):
            new[piece] = tokens = array("i", encoding.ids).tobytes()
            if len(piece) <= _LONGEST_WORD and len(self._table) < _WORDS and _is_one_word(piece):
                self._table[piece] = tokens
        return new

    def _trim(self, body: bytes, keep_bos: bool = False, keep_eos: bool = False) -> bytes:
        """Drop the BOS and EOS that some tokenizers add by themselves, and an EOS that a text ends in."""
        size = len(self._end)
        if not keep_bos and self.tokenizer.bos_id is not None and body[:size] == _bytes([self.tokenizer.bos_id]):
            body = body[size:]
        return body[:-size] if not keep_eos and body[-size:] == self._end else body


def _bytes(ids: list[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


class _Table(dict[str, bytes]):
    """Tokens of pieces. What is looked up and not there is noted, thread by thread, and given back itself."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.local()

    def note_missed(self) -> dict[str, None]:
        """What this thread looks up in vain from now on, each piece once."""
        missed: dict[str, None] = {}
        self._thread.missed = missed
        return missed

    def __missing__(self, piece: str) -> str:
        self._thread.missed[piece] = None
        return piece


def pieces(text: str) -> list[str]:
    """Cut a text at the spaces that begin a word.

    The space belongs to the piece behind it, but is left out. The first piece, which has none, has one in front here
    instead: no other piece begins with a blank, so this tells it apart.
    """
    found = _BETWEEN_WORDS.split(text)
    found[0] = f" {found[0]}"
    return found


def _join(parts: list[bytes | str], new: dict[str, bytes]) -> bytes:
    try:
        return b"".join(parts)  # type: ignore[arg-type]
    except TypeError:  # some were not in the table
        return b"".join([part if type(part) is bytes else new[part] for part in parts])  # type: ignore[index]


def _is_one_word(piece: str) -> bool:
    """Whether a piece is no blank at its ends and holds no space. Others rarely come again."""
    body = piece.removeprefix(" ")
    return bool(body) and " " not in body and not body[0].isspace() and not body[-1].isspace()


def begins_words_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is known to begin a word at each single space between two characters that are no blanks.

    Then encoding piece by piece gives the same tokens. That holds for byte-level BPE with the regular expressions of
    GPT-2 (SmolLM, Pythia, ...), Llama 3 or Qwen, unless special tokens reach over spaces or it adds tokens of its own.
    """
    settings = json.loads(tokenizer.processor.to_str())
    model, normalizer = settings["model"], settings["normalizer"] or {"type": "NFC"}
    specials = {tokenizer.bos_id, tokenizer.eos_id}
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and normalizer["type"] == "NFC"
        and _cuts_at_spaces(settings["pre_tokenizer"])
        and set(tokenizer.processor.encode("").ids) <= specials
        and not any(_reaches_over_a_space(token) for token in settings["added_tokens"])
    )


def _cuts_at_spaces(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer is one of those known to begin a word at a single space."""
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *others, last = steps
    if last["type"] != "ByteLevel":
        return False
    splits = [step for step in others if step["type"] == "Split"]
    if any(step["type"] not in ("Digits", "Split") for step in others):
        return False
    if last["use_regex"]:
        return not splits
    return len(splits) == 1 and splits[0]["pattern"].get("Regex") in _SPLITS and splits[0]["behavior"] == "Isolated"


def _reaches_over_a_space(token: dict[str, Any]) -> bool:
    """Whether an added token could take a single space between two words for itself."""
    blanks = token["content"].isspace() and len(token["content"]) > 1
    return token["rstrip"] or token["single_word"] or (" " in token["content"] and not blanks)
