"""How much is forgotten at which validation loss? Settings of the sinks, trained on a finished demo's streams.

    litgpt-memsinks frontier --demo runs/demo --out_dir runs/frontier

Each setting differs from the demo's arms in ``data.sinks`` and in the ID noise of its stream only, so it is set against
the demo's own ``standard`` and ``left_out`` runs of the same seed. The tables of ``docs/frontier.md`` are its output.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from litgpt_memsinks.digests import file_sha256
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.battery import Kept, Measured, Plan, measure
from litgpt_memsinks.evaluate.evaluate import deviation
from litgpt_memsinks.evaluate.results import compare, extracted
from litgpt_memsinks.evaluate.subject import Asked, Role, Subject, ask_prepared
from litgpt_memsinks.evaluate.verdict import loss_auc
from litgpt_memsinks.experiments.demo import (
    EMBEDDED_BLOCK,
    MICRO_BATCH,
    OWN_BLOCK,
    RELEARNED,
    RELEARNING_STEPS,
    REPEATED_DOCUMENTS,
    REPEATS,
    pretrain_command,
    run_dir,
)
from litgpt_memsinks.experiments.training_runs import TrainingRun, is_trained, one_pass, train_runs
from litgpt_memsinks.files import write_json
from litgpt_memsinks.prepare.manifest import MANIFEST, Manifest
from litgpt_memsinks.prepare.prepare import prepare

PARTS = ("losses", "extraction", "membership", "relearning")
FOUND, SETTING = "found.json", "setting.json"
ARM = "memsinks"
"""The demo's recipe whose sinks a setting replaces."""
REFERENCES: dict[str, Role] = {"standard": "standard", "left_out": "left_out"}


@dataclass
class Setting:
    """One row of the scan."""

    name: str
    """Of the row, and of the folder of its runs"""
    sinks: dict[str, Any] = field(default_factory=dict)
    """What ``data.sinks`` has besides or instead of what the recipe ``memsinks`` of the demo says"""
    id_noise: float = 0.0
    """Share of the occurrences of repeated documents that get a random ID in training"""
    left_out: bool = False
    """Train on the demo's stream without the repeated documents: what settings of more than sinks are set against"""


@dataclass
class Found:
    """What one model shows, its sinks dropped unless said. Losses in nats per token."""

    name: str
    seed: int
    validation: float
    validation_change: float
    """Relative, against standard training"""
    repeated: float
    own: float
    """The repeated documents' loss with their own sinks on"""
    placebo: float
    """The same with another document's sinks on"""
    gap_closed: float
    extracted: float
    """Share of the repeated documents whose tokens 33 to 64 come back from the first 32"""
    relearned: float
    """By how much the loss of other repeated documents falls while a few are relearnt"""
    membership: float
    """AUC of the loss attack: how well the loss tells repeated documents from validation documents"""


def frontier(
    demo: Path = Path("runs/demo"),
    settings: Path = Path("recipes/frontier/settings.yaml"),
    out_dir: Path = Path("runs/frontier"),
    recipes: Path = Path("recipes/demo"),
    seeds: int = 1,
    only: str = "",
) -> None:
    """Train settings of the sinks on a finished demo's streams and say what each forgets at which validation loss.

    One training at a time. What is finished is not redone, and found.json keeps the rows of earlier commands.

    Args:
        demo: Folder of a finished `litgpt-memsinks demo` with as many seeds.
        settings: YAML list of settings: name, sinks, id_noise, left_out.
        out_dir: Folder for runs, noisy streams and found.json.
        recipes: Folder of the demo's recipes.
        seeds: Number of training seeds.
        only: Names of the settings to run, with commas between them; all by default.

    Raises:
        MemSinksError: If the demo is not finished, the settings are not a list of such, a finished run has the name of
            a setting but other settings, or a training run fails.
    """
    chosen = read_settings(settings, only)
    _check(demo, recipes, seeds)
    read_rows(out_dir / FOUND)  # refused before anything is trained
    block_size = EMBEDDED_BLOCK if _corpus(demo) is None else OWN_BLOCK
    asked = ask_prepared(demo / "data" / "stream", None)
    rows: list[Found] = []
    for setting in chosen:
        for seed in range(1, seeds + 1):
            stream = demo / "data" / "left_out" if setting.left_out else _stream(demo, out_dir, setting.id_noise)
            train(setting, stream, out_dir, recipes / f"{ARM}.yaml", seed, block_size)
            rows.append(look(setting, demo, out_dir, seed, asked, block_size))
            print(_row(rows[-1]), flush=True)
            add(out_dir / FOUND, rows[-1])
    print("\n" + table(rows))
    if seeds > 1:
        print("\n" + over_seeds(rows))


def read_settings(path: Path, only: str = "") -> list[Setting]:
    """The settings of a file, those named in ``only`` if any.

    Raises:
        MemSinksError: If it is not a list of settings with different names, or lacks one that is asked for.
    """
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    try:
        settings = [Setting(**one) for one in content]
    except TypeError as error:
        raise MemSinksError(
            f"{str(path)!r} is no list of settings with name, sinks, id_noise and left_out ({error}). Give one such as "
            "recipes/frontier/settings.yaml."
        ) from error
    names = [setting.name for setting in settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MemSinksError(f"{str(path)!r} has {twice[0]!r} more than once. Give each setting a name of its own.")
    wanted = only.split(",") if only else names
    if missing := [name for name in wanted if name not in names]:
        raise MemSinksError(f"{str(path)!r} has no setting {missing[0]!r}. It has: {', '.join(names)}.")
    return [setting for setting in settings if setting.name in wanted]


def _check(demo: Path, recipes: Path, seeds: int) -> None:
    if seeds < 1:
        raise MemSinksError(f"seeds is {seeds}, but it must be at least 1.")
    for seed in range(1, seeds + 1):
        for arm in REFERENCES:
            if not is_trained(run_dir(demo, arm, seed)):
                raise MemSinksError(
                    f"{str(demo)!r} has no finished run {arm} of seed {seed}. Run litgpt-memsinks demo "
                    f"--seeds {seeds} first (make demo SEEDS={seeds})."
                )
    if not (recipes / f"{ARM}.yaml").is_file():
        raise MemSinksError(f"{str(recipes)!r} lacks {ARM}.yaml. Run this in the repository, or give --recipes DIR.")


def _corpus(demo: Path) -> str | None:
    """The corpus of a demo; ``None`` if that is the embedded one."""
    corpus = json.loads((demo / "demo.json").read_text(encoding="utf-8"))["corpus"]
    assert corpus is None or isinstance(corpus, str)  # as `demo` writes it
    return corpus


def _stream(demo: Path, out_dir: Path, id_noise: float) -> Path:
    """The demo's stream, or the same documents with a random ID at some occurrences of the repeated ones."""
    if not id_noise:
        return demo / "data" / "stream"
    folder = out_dir / "data" / f"id_noise_{id_noise:g}"
    if not (folder / MANIFEST).is_file():
        prepare(
            train=demo / "corpus" / "train.jsonl",
            validation=demo / "corpus" / "validation.jsonl",
            out_dir=folder,
            tokenizer_dir=demo / "tokenizer",
            repeated_documents=REPEATED_DOCUMENTS,
            repeats=REPEATS,
            id_noise=id_noise,
        )
    return folder


def train(setting: Setting, stream: Path, out_dir: Path, recipe: Path, seed: int, block_size: int) -> None:
    """Run the stock `litgpt pretrain` for one pass over the stream, unless that is done; its output is ``train.log``.

    Raises:
        MemSinksError: If it fails; the message has the end of its log. Or if what is done had other settings.
    """
    folder = run_dir(out_dir, setting.name, seed)
    settings = asdict(setting) | {
        "recipe_sha256": file_sha256(recipe),
        "stream": Manifest.read(stream).splits["train"].digest,
        "block_size": block_size,
    }
    if is_trained(folder):
        _refuse_others(folder, settings)
        return
    iterations = one_pass(stream, block_size)
    command = pretrain_command(recipe, stream, folder, seed, block_size, iterations * MICRO_BATCH * block_size)
    for name, value in setting.sinks.items():
        command += [f"--data.sinks.{name}", value if isinstance(value, str) else json.dumps(value)]
    train_runs([TrainingRun(f"{setting.name} seed {seed}", tuple(command), folder, iterations)], 1, os.cpu_count() or 1)
    write_json(folder / SETTING, settings)


def _refuse_others(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a finished run of other settings than these, under the same name."""
    try:
        before = json.loads((folder / SETTING).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemSinksError(
            f"{str(folder)!r} has no {SETTING} that says what it was trained with. Remove it, or set --out_dir."
        ) from error
    if different := [name for name, value in settings.items() if before.get(name) != value]:
        raise MemSinksError(
            f"{str(folder)!r} was trained with another {' and '.join(different)}. Give the setting another name, "
            "remove the folder, or set --out_dir."
        )


def look(setting: Setting, demo: Path, out_dir: Path, seed: int, asked: Asked, block_size: int) -> Found:
    """Measure one run beside the demo's references; what was measured before is not redone."""
    plan = Plan(PARTS, block_size, relearn_documents=(RELEARNED,), relearn_steps=RELEARNING_STEPS)
    subjects = [Subject.at(arm, run_dir(demo, arm, seed) / "final", role) for arm, role in REFERENCES.items()]
    subjects.append(Subject.at(setting.name, run_dir(out_dir, setting.name, seed) / "final"))
    kept = Kept(out_dir / "measured")
    arms = {one.arm: measure(one, asked, plan, "cpu", kept, allow_wrong_map=True) for one in subjects}
    (row,) = (row for row in compare([arms]) if row.arm == setting.name)
    return Found(
        setting.name,
        seed,
        row.validation[0],
        row.validation_change[0],
        row.repeated[0],
        row.own[0],
        row.placebo[0],
        row.gap_closed[0],
        extracted(arms[setting.name], "dropped"),
        relearned(arms[setting.name]),
        loss_auc(arms[setting.name]),
    )


def read_rows(path: Path) -> list[Found]:
    """The rows of earlier commands; none without the file.

    Raises:
        MemSinksError: If the file is something else.
    """
    try:
        return [Found(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
    except (ValueError, TypeError) as error:
        raise MemSinksError(f"{str(path)!r} is no list of rows ({error}). Move it away, or set --out_dir.") from error


def add(path: Path, row: Found) -> None:
    """Write a row to the file, instead of one of the same name and seed, if it has one.

    Raises:
        MemSinksError: If the file is something else.
    """
    rows = [one for one in read_rows(path) if (one.name, one.seed) != (row.name, row.seed)]
    write_json(path, [asdict(one) for one in (*rows, row)])


def relearned(measured: Measured) -> float:
    """Nats per token by which the loss of other repeated documents falls while a few are relearnt."""
    (run,) = measured.found["relearning"]["runs"]
    return float(run["other"][0] - run["other"][-1])


def _row(found: Found) -> str:
    return (
        f"| {found.name} | {found.seed} | {found.validation:.3f} | {found.validation_change:+.1%} | "
        f"{found.repeated:.3f} | {found.own:.3f} | {found.placebo:.3f} | "
        f"{found.gap_closed:.1%} | {found.extracted:.0%} | {found.relearned:.3f} | "
        f"{found.membership:.2f} |"
    )


def _lines(heads: list[str], rows: Iterable[str]) -> Iterator[str]:
    names = [*heads, "validation", "vs standard", "repeated", "own sinks", "placebo", "gap closed", "extracted"]
    names += ["relearned", "AUC, loss"]
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    yield from rows


def table(rows: list[Found]) -> str:
    """The rows as Markdown."""
    return "\n".join(_lines(["setting", "seed"], map(_row, rows)))


def over_seeds(rows: list[Found]) -> str:
    """The same with mean ± sample standard deviation over the seeds of each setting."""
    names = dict.fromkeys(row.name for row in rows)
    return "\n".join(_lines(["setting"], (_mean_row([row for row in rows if row.name == name]) for name in names)))


def _mean_row(rows: list[Found]) -> str:
    def cell(name: str, form: str, factor: float = 1.0, unit: str = "") -> str:
        values = [factor * getattr(row, name) for row in rows]
        return f"{mean(values):{form}} ± {deviation(values):{form.lstrip('+')}}{unit}"

    losses = {name: cell(name, ".3f") for name in ("validation", "repeated", "own", "placebo", "relearned")}
    return (
        f"| {rows[0].name} | {losses['validation']} | {cell('validation_change', '+.1f', 100, '%')} | "
        f"{losses['repeated']} | {losses['own']} | {losses['placebo']} | {cell('gap_closed', '.1f', 100, '%')} | "
        f"{cell('extracted', '.0f', 100, '%')} | {losses['relearned']} | {cell('membership', '.2f')} |"
    )
