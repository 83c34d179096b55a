"""Do the paper's theorems hold? Each one simulated in its own linear model, in float64, and compared with its bound."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt_memsinks.files import atomic_directory, refuse_to_overwrite, write_json
from litgpt_memsinks.theory import accumulation as theory_accumulation
from litgpt_memsinks.theory import coadaptation as theory_coadaptation
from litgpt_memsinks.theory import entanglement as theory_entanglement
from litgpt_memsinks.theory import figures
from litgpt_memsinks.theory import forgetting as theory_forgetting
from litgpt_memsinks.theory.verdict import Verdict

Theorem = Literal["all", "entanglement", "coadaptation", "forgetting", "accumulation"]
COLUMNS = ("theorem", "version", "statement", "simulated", "measured", "relation", "bound", "holds")


class Part(NamedTuple):
    """A theorem, or several with one setting."""

    setup: Any
    """The setting, a dataclass of the paper's symbols"""
    verdicts: Callable[..., list[Verdict]]
    """Checks a setting"""
    draw: Callable[[Figure], None]
    """Draws the default one"""


PARTS: dict[str, Part] = {
    "entanglement": Part(theory_entanglement.Entanglement(), theory_entanglement.verdicts, figures.draw_entanglement),
    "coadaptation": Part(theory_coadaptation.Coadaptation(), theory_coadaptation.verdicts, figures.draw_coadaptation),
    "forgetting": Part(theory_forgetting.Forgetting(), theory_forgetting.verdicts, figures.draw_forgetting),
    "accumulation": Part(theory_accumulation.Accumulation(), theory_accumulation.verdicts, figures.draw_accumulation),
}


def theory(theorem: Theorem = "all", out_dir: Path = Path("theory")) -> None:
    """Simulate the paper's theorems in their linear models and compare each with its bound.

    Writes `theory.json`, with every setting and number, and one SVG per theorem. Takes seconds; no GPU.

    Args:
        theorem: `entanglement` (3.1, D.3), `coadaptation` (4.1, F.1), `forgetting` (H.2), `accumulation` (H.3) or all.
        out_dir: Folder to write. Must not hold anything.

    Raises:
        MemSinksError: If `out_dir` holds something.
    """
    refuse_to_overwrite(out_dir)
    names = list(PARTS) if theorem == "all" else [theorem]
    verdicts = {name: PARTS[name].verdicts(PARTS[name].setup) for name in names}
    with atomic_directory(out_dir) as folder:
        content = {
            name: {"setup": asdict(PARTS[name].setup), "verdicts": [verdict.row() for verdict in verdicts[name]]}
            for name in names
        }
        write_json(folder / "theory.json", content)
        for name in names:
            save_figure(PARTS[name].draw, folder / f"{name}.svg")
    print_verdicts([verdict for name in names for verdict in verdicts[name]])
    print(f"Numbers and figures: {out_dir}")


def cells(verdict: Verdict) -> tuple[str, ...]:
    """A row of the table, by ``COLUMNS``; numbers with three digits, what is rounding as 0."""
    numbers = [f"{0.0 if abs(number) < 1e-6 else number:.3g}" for number in (verdict.measured, verdict.bound)]
    outcome = "yes" if verdict.holds else "NO"
    fixed = (verdict.theorem, verdict.version, verdict.statement, verdict.simulated)
    return (*fixed, numbers[0], verdict.relation, numbers[1], outcome)


def print_verdicts(verdicts: list[Verdict]) -> None:
    """Print the table."""
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=170)  # a pipe has no width
    table = Table(title="The paper's theorems, simulated; measured against bound", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for verdict in verdicts:
        table.add_row(*(Text(cell) for cell in cells(verdict)))
    console.print(table)
    print("printed: as the paper states it, or with the one change that is named.  corrected: what does hold.")


def save_figure(draw: Callable[[Figure], None], path: Path) -> None:
    """Draw an SVG whose text stays text, the same bytes each time with one release of matplotlib."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.family": "sans-serif"}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        draw(figure)
        figure.savefig(path, format="svg", metadata={"Date": None})
