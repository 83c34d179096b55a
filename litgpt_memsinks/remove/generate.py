"""What do the sinks hold? The continuation of a prompt with the sinks of some documents on, beside the one without.

LitGPT's own loop generates, with its KV cache. The mask is the same for every token of prompt and continuation, so the
loop needs no change: it sees a model that has the mask built in.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from lightning.fabric import seed_everything
from litgpt.generate.base import generate as base_generate
from litgpt.tokenizer import Tokenizer

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import load_model
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.prepared.chosen import Chosen, choose
from litgpt_memsinks.remove.pool import numbers_of, union


class Switched(nn.Module):
    """A model in eval mode with the same sinks on for every token.

    Args:
        model: With sinks.
        sinks: Which are on, bool ``(n_sink,)``; ``None``: dropped.
    """

    def __init__(self, model: GPT, sinks: torch.Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.sinks = None if sinks is None else sinks.view(1, 1, -1)

    @property
    def max_seq_length(self) -> int:
        """LitGPT's loop checks it."""
        return self.model.max_seq_length

    def forward(self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """As LitGPT's loop calls its model; logits ``(B, T, padded_vocab_size)``."""
        return self.model(idx, input_pos, sinks=self.sinks, **kwargs)


def generate(
    checkpoint_dir: Path,
    prompt: str,
    document: str = "",
    id: str = "",
    source: str = "",
    data_path: Path | None = None,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int = 1234,
) -> None:
    """Continue a prompt with the sinks of some documents on, and with sinks dropped.

    Give one of document, id and source. With temperature 0 the likeliest token is taken each time.

    Args:
        checkpoint_dir: Checkpoint of a model with sinks, with its tokenizer.
        prompt: How the text begins.
        document: A document's whole text: its sinks.
        id: A sequence ID, or several with commas between them: their sinks. Believed without data_path.
        source: Name of a source: the sinks of all its documents together.
        data_path: Folder that `prepare` wrote and that the model was trained on.
        max_new_tokens: Tokens to generate at most.
        temperature: Higher is more random; 0 is greedy.
        top_k: Sample from the likeliest so many tokens.
        top_p: Sample from the likeliest tokens of this probability together.
        seed: Of the sampling.

    Raises:
        MemSinksError: If the checkpoint has no sinks or no tokenizer, a document is not found, or for bad input.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    if not (document or id or source):
        raise MemSinksError("Whose sinks? Give one of --document, --id and --source.")
    model = load_model(checkpoint_dir)
    if not isinstance(model, GPT) or not model.config.n_sink:
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} has no sinks. Use litgpt generate, or name a checkpoint with its sinks."
        )
    tokenizer = _tokenizer(checkpoint_dir)
    tokens = tokenizer.encode(prompt)
    chosen = choose(data_path, ids=id, source=source, text=document)
    sinks = sinks_of(model, chosen)
    print(f"Sinks of {chosen.rule}: {int(sinks.sum()):,} of {model.config.n_sink:,} in each MLP.")
    for title, on in (("With these sinks", sinks), ("Sinks dropped", None)):
        seed_everything(seed, verbose=False)
        found = continuation(model, on, tokens, max_new_tokens, tokenizer.eos_id, temperature, top_k, top_p)
        print(f"\n{title}:\n{tokenizer.decode(torch.cat((tokens, found)))}")


def sinks_of(model: GPT, chosen: Chosen) -> torch.Tensor:
    """The sinks that any of the documents uses, bool ``(n_sink,)``.

    Raises:
        MemSinksError: If none of them has sinks.
    """
    config = model.config
    # IDs without a prepared folder are believed to repeat
    numbers = numbers_of(chosen.rows, config.sink_sinks_for) if chosen.rows.num_rows else chosen.ids
    if not numbers:
        raise MemSinksError(
            f"Of {chosen.rule}, none occurs more than once, and this model has sinks for repeated documents only. "
            "Choose a repeated document."
        )
    return union(config, numbers)


def continuation(
    model: GPT,
    sinks: torch.Tensor | None,
    tokens: torch.Tensor,
    max_new_tokens: int,
    eos: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Continue tokens by LitGPT's loop with a KV cache.

    Args:
        model: In eval mode.
        sinks: Which are on, bool ``(n_sink,)``; ``None``: dropped.
        tokens: ``(n_tokens,)``.
        max_new_tokens: Most tokens to generate.
        eos: Token that ends a text; it is left out.
        temperature: 0 is greedy.
        top_k: Sample from the likeliest so many tokens.
        top_p: Sample from the likeliest tokens of this probability together.

    Returns:
        The new tokens, int64 ``(n,)``.

    Raises:
        MemSinksError: If the model's context is too short.
    """
    longest = model.config.block_size
    if not len(tokens):
        raise MemSinksError("The prompt has no tokens. Give some text to continue.")
    if len(tokens) + max_new_tokens > longest:
        raise MemSinksError(
            f"The prompt has {len(tokens)} tokens and max_new_tokens is {max_new_tokens}, but the model's context has "
            f"{longest}. Shorten one of them."
        )
    model.max_seq_length = len(tokens) + max_new_tokens
    model.set_kv_cache(batch_size=1)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "eos_id": eos}
    try:
        found = base_generate(
            Switched(model, sinks), tokens.long(), model.max_seq_length, include_prompt=False, **settings
        )
    finally:
        model.clear_kv_cache()
        model.max_seq_length = longest
    found = found.long()
    return found[:-1] if len(found) and eos is not None and found[-1] == eos else found


def _tokenizer(checkpoint_dir: Path) -> Tokenizer:
    if not any((checkpoint_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise MemSinksError(
            f"{str(checkpoint_dir)!r} has no tokenizer. Copy the files of the prepared folder's tokenizer/ there."
        )
    return Tokenizer(checkpoint_dir)


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if value is not None and value < 1:
            raise MemSinksError(f"{name} is {value}, but it must be at least 1.")
    if not temperature >= 0:
        raise MemSinksError(f"temperature is {temperature}, but it must be at least 0, which is greedy.")
    if not 0 <= top_p <= 1:
        raise MemSinksError(f"top_p is {top_p}, but it must lie in [0, 1].")
