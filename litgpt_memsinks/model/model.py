"""Which neurons fire? LitGPT's model with MLPs whose sinks are switched per token by the ID of the token's document.

Memorization Sinks (https://arxiv.org/abs/2507.09937), Sec. 5: "we apply the mask over the memorization neurons", with
"the same masking across all MLP layers", "in the output-space after the gating" (App. I.1).

    pairs (B, T, 2) ──► tokens (B, T) ─────────────► wte ─► Block ─► Block ─► ... ─► ln_f ─► lm_head
                   └──► sequence IDs (B, T) ─► sink_mask (B, T, n_sink) ┴────────┴─ where(mask, sinks, 0) in each MLP

Without a mask the sinks are dropped: only the first ``n_shared`` neurons of each MLP are computed, exactly as in the
plain model that `drop_sinks.py` writes.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from litgpt.model import GPT as BaseGPT
from litgpt.model import Block as BaseBlock
from litgpt.model import CausalSelfAttention as BaseCausalSelfAttention
from litgpt.model import GptNeoxMLP as BaseGptNeoxMLP
from litgpt.model import LLaMAMLP as BaseLLaMAMLP
from litgpt.model import batched_index_select, do_softcapping

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.sinks.masks import only_repeated, trained_without, unpack_neurons

MARKER = "n_shared"
"""Name of the buffer that tells a checkpoint with sinks from a plain one: a plain GPT's strict load refuses it."""
REMOVED = "sink_removed"
"""Name of the buffer that travels with weights of which some sinks were removed: uint8 ``(n_sink,)``, 1 if removed."""
ROWS = ("mlp.fc.", "mlp.fc_1.", "mlp.fc_2.")
"""Layers of an MLP whose output neurons are hidden neurons: weights ``(intermediate_size, n_embd)`` and biases."""
COLUMNS = "mlp.proj.weight"
"""Weights whose inputs are hidden neurons: ``(n_embd, intermediate_size)``. Its bias belongs to the residual stream."""


def sliced_dimension(name: str) -> int | None:
    """Along which dimension a parameter of this name has one entry per hidden neuron of an MLP, if any."""
    if any(part in name for part in ROWS):
        return 0
    return 1 if name.endswith(COLUMNS) else None


def removed_mask(config: MemSinksConfig) -> torch.Tensor:
    """Which sinks were removed from a model, bool ``(n_sink,)``. They are zero, and never on."""
    return unpack_neurons(config.sink_removed, config.n_sink)


class GPT(BaseGPT):
    """LitGPT's GPT that also accepts the sequence ID of each token."""

    def __init__(self, config: MemSinksConfig) -> None:
        super().__init__(config)
        self.config: MemSinksConfig = config
        self.transformer.h = nn.ModuleList()  # frees the base class's blocks before ours are made
        self.transformer.h = nn.ModuleList(Block(config, block_idx) for block_idx in range(config.n_layer))
        self.register_buffer(MARKER, torch.tensor(config.n_shared), persistent=True)
        if config.sink_removed:
            removed = torch.empty(config.n_sink, dtype=torch.uint8)  # on the meta device, if that is where we are
            self.register_buffer(REMOVED, removed.copy_(removed_mask(config)), persistent=True)

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> "GPT":
        """Build a registered model; ``kwargs`` as in ``MemSinksConfig.from_name``."""
        return cls(MemSinksConfig.from_name(name, **kwargs))

    def forward(
        self,
        idx: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        input_pos_maxp1: int | None = None,
        lm_head_chunk_size: int = 0,
        sequence_ids: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits with some, or no, sinks switched on.

        Args:
            idx: Tokens ``(B, T)``, or (token, sequence ID) pairs ``(B, T, 2)`` as `data.py` yields them. In training
                the pairs' IDs choose the sinks. In eval mode they do not: sinks are dropped, so that the stock
                validation loss is that of the model that will be released. Under ``attention: document`` they say in
                both which tokens see each other.
            input_pos: Positions for the KV cache, see ``litgpt.GPT.forward``.
            input_pos_maxp1: See ``litgpt.GPT.forward``.
            lm_head_chunk_size: See ``litgpt.GPT.forward``.
            sequence_ids: Integer IDs whose sinks are switched on in any mode, with and without the KV cache; of shape
                ``(B, T)``, or ``(B,)`` for one document per row. Overrides the IDs in ``idx``.
            sinks: The sinks that are on, bool of shape ``(B or 1, T or 1, n_sink)``, such as those of several documents
                at once. Overrides all IDs. Removed ones stay off.

        Returns:
            Logits ``(B, T, padded_vocab_size)``, or a list of chunks, see ``litgpt.GPT.forward``.

        Raises:
            MemSinksError: In training mode without IDs, which would silently train the shared neurons only.
        """
        documents = idx[..., 1] if idx.dim() == 3 else sequence_ids
        if idx.dim() == 3:
            if sequence_ids is None and self.training:
                sequence_ids = self._trained_ids(idx[..., 0], idx[..., 1])
            idx = idx[..., 0]
        if self.training and sequence_ids is None and sinks is None and self.config.n_sink:
            sequence_ids = self._fake_ids(idx)
        if sinks is not None:
            sinks = self._not_removed(sinks)
        elif sequence_ids is not None:
            sinks = self.sinks(sequence_ids)
        attended = None
        if self.config.sink_attention == "document" and documents is not None and documents.shape == idx.shape:
            attended = within_documents(documents)
        if (sinks is None or not self.config.n_sink) and attended is None:
            return super().forward(idx, input_pos, input_pos_maxp1, lm_head_chunk_size)
        return self._forward_with_sinks(idx, sinks, attended, input_pos, input_pos_maxp1, lm_head_chunk_size)

    def sinks(self, sequence_ids: torch.Tensor) -> torch.Tensor:
        """The mask of the sinks that are on under this model's configuration.

        In training under gradient masking, that of the sinks that learn from the token: all, if its document repeats.

        Args:
            sequence_ids: Integer IDs of shape ``(B, T)``, or ``(B,)`` for one document per row.

        Returns:
            bool of shape ``(B, T, n_sink)``, or ``(B, 1, n_sink)``.
        """
        if sequence_ids.dim() == 1:
            sequence_ids = sequence_ids.unsqueeze(-1)
        config = self.config
        if config.sink_sinks_for == "repeated" or (self.training and config.sink_method != "memsinks"):
            sequence_ids = only_repeated(sequence_ids)
        return self._not_removed(config.mask(sequence_ids))

    def _trained_ids(self, tokens: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
        """The IDs whose sinks are on in training, both ``(B, T)``: 0 for none where ``off_share`` says so."""
        if not self.config.sink_off_share:
            return sequence_ids
        off = trained_without(tokens, sequence_ids, self.config.sink_off_share, self.config.sink_seed)
        return torch.where(off, 0, sequence_ids)

    def _not_removed(self, sinks: torch.Tensor) -> torch.Tensor:
        """The same without removed sinks."""
        return sinks & (getattr(self, REMOVED) == 0) if self.config.sink_removed else sinks

    def _fake_ids(self, idx: torch.Tensor) -> torch.Tensor:
        """IDs for LitGPT's FLOP count, which runs the model on the meta device with tokens only."""
        if idx.device.type != "meta":
            raise MemSinksError(
                "A model with sinks was trained on tokens without sequence IDs, which would train its shared neurons "
                "only. Pass pairs of shape (B, T, 2), as litgpt_memsinks.MemSinksData yields them, or `sequence_ids`."
            )
        return torch.ones_like(idx)

    def _forward_with_sinks(
        self,
        idx: torch.Tensor,
        sinks: torch.Tensor | None,
        attended: torch.Tensor | None,
        input_pos: torch.Tensor | None,
        input_pos_maxp1: int | None,
        lm_head_chunk_size: int,
    ) -> torch.Tensor | list[torch.Tensor]:
        """``litgpt.GPT.forward`` restated, because it offers no way to hand its blocks another argument.

        Pinned by ``test_model.py::test_restated_forward_equals_litgpt``. The mask is an argument and not an attribute
        of the modules: side state is wrong under activation checkpointing and breaks the compiled graph.
        """
        T = idx.size(1)
        if self.max_seq_length < T:
            raise ValueError(f"Cannot forward sequence of length {T}, max seq length is only {self.max_seq_length}.")
        cos, sin, mask, input_pos_maxp1 = self._positions(T, input_pos, input_pos_maxp1)
        mask = attended if input_pos is None else mask  # what is in the KV cache is of one document
        x = self.transformer.wte(idx)  # (B, T, n_embd)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)
        for block_idx, block in enumerate(self.transformer.h):
            rope = slice(None) if self.config.rope_indices is None else self.config.rope_indices[block_idx]
            on = sinks if self.config.has_sinks(block_idx) else None
            x = block(x, cos[..., rope], sin[..., rope], mask, input_pos, input_pos_maxp1, on)
        x = self.transformer.ln_f(x)
        threshold = self.config.final_logit_softcapping
        clamp = nn.Identity() if threshold is None else partial(do_softcapping, thresh=threshold)
        if lm_head_chunk_size > 0:
            return [clamp(self.lm_head(x_i)) for x_i in x.split(lm_head_chunk_size, dim=1)]
        return clamp(self.lm_head(x))  # (B, T, padded_vocab_size)

    def _positions(
        self, T: int, input_pos: torch.Tensor | None, input_pos_maxp1: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int | None]:
        """Rotary factors, attention mask and end of the KV cache; part of the restated forward.

        Returns:
            ``cos`` and ``sin`` of shape ``(1 or B, T, rope_n_elem)``, the mask (``None``: causal), ``input_pos_maxp1``.
        """
        if input_pos is None:
            return self.cos[:T].unsqueeze(0), self.sin[:T].unsqueeze(0), None, None
        if input_pos.dim() > 2:
            raise ValueError(f"input_pos must have 1 or 2 dimensions, input_pos.shape = {input_pos.shape}")
        if input_pos.shape[-1] != T:
            raise ValueError(f"input_pos.shape[-1] = {input_pos.shape[-1]} != {T} = idx.shape[1], must be the same")
        if self.mask_cache is None:
            raise TypeError("You need to call `gpt.set_kv_cache()`")
        cos = batched_index_select(self.cos, 0, input_pos)
        sin = batched_index_select(self.sin, 0, input_pos)
        if input_pos.dim() == 1:
            cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        mask = batched_index_select(self.mask_cache, 2, input_pos)
        if mask.dim() > 4:  # the cache's batch dimension of 1 on top of the one of a batched input_pos
            mask = mask.view(*(mask.shape[0:1] + mask.shape[2:]))
        if input_pos_maxp1 is not None:
            if input_pos_maxp1 > self.max_seq_length:
                raise ValueError(f"Positions in 'input_pos' must be in [0,{self.max_seq_length})")
            mask = mask[..., :input_pos_maxp1]
        return cos, sin, mask, input_pos_maxp1

    def reset_parameters(self) -> None:
        """Recompute what initialisation on the meta device leaves undefined: the rotary cache and the markers."""
        super().reset_parameters()
        getattr(self, MARKER).fill_(self.config.n_shared)
        if self.config.sink_removed:
            getattr(self, REMOVED).copy_(removed_mask(self.config))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Accept plain weights, which have no marker, and refuse those of a model with another number of sinks."""
        state_dict.setdefault(f"{prefix}{MARKER}", torch.tensor(self.config.n_shared))
        n_shared = int(state_dict[f"{prefix}{MARKER}"])
        if n_shared != self.config.n_shared:
            raise MemSinksError(
                f"The checkpoint has {n_shared} shared neurons in each MLP, but this model {self.config.n_shared}. "
                "Use the shared_fraction that the checkpoint was trained with."
            )
        check_removed(self.config, state_dict.get(f"{prefix}{REMOVED}"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def check_removed(config: MemSinksConfig, removed: torch.Tensor | None) -> None:
    """Refuse weights whose removed sinks are not those of the configuration: what was removed would come back.

    Args:
        config: Of the model.
        removed: The weights' buffer ``REMOVED``, if they have one.

    Raises:
        MemSinksError: If they differ.
    """
    theirs = torch.zeros(config.n_sink, device="cpu") if removed is None else removed.cpu()
    if theirs.shape != (config.n_sink,) or not torch.equal(theirs != 0, removed_mask(config)):
        raise MemSinksError(
            f"The weights have {int((theirs != 0).sum())} removed sinks, but the model's configuration "
            f"{int(removed_mask(config).sum())}, or others. Use the weights and model_config.yaml of one checkpoint."
        )


class Block(BaseBlock):
    """LitGPT's transformer block that hands the sinks' mask to its MLP."""

    checkpointing = False
    """Keep only the input for the backward pass and compute the rest again there. Set at run time, by `launch.py`"""

    def __init__(self, config: MemSinksConfig, block_idx: int) -> None:
        super().__init__(config, block_idx)
        if config.n_value_sink:
            self.attn = CausalSelfAttention(config, block_idx)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `compute`, whose arguments these are; with activation checkpointing if it is on and gradients are."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.compute(*args, **kwargs)
        # nothing here is random: no state of a random generator has to be restored
        return torch.utils.checkpoint.checkpoint(
            self.compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    def compute(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
        input_pos_maxp1: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``litgpt.model.Block.forward``, which is restated here for the sake of one argument.

        Pinned by ``test_model.py::test_restated_forward_equals_litgpt``.

        Args:
            x: Hidden states ``(B, T, n_embd)``.
            cos: Rotary factors, see ``litgpt.GPT.forward``.
            sin: Rotary factors.
            mask: Attention mask.
            input_pos: Positions for the KV cache.
            input_pos_maxp1: End of the KV cache.
            sinks: Which sinks are on, bool ``(B, T or 1, n_sink)``. ``None``: sinks dropped.
        """
        if sinks is None:
            return super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)
        x_normed = self.norm_1(x)
        attended = Attended(mask, sinks) if self.config.n_value_sink else mask
        attention_output = self.post_attention_norm(self.attn(x_normed, cos, sin, attended, input_pos, input_pos_maxp1))
        if self.config.parallel_residual:
            if not self.config.shared_attention_norm:
                x_normed = self.norm_2(x)
            x = attention_output + x
        else:
            x = attention_output + x
            x_normed = self.norm_2(x)
        return self.post_mlp_norm(self.mlp(x_normed, sinks)) + x


def first_rows(linear: nn.Linear, x: torch.Tensor, n: int) -> torch.Tensor:
    """The first ``n`` outputs of ``linear``: ``(..., in_features)`` to ``(..., n)``."""
    return F.linear(x, linear.weight[:n], None if linear.bias is None else linear.bias[:n])


def first_columns(linear: nn.Linear, x: torch.Tensor, n: int) -> torch.Tensor:
    """``linear`` applied to its first ``n`` inputs only: ``(..., n)`` to ``(..., out_features)``."""
    return F.linear(x, linear.weight[:, :n], linear.bias)


def within_documents(sequence_ids: torch.Tensor) -> torch.Tensor:
    """What each token attends to if documents do not see each other: itself, and what is before it in its document.

    Not in the paper. A document is what has one ID without a break: two occurrences are two documents, unless one
    directly follows the other.

    Args:
        sequence_ids: The ID of each token's document, integers of shape ``(B, T)``.

    Returns:
        bool of shape ``(B, 1, T, T)``: at ``[b, 0, t, s]`` whether token t attends to token s.
    """
    begins = F.pad(sequence_ids[:, 1:] != sequence_ids[:, :-1], (1, 0))
    number = begins.cumsum(dim=-1)  # of the document in its row
    return (number[:, None, :, None] == number[:, None, None, :]).tril()


def switch_sinks(hidden: torch.Tensor, sinks: torch.Tensor, scale: float) -> torch.Tensor:
    """Zero the sinks that are off and scale those that are on (Sec. 5; App. I.1: after the gating).

    Args:
        hidden: Hidden activations ``(B, T, n_shared + n_sink)``; the sinks are the last.
        sinks: Which are on, bool ``(B, T or 1, n_sink)``.
        scale: Factor of the sinks that are on.

    Returns:
        Same shape and dtype as ``hidden``.
    """
    n_shared = hidden.size(-1) - sinks.size(-1)
    on = hidden[..., n_shared:] if scale == 1.0 else hidden[..., n_shared:] * scale
    # `where`, because multiplying by the mask turns an infinity that is off into NaN
    return torch.cat((hidden[..., :n_shared], torch.where(sinks, on, 0.0)), dim=-1)


def sink_scale(config: MemSinksConfig) -> float:
    """1, or 1/p if the sinks keep their expected sum as under inverted dropout."""
    return 1.0 / config.sink_active_probability if config.sink_scale == "inverse" else 1.0


class Attended(NamedTuple):
    """What takes the mask's place in LitGPT's attention, which hands it on to the function that we override."""

    mask: torch.Tensor | None
    """LitGPT's own"""
    sinks: torch.Tensor
    """Which sinks are on, bool ``(B, T or 1, n_sink)``"""


class CausalSelfAttention(BaseCausalSelfAttention):
    """LitGPT's attention, in which the last value channels of each head are sinks. Not in the paper.

    A channel is that of a sink of the MLP, and on for the documents that have it on. The token that attends decides, at
    the input of the output projection: as in the MLP, where the hidden neurons are switched at the input of theirs.
    """

    def scaled_dot_product_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | Attended | None = None
    ) -> torch.Tensor:
        """As LitGPT's: ``(B, n_head, T, head_size)`` to ``(B, T, n_head, head_size)``.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            mask: Attention mask, and that of the sinks; without it they are dropped.
        """
        mask, sinks = mask if isinstance(mask, Attended) else (mask, None)
        heads = super().scaled_dot_product_attention(q, k, v, mask)
        n = self.config.sink_shared_values
        if sinks is None:
            return torch.cat((heads[..., :n], torch.zeros_like(heads[..., n:])), dim=-1)
        own = sinks[..., : self.config.n_value_sink].unflatten(-1, (self.config.n_query_groups, -1))
        own = own.repeat_interleave(self.config.n_head // self.config.n_query_groups, dim=-2)
        on = heads[..., n:] * sink_scale(self.config)
        return torch.cat((heads[..., :n], torch.where(own, on, 0.0)), dim=-1)


def value_rows(config: MemSinksConfig) -> torch.Tensor:
    """Rows of ``attn.qkv`` that make the value channels of the first sinks, int64 ``(n_value_sink,)``."""
    group, channel = _value_sinks(config)
    return (config.n_head + config.n_query_groups + group) * config.head_size + channel


def value_columns(config: MemSinksConfig) -> torch.Tensor:
    """Columns of ``attn.proj`` that read them, int64 ``(n_value_sink, n_head / n_query_groups)``: one for each head."""
    group, channel = _value_sinks(config)
    heads = config.n_head // config.n_query_groups
    return (heads * group[:, None] + torch.arange(heads)) * config.head_size + channel[:, None]


def _value_sinks(config: MemSinksConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The query group of each value channel that is a sink, and its place in the head; both ``(n_value_sink,)``."""
    assert config.sink_shared_values is not None
    sinks = torch.arange(config.n_value_sink)
    of_a_head = config.head_size - config.sink_shared_values
    return sinks // of_a_head, config.sink_shared_values + sinks % of_a_head


class LLaMAMLP(BaseLLaMAMLP):
    """LitGPT's gated MLP (SmolLM, Llama) with sinks."""

    def activation(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gated hidden activations; all ``(..., neurons)``."""
        return F.silu(gate) * up

    def forward(self, x: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, T, n_embd)`` to the same; ``sinks`` as in ``Block.forward``."""
        if sinks is None:
            n = self.config.n_shared
            return first_columns(
                self.proj, self.activation(first_rows(self.fc_1, x, n), first_rows(self.fc_2, x, n)), n
            )
        return self.proj(switch_sinks(self.activation(self.fc_1(x), self.fc_2(x)), sinks, sink_scale(self.config)))


class GemmaMLP(LLaMAMLP):
    """LitGPT's gated MLP with GELU (Gemma) with sinks."""

    def activation(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gated hidden activations; all ``(..., neurons)``."""
        return F.gelu(gate, approximate=self.config.gelu_approximate) * up


class GptNeoxMLP(BaseGptNeoxMLP):
    """LitGPT's ungated MLP (GPT-2, Pythia) with sinks."""

    def forward(self, x: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, T, n_embd)`` to the same; ``sinks`` as in ``Block.forward``."""
        approximate = self.config.gelu_approximate
        if sinks is None:
            n = self.config.n_shared
            return first_columns(self.proj, F.gelu(first_rows(self.fc, x, n), approximate=approximate), n)
        return self.proj(switch_sinks(F.gelu(self.fc(x), approximate=approximate), sinks, sink_scale(self.config)))
