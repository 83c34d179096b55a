"""Which training runs does an experiment need, and which of them are there? One folder for each run and seed.

A folder's name has a fingerprint of everything that decides the run, so experiments share runs, and a run whose
settings have changed is a new one beside the old.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.subject import key_of
from litgpt_memsinks.experiments.declared import STREAM, Arm, Setting
from litgpt_memsinks.experiments.scales import Scale, Texts, make_edited, prepare_stream, stream_folder, stream_settings
from litgpt_memsinks.experiments.training_runs import (
    MICRO_BATCH,
    TRAINED,
    TrainingFailedError,
    TrainingRun,
    is_trained,
    one_pass,
    pretrain_command,
    seeded_command,
    train_runs,
)
from litgpt_memsinks.files import write_json, write_text
from litgpt_memsinks.prepare.manifest import MANIFEST, Manifest

SETTINGS = "run.json"
STREAMS = "data"
OPTIMIZER = "optimizer.init_args."


@dataclass(frozen=True)
class Workplace:
    """Where the runs of one scale and corpus are."""

    scale: Scale
    """The sizes"""
    texts: Texts
    """The texts"""
    folder: Path
    """Of streams, runs and finished measurements"""
    recipes: Path
    """Folder ``recipes`` of the repository"""
    corpus_sha256: str
    """Of the corpus; empty for the embedded stories, and for files that the scale names"""

    def stream(self, arm: Arm) -> Path:
        """The prepared folder that an arm trains on, which is made if it is not there.

        Raises:
            MemSinksError: For bad input, or if the folder there was made with other settings.
        """
        settings = self._stream_settings(arm)
        wanted = self._placeless(settings)
        folder = self.folder / STREAMS / stream_folder(arm.stream, self.scale)
        note = folder.with_name(f"{folder.name}.json")
        there = note.is_file() and (folder / MANIFEST).is_file()
        if there and json.loads(note.read_text(encoding="utf-8")) != wanted:
            raise MemSinksError(
                f"{str(folder)!r} was prepared with other settings than this package's. Remove it, or set --out_dir."
            )
        write_json(note, wanted)
        prepare_stream(settings, self.texts, folder)
        return folder

    def _stream_settings(self, arm: Arm) -> dict[str, Any]:
        copies = ""
        if arm.stream.edited:
            exact = self.stream(replace(arm, stream=STREAM))
            copies = str(make_edited(exact, arm.stream.edited, self.scale.repeats - 1, self.folder / "edited"))
        return stream_settings(arm.stream, self.scale, self.texts, self.recipes, copies)

    def _placeless(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The same whatever the workplace is called: what the texts are matters, not where."""
        return json.loads(json.dumps(settings).replace(json.dumps(str(self.folder))[1:-1], "WORKPLACE"))

    def recipe(self, arm: Arm) -> Path:
        """The recipe of an arm.

        Raises:
            MemSinksError: If there is none.
        """
        name = f"{arm.paper_recipe}.yaml" if self.is_whole(arm) else f"demo/{arm.recipe}.yaml"
        if not (self.recipes / name).is_file():
            raise MemSinksError(
                f"There is no recipe {str(self.recipes / name)!r}. Run in the repository, or give --recipes DIR."
            )
        return self.recipes / name

    def is_whole(self, arm: Arm) -> bool:
        """Whether the recipe has model, tokens and steps, too: the paper's large runs."""
        return self.scale.paper and bool(arm.paper_recipe)

    def changes(self, arm: Arm, recipe: dict[str, Any]) -> list[Setting]:
        """What an arm changes of its recipe; what is more particular comes later, and holds."""
        if self.is_whole(arm):
            return list(arm.settings)
        sinks = recipe["data"]["init_args"].get("sinks", {})
        with_sinks = sinks.get("shared_fraction") != 1
        return [
            *self.scale.settings,
            *(self.scale.sink_settings if with_sinks else ()),
            *(self.scale.sizes[arm.size] if arm.size else ()),
            ("eval.interval", str(arm.reading_every)),
            *((("train.save_interval", str(arm.checkpoint_every)),) if arm.checkpoint_every else ()),
            *arm.settings,
        ]

    def _with_optimizer(self, recipe: Path, content: dict[str, Any], changes: Sequence[Setting]) -> Path:
        """The recipe, or a copy with another optimizer: LitGPT keeps a recipe's, whatever the flags after it say."""
        optimizer = [(name, value) for name, value in changes if name.startswith(OPTIMIZER)]
        if not optimizer:
            return recipe
        for name, value in optimizer:
            content["optimizer"]["init_args"][name.removeprefix(OPTIMIZER)] = float(value)
        copy = self.folder / "recipes" / f"{recipe.stem}-{key_of(changes=optimizer)[:8]}.yaml"
        write_text(copy, yaml.safe_dump(content, sort_keys=False))
        return copy

    def planned(self, arm: Arm, seed: int) -> "Planned":
        """The run of an arm and a seed. Its stream has to be there.

        Raises:
            MemSinksError: If its recipe is missing, or its stream cannot be read.
        """
        recipe, stream = self.recipe(arm), self.folder / STREAMS / stream_folder(arm.stream, self.scale)
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        changes = self.changes(arm, content)
        block = content["train"]["max_seq_length"] if self.is_whole(arm) else self.scale.block_size
        settings = {
            "recipe": recipe.name,
            "recipe_sha256": hashlib.sha256(recipe.read_bytes()).hexdigest(),
            "changes": [part for name, value in changes for part in (f"--{name}", value)],
            "stream": stream.name,
            "stream_tokens": Manifest.read(stream).splits["train"].tokens,
            "stream_settings": self._placeless(self._stream_settings(arm)),
            "corpus_sha256": self.corpus_sha256,
            "block_size": block,
            "package": version("litgpt-memsinks"),
        }
        folder = self.folder / "runs" / f"{recipe.stem}-{stream.name}-{key_of(**settings)[:8]}" / f"seed{seed}"
        used = self._with_optimizer(recipe, content, changes)
        flags = [part for name, value in changes if not name.startswith(OPTIMIZER) for part in (f"--{name}", value)]
        if self.is_whole(arm):
            train = content["train"]
            iterations = int(train["max_tokens"]) // (int(train["micro_batch_size"]) * int(block))
            command = seeded_command(used, stream, folder, seed)
        else:
            iterations = one_pass(stream, block)
            command = pretrain_command(used, stream, folder, seed, block, iterations * MICRO_BATCH * block)
        run = TrainingRun(f"{arm.name} seed {seed}", (*command, *flags), folder, max(1, iterations))
        return Planned(arm, seed, settings, block, run)


@dataclass(frozen=True)
class Planned:
    """A run that an experiment needs."""

    arm: Arm
    """Whose"""
    seed: int
    """Of the training"""
    settings: dict[str, Any]
    """All that decides it besides the seed"""
    block_size: int
    """Tokens in a training row"""
    run: TrainingRun
    """How it is trained"""

    @property
    def final(self) -> Path:
        """Its last checkpoint."""
        return self.run.out_dir / "final"

    @property
    def minutes(self) -> float | None:
        """How long its training took; ``None`` if that is not written down."""
        path = self.run.out_dir / TRAINED
        return json.loads(path.read_text(encoding="utf-8"))["seconds"] / 60 if path.is_file() else None


def train(planned: Sequence[Planned], jobs: int) -> dict[Path, str]:
    """Train what is not trained yet, each folder once, one thread each.

    Args:
        planned: The runs; arms may share one.
        jobs: Runs at the same time.

    Returns:
        Folder of each run that failed to one line that says why. The others are trained.
    """
    wanted = {one.run.out_dir: one for one in planned}
    for folder, one in wanted.items():
        _say_if_redone(folder, one)
    failed = train_runs([one.run for one in wanted.values()], max(1, min(jobs, len(wanted))), 1, keep_going=True)
    for folder, one in wanted.items():
        if is_trained(folder):
            write_json(folder / SETTINGS, one.settings | {"seed": one.seed, "command": " ".join(one.run.command)})
    return {folder: _line(failed[one.run.title]) for folder, one in wanted.items() if one.run.title in failed}


def _say_if_redone(folder: Path, one: Planned) -> None:
    """Name what has changed since a run of the same recipe and stream, which stays where it is."""
    if is_trained(folder):
        return
    stem = folder.parent.name.rsplit("-", 1)[0]
    for path in sorted(folder.parent.parent.glob(f"{stem}-*/{folder.name}/{SETTINGS}")):
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in one.settings.items() if before.get(name) != value]
        if changed and set(changed) != {"changes"}:  # another arm of the same recipe
            print(f"{one.run.title} is trained anew: its {', '.join(changed)} differ from those of {path.parent}.")


def _line(error: TrainingFailedError) -> str:
    """A failure in one line."""
    return f"it ended with status {error.status}: {error.last} (log: {error.log})"
