"""The result files as a page to read, pictures for a paper, and tables. It needs the files only, and no PyTorch."""

from pathlib import Path

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import atomic_directory, refuse_to_overwrite, write_text
from litgpt_memsinks.report.charts import Chart, sections
from litgpt_memsinks.report.figures import overview, write_figure
from litgpt_memsinks.report.page import page
from litgpt_memsinks.report.results import Results, read_results, validation_curve
from litgpt_memsinks.report.table import as_csv, as_markdown

__all__ = ["read_results", "report", "validation_curve"]

PICTURES = (".png", ".svg", ".pdf")
OVERVIEW = ("curve_validation", "losses_repeated", "frontier")


def report(results: Path | list[Path], out: Path = Path("report.html")) -> None:
    """Show result files as a page that opens in any browser, as pictures for a paper, and as tables.

    Args:
        results: Files that `litgpt-memsinks evaluate` or the demo wrote. Several are set side by side.
        out: What to make. A name in .html is a page without other files; in .png, .svg or .pdf an overview picture; any
            other name is a folder with the page, figures/ for papers, table.csv and table.md. Must not exist.

    Raises:
        MemSinksError: If a result file is missing or is not one, or `out` exists or has another ending.
    """
    if out.suffix.lower() not in ("", ".html", *PICTURES):
        raise MemSinksError(f"out is {str(out)!r}, but it must end in .html, {', '.join(PICTURES)}, or name a folder.")
    refuse_to_overwrite(out)
    found = read_results([results] if isinstance(results, Path) else results)
    if out.suffix.lower() in PICTURES:
        overview(found, overview_charts(found), out)
        print(f"Picture: {out}")
    elif out.suffix.lower() == ".html":
        write_text(out, page(found))
        print(f"Page: {out}")
    else:
        _write_folder(found, out)
        print(f"Page: {out / 'report.html'}   Figures: {out / 'figures'}   Tables: {out / 'table.csv'}, table.md")


def overview_charts(results: Results) -> list[Chart]:
    """The three pictures that say most, as far as there are any."""
    known = {chart.name: chart for section in sections(results) for chart in section.charts}
    return [known[name] for name in OVERVIEW if name in known]


def _write_folder(results: Results, out: Path) -> None:
    with atomic_directory(out) as scratch:
        write_text(scratch / "report.html", page(results))
        write_text(scratch / "table.csv", as_csv(results))
        write_text(scratch / "table.md", as_markdown(results) + "\n")
        for chart in (chart for section in sections(results) for chart in section.charts):
            for ending in ("svg", "png"):
                write_figure(chart, scratch / "figures" / f"{chart.name}.{ending}")
