"""Which settings did the paper choose from? Its tables, as experiments that select an arm and claim nothing."""

from dataclasses import replace
from itertools import product

from litgpt_memsinks.experiments.declared import (
    EXPERIMENTS,
    MEMSINKS,
    RARE,
    STANDARD,
    STREAM,
    Arm,
    Experiment,
    Setting,
    SmolLM,
)

LEARNING_RATES = (6e-5, 6e-4, 6e-3)
WEIGHT_DECAYS = (1e-5, 1e-3, 1e-1)

Axis = tuple[str, tuple[float, ...], tuple[str, ...]]
"""Name in an arm's name, values, and the flags of `litgpt pretrain` that take one"""

_OPTIMIZER: tuple[Axis, ...] = (
    ("lr", LEARNING_RATES, ("optimizer.init_args.lr", "train.min_lr")),  # constant after warm-up
    ("wd", WEIGHT_DECAYS, ("optimizer.init_args.weight_decay",)),
)


def _g(*values: float) -> Axis:
    return ("g", values, ("data.sinks.shared_fraction",))


def _p(*values: float) -> Axis:
    return ("p", values, ("data.sinks.active_probability",))


def grid(base: Arm, *axes: Axis) -> tuple[Arm, ...]:
    """An arm like ``base`` for each choice of a value from every axis."""
    arms = []
    for values in product(*(axis[1] for axis in axes)):
        chosen = list(zip(axes, values, strict=True))
        name = " ".join(f"{axis[0]}={value:g}" for axis, value in chosen)
        settings: tuple[Setting, ...] = tuple((flag, f"{value:g}") for axis, value in chosen for flag in axis[2])
        arms.append(replace(base, name=name, settings=settings, standard=""))
    return tuple(arms)


_HERE = "The values are the paper's, at the CPU's scale, too. No run stops early."
_SMOLLM = "The paper does not say by what it selects; here by the same loss as in Table 3."


def _table(name: str, where: str, says: str, by: str, arms: tuple[Arm, ...], comment: str = _HERE) -> Experiment:
    return Experiment(
        *(name, where, says, comment, arms),
        asked=arms[0].name,
        selected_by=by,
        table=tuple(dict.fromkeys((by, "validation", "repeated"))),
        pictures=("grid",),
    )


def _smollm(name: str, where: str, model: SmolLM, size: str, recipe: str) -> Experiment:
    stream = RARE.at_paper_scale(model, f"{recipe}_slimpajama_tinystories")
    base = Arm("", "memsinks", stream, size=size, paper_recipe=f"{recipe}_memsinks")
    says = f"Sinks in {model}: g and p by validation loss with sinks dropped."
    return _table(name, where, says, "validation", grid(base, _g(0.95, 0.9, 0.7, 0.5), _p(0.1, 0.3, 0.5)), _SMOLLM)


_ALL = (
    _table(
        *("table1", "Table 1", "Standard training: learning rate and weight decay by validation loss."),
        *("validation", grid(STANDARD, *_OPTIMIZER)),
    ),
    _table(
        *("table2", "Table 2"),
        "Gradient masking: learning rate, weight decay and g by validation loss before its neurons are dropped.",
        *("validation_kept", grid(Arm("", "mask_exact", STREAM), *_OPTIMIZER, _g(0.7, 0.9, 0.95))),
    ),
    _table(
        *("table3", "Table 3", "Sinks: learning rate, weight decay, g and p by validation loss with sinks dropped."),
        *("validation", grid(MEMSINKS, *_OPTIMIZER, _g(0.1, 0.3, 0.5, 0.7), _p(0.1, 0.3, 0.5, 0.7))),
    ),
    _smollm("table6a", "Table 6, 360M", "SmolLM-360M", "", "smollm360"),
    _smollm("table6b", "Table 6, 1.7B", "SmolLM-1.7B", "large", "smollm1.7b"),
)

GRIDS = {one.name: one for one in _ALL}
"""Name to grid, in the paper's order. `experiment all` leaves them out: together they are 204 runs a seed."""

DECLARED = EXPERIMENTS | GRIDS
"""Name to everything that `experiment` runs."""
