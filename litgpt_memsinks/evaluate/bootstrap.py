"""How sure is a number? Bootstrap over documents, and over seeds where there are several.

A document is drawn whole, because its tokens are not independent (cluster bootstrap). What is compared is drawn
together: the same documents for each model, so that documents that are hard for all do not widen the difference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn."""

    draws: int = 1000
    """Resamples. 0: no intervals"""
    level: float = 0.95
    """Share of the resamples that an interval holds"""
    seed: int = 0
    """Seed of the resamples"""

    def interval(
        self, statistic: Callable[..., float], sizes: Sequence[int]
    ) -> tuple[float, float] | tuple[None, None]:
        """Percentile interval of a statistic.

        Args:
            statistic: Given the indices drawn of each group, int64 ``(size,)``, the number.
            sizes: Number of documents, or of seeds, of each group.

        Returns:
            Its two ends; none if no group has two or more to draw from, or the statistic is undefined in most draws.
        """
        if not self.draws or max(sizes, default=0) < 2 or min(sizes) < 1:
            return None, None
        rng = np.random.default_rng(self.seed)
        drawn = np.array([statistic(*(rng.integers(0, size, size) for size in sizes)) for _ in range(self.draws)])
        drawn = drawn[~np.isnan(drawn)]
        if len(drawn) < self.draws / 2:
            return None, None
        tail = (1 - self.level) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return float(low), float(high)

    def value(self, statistic: Callable[..., float], sizes: Sequence[int], n: int | None = None) -> dict[str, Any]:
        """A number of the result file: its value, interval and the documents it rests on.

        Args:
            statistic: See ``interval``.
            sizes: See ``interval``.
            n: Documents it rests on; the sum of the sizes by default.
        """
        count = sum(sizes) if n is None else n
        if not sizes or min(sizes) < 1:
            return {"value": None, "low": None, "high": None, "n": count}
        found = statistic(*(np.arange(size) for size in sizes))
        low, high = self.interval(statistic, sizes)
        return {"value": None if math.isnan(found) else found, "low": low, "high": high, "n": count}

    def mean(self, values: Sequence[float] | npt.NDArray[Any]) -> dict[str, Any]:
        """The mean over documents. Documents without a value, NaN, are left out."""
        array = np.asarray(values, dtype=np.float64)
        array = array[~np.isnan(array)]
        return self.value(lambda drawn: float(array[drawn].mean()), (len(array),))

    def loss(self, nats: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
        """The mean over targets.

        Args:
            nats: Sum of each document's losses.
            counts: Targets of each document.
        """
        sums, numbers = np.asarray(nats, dtype=np.float64), np.asarray(counts, dtype=np.int64)
        scored = numbers > 0
        sums, numbers = sums[scored], numbers[scored]
        value = self.value(lambda drawn: float(sums[drawn].sum() / numbers[drawn].sum()), (len(sums),))
        return value | {"targets": int(numbers.sum())}
