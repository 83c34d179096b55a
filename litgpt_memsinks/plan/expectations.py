"""What will the sinks do, and where is it known that they will not work? Sink masks are independent coin flips.

With n sinks in each MLP, each on for a document with probability p (Sec. 5), everything here is the binomial
distribution. tests/test_plan.py compares it with masks that are drawn.
"""

import math
from dataclasses import dataclass
from typing import Any

from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.plan.sizing import Parameters
from litgpt_memsinks.prepare.manifest import Manifest, Split
from litgpt_memsinks.sinks.masks import exact_number

BITS_PER_PARAMETER = 3.6
"""What a parameter of a GPT remembers at most (Morris et al. 2025, arXiv 2505.24832)."""
DOCUMENT_BITS = 31
"""Bits of a sequence ID that name the document, see `document_ids/ids.py`."""
PAPER_RATES = {"SmolLM-360M-MemSinks": 5e-4, "SmolLM-1.7B-MemSinks": 5e-5}
"""Learning rates of App. I, Tables 4 and 5."""


def active(n_sink: int, p: float) -> tuple[float, float]:
    """Mean and standard deviation of the number of sinks that are on for a document, in each MLP."""
    return n_sink * p, math.sqrt(n_sink * p * (1 - p))


def coverage(p: float, documents: int) -> float:
    """Fraction of the sinks that at least one of so many documents switches on: 1 - (1 - p)^k."""
    return 1 - (1 - p) ** documents


def overlap(n_sink: int, p: float) -> float:
    """Expected number of sinks in each MLP that two documents share: n p²."""
    return n_sink * p * p


def private(n_sink: int, p: float, others: int) -> float:
    """Expected number of a document's sinks that none of so many other documents switches on: n p (1 - p)^k."""
    return n_sink * p * (1 - p) ** others


def colliding_pairs(documents: int) -> float:
    """Expected pairs of documents that share a sequence ID by chance, of ``2**31 - 1`` IDs (0 is none)."""
    return documents * (documents - 1) / 2 / (2**DOCUMENT_BITS - 1)


@dataclass(frozen=True)
class Data:
    """What the manifest of the prepared training data says."""

    documents: int
    """Distinct documents"""
    repeated_documents: int
    """Those that occur more than once"""
    repeated_tokens: int
    """Their tokens, repeats included"""
    repeats: float | None
    """How often they occur on average; ``None``: nothing repeats"""
    noise: float
    """Fraction of their occurrences with a random ID"""
    schemes: dict[str, str]
    """How each source makes its IDs"""
    colliding_pairs: int
    """Pairs that do share an ID by chance"""
    left_out: bool
    """Whether repeated documents were left out"""

    @classmethod
    def of(cls, manifest: Manifest, split: str) -> "Data":
        """Read it off a manifest; ``split`` is the folder that is trained on."""
        counts, recipe = manifest.splits[split], manifest.recipe
        return cls(
            documents=counts.documents,
            repeated_documents=counts.repeated_documents,
            repeated_tokens=counts.repeated_tokens,
            repeats=_mean_repeats(counts),
            noise=recipe["id_noise"],
            schemes={name: source["ids"] for name, source in recipe["sources"].items()},
            colliding_pairs=manifest.colliding_pairs,
            left_out=recipe["leave_out_repeated"],
        )


def _mean_repeats(counts: Split) -> float | None:
    if not counts.repeated_documents:
        return None
    once = counts.documents - counts.repeated_documents
    return (counts.written - once) / counts.repeated_documents


def sink_warnings(
    config: MemSinksConfig, parameters: Parameters, learning_rate: float | None, data: Data | None
) -> list[str]:
    """Where the paper or our own measurements say that the sinks will not do what they are for; one sentence each.

    Args:
        config: The model's.
        parameters: Its counts.
        learning_rate: Of the optimizer; ``None``: not known.
        data: The prepared data; ``None``: not there yet.
    """
    found = _rate_warnings(config, parameters, learning_rate)
    if config.sink_attention == "document":
        found.append(
            "sinks.attention is document, but the memory of its masks, (rows, 1, T, T) for each layer, is not counted "
            "here, so try a few steps at full size first (docs/frontier.md)."
        )
    if not config.n_sink or config.sink_method != "memsinks":
        return found
    found += _model_warnings(config)
    if data is not None:
        found += _data_warnings(config, parameters, data)
    return found


def _rate_warnings(config: MemSinksConfig, parameters: Parameters, rate: float | None) -> list[str]:
    if rate is None:
        return []
    if (paper := PAPER_RATES.get(config.name)) and not paper / 2 <= rate <= paper * 2:
        return [
            f"The learning rate is {rate:g}, but the paper trained this model at {paper:g} (App. I, Tables 4 and 5)."
        ]
    if config.n_sink and parameters.total < 50_000_000 and rate < 1e-3:
        return [
            f"The learning rate is {rate:g}: a two-layer model closed 42% of the gap at 1e-3 and 72% at 4e-3, so below "
            "1e-3 expect less (docs/planning.md)."
        ]
    return []


def _model_warnings(config: MemSinksConfig) -> list[str]:
    found, p = [], config.sink_active_probability
    if p >= 0.7:
        found.append(
            f"active_probability is {p:g}: isolation breaks down from 0.7 on (Fig. 5a), 0.3 is the paper's best."
        )
    if config.n_sink <= 128:
        found.append(
            f"Each MLP has {config.n_sink} sinks: with 128 a two-layer model closed 15 to 42% of the gap, with 256 64% "
            "(docs/planning.md). Lower shared_fraction, or widen the model."
        )
    return found


def _data_warnings(config: MemSinksConfig, parameters: Parameters, data: Data) -> list[str]:
    found: list[str] = []
    if data.repeats is None:
        why = "were left out" if data.left_out else "there are none"
        effect = {
            "all": "sinks take text that occurs once, which dropping them loses",
            "repeated": "no sink is ever on",
        }
        return [
            f"Of {data.documents:,} documents 0 repeat ({why}): {effect[config.sink_sinks_for]}. Train with "
            "sinks.shared_fraction 1.0."
        ]
    if data.repeats < 64:
        found.append(
            f"Repeated documents occur {data.repeats:.3g} times: a two-layer model closed 2 to 22% of the gap "
            "at 16 repeats and 63% at 64 (docs/planning.md); the paper closes 50% at 360M and 1.7B, and more at 20 "
            "repeats than at its base count, which it does not print (Sec. 5.2)."
        )
    if data.noise >= 0.1:
        found.append(
            f"id_noise is {data.noise:g}: the paper is robust to 0.1 and weak at 0.5 (Fig. 5c), a two-layer model lost "
            "a third of the effect at 0.1 (docs/planning.md)."
        )
    if by_number := sorted(name for name, scheme in data.schemes.items() if scheme == "index"):
        found.append(
            f"IDs of {', '.join(by_number)} are numbers (ids: index): copies that the files hold get different IDs and "
            "different sinks, as under 100% ID noise; ids: hash gives equal text one ID (App. I.1)."
        )
    found += _capacity_warnings(config, parameters, data)
    return found


def _capacity_warnings(config: MemSinksConfig, parameters: Parameters, data: Data) -> list[str]:
    """Whether the sinks can hold the repeated text at all, at ``log2(vocabulary)`` bits a token, which none exceeds."""
    assert data.repeats is not None  # something repeats
    assert config.padded_vocab_size is not None  # set by Config.__post_init__
    bits = data.repeated_tokens / data.repeats * math.log2(config.padded_vocab_size)
    used = sum(map(config.has_sinks, range(config.n_layer))) / config.n_layer
    sinks = round(parameters.sinks * used)
    capacity = sinks * BITS_PER_PARAMETER
    if bits <= capacity:
        return []
    return [
        f"The repeated text takes up to {bits / 8e6:,.1f} MB, but {sinks:,} sink parameters remember "
        f"{capacity / 8e6:,.1f} MB at {BITS_PER_PARAMETER} bits each (arXiv 2505.24832): shared neurons take the rest."
    ]


def expected(config: MemSinksConfig, data: Data | None) -> dict[str, Any]:
    """What the sinks will do, as numbers. Empty without sinks, and under gradient masking, where all are alike."""
    if not config.n_sink or config.sink_method != "memsinks":
        return {}
    n, p = config.n_sink, config.sink_active_probability
    mean, deviation = (exact_number(n, p), 0.0) if config.sink_mask == "exact" else active(n, p)
    counts = [1, 10, 100, 1000]
    result: dict[str, Any] = {
        "shared_neurons": config.n_shared,
        "sink_neurons": n,
        "active_mean": mean,
        "active_sd": deviation,
        "overlap_of_two": overlap(n, p),
    }
    if data is not None:
        with_sinks = data.documents if config.sink_sinks_for == "all" else data.repeated_documents
        counts += [data.repeated_documents] if data.repeated_documents else []
        result["documents_per_sink"] = p * with_sinks
        result["repeated_documents_per_sink"] = p * data.repeated_documents
        result["colliding_pairs_expected"] = colliding_pairs(data.documents)
        result["colliding_pairs"] = data.colliding_pairs
    result["coverage"] = {count: coverage(p, count) for count in counts}
    result["private"] = {count: private(n, p, count - 1) for count in counts}
    return result
