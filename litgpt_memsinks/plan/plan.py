"""What will a run take, and will it work? Everything that can be worked out before a GPU is spent.

Takes the settings of ``litgpt pretrain``, parsed as it parses them, builds the model on the meta device, and prints
what `schedule.py`, `sizing.py` and `expectations.py` say of it.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from litgpt.config import Config
from litgpt.pretrain import setup
from litgpt.utils import get_default_supported_precision, parse_devices
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt_memsinks.config import LaunchArgs, MemSinksConfig
from litgpt_memsinks.data.data import MemSinksData
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.files import refuse_to_overwrite, write_json
from litgpt_memsinks.plan.expectations import Data, expected, sink_warnings
from litgpt_memsinks.plan.schedule import Schedule, make_schedule, schedule_warnings
from litgpt_memsinks.plan.sizing import (
    PRECISIONS,
    Parameters,
    Precision,
    checkpoint,
    count_parameters,
    flops_per_token,
    memory,
    prepared,
    sharding,
    weights,
)
from litgpt_memsinks.prepare.chunks import read_index
from litgpt_memsinks.pretrain.launch import check_devices

_WIDTH = 120  # of tables that are not on a terminal
STRATEGIES = {"one": "one device", "ddp": "DDP", "fsdp": "FSDP", "hsdp": "HYBRID_SHARD"}
"""Strategies by their names in `sizing.sharding` and in the tables."""


def plan(
    tokens_per_second: float | None = None,
    mfu: float | None = None,
    peak_tflops: float | None = None,
    out_file: Path | None = None,
    **pretrain: Any,
) -> None:
    """Work out what a run of ``litgpt pretrain`` will take, and warn of what will not work.

    Takes the same settings: a recipe with ``--config``, and any ``--data.sinks.active_probability 0.1`` after it.

    Args:
        tokens_per_second: Throughput of one device that the hours are worked out for.
        mfu: Instead of it, the fraction of `peak_tflops` that training is assumed to reach.
        peak_tflops: Peak of one device in 1e12 FLOPs per second, such as 989 for an H100 in bf16.
        out_file: JSON file for the same figures. Must not exist.
        pretrain: Settings of ``litgpt pretrain``.

    Raises:
        MemSinksError: If ``litgpt pretrain`` would stop at the settings, or the throughput makes no sense.
    """
    if out_file is not None:
        refuse_to_overwrite(out_file)
    result = make_plan(pretrain, Throughput(tokens_per_second, mfu, peak_tflops))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    for table in tables(result):
        console.print(table)
        console.print()
    for heading, lines in (("missing", result["missing"]), ("warning", result["warnings"])):
        for line in lines:
            console.print(Text(f"{heading}: {line}", "yellow"), soft_wrap=not sys.stdout.isatty())
    if out_file is not None:
        write_json(out_file, result)


@dataclass(frozen=True)
class Throughput:
    """How fast a device is assumed to be."""

    tokens_per_second: float | None = None
    """Of one device"""
    mfu: float | None = None
    """Fraction of the peak"""
    peak_tflops: float | None = None
    """Of one device, in 1e12 FLOPs per second"""

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            MemSinksError: Naming the setting and its value.
        """
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise MemSinksError(f"{name} is {value}, but it must be above 0.")
        if (self.mfu is None) != (self.peak_tflops is None):
            raise MemSinksError("mfu is a fraction of peak_tflops: give both, such as --mfu 0.4 --peak_tflops 989.")
        if self.mfu is not None and self.mfu > 1:
            raise MemSinksError(f"mfu is {self.mfu}, but it is a fraction: at most 1, such as 0.4.")
        if self.tokens_per_second is not None and self.mfu is not None:
            raise MemSinksError("tokens_per_second and mfu are two ways to say one thing. Give one of them.")

    def hours(self, tokens: int, flops: float, devices: int) -> float | None:
        """Hours of training, of all devices together side by side; ``None`` if nothing was given."""
        if self.tokens_per_second is not None:
            return tokens / (self.tokens_per_second * devices) / 3600
        if self.mfu is not None and self.peak_tflops is not None:
            return flops / (self.mfu * self.peak_tflops * 1e12 * devices) / 3600
        return None

    def describe(self) -> str:
        """What the hours rest on."""
        if self.tokens_per_second is not None:
            return f"{self.tokens_per_second:,.0f} tokens per second and device, as given"
        if self.mfu is not None:
            return f"{self.mfu:.0%} of {self.peak_tflops:g} TFLOP/s per device, as given"
        return "give --tokens_per_second, or --mfu with --peak_tflops"


def parse_pretrain(arguments: list[str]) -> dict[str, Any]:
    """Parse arguments of ``litgpt pretrain`` as its command line does; the keyword arguments of ``setup``."""
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(setup, as_group=False, as_positional=True, sub_configs=True)
    settings = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    settings.pop("config")
    return settings


# ------------------------------------------------------------------------------------------------------ working it out


def make_plan(pretrain: dict[str, Any], throughput: Throughput) -> dict[str, Any]:
    """Work everything out.

    Args:
        pretrain: Arguments of ``litgpt.pretrain.setup``, parsed and instantiated.
        throughput: What hours are worked out for.

    Returns:
        Plain numbers, texts, lists and dictionaries, as ``out_file`` holds them. Sizes are in bytes.

    Raises:
        MemSinksError: If ``litgpt pretrain`` would stop at the settings.
    """
    throughput.check()
    data, train = pretrain["data"], pretrain["train"]
    if not isinstance(data, MemSinksData):
        raise MemSinksError(
            f"data is {type(data).__name__}, but plan is for training with sinks. Use data.class_path: "
            "litgpt_memsinks.MemSinksData."
        )
    config = MemSinksConfig.from_base(_base_config(pretrain), data.sinks)
    block_size = train.max_seq_length or config.block_size
    if block_size > config.block_size:
        raise MemSinksError(f"train.max_seq_length is {block_size}, but the model's block_size is {config.block_size}.")
    devices, num_nodes = _devices(pretrain["devices"]), pretrain["num_nodes"]
    tied = bool(train.tie_embeddings)
    found, rows, missing = _look_at_data(data, config, pretrain, block_size)
    training = None if found is None else found.training
    schedule = make_schedule(train, block_size, devices, num_nodes, rows)
    parameters = count_parameters(config, tied)
    precision = pretrain["precision"] or get_default_supported_precision(training=True)
    return {
        "model": config.name,
        "out_dir": str(pretrain["out_dir"]),
        "precision": precision,
        "strategy": _strategy(data, devices * num_nodes),
        "checkpointing": data.launch.activation_checkpointing,
        "parameters": asdict(parameters),
        "schedule": asdict(schedule),
        "compute": _compute(config, parameters, schedule, throughput),
        "memory": _memories(config, parameters, train.micro_batch_size * block_size, data, devices, num_nodes),
        "disk": _disk(parameters, schedule, PRECISIONS[precision], found, train.max_tokens),
        "sinks": expected(config, training),
        "missing": missing,
        "warnings": [
            *_refusals(data.launch, devices, num_nodes),
            *schedule_warnings(train, pretrain["eval"], schedule),
            *_optimizer_warnings(pretrain["optimizer"]),
            *sink_warnings(config, parameters, _learning_rate(pretrain["optimizer"]), training),
        ],
    }


def _base_config(pretrain: dict[str, Any]) -> Config:
    if pretrain["model_config"] is not None:
        return pretrain["model_config"]
    try:
        return Config.from_name(pretrain["model_name"])
    except ValueError as error:
        name = pretrain["model_name"]
        raise MemSinksError(f"LitGPT knows no model {name!r}. See: litgpt pretrain list") from error


def _devices(devices: int | str) -> int:
    try:
        return parse_devices(devices)
    except ValueError as error:
        raise MemSinksError(f"devices is {devices!r}, but it must be auto or a number above 0.") from error


@dataclass(frozen=True)
class _Prepared:
    """What is in the prepared folder."""

    training: Data
    tokens: int
    """Of all splits"""


def _look_at_data(
    data: MemSinksData, config: MemSinksConfig, pretrain: dict[str, Any], block_size: int
) -> tuple[_Prepared | None, int | None, list[str]]:
    """What the prepared data holds, its rows of training, and else one line that says why not."""
    assert config.padded_vocab_size is not None  # set by Config.__post_init__
    try:
        batch = pretrain["train"].micro_batch_size
        manifest = data.check(config.padded_vocab_size, block_size, batch, pretrain["tokenizer_dir"])
    except MemSinksError as error:
        return None, None, [str(error)]
    assert data.split_names is not None  # checked
    folder = data.tokenizer_dir.parent / data.split_names[0]
    rows = sum(chunk["dim"] // (2 * (block_size + 1)) for chunk in read_index(folder)["chunks"])
    own = [split for name, split in manifest.splits.items() if name in data.split_names]
    return _Prepared(Data.of(manifest, data.split_names[0]), sum(split.tokens for split in own)), rows, []


def _strategy(data: MemSinksData, world: int) -> str:
    """The strategy of the run. LitGPT's own shards within a node and replicates across, as ``hsdp`` does."""
    if world == 1:
        return "one"
    return "hsdp" if data.launch.strategy == "litgpt" else data.launch.strategy


def _compute(
    config: MemSinksConfig, parameters: Parameters, schedule: Schedule, throughput: Throughput
) -> dict[str, Any]:
    per_token = flops_per_token(config, parameters.linear, schedule.block_size)
    flops = per_token * schedule.tokens
    hours = throughput.hours(schedule.tokens, flops, schedule.devices)
    return {
        "flops_per_token": per_token,
        "flops": flops,
        "assumed": throughput.describe(),
        "hours": hours,
        "device_hours": None if hours is None else hours * schedule.devices,
    }


def _memories(
    config: MemSinksConfig, parameters: Parameters, tokens: int, data: MemSinksData, devices: int, num_nodes: int
) -> list[dict[str, Any]]:
    """Every strategy that fits the devices, every precision, compiled and eager, with and without checkpointing."""
    result = []
    for strategy in ["one"] if devices * num_nodes == 1 else ["ddp", "fsdp", "hsdp"]:
        spread = sharding(strategy, devices, num_nodes, data.launch.shard_size)
        for name, precision in PRECISIONS.items():
            for compiled in (True, False):
                for checkpointing in (False, True):
                    one = memory(config, parameters, tokens, precision, spread, compiled, checkpointing)
                    settings = {"strategy": strategy, "precision": name, "compiled": compiled}
                    result.append(settings | {"checkpointing": checkpointing} | asdict(one) | {"total": one.total})
    return result


def _disk(
    parameters: Parameters, schedule: Schedule, precision: Precision, found: _Prepared | None, max_tokens: int
) -> dict[str, int]:
    one = checkpoint(parameters, precision)
    return {
        "step_checkpoint": one,
        "final_checkpoint": one,
        "checkpoints": (schedule.checkpoints + 1) * one,
        "dropped_float32": weights(parameters.dropped, PRECISIONS["32-true"]),
        "dropped_bfloat16": weights(parameters.dropped, PRECISIONS["bf16-true"]),
        "data": prepared(max_tokens if found is None else found.tokens),
    }


def _refusals(launch: LaunchArgs, devices: int, num_nodes: int) -> list[str]:
    try:
        check_devices(launch, devices, num_nodes, gpu=True)  # where it will run
    except MemSinksError as error:
        return [f"litgpt pretrain will refuse this run: {error}"]
    return []


def _learning_rate(optimizer: str | dict[str, Any]) -> float | None:
    if isinstance(optimizer, str):
        return None
    return optimizer.get("init_args", {}).get("lr")


def _optimizer_warnings(optimizer: str | dict[str, Any]) -> list[str]:
    name = optimizer if isinstance(optimizer, str) else optimizer.get("class_path", "")
    found = []
    if isinstance(optimizer, dict) and (unread := sorted(optimizer.keys() - {"class_path", "init_args"})):
        found.append(
            f"optimizer.{unread[0]} is {optimizer[unread[0]]}, but litgpt 0.5.13 reads optimizer.init_args only, which "
            "its command line cannot change: write it into the recipe."
        )
    if name.rsplit(".", 1)[-1] != "AdamW":
        found.append(f"The optimizer is {name}, but memory and checkpoints are worked out for AdamW's two moments.")
    return found


# ------------------------------------------------------------------------------------------------------------- printing


def tables(result: dict[str, Any]) -> list[Table]:
    """What `make_plan` found, as tables."""
    found = [_parameters_table(result), _schedule_table(result), _memory_table(result), _disk_table(result)]
    return found + ([_sinks_table(result["sinks"]), _documents_table(result["sinks"])] if result["sinks"] else [])


def _parameters_table(result: dict[str, Any]) -> Table:
    count = result["parameters"]
    rows = [
        ("parameters", f"{count['total']:,}", "tied embeddings counted once"),
        ("of them sinks", f"{count['sinks']:,}", f"{count['sinks'] / count['total']:.1%}"),
        ("of them token embedding", f"{count['embeddings']:,}", ""),
        ("when the sinks are dropped", f"{count['dropped']:,}", "the released model"),
    ]
    return _key_values(f"{result['model']}, {result['precision']}", rows)


def _schedule_table(result: dict[str, Any]) -> Table:
    run, compute = result["schedule"], result["compute"]
    warmup = "a fraction of an epoch" if run["warmup"] is None else f"{run['warmup'] / run['accumulation']:,.1f} steps"
    epochs = "the data is not there yet" if run["epochs"] is None else f"{run['epochs']:.3f} epochs of the data"
    hours = "–" if compute["hours"] is None else f"{compute['hours']:,.1f}"
    device_hours = "–" if compute["hours"] is None else f"{compute['device_hours']:,.1f}"
    rows = [
        (
            "optimizer steps",
            f"{run['steps']:,}",
            f"{run['rows_per_step']:,} rows, {run['tokens_per_step']:,} tokens each",
        ),
        ("gradient accumulation", f"{run['accumulation']:,}", f"micro batches on each of {run['devices']} devices"),
        ("tokens", f"{run['tokens']:,}", f"{run['rows']:,} rows of {run['block_size']:,}; {epochs}"),
        ("warm-up", warmup, ""),
        (
            "FLOPs",
            f"{compute['flops']:.3g}",
            "a token: 6 × linear weights + 12 × layers × T × heads × head size",
        ),
        ("hours, estimated", hours, compute["assumed"]),
        ("device hours, estimated", device_hours, "training alone, without validation and checkpoints"),
    ]
    return _key_values("Run", rows)


def _memory_table(result: dict[str, Any]) -> Table:
    title = "Memory of a device at the peak, GB, estimated; 1 to 2 GB of context and fragmentation come on top"
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "total")
    table = _table(title, "strategy", "precision", "code", *parts)
    for one in result["memory"]:
        if one["precision"] == result["precision"] or (
            one["strategy"] == result["strategy"] and one["compiled"] and not one["checkpointing"]
        ):
            ours = all(one[name] == result[name] for name in ("strategy", "precision", "checkpointing"))
            table.add_row(
                STRATEGIES[one["strategy"]] + (" *" if ours else ""),
                one["precision"],
                ("compiled" if one["compiled"] else "eager") + (" +" if one["checkpointing"] else ""),
                *(f"{one[part] / 1e9:,.2f}" for part in parts),
            )
    table.caption = (
        "* of this run, compiled unless that is switched off. + with activation checkpointing. Activations and logits: "
        "of one micro batch"
    )
    table.caption_justify = "left"
    return table


def _disk_table(result: dict[str, Any]) -> Table:
    disk, saved = result["disk"], result["schedule"]["checkpoints"]
    rows = [
        ("a checkpoint", _gb(disk["step_checkpoint"]), "weights and AdamW's state, at steps and at the end"),
        ("all checkpoints", _gb(disk["checkpoints"]), f"{saved} on the way and the final one"),
        ("the dropped model", _gb(disk["dropped_float32"]), f"float32; {_gb(disk['dropped_bfloat16'])} in bfloat16"),
        ("the data", _gb(disk["data"]), "8 bytes a token"),
    ]
    return _key_values("Disk, GB", rows)


def _sinks_table(sinks: dict[str, Any]) -> Table:
    rows = [
        ("shared neurons", f"{sinks['shared_neurons']:,}", ""),
        ("sinks", f"{sinks['sink_neurons']:,}", ""),
        ("on for a document", f"{sinks['active_mean']:,.1f}", f"± {sinks['active_sd']:.1f}"),
        ("on for both of two documents", f"{sinks['overlap_of_two']:,.1f}", ""),
    ]
    if "documents_per_sink" in sinks:
        repeated = f"{sinks['repeated_documents_per_sink']:,.1f} of them repeated"
        rows += [
            ("documents per sink", f"{sinks['documents_per_sink']:,.1f}", repeated),
            (
                "pairs with one ID",
                f"{sinks['colliding_pairs']:,}",
                f"{sinks['colliding_pairs_expected']:,.2f} expected",
            ),
        ]
    return _key_values("Sinks of each MLP; the same in all layers", rows)


def _documents_table(sinks: dict[str, Any]) -> Table:
    table = _table("Of k documents with sinks", "k", "sinks on for any", "of a document's sinks, on for no other")
    for count, share in sinks["coverage"].items():
        table.add_row(f"{count:,}", f"{share:.1%}", f"{sinks['private'][count]:,.1f}")
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _key_values(title: str, rows: Iterable[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return table
