"""What is the outcome of checking one statement of the paper's theory? Two numbers and the relation between them."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from litgpt_memsinks.errors import MemSinksError

ROUNDING = 1e-6
"""Differences up to this much of the bound (of 1, if the bound is smaller) count as rounding: all is float64."""

Relation = Literal["<=", ">=", ">", "="]


@dataclass(frozen=True)
class Verdict:
    """A statement, what was simulated, and the two sides of its relation."""

    theorem: str
    """The paper's number, such as F.1"""
    version: Literal["printed", "corrected"]
    """As the paper states it, or as it does hold"""
    statement: str
    """The relation in a few words"""
    simulated: str
    """What was run"""
    measured: float
    """Left side, from the simulation"""
    relation: Relation
    """How the sides should compare"""
    bound: float
    """Right side, from the formula"""

    @property
    def holds(self) -> bool:
        """Whether the relation is true, up to ``ROUNDING``."""
        slack = ROUNDING * max(1.0, abs(self.bound))
        difference = self.measured - self.bound
        return {
            "<=": difference <= slack,
            ">=": difference >= -slack,
            ">": difference > slack,
            "=": abs(difference) <= slack,
        }[self.relation]

    def row(self) -> dict[str, Any]:
        """The fields and ``holds``, for JSON."""
        return {**asdict(self), "holds": self.holds}


def require(condition: bool, name: str, value: object, limit: str) -> None:
    """Refuse a parameter of a set-up.

    Raises:
        MemSinksError: If ``condition`` is false, naming the parameter, its value and what it must be.
    """
    if not condition:
        raise MemSinksError(f"{name} is {value}, but it must be {limit}. Change it.")
