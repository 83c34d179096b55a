"""The baseline of Sec. 4 and App. E, gradient masking: which neurons learn from which token.

Each MLP's hidden neurons are parted as sinks are: the first ``n_shared`` are generalisation neurons, the others
memorisation neurons. Tokens of repeated documents (the sign bit of their sequence ID) may change the weights of
memorisation neurons only, all other tokens those of generalisation neurons only. Attention, embeddings and norms learn
from every token. Dropping and evaluation are those of sinks that are on for every document (p = 1).

With ``x`` a token's input, ``W`` the weights before the activation, ``h = a(W x)`` its hidden activations (after the
gating), ``P`` the down-projection, ``m`` 1 where a neuron may learn from the token, and ``[ ]`` for what is a constant
to the backward pass:

    mask_exact   h = a(m W x + (1 - m) [W] x),  y = P m h + [P] (1 - m) h
                                              a neuron's weights, in and out, learn from its own tokens only
    mask_cloud   y = P (m h + (1 - m) [h])    as in Cloud et al., arXiv 2410.04332: the activations are cut off, so that
                                              only the weights before them are masked, and P learns from every token
    mask_sgtm    see `sgtm`                   Selective gradient masking, arXiv 2512.05648

The first two run with all neurons on, whatever the token. What counts is the token at whose position a neuron fires: a
later token whose loss reaches it through attention changes what this position's document allows.

`mask_exact` and `sgtm` mask the gradients of parameters alone. `cloud` cuts activations, and so keeps the gradient from
the layers below, too, where it came through a neuron that may not learn: those are then trained for a part of what the
model computes.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from litgpt_memsinks.config import MemSinksConfig, Method
from litgpt_memsinks.model import model

SinkMLP = model.LLaMAMLP | model.GptNeoxMLP
Rule = Callable[[SinkMLP, torch.Tensor, torch.Tensor], torch.Tensor]
"""An MLP, its input ``(B, T, n_embd)`` and whether a token's document repeats, bool ``(B, T, 1)``, to its output"""


def learns(repeated: torch.Tensor, n_shared: int, n_sink: int) -> torch.Tensor:
    """``m``: which neurons may learn from which token.

    Args:
        repeated: Whether the token's document repeats, bool ``(B, T, 1)``.
        n_shared: Generalisation neurons, the first ones.
        n_sink: Memorisation neurons.

    Returns:
        bool ``(B, T, n_shared + n_sink)``.
    """
    return repeated == (torch.arange(n_shared + n_sink, device=repeated.device) >= n_shared)


def exact(mlp: SinkMLP, x: torch.Tensor, repeated: torch.Tensor) -> torch.Tensor:
    """Masks the gradients of the MLP's parameters, and no other, token by token (Sec. 4.1, App. F).

    The projection's bias belongs to no neuron and learns from every token. Takes twice the MLP's arithmetic forward, of
    which a compiler may share what is computed twice.
    """
    m = learns(repeated, mlp.config.n_shared, mlp.config.n_sink)
    hidden = _activation(mlp, [torch.where(m, layer(x), _constant(layer, x)) for layer in _layers(mlp)])
    # `where`, because multiplying by the mask turns an infinity into NaN
    others = F.linear(torch.where(m, 0.0, hidden), mlp.proj.weight.detach())
    return mlp.proj(torch.where(m, hidden, 0.0)) + others


def cloud(mlp: SinkMLP, x: torch.Tensor, repeated: torch.Tensor) -> torch.Tensor:
    """Cloud et al.'s gradient routing: exact for the weights before the activation, none for the projection."""
    m = learns(repeated, mlp.config.n_shared, mlp.config.n_sink)
    hidden = _activation(mlp, [layer(x) for layer in _layers(mlp)])
    return mlp.proj(torch.where(m, hidden, hidden.detach()))


def sgtm(mlp: SinkMLP, x: torch.Tensor, repeated: torch.Tensor) -> torch.Tensor:
    """Selective gradient masking (arXiv 2512.05648, its "parameter masking"), token by token instead of batch by batch.

    There a batch is of one kind. A batch to be forgotten runs with all neurons, then the gradients of all parameters
    but the memorisation neurons' are zeroed; any other batch runs with the memorisation activations at zero, so that
    they get no gradient. Our rows mix both kinds, so each token gets the MLP of its kind: repeated ones that in which
    the generalisation neurons' weights and the projection's bias are constants, others the dropped one. In a micro
    batch of one kind this is what that code does to an MLP; unlike it, attention is not parted.

    Takes 1 + g times the arithmetic of the MLP.
    """
    n = mlp.config.n_shared
    inputs = [
        F.linear(x, _frozen(layer.weight, n), None if layer.bias is None else _frozen(layer.bias, n))
        for layer in _layers(mlp)
    ]
    bias = None if mlp.proj.bias is None else mlp.proj.bias.detach()
    whole = F.linear(_activation(mlp, inputs), _frozen(mlp.proj.weight, n, dim=1), bias)
    return torch.where(repeated, whole, mlp(x))


RULES: dict[Method, Rule] = {"mask_exact": exact, "mask_cloud": cloud, "mask_sgtm": sgtm}
"""Kinds of gradient masking, by ``SinkArgs.method``"""


def _frozen(weight: torch.Tensor, n: int, dim: int = 0) -> torch.Tensor:
    """The same numbers, of which the first ``n`` along ``dim`` are constants."""
    return torch.cat((weight.narrow(dim, 0, n).detach(), weight.narrow(dim, n, weight.size(dim) - n)), dim)


def _constant(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the layer yields, with its parameters as constants."""
    return F.linear(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def _layers(mlp: SinkMLP) -> tuple[nn.Linear, ...]:
    return (mlp.fc,) if isinstance(mlp, model.GptNeoxMLP) else (mlp.fc_1, mlp.fc_2)


def _activation(mlp: SinkMLP, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Hidden activations from what the layers before them yield; all ``(B, T, neurons)``."""
    if isinstance(mlp, model.GptNeoxMLP):
        return F.gelu(inputs[0], approximate=mlp.config.gelu_approximate)
    return mlp.activation(*inputs)


class GradientMasked(nn.Module):
    """Trains an MLP with sinks by a rule of gradient masking. In eval mode, and with sinks dropped, it is that MLP."""

    def __init__(self, config: MemSinksConfig, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        self.rule = RULES[config.sink_method]

    def forward(self, x: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, T, n_embd)`` to the same.

        Args:
            x: Input.
            sinks: In training, bool ``(B, T, n_sink)``: whether the token's document repeats, the same for every sink.
                In eval mode as in ``model.Block.compute``.
        """
        if sinks is None or not self.training:
            return super().forward(x, sinks)
        return self.rule(self, x, sinks[..., :1])  # type: ignore[arg-type] # mixed into one of these


class LLaMAMLP(GradientMasked, model.LLaMAMLP):
    """LitGPT's gated MLP (SmolLM, Llama)."""


class GemmaMLP(GradientMasked, model.GemmaMLP):
    """LitGPT's gated MLP with GELU (Gemma)."""


class GptNeoxMLP(GradientMasked, model.GptNeoxMLP):
    """LitGPT's ungated MLP (GPT-2, Pythia)."""
