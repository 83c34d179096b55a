"""Settings: the sink hyperparameters, the model configuration that carries them, and the registered models.

Shared by all stages; not a stage itself.
"""

import copy
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

import litgpt.config
import torch
from litgpt.config import Config as BaseConfig
from litgpt.config import name_to_config

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.sinks.masks import MASK_VERSION, exact_mask, sink_mask, unpack_neurons

SinksFor = Literal["all", "repeated"]
Scale = Literal["none", "inverse"]
Method = Literal["memsinks", "mask_exact", "mask_cloud", "mask_sgtm"]
Mask = Literal["bernoulli", "exact"]
Attention = Literal["row", "document"]
Strategy = Literal["litgpt", "ddp", "fsdp", "hsdp"]


@dataclass
class SinkArgs:
    """Hyperparameters of the memorization sinks (Sec. 5). ``null`` takes the default registered with the model."""

    shared_fraction: float | None = None
    """g: fraction of each MLP's hidden neurons that all documents share, in (0, 1]. 1.0 has no sinks: the baseline on
    the same stream"""
    active_probability: float | None = None
    """p: probability that a sink is on for a document, in (0, 1]"""
    seed: int = 0
    """Seed of the masks, an int32. Not of the training"""
    sinks_for: SinksFor = "all"
    """Which documents have sinks: all (the paper), or only those that occur more than once in the stream"""
    scale: Scale = "none"
    """Multiply sinks that are on by 1 (the paper) or by 1/p (inverse, as in inverted dropout)"""
    method: Method = "memsinks"
    """How the sinks come to hold what repeats: the paper's method, or as a baseline a kind of gradient masking
    (docs/baselines.md). Under that, all repeated documents share all sinks"""
    off_share: float = 0.0
    """Share of a document's training rows in which its sinks are off, in [0, 1), so that the shared neurons learn to do
    without. 0 is the paper. By a hash of ID and row, not at random"""
    layers: list[int] | None = None
    """Layers that have sinks, counted from 0. ``null``: all (the paper). The others have their shared neurons only"""
    mask: Mask = "bernoulli"
    """Each sink is on with probability p by itself (bernoulli, the paper), or exactly p of them are (exact)"""
    attention: Attention = "row"
    """What a token of a training or validation row attends to: all of the row before it (row, the paper), or of its own
    document (document), whose neighbours have other sinks on"""
    value_shared_fraction: float = 1.0
    """Fraction of the value channels of each attention head that all documents share, in (0, 1]; the others are sinks,
    too. 1.0 has none there: the paper"""
    learning_rate: float = 1.0
    """What the sinks' learning rate is in units of the optimizer's, above 0. Needs AdamW"""
    weight_decay: float | None = None
    """Weight decay of the sinks, at least 0. ``null``: the optimizer's. Needs AdamW"""
    mask_version: int = MASK_VERSION
    """Version of the mask function. Set it only to state on which version a recipe was made"""

    def check(self) -> None:
        """Refuse values out of range.

        Not in ``__post_init__``: LitGPT's command line would show an error there as a traceback of its parser.

        Raises:
            MemSinksError: Naming the field, its value and the limit.
        """
        _check_fraction("shared_fraction", self.shared_fraction)
        _check_fraction("active_probability", self.active_probability)
        _check_fraction("value_shared_fraction", self.value_shared_fraction)
        _check_choice("sinks_for", self.sinks_for, ("all", "repeated"))
        _check_choice("scale", self.scale, ("none", "inverse"))
        self._check_method()
        _check_choice("mask", self.mask, ("bernoulli", "exact"))
        _check_choice("attention", self.attention, ("row", "document"))
        if not 0 <= self.off_share < 1:
            raise MemSinksError(f"sinks.off_share is {self.off_share}, but it must be at least 0 and below 1.")
        _check_layers(self.layers)
        if not 0 < self.learning_rate < inf:
            raise MemSinksError(f"sinks.learning_rate is {self.learning_rate}, but it must be above 0, and finite.")
        if self.weight_decay is not None and not 0 <= self.weight_decay < inf:
            raise MemSinksError(f"sinks.weight_decay is {self.weight_decay}, but it must be at least 0, and finite.")
        if not isinstance(self.seed, int) or not -(2**31) <= self.seed < 2**31:
            raise MemSinksError(f"sinks.seed is {self.seed}, but it must be an integer in [-2**31, 2**31).")
        if self.mask_version != MASK_VERSION:
            raise MemSinksError(
                f"sinks.mask_version is {self.mask_version}, but this release computes version {MASK_VERSION} only. "
                "Install the release that the recipe or checkpoint was made with."
            )

    def _check_method(self) -> None:
        """Refuse settings of single documents' sinks where documents have none of their own."""
        _check_choice("method", self.method, ("memsinks", "mask_exact", "mask_cloud", "mask_sgtm"))
        if self.method == "memsinks":
            return
        for name, *only in (
            *(("active_probability", None, 1.0), ("sinks_for", "all"), ("scale", "none")),
            *(("off_share", 0.0), ("layers", None), ("mask", "bernoulli"), ("value_shared_fraction", 1.0)),
        ):
            if (value := getattr(self, name)) not in only:
                raise MemSinksError(
                    f"sinks.{name} is {value!r}, but under method {self.method} all sinks learn from all repeated "
                    "documents. Leave it out."
                )
        if self.shared_fraction == 1:
            raise MemSinksError(
                f"sinks.shared_fraction is 1.0, but method {self.method} needs neurons for what repeats. Lower it."
            )

    def resolved(self, model_name: str) -> "SinkArgs":
        """These settings with g and p, where ``None``, replaced by the default registered for ``model_name``.

        Under gradient masking p is 1: a document's own sinks are all of them.
        """
        default = asdict(SINK_DEFAULTS.get(model_name, PAPER_SINKS))
        if self.method != "memsinks":
            default["active_probability"] = 1.0
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return SinkArgs(**{**default, **given})


def _check_fraction(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise MemSinksError(f"sinks.{name} is {value}, but it must be above 0 and at most 1.")


def _check_layers(layers: list[int] | None) -> None:
    if layers is None:
        return
    numbers = [layer for layer in layers if isinstance(layer, int) and layer >= 0]
    if not layers or numbers != layers or len(set(layers)) < len(layers):
        raise MemSinksError(
            f"sinks.layers is {layers}, but it must be different numbers of layers, counted from 0, or null for all. "
            "Train without sinks by sinks.shared_fraction 1.0."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise MemSinksError(f"sinks.{name} is {value!r}. Choose from: {', '.join(choices)}.")


@dataclass
class GoldfishArgs:
    """Goldfish loss (arXiv 2406.10209): some targets are left out of the training loss, always the same of a text."""

    k: int = 0
    """One in k targets is left out. 0: none, the ordinary loss"""
    context_width: int = 13
    """Tokens before a target that decide whether it is left out"""
    seed: int = 0
    """Another seed leaves out others"""

    def check(self, block_size: int) -> None:
        """Refuse values out of range.

        Args:
            block_size: Tokens in a training row, T.

        Raises:
            MemSinksError: Naming the field, its value and the limit.
        """
        if not isinstance(self.k, int) or (self.k != 0 and self.k < 2):
            raise MemSinksError(f"goldfish.k is {self.k}, but it must be 0 (leave out none) or an integer from 2 on.")
        if self.k and (not isinstance(self.context_width, int) or not 1 <= self.context_width < block_size):
            raise MemSinksError(
                f"goldfish.context_width is {self.context_width}, but it must be at least 1 and less than a row's "
                f"{block_size} tokens."
            )
        if not isinstance(self.seed, int):
            raise MemSinksError(f"goldfish.seed is {self.seed}, but it must be an integer.")


@dataclass
class WatchArgs:
    """What is measured at each validation besides LitGPT's ``val_loss``, on a fixed sample of documents."""

    documents: int = 64
    """Repeated documents of each source that repeats: one row each, of one block at most. 0 watches none"""
    validation_documents: int = 64
    """Documents of each validation set: one row each, of one block at most. 0 watches none"""
    seed: int = 0
    """Seed of the sample"""
    evaluation_file: Path | None = None
    """Local copy of the prepared folder's evaluation.parquet, for data in an object store; rank 0 reads it. By default
    the folder's"""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            MemSinksError: Naming the field, its value and the limit.
        """
        for name in ("documents", "validation_documents"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise MemSinksError(f"watch.{name} is {value}, but it must be an integer, at least 0 (watch none).")
        if not isinstance(self.seed, int):
            raise MemSinksError(f"watch.seed is {self.seed}, but it must be an integer.")


@dataclass
class LaunchArgs:
    """How several devices train together (``docs/distributed.md``)."""

    strategy: Strategy = "litgpt"
    """``litgpt``: LitGPT's own, FSDP1 with HYBRID_SHARD, on GPUs only. ``ddp``: every device holds the whole model.
    ``fsdp``: FSDP2, weights, gradients and optimizer state cut over all devices. ``hsdp``: FSDP2 in groups of
    ``shard_size`` devices, each of which holds a whole copy. Without effect on one device"""
    shard_size: int | None = None
    """Devices that share one copy of the model under ``hsdp``. ``null``: the devices of a node"""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the block again: less memory, about a third more
    compute, the same gradients. On one device, too"""

    def check(self) -> None:
        """Refuse values out of range. Whether they fit the devices is checked by `launch.py`.

        Raises:
            MemSinksError: Naming the field, its value and the limit.
        """
        if self.strategy not in (choices := ("litgpt", "ddp", "fsdp", "hsdp")):
            raise MemSinksError(f"launch.strategy is {self.strategy!r}. Choose from: {', '.join(choices)}.")
        if self.shard_size is None:
            return
        if self.strategy != "hsdp":
            raise MemSinksError(
                f"launch.shard_size is {self.shard_size}, but launch.strategy is {self.strategy}, which does not read "
                "it. Leave it out, or set launch.strategy to hsdp."
            )
        if self.shard_size < 2:
            raise MemSinksError(
                f"launch.shard_size is {self.shard_size}, but it must be at least 2 devices. Whole copies on each "
                "device are launch.strategy ddp."
            )


PAPER_SINKS = SinkArgs(shared_fraction=0.7, active_probability=0.3)
"""The paper's setting for its figures (Sec. 5, "Experimental Details")."""


def shared_neurons(intermediate_size: int, shared_fraction: float) -> int:
    """Number of hidden neurons that all documents share: g times ``intermediate_size``, made friendly to hardware.

    Rounded to a multiple of 64 from 1024 neurons on, where that moves g by 0.031 at most; else to the nearest whole
    neuron. The dropped model's ``intermediate_size`` is this number.

    Raises:
        MemSinksError: If less than one neuron would be shared, or if g < 1 leaves no sink.
    """
    if shared_fraction == 1:
        return intermediate_size
    exact = shared_fraction * intermediate_size
    if exact < 1:
        raise MemSinksError(
            f"sinks.shared_fraction {shared_fraction} of intermediate_size {intermediate_size} is {exact:.3g} neurons, "
            "but at least 1 must be shared. Raise shared_fraction."
        )
    multiple = 64 if intermediate_size >= 1024 else 1
    rounded = round(exact / multiple) * multiple
    if not 0 < rounded < intermediate_size:
        rounded = round(exact)
    if rounded == intermediate_size:
        raise MemSinksError(
            f"sinks.shared_fraction {shared_fraction} of intermediate_size {intermediate_size} leaves no sink. "
            "Lower it, or set it to 1.0 to train without sinks."
        )
    return rounded


def shared_values(head_size: int, fraction: float) -> int | None:
    """Value channels of each head that all documents share, to the nearest channel; ``None`` for all, if that is 1."""
    return None if fraction == 1 else round(fraction * head_size)


@dataclass
class MemSinksConfig(BaseConfig):
    """A LitGPT model configuration whose MLPs have sinks. ``model_config.yaml`` of a checkpoint holds it.

    The plain ``litgpt.Config`` refuses these fields, so that stock commands stop loudly at an undropped checkpoint.
    """

    sink_n_shared: int | None = None
    """Neurons of each MLP that all documents share; the first ones. ``None``: all of them, no sinks"""
    sink_active_probability: float = 0.3
    """p, see ``SinkArgs.active_probability``"""
    sink_seed: int = 0
    """Seed of the masks"""
    sink_sinks_for: SinksFor = "all"
    """See ``SinkArgs.sinks_for``"""
    sink_scale: Scale = "none"
    """See ``SinkArgs.scale``"""
    sink_method: Method = "memsinks"
    """See ``SinkArgs.method``"""
    sink_off_share: float = 0.0
    """See ``SinkArgs.off_share``; without effect outside training"""
    sink_layers: list[int] | None = None
    """See ``SinkArgs.layers``"""
    sink_mask: Mask = "bernoulli"
    """See ``SinkArgs.mask``"""
    sink_attention: Attention = "row"
    """See ``SinkArgs.attention``; without effect where a row is one document"""
    sink_shared_values: int | None = None
    """Value channels of each attention head that all documents share; the first ones. ``None``: all of them"""
    sink_learning_rate: float = 1.0
    """See ``SinkArgs.learning_rate``; without effect outside training"""
    sink_weight_decay: float | None = None
    """See ``SinkArgs.weight_decay``; without effect outside training"""
    sink_mask_version: int = MASK_VERSION
    """Version of the mask function that the weights were trained with"""
    sink_removed: str = ""
    """Sinks that `remove` has zeroed and that no document switches on again: hexadecimal, see ``sinks.pack_neurons``"""
    sink_removed_documents: int = 0
    """Documents whose sinks were removed; their number"""

    def __post_init__(self) -> None:
        _refuse_unsupported(self)
        super().__post_init__()
        assert self.intermediate_size is not None  # set by the base class
        if self.sink_n_shared is None:
            self.sink_n_shared = self.intermediate_size
        if not 1 <= self.sink_n_shared <= self.intermediate_size:
            raise MemSinksError(
                f"sink_n_shared is {self.sink_n_shared}, but it must lie in [1, intermediate_size = "
                f"{self.intermediate_size}]."
            )
        if self.sink_active_probability is None:
            raise MemSinksError("sink_active_probability is null, but it must be above 0 and at most 1.")
        # the same rules as on the command line
        SinkArgs(
            active_probability=self.sink_active_probability,
            seed=self.sink_seed,
            sinks_for=self.sink_sinks_for,
            scale=self.sink_scale,
            method=self.sink_method,
            off_share=self.sink_off_share,
            layers=self.sink_layers,
            mask=self.sink_mask,
            attention=self.sink_attention,
            learning_rate=self.sink_learning_rate,
            weight_decay=self.sink_weight_decay,
            mask_version=self.sink_mask_version,
        ).check()
        if self.sink_layers is not None and max(self.sink_layers) >= self.n_layer:
            raise MemSinksError(
                f"sinks.layers has layer {max(self.sink_layers)}, but the model's {self.n_layer} layers are counted "
                "from 0. Leave it out."
            )
        self._check_attention()
        self._check_values()
        self._check_removed()

    def _check_attention(self) -> None:
        """Refuse models whose attention takes no mask of ours: LitGPT puts the window's in its place, or adds it."""
        for name in ("sliding_window_size", "attention_logit_softcapping"):
            if self.sink_attention == "document" and (value := getattr(self, name)) is not None:
                raise MemSinksError(
                    f"sinks.attention is 'document', but the model's {name} is {value}, with which LitGPT's attention "
                    "cannot keep to documents. Leave it out."
                )

    def _check_values(self) -> None:
        """Refuse sinks in attention that LitGPT's attention, or the number of sinks, does not allow."""
        if self.sink_shared_values is None:
            return
        if not self.n_sink:
            raise MemSinksError("sinks.value_shared_fraction needs sinks in the MLPs. Lower sinks.shared_fraction.")
        if not 1 <= self.sink_shared_values < self.head_size:
            raise MemSinksError(
                f"sink_shared_values is {self.sink_shared_values}, but a head has {self.head_size} channels, and at "
                "least 1 must be shared and 1 a sink. Change sinks.value_shared_fraction, or leave it out."
            )
        if self.n_value_sink > self.n_sink:
            raise MemSinksError(
                f"{self.n_value_sink} value channels of a layer would be sinks, but each belongs to one of its MLP's "
                f"{self.n_sink}. Raise sinks.value_shared_fraction, or lower sinks.shared_fraction."
            )
        if self.sliding_window_size is not None:
            raise MemSinksError(
                f"sinks.value_shared_fraction is given, but the model's sliding_window_size is "
                f"{self.sliding_window_size}, which its attention does not support. Leave it out."
            )
        if self.sink_learning_rate != 1 or self.sink_weight_decay is not None:
            raise MemSinksError(
                "sinks.learning_rate and sinks.weight_decay are of sinks in the MLPs only, but "
                "sinks.value_shared_fraction is given, too. Leave one out."
            )

    def _check_removed(self) -> None:
        """Refuse a record of removed sinks that is not of this model."""
        try:
            unpack_neurons(self.sink_removed, self.n_sink)
        except (TypeError, ValueError) as error:
            raise MemSinksError(
                f"sink_removed does not say which of the {self.n_sink} sinks are removed ({error}). Take the "
                "checkpoint's model_config.yaml again."
            ) from error
        if self.sink_removed and self.sink_method != "memsinks":
            raise MemSinksError(
                f"sink_removed lists removed sinks, but under sink_method {self.sink_method} no document has sinks of "
                "its own. Take the checkpoint's model_config.yaml again."
            )
        count = self.sink_removed_documents
        if not isinstance(count, int) or count < 0 or bool(count) != bool(self.sink_removed):
            raise MemSinksError(
                f"sink_removed_documents is {count!r}, but it must be the number of documents whose sinks sink_removed "
                "lists. Take the checkpoint's model_config.yaml again."
            )

    @classmethod
    def from_name(cls, name: str, sinks: SinkArgs | None = None, **kwargs: Any) -> "MemSinksConfig":
        """A registered model with sinks.

        Args:
            name: Any name that LitGPT knows, ours among them.
            sinks: Sink settings; what is left out takes the default registered for the name.
            kwargs: Fields of ``litgpt.Config`` to change.
        """
        return cls.from_base(BaseConfig.from_name(name, **kwargs), sinks or SinkArgs())

    @classmethod
    def from_base(cls, config: BaseConfig, sinks: SinkArgs) -> "MemSinksConfig":
        """Add sinks to a plain configuration.

        Args:
            config: Any ``litgpt.Config`` with a supported MLP.
            sinks: Sink settings; ``None`` fields take the default registered for ``config.name``.

        Raises:
            MemSinksError: If the architecture is not supported, or the settings do not fit it.
        """
        _refuse_unsupported(config)  # before the sizes are, which such a model may not have
        sinks.check()
        sinks = sinks.resolved(config.name)
        assert sinks.shared_fraction is not None  # resolved
        assert sinks.active_probability is not None
        assert config.intermediate_size is not None  # set by Config.__post_init__
        return cls(
            **copy.deepcopy(asdict(config)),
            sink_n_shared=shared_neurons(config.intermediate_size, sinks.shared_fraction),
            sink_active_probability=sinks.active_probability,
            sink_seed=sinks.seed,
            sink_sinks_for=sinks.sinks_for,
            sink_scale=sinks.scale,
            sink_method=sinks.method,
            sink_off_share=sinks.off_share,
            sink_layers=copy.deepcopy(sinks.layers),
            sink_mask=sinks.mask,
            sink_attention=sinks.attention,
            sink_shared_values=shared_values(config.head_size, sinks.value_shared_fraction),
            sink_learning_rate=sinks.learning_rate,
            sink_weight_decay=sinks.weight_decay,
            sink_mask_version=sinks.mask_version,
        )

    def to_base(self) -> BaseConfig:
        """The plain configuration of the model that is left when the sinks are dropped."""
        plain = {field.name for field in fields(BaseConfig)}
        values = {name: value for name, value in copy.deepcopy(asdict(self)).items() if name in plain}
        return BaseConfig(**{**values, "intermediate_size": self.n_shared})

    @property
    def n_shared(self) -> int:
        """Shared neurons in each MLP."""
        assert self.sink_n_shared is not None  # set in __post_init__
        return self.sink_n_shared

    @property
    def n_sink(self) -> int:
        """Sink neurons in each MLP. 0: a plain model."""
        assert self.intermediate_size is not None  # set in __post_init__
        return self.intermediate_size - self.n_shared

    @property
    def n_value_sink(self) -> int:
        """Value channels of a layer's attention that are sinks: of the first so many of its MLP's sinks."""
        if self.sink_shared_values is None:
            return 0
        return self.n_query_groups * (self.head_size - self.sink_shared_values)

    def has_sinks(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has sinks."""
        return self.n_sink > 0 and (self.sink_layers is None or layer in self.sink_layers)

    def mask(self, sequence_ids: torch.Tensor) -> torch.Tensor:
        """The sinks of documents, bool ``(..., n_sink)`` for IDs ``(...)``, repeated or not; removed ones, too."""
        function = exact_mask if self.sink_mask == "exact" else sink_mask
        return function(sequence_ids, self.n_sink, self.sink_active_probability, self.sink_seed)

    @property
    def mlp_class(self) -> type:
        """The MLP with sinks that takes the place of LitGPT's of the same name."""
        import litgpt_memsinks.model.gradient_masking
        import litgpt_memsinks.model.model

        module = (
            litgpt_memsinks.model.model if self.sink_method == "memsinks" else litgpt_memsinks.model.gradient_masking
        )
        return getattr(module, self.mlp_class_name)


SUPPORTED_MLPS = ("LLaMAMLP", "GemmaMLP", "GptNeoxMLP")


def _refuse_unsupported(config: BaseConfig) -> None:
    """Refuse architectures in which "a fraction of the MLP's neurons" is not defined here.

    Raises:
        MemSinksError: Naming the field and its value.
    """
    if config.mlp_class_name not in SUPPORTED_MLPS:
        raise MemSinksError(
            f"mlp_class_name is {config.mlp_class_name!r}, but sinks are supported in {', '.join(SUPPORTED_MLPS)} "
            f"only. Choose a dense model instead of {config.name!r}."
        )
    for name in ("latent_attention", "first_k_dense_replace", "n_expert_groups"):
        if (value := getattr(config, name)) is not None:
            raise MemSinksError(f"{name} is {value!r}, but sinks do not support it. Choose another model.")
    if config.n_expert:
        raise MemSinksError(f"n_expert is {config.n_expert}, but sinks do not support mixtures of experts.")


def _smollm(name: str, base: str, **changes: Any) -> dict[str, Any]:
    config = copy.deepcopy(name_to_config[base])
    config.update(name=name, hf_config={"org": "HuggingFaceTB", "name": name.removesuffix("-MemSinks")}, **changes)
    return config


def _registered_models() -> list[dict[str, Any]]:
    """The models of the paper and a tiny one. Sizes from the published configurations of each."""
    return [
        # SmolLM (v1) differs from SmolLM2, which LitGPT ships, in its context length and RoPE base.
        _smollm("SmolLM-360M-MemSinks", "SmolLM2-360M", block_size=2048, rope_base=10000),
        _smollm("SmolLM-1.7B-MemSinks", "SmolLM2-1.7B", block_size=2048, rope_base=10000),
        _smollm("SmolLM2-360M-MemSinks", "SmolLM2-360M"),
        _smollm("SmolLM2-1.7B-MemSinks", "SmolLM2-1.7B"),
        # The paper's "GPT Medium" of Sec. 3 to 5: 24 layers of width 1024 with a GELU MLP four times as wide. LitGPT
        # has no learned position embeddings, so positions are rotary.
        dict(
            name="GPT2-Medium-MemSinks",
            hf_config={},
            block_size=1024,
            vocab_size=50257,
            padding_multiple=64,
            n_layer=24,
            n_head=16,
            n_embd=1024,
            rotary_percentage=1.0,
            parallel_residual=False,
            gelu_approximate="tanh",
        ),
        # The demo's: about half a million parameters, trains in a minute on one CPU core.
        dict(
            name="Tiny-MemSinks",
            hf_config={},
            block_size=512,
            vocab_size=1024,
            padding_multiple=64,
            n_layer=2,
            n_head=4,
            n_embd=128,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=384,
        ),
    ]


SINK_DEFAULTS: dict[str, SinkArgs] = {
    "SmolLM-360M-MemSinks": PAPER_SINKS,
    "SmolLM-1.7B-MemSinks": PAPER_SINKS,
    "SmolLM2-360M-MemSinks": PAPER_SINKS,
    "SmolLM2-1.7B-MemSinks": PAPER_SINKS,
    "GPT2-Medium-MemSinks": PAPER_SINKS,
    # Narrow MLPs need a larger share of sinks to hold as much.
    "Tiny-MemSinks": SinkArgs(shared_fraction=0.5, active_probability=0.3),
}
"""Sink settings that hold for a registered model where the recipe leaves them out."""


def register_models() -> None:
    """Add our models to LitGPT's registry, where ``litgpt pretrain --model_name`` finds them. Idempotent."""
    for config in _registered_models():
        litgpt.config.name_to_config[config["name"]] = config


register_models()
