"""How large is a run? Parameters, FLOPs, memory and disk, worked out before anything is allocated.

Each formula is one short function that says what it assumes. Nothing here is fitted: every count follows from LitGPT's
code, and tests/test_plan.py compares it with what PyTorch holds on a CPU. GB are 1e9 bytes.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import num_parameters

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.model.model import GPT, Block


@dataclass(frozen=True)
class Precision:
    """Bytes of a number under one of LitGPT's precisions."""

    weight: int
    """Of a weight, its gradient and each of AdamW's two moments"""
    compute: int
    """Of an activation that a linear layer reads or writes, and of a logit"""
    residual: int
    """Of the residual stream and of what compiled code keeps of it"""
    casts: bool
    """Whether autocast keeps a copy of each linear layer's weight in the compute precision until the backward pass"""


PRECISIONS = {
    "32-true": Precision(weight=4, compute=4, residual=4, casts=False),
    "bf16-mixed": Precision(weight=4, compute=2, residual=4, casts=True),
    "bf16-true": Precision(weight=2, compute=2, residual=2, casts=False),
}


# ---------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameters:
    """Counts of one model, tied embeddings counted once."""

    total: int
    """All of them"""
    sinks: int
    """Those that dropping the sinks takes away: weights and biases of the sink neurons in all layers"""
    dropped: int
    """Those of the model that is released"""
    embeddings: int
    """Of the token embedding; the output layer is the same matrix if tied"""
    linear: int
    """Weights of the linear layers, which are multiplied with every token; the output layer is among them"""
    block: int
    """Of one transformer block"""
    tensors: int
    """How many tensors the optimizer keeps state for"""


def build(config: Config, tied: bool) -> BaseGPT:
    """The model on the meta device, which takes no memory. Tied as ``litgpt.pretrain.main`` does it."""
    with torch.device("meta"):
        model = GPT(config) if isinstance(config, MemSinksConfig) else BaseGPT(config)
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def count_parameters(config: MemSinksConfig, tied: bool) -> Parameters:
    """Count the model's parameters and those of the model that is left when the sinks are dropped."""
    model = build(config, tied)
    total, dropped = num_parameters(model), num_parameters(build(config.to_base(), tied))
    return Parameters(
        total=total,
        sinks=total - dropped,
        dropped=dropped,
        embeddings=model.transformer.wte.weight.numel(),
        linear=sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)),
        block=num_parameters(model.transformer.h[0]),
        tensors=len(list(model.parameters())),
    )


# --------------------------------------------------------------------------------------------------------------- FLOPs


def flops_per_token(config: Config, linear: int, block_size: int) -> float:
    """FLOPs of a training step per token: ``6 * linear + 12 * n_layer * block_size * n_head * head_size``.

    Two for each multiply-add, once forward and twice backward. Attention is counted over the whole square of positions,
    as LitGPT's own count does (``measure_flops``); a kernel that skips the masked half does half of that term.
    Recomputing under activation checkpointing is not counted.
    """
    assert config.head_size is not None  # set by Config.__post_init__
    return 6 * linear + 12 * config.n_layer * block_size * config.n_head * config.head_size


# -------------------------------------------------------------------------------------------------------------- memory


def weights(parameters: int, precision: Precision) -> int:
    """Bytes of the weights, and equally of their gradients. Rotary factors (a megabyte) are left out."""
    return parameters * precision.weight


def adamw_state(parameters: int, tensors: int, precision: Precision) -> int:
    """Bytes of AdamW's two moments, in the weights' precision, and of a float32 step counter for each tensor."""
    return 2 * parameters * precision.weight + 4 * tensors


def block_activations(config: MemSinksConfig, tokens: int, precision: Precision, compiled: bool) -> int:
    """Bytes that one transformer block keeps of a micro batch for the backward pass.

    Eager: the input of each linear layer (a copy for each under autocast), q, k, v (repeated for grouped queries, a
    view of the whole projection otherwise), the attention's output before and after its reshaping, with flash attention
    no scores but their log-sum-exp per head, of RMSNorm the input and the normalised input in float32, of LayerNorm the
    input, and of the MLP every intermediate. Compiled: what torch.compile 2.15 keeps on a CPU, three (two, ungated)
    instead of four (two) tensors of the MLP's width and four of the model's width. Under autocast both also keep each
    weight in the compute precision.

    Assumes LitGPT's ``LLaMAMLP``, ``GemmaMLP`` or ``GptNeoxMLP`` and no normalisation but ``norm_1`` and ``norm_2``.
    The sinks' mask is in `head_activations`, as all blocks share it.
    """
    assert config.intermediate_size is not None  # these three are set by Config.__post_init__
    assert config.n_query_groups is not None
    assert config.head_size is not None
    width, hidden, heads = config.n_embd, config.intermediate_size, config.n_head * config.head_size
    gated = config.mlp_class_name != "GptNeoxMLP"
    repeated = config.n_query_groups != config.n_head
    attention = (4 if repeated else 6) * heads * precision.compute + 4 * config.n_head
    norms = 2 * _norm(config, precision, compiled)
    if compiled:
        mlp = (3 if gated else 2) * hidden * precision.compute
        streams = 2 * width * precision.compute + 2 * width * precision.residual
    else:
        mlp = (4 if gated else 2) * hidden * precision.compute
        inputs = 1 + (2 if gated and precision.casts else 1)  # of the query, key and value projection and of the MLP
        streams = (inputs * width + heads) * precision.compute
    return tokens * (attention + norms + mlp + streams) + _casts(_block_linear(config), precision)


def head_activations(config: MemSinksConfig, tokens: int, precision: Precision, compiled: bool) -> int:
    """Bytes kept outside the blocks: tokens, the sinks' mask, the last normalisation and the output layer's input."""
    assert config.padded_vocab_size is not None  # set by Config.__post_init__
    streams = (2 if compiled else 1) * config.n_embd * precision.compute + _norm(config, precision, compiled)
    return tokens * (streams + 8 + config.n_sink) + _casts(config.n_embd * config.padded_vocab_size, precision)


def activations(
    config: MemSinksConfig, tokens: int, precision: Precision, compiled: bool, checkpointing: bool = False
) -> int:
    """Bytes kept of one micro batch of ``tokens`` for the backward pass, without the logits.

    With activation checkpointing each block keeps its input only, and one block at a time is computed again.
    """
    block = block_activations(config, tokens, precision, compiled)
    kept = config.n_layer * tokens * config.n_embd * precision.residual + block if checkpointing else 0
    return head_activations(config, tokens, precision, compiled) + (kept or config.n_layer * block)


def logits(config: Config, tokens: int, precision: Precision) -> int:
    """Bytes of the logits at their peak: three tensors ``(tokens, padded_vocab_size)`` in the compute precision.

    LitGPT's ``fit`` holds the logits while the gradient of its chunked loss exists twice, in chunks and as a whole.
    Under autocast the forward pass takes as much: the logits, and their log-softmax in float32.
    """
    assert config.padded_vocab_size is not None  # set by Config.__post_init__
    return 3 * tokens * config.padded_vocab_size * precision.compute


def _norm(config: Config, precision: Precision, compiled: bool) -> int:
    """Bytes per token that a normalisation keeps, its output apart."""
    rms = config.norm_class_name == "RMSNorm"
    statistics = 4 if rms else 8
    if compiled:
        return statistics
    return statistics + config.n_embd * (2 * 4 if rms else precision.residual)


def _casts(linear: int, precision: Precision) -> int:
    return linear * precision.compute if precision.casts else 0


def _block_linear(config: MemSinksConfig) -> int:
    """Weights of one block's linear layers."""
    with torch.device("meta"):
        block = Block(config, 0)
    return sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))


@dataclass(frozen=True)
class Sharding:
    """Over how many devices a strategy spreads what it trains."""

    shards: int
    """Devices that share one copy of weights, gradients and optimizer state"""
    buckets: bool = False
    """Whether gradients exist a second time, in the buckets that are reduced"""


def sharding(strategy: str, devices: int, num_nodes: int, shard_size: int | None = None) -> Sharding:
    """How a strategy spreads a run.

    Args:
        strategy: ``one`` (a single device), ``ddp``, ``fsdp`` (over all devices) or ``hsdp`` (over ``shard_size``
            devices, by default those of a node, as in LitGPT's ``HYBRID_SHARD``; nodes hold copies).
        devices: Devices of a node.
        num_nodes: Nodes.
        shard_size: Devices that share one copy, for ``hsdp``.
    """
    return {
        "one": Sharding(1),
        "ddp": Sharding(1, buckets=True),  # Fabric leaves PyTorch's gradient_as_bucket_view off
        "fsdp": Sharding(devices * num_nodes),
        "hsdp": Sharding(shard_size or devices),
    }[strategy]


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak, which is where the loss is differentiated."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Whole weights of sharded modules that are in use"""
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum. The CUDA context, NCCL's buffers and fragmentation come on top: a gigabyte or two."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.logits


def memory(
    config: MemSinksConfig,
    parameters: Parameters,
    tokens: int,
    precision: Precision,
    spread: Sharding,
    compiled: bool = True,
    checkpointing: bool = False,
) -> Memory:
    """Memory of one device for a micro batch of ``tokens``.

    Sharded weights are divided evenly. What lies outside the blocks is gathered for the whole step, and two blocks at a
    time, the one in use and the next, in the compute precision, with gradients of as much. Under gradient accumulation
    the gradients exist while activations do.
    """
    own = -(-parameters.total // spread.shards)
    gathered = 0
    if spread.shards > 1:
        outside = parameters.total - config.n_layer * parameters.block
        gathered = 2 * precision.compute * (outside + min(2, config.n_layer) * parameters.block)
    return Memory(
        weights=weights(own, precision),
        gradients=weights(own, precision) * (2 if spread.buckets else 1),
        optimizer=adamw_state(own, parameters.tensors, precision),
        gathered=gathered,
        activations=activations(config, tokens, precision, compiled, checkpointing),
        logits=logits(config, tokens, precision),
    )


# ---------------------------------------------------------------------------------------------------------------- disk


def checkpoint(parameters: Parameters, precision: Precision) -> int:
    """Bytes of ``lit_model.pth`` that ``litgpt pretrain`` writes, at steps and at the end alike.

    Weights, AdamW's state, and some kilobytes of settings, names and the loader's position, which are left out.
    """
    return weights(parameters.total, precision) + adamw_state(parameters.total, parameters.tensors, precision)


def prepared(tokens: int) -> int:
    """Bytes of a prepared stream: a token and its sequence ID, int32 each. Its tables are left out."""
    return 8 * tokens
