"""Tokenizers in the shapes that LitGPT's models bring along, made from the small one of conftest.py."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing


def tokenizer_variant(source: Path, folder: Path, template: str, change: dict[str, Any], **config: Any) -> Path:
    """A tokenizer with a BOS of its own, and a processor that adds what ``template`` says.

    ``change`` replaces parts of the file; its ``add`` are further tokens.
    """
    folder.mkdir(parents=True)
    tokenizer = HFTokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", *change.get("add", [])])
    specials = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "<|endoftext|>")]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    content = json.loads(tokenizer.to_str()) | {name: part for name, part in change.items() if name != "add"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# How the processor works, whether LitGPT is told to use BOS, other settings of the file
VARIANTS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "plain": ("$A", False, {}),
    "use_bos": ("$A", True, {}),
    "adds_bos": ("<s> $A", False, {}),
    "adds_bos-use_bos": ("<s> $A", True, {}),
    "adds_bos_and_eos-use_bos": ("<s> $A <|endoftext|>", True, {}),
    "adds_eos": ("$A <|endoftext|>", False, {}),
    # as files have it that were saved from a fine-tuning or embedding script
    "pads": (
        "$A",
        False,
        {
            "padding": {
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 5,
                "pad_type_id": 0,
                "pad_token": "&",
            }
        },
    ),
}


def _byte_level(**change: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True} | change


def _split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST

# Change of the file, and whether words can be encoded by themselves
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt2": ({"pre_tokenizer": _byte_level()}, True),
    "gpt2-prefix_space": ({"pre_tokenizer": _byte_level(add_prefix_space=True)}, True),
    "smollm": (_sequence({"type": "Digits", "individual_digits": True}, _byte_level()), True),
    "llama3": (_sequence(_split(_LLAMA_3), _byte_level(use_regex=False)), True),
    "qwen2": (_sequence(_split(_LLAMA_3.replace("{1,3}", "")), _byte_level(use_regex=False)), True),
    "nfc": ({"normalizer": {"type": "NFC"}}, True),
    "pythia": ({"add": ["  ", "   "]}, True),
    "strips_left": ({"add": [AddedToken("<x>", lstrip=True)]}, True),
    "strips_right": ({"add": [AddedToken("<x>", rstrip=True)]}, False),
    "token_with_space": ({"add": ["a b"]}, False),
    "whole_words": ({"add": [AddedToken("ab", single_word=True)]}, False),
    "no_words": ({"pre_tokenizer": None}, False),
    "no_regex": ({"pre_tokenizer": _byte_level(use_regex=False)}, False),
    "other_regex": (_sequence(_split(r"[a-z ]+"), _byte_level(use_regex=False)), False),
    "merging": (_sequence(_split(_LLAMA_3, "MergedWithNext"), _byte_level(use_regex=False)), False),
    "nfkc": ({"normalizer": {"type": "NFKC"}}, False),
    "lower": ({"normalizer": {"type": "Lowercase"}}, False),
}
