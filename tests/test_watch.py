"""What is logged while a run trains, against a plain loop over documents, and what watching must not change."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.pretrain import setup

from litgpt_memsinks.config import MemSinksConfig, SinkArgs, WatchArgs
from litgpt_memsinks.corpus.embedded import stories
from litgpt_memsinks.corpus.mixture import Source, ValidationSet
from litgpt_memsinks.data.data import MemSinksData
from litgpt_memsinks.data.scored import sample_scored
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate.evaluate import read_scored, score
from litgpt_memsinks.model.model import GPT
from litgpt_memsinks.prepare.prepare import prepare
from litgpt_memsinks.pretrain.pretrain import base_validate
from litgpt_memsinks.pretrain.run import Run
from litgpt_memsinks.pretrain.watch import Watch, Watched
from litgpt_memsinks.sinks.masks import sink_mask
from tests.console import REPOSITORY, TINY_MODEL, litgpt, logged, pretrain_arguments
from tests.planned import write_files

T, SHARED = 32, 32  # tokens in a block of the runs, shared neurons of 64
SINKS = {"data__sinks__shared_fraction": 0.5, "data__sinks__active_probability": 0.3}
ALL = {"data__watch__documents": 1000, "data__watch__validation_documents": 1000}
OFF = {"data__watch__documents": 0, "data__watch__validation_documents": 0}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Two sources that repeat, one that does not, two validation sets; documents shorter and longer than a block."""
    folder = tmp_path_factory.mktemp("several")
    texts = list(stories(400, seed=5))
    short = [" ".join(text.split()[:9]) for text in texts[:40]]
    paths = {
        "long": write_files(folder / "long", {"a": texts[40:47]}),
        "short": write_files(folder / "short", {"a": short[:9]}),
        "once": write_files(folder / "once", {"a": texts[60:360]}),
        "held": write_files(folder / "held", {"a": texts[360:390]}),
        "brief": write_files(folder / "brief", {"a": short[9:20]}),
    }
    prepare(
        out_dir=folder / "data",
        tokenizer_dir=tokenizer_dir,
        sources={
            "long": Source(paths["long"], repeats=6),
            "short": Source(paths["short"], repeats=4),
            "once": Source(paths["once"], repeats=1),
        },
        validation={"held": ValidationSet(paths["held"]), "brief": ValidationSet(paths["brief"])},
        num_workers=1,
    )
    return folder / "data"


# ---------------------------------------------------------------------------------------------------------- a reference


def loss_of(model: BaseGPT, tokens: list[int]) -> tuple[float, int]:
    """Nats and targets of one document, by LitGPT's model and PyTorch's cross entropy."""
    row = torch.tensor(tokens[: T + 1])
    with torch.no_grad():
        logits = model(row[None, :-1])
    return F.cross_entropy(logits[0], row[1:], reduction="sum").item(), len(row) - 1


def plain(weights: dict[str, torch.Tensor], sequence_id: int | None = None) -> BaseGPT:
    """LitGPT's own model of the shared neurons only, or of all with those zeroed that are off for a document."""
    width = SHARED if sequence_id is None else 64
    model = BaseGPT(Config(**{**TINY_MODEL, "intermediate_size": width})).eval()
    kept = {}
    for name, value in weights.items():
        if name == "n_shared":
            continue
        if ".fc_" in name:
            value = value[:width]
        if ".mlp.proj" in name:
            value = value[:, :width].clone()
            if sequence_id is not None:
                on = sink_mask(torch.tensor([sequence_id]), 64 - SHARED, 0.3, 0)[0]
                value[:, SHARED:] *= on
        kept[name] = value
    model.load_state_dict(kept)
    return model


def reference(weights: dict[str, torch.Tensor], data_path: Path) -> dict[str, float]:
    """What is to be logged for all documents of a folder, one document at a time."""
    sums: dict[str, list[tuple[float, int]]] = {}
    rows = pq.read_table(data_path / "evaluation.parquet").to_pylist()
    sources = {row["source"] for row in rows if row["split"] == "repeated"}
    dropped = plain(weights)
    for row in rows:
        if row["split"] == "val":
            sums.setdefault(f"val/{row['source']}/dropped", []).append(loss_of(dropped, row["tokens"]))
            continue
        own = plain(weights, row["sequence_id"])
        for prefix in ["memorised"] + [f"memorised/{row['source']}"] * (len(sources) > 1):
            sums.setdefault(f"{prefix}/dropped", []).append(loss_of(dropped, row["tokens"]))
            sums.setdefault(f"{prefix}/own", []).append(loss_of(own, row["tokens"]))
    means = {name: sum(nats for nats, _ in pairs) / sum(n for _, n in pairs) for name, pairs in sums.items()}
    sets = [name.split("/")[1] for name in means if name.startswith("val/")]
    return means | {f"gap/{name}": means[f"val/{name}/dropped"] - means["memorised/dropped"] for name in sets}


def watched_rows(out_dir: Path) -> dict[int, dict[str, float]]:
    """Step to what was logged of what is watched."""
    with open(out_dir / "logs/csv/version_0/metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        int(row["step"]): {
            name: float(value)
            for name, value in row.items()
            if value and name.split("/")[0] in ("val", "memorised", "gap")
        }
        for row in rows
        if any(row[name] for name in row if name.startswith("val/"))
    }


# ------------------------------------------------------------------------------------------------- with the real script


@pytest.fixture(scope="module")
def watched_run(several: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out_dir = tmp_path_factory.mktemp("watched") / "out"
    arguments = pretrain_arguments(out_dir, several, **SINKS, **ALL, train__save_interval=5)
    return out_dir, litgpt(*arguments).stdout


NAMES = {
    "val/held/dropped",
    "val/brief/dropped",
    "memorised/dropped",
    "memorised/own",
    "memorised/long/dropped",
    "memorised/long/own",
    "memorised/short/dropped",
    "memorised/short/own",
    "gap/held",
    "gap/brief",
}


def test_logged_values_are_those_of_the_checkpoints(watched_run: tuple[Path, str], several: Path) -> None:
    found = watched_rows(watched_run[0])
    checkpoints = {4: "step-00000005", 9: "step-00000010", 12: "final"}
    assert set(found) == set(checkpoints)
    for step, name in checkpoints.items():
        weights = torch.load(watched_run[0] / name / "lit_model.pth", weights_only=False)["model"]
        expected = reference(weights, several)
        assert set(expected) == set(found[step]) == NAMES
        assert found[step] == pytest.approx(expected, abs=1e-5)
    assert len({tuple(values.values()) for values in found.values()}) == 3


def test_what_is_logged_is_printed(watched_run: tuple[Path, str]) -> None:
    out_dir, output = watched_run
    for step, iteration in ((4, 5), (9, 10), (12, 12)):
        (line,) = [line for line in output.splitlines() if line.startswith(f"iter {iteration}: val/")]
        shown = dict(part.rsplit(" ", 1) for part in line.split(": ", 1)[1].split(" | "))
        assert {name: float(value) for name, value in shown.items()} == pytest.approx(
            watched_rows(out_dir)[step], abs=6e-4
        )


def test_watching_changes_nothing_else(watched_run: tuple[Path, str], several: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    output = litgpt(*pretrain_arguments(out_dir, several, **SINKS, **OFF)).stdout
    assert "Watching nothing: data.watch.documents and data.watch.validation_documents are 0." in output
    for column in ("loss", "val_loss", "step", "learning_rate"):
        with_it = logged(watched_run[0], column)
        if column == "step":
            with_it = sorted(with_it, key=int)
            for step in ("4", "9", "12"):
                with_it.remove(step)  # rows of their own
            assert with_it == sorted(logged(out_dir, column), key=int)
        else:
            assert with_it == logged(out_dir, column)
    assert not watched_rows(out_dir)
    ours, other = (torch.load(path / "final/lit_model.pth", weights_only=False) for path in (watched_run[0], out_dir))
    assert ours["model"].keys() == other["model"].keys()
    assert all(torch.equal(ours["model"][name], other["model"][name]) for name in ours["model"])


# ------------------------------------------------------------------------------------------------------ in this process


class Logger:
    """Keeps what LitGPT and we log."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))


def make_run(data_path: Path | str, fabric: Any = None, micro_batch_size: int = 4, **settings: Any) -> Run:
    """A run of a tiny model as pretrain.py makes it; ``settings`` are those of ``watch`` and ``shared_fraction``."""
    sinks = SinkArgs(settings.pop("shared_fraction", 0.5), 0.3)
    data = MemSinksData(data_path=data_path, num_workers=0, sinks=sinks, watch=WatchArgs(**settings))
    data.watch.check()
    train = TrainArgs(micro_batch_size=micro_batch_size, global_batch_size=8, max_seq_length=T)
    config = MemSinksConfig.from_base(Config(**TINY_MODEL), sinks)
    if fabric is None:
        fabric = L.Fabric(accelerator="cpu", devices=1)
        fabric.launch()
    fabric.loggers.append(Logger())
    return Run(
        fabric,
        config,
        data,
        train,
        EvalArgs(interval=5, max_iters=10),
        Path("out"),
        devices=1,
        num_nodes=1,
        tokenizer_dir=Path("tokenizer"),
        data_digest=None,
        state={"iter_num": 0},
    )


def make_model(run: Run) -> GPT:
    torch.manual_seed(1)
    model = GPT(run.config)
    model.max_seq_length = T
    return model


def started(run: Run) -> Watch:
    watch = Watch(run, base_validate)
    watch.start()
    return watch


def measured(run: Run) -> dict[str, float]:
    watch = started(run)
    assert watch.watched is not None
    return watch.measure(watch.watched, run.fabric.setup(make_model(run)))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was printed before training."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Watching")]
    return line


def test_every_setting_is_tested() -> None:
    assert {field.name for field in fields(WatchArgs)} == {
        "documents",
        "validation_documents",
        "seed",
        "evaluation_file",
    }


def test_one_set_and_one_source_agree_with_evaluate(prepared: Path) -> None:
    run = make_run(prepared, documents=1000, validation_documents=1000)
    values = measured(run)
    assert set(values) == {"val/validation/dropped", "memorised/dropped", "memorised/own", "gap/validation"}
    model, repeated = make_model(run).eval(), read_scored(prepared, "repeated")
    expected = {
        "val/validation/dropped": score(model, read_scored(prepared, "val"), T).loss,
        "memorised/dropped": score(model, repeated, T).loss,
        "memorised/own": score(model, repeated, T, repeated.sequence_ids).loss,
    }
    expected["gap/validation"] = expected["val/validation/dropped"] - expected["memorised/dropped"]
    assert values == pytest.approx(expected, abs=1e-5)


def test_without_sinks_there_is_no_own(prepared: Path) -> None:
    values = measured(make_run(prepared, shared_fraction=1.0))
    assert set(values) == {"val/validation/dropped", "memorised/dropped", "gap/validation"}


def test_without_repeats_validation_is_watched(tmp_path: Path, tokenizer_dir: Path, capsys: Any) -> None:
    corpus = write_files(tmp_path / "c", {"a": stories(40)})
    prepare(train=corpus, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data", num_workers=1)
    assert set(measured(make_run(tmp_path / "data"))) == {"val/held_out/dropped"}
    assert said(capsys).startswith("Watching 0 repeated and 2 validation documents: each validation takes 1 more")


def test_left_out_documents_have_no_sinks_of_their_own(tmp_path: Path, tokenizer_dir: Path) -> None:
    settings: dict[str, Any] = {"tokenizer_dir": tokenizer_dir, "repeated_documents": 3, "repeats": 4, "num_workers": 1}
    corpus = write_files(tmp_path / "c", {"a": stories(40)})
    names = {}
    for left_out in (False, True):
        folder = tmp_path / f"data{left_out}"
        prepare(train=corpus, out_dir=folder, leave_out_repeated=left_out, **settings)
        names[left_out] = set(measured(make_run(folder)))
    assert names[False] - names[True] == {"memorised/own"}
    assert names[True] == {"val/held_out/dropped", "memorised/dropped", "gap/held_out"}


@pytest.mark.parametrize("part", ["documents", "validation_documents"])
def test_zero_switches_a_part_off(prepared: Path, part: str) -> None:
    kept = {"documents": {"val/validation/dropped"}, "validation_documents": {"memorised/dropped", "memorised/own"}}
    assert set(measured(make_run(prepared, **{part: 0}))) == kept[part]


# ----------------------------------------------------------------------------------------------------------- the sample


def drawn(path: Path, seed: int = 0, documents: int = 3, validation: int = 4) -> dict[tuple[str, str], list[list[int]]]:
    found = sample_scored(path, {"repeated": documents, "val": validation}, seed, T + 1)
    return {place: [tokens.tolist() for tokens in scored.tokens] for place, scored in found.items()}


def test_sample_is_of_each_set_and_depends_on_the_seed_only(several: Path, tmp_path: Path) -> None:
    path = several / "evaluation.parquet"
    table = pq.read_table(path)
    first = drawn(path)
    assert {place: len(documents) for place, documents in first.items()} == {
        ("repeated", "long"): 3,
        ("repeated", "short"): 3,
        ("val", "brief"): 4,
        ("val", "held"): 4,
    }
    for (split, source), documents in first.items():
        there = [r["tokens"][: T + 1] for r in table.to_pylist() if (r["split"], r["source"]) == (split, source)]
        assert all(document in there for document in documents)
        assert len(set(map(tuple, documents))) == len(documents)
    pq.write_table(table.take(list(range(len(table)))[::-1]), tmp_path / "other.parquet", row_group_size=3)
    assert drawn(tmp_path / "other.parquet") == first
    assert drawn(path, seed=1) != first
    assert {len(documents) for documents in drawn(path, documents=1000, validation=1000).values()} == {7, 9, 11, 30}


def test_sample_carries_its_ids(several: Path) -> None:
    ids = {tuple(r["tokens"]): r["sequence_id"] for r in pq.read_table(several / "evaluation.parquet").to_pylist()}
    for scored in sample_scored(several / "evaluation.parquet", {"repeated": 5, "val": 5}, 2, 10_000).values():
        assert [ids[tuple(tokens.tolist())] for tokens in scored.tokens] == scored.sequence_ids.tolist()


# -------------------------------------------------------------------------------------------------------- what it costs


class Counted(torch.nn.Module):
    """Notes the shape of every forward pass."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, idx: torch.Tensor, **settings: Any) -> Any:
        self.shapes.append(tuple(idx.shape))
        return self.model(idx, **settings)


def test_passes_are_as_announced_and_of_one_shape(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(several, documents=5, validation_documents=6)
    watch = started(run)
    assert watch.watched is not None
    # 5 of each of 2 sources and 6 of each of 2 sets are 22 rows: 6 passes of 4; again 10 with their own sinks: 3
    assert said(capsys) == (
        "Watching 10 repeated and 12 validation documents: each validation takes 9 more forward passes of 4 x 32 "
        "tokens on each device, 90% of the tokens of LitGPT's own (eval.max_iters 10 x 4 x 32)."
    )
    model = Counted(make_model(run))
    for _ in range(2):
        watch.measure(watch.watched, model)
    assert model.shapes == [(4, T)] * 18


def test_short_documents_make_short_rows(several: Path, tmp_path: Path) -> None:
    table = pq.read_table(several / "evaluation.parquet")
    brief = table.filter(pa.compute.equal(table["source"], "short"))
    pq.write_table(brief, tmp_path / "evaluation.parquet")
    longest = max(len(tokens) for tokens in brief["tokens"].to_pylist())
    assert longest < T
    run = make_run(several, documents=100, validation_documents=0)
    found = sample_scored(tmp_path / "evaluation.parquet", {"repeated": 100}, 0, T + 1)
    watch = Watch(run, base_validate)
    watch.watched = Watched.of(found, T, own=True)
    model = Counted(make_model(run))
    watch.measure(watch.watched, model)
    assert set(model.shapes) == {(4, longest - 1)}


def test_nothing_is_compiled_for_watching(several: Path) -> None:
    """And what is compiled stays: no graph of another shape, which would have PyTorch compile training anew."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(inputs)
        return graph.forward

    run = make_run(several, documents=2, validation_documents=2)
    watch = started(run)
    assert watch.watched is not None
    watch.watched.inputs, watch.watched.targets = watch.watched.inputs[:, :-3], watch.watched.targets[:, :-3]
    torch.compiler.reset()
    model = torch.compile(make_model(run), backend=backend)
    batch = torch.randint(0, 500, (4, T, 2))
    model(batch)
    model.eval()
    with torch.no_grad():
        model(batch)
    model.train()
    before = len(compiled)
    assert before
    for _ in range(2):
        watch.measure(watch.watched, model)
        assert model.training
        model(batch)
    assert len(compiled) == before
    torch.compiler.reset()


def test_random_state_is_left_alone(several: Path) -> None:
    run = make_run(several)
    watch, model = started(run), make_model(run)
    assert watch.watched is not None
    torch.manual_seed(3)
    before = torch.get_rng_state()
    watch.measure(watch.watched, model)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("iterations", [12, 13])
def test_steps_are_those_of_litgpts_own_validation(
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    iterations: int,
) -> None:
    """With an initial validation; the final one is at the iteration of the last in the loop, or amid accumulation."""
    monkeypatch.setattr(sys, "argv", ["litgpt", "tiny"])  # LitGPT keeps the command line with the checkpoint
    with torch.compiler.set_stance("force_eager"):
        setup(
            "tiny",
            Config(**TINY_MODEL),
            out_dir=tmp_path,
            precision="32-true",
            data=MemSinksData(data_path=prepared, num_workers=0, sinks=SinkArgs(0.5, 0.3)),
            train=TrainArgs(
                save_interval=1000,
                log_interval=1,
                global_batch_size=8,
                micro_batch_size=4,
                lr_warmup_steps=2,
                max_tokens=iterations * 4 * T,
                max_seq_length=T,
                max_norm=1.0,
                tie_embeddings=True,
            ),
            eval=EvalArgs(interval=3, max_iters=2, initial_validation=True, final_validation=True),
            devices=1,
            logger_name="csv",
        )
    with open(tmp_path / "logs/csv/version_0/metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    watched = [(int(row["step"]), row["memorised/own"]) for row in rows if row["memorised/own"]]
    steps = [step for step, _ in watched]
    assert steps == [0, *(int(row["step"]) for row in rows if row["val_loss"])] == [0, 5, 11, iterations]
    # two micro batches make a step, so the same weights are measured twice
    assert watched[2][1] == watched[3][1]
    printed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": val/validation" in line]
    assert printed == ["iter 0", "iter 6", "iter 12", f"iter {iterations}"]


def test_sanity_check_is_not_watched_and_the_value_is_litgpts(several: Path) -> None:
    run = make_run(several)
    run.state = {"iter_num": 7, "step_count": 5}
    batches = [torch.randint(0, 500, (4, T + 1, 2)) for _ in range(3)]
    model = run.fabric.setup(make_model(run))
    watch = Watch(run, lambda *_, **given: torch.tensor(float(given["max_iters"])))
    (logger,) = run.fabric.loggers
    assert watch.validate(run.fabric, model, batches, max_iters=2, verbose=False) == 2.0
    assert logger.logged == []
    # a run that was resumed when it was finished: the next validation is the final one
    assert watch.validate(run.fabric, model, batches, max_iters=3) == 3.0
    assert [step for step, _ in logger.logged] == [7]


# -------------------------------------------------------------------------------------------------------- several ranks

RANK = """
import json, sys
from pathlib import Path
import lightning as L
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from tests.test_watch import Counted, make_model, make_run, started

def shard(model, mesh):
    for block in model.model.transformer.h:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])

results = {}
for name, strategy in {"ddp": DDPStrategy(), "fsdp": ModelParallelStrategy(shard)}.items():
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    run = make_run(Path(sys.argv[1]), fabric, micro_batch_size=4, documents=6, validation_documents=5)
    watch, model = started(run), Counted(make_model(run))
    wrapped = fabric.setup(model)
    results[name] = {"values": watch.measure(watch.watched, wrapped), "shapes": model.shapes}
print("RESULT", json.dumps(results))
"""


@pytest.mark.long
def test_two_ranks_give_the_values_of_one(several: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "watch",  # so that Lightning takes ranks from the environment, as torchrun sets them
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(several)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-3000:]
    # 12 + 10 rows are 6 batches of 4, 3 on each rank; 12 rows with their own sinks 3, so that one of 2 x 2 is empty
    assert sum("each validation takes 5 more forward passes of 4 x 32" in output for output in outputs) == 1
    results = [json.loads(output.split("RESULT ")[1].splitlines()[0]) for output in outputs]
    run = make_run(several, micro_batch_size=4, documents=6, validation_documents=5)
    alone = measured(run)
    for result in results:
        for strategy in ("ddp", "fsdp"):
            assert result[strategy]["shapes"] == [[4, T]] * 5
            assert result[strategy]["values"] == pytest.approx(alone, abs=1e-6)
            assert set(result[strategy]["values"]) == NAMES
    assert results[0]["ddp"] == results[1]["ddp"]
    assert results[0]["fsdp"] == results[1]["fsdp"]


# ------------------------------------------------------------------------------------------------------ what is refused

BAD = {
    "documents": [(-1, "-1"), (1.5, "1.5"), ("many", "many")],
    "validation_documents": [(-64, "-64"), (None, "None")],
    "seed": [("a", "a")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_settings_are_refused(prepared: Path, name: str, value: tuple[Any, str]) -> None:
    data = MemSinksData(data_path=prepared, watch=WatchArgs(**{name: value[0]}))
    with pytest.raises(MemSinksError, match=rf"^watch\.{name} is {value[1]}") as caught:
        data.check(512, T, 4)
    assert "\n" not in str(caught.value)


def lacking(folder: Path, data: Path) -> Path:
    """A folder that has all but the scored documents."""
    for path in data.iterdir():
        if path.name != "evaluation.parquet":
            (folder / path.name).symlink_to(path)
    return folder


def test_folder_without_the_documents_trains_unwatched(prepared: Path, tmp_path: Path, capsys: Any) -> None:
    watch = started(make_run(lacking(tmp_path, prepared)))
    assert watch.watched is None
    line = said(capsys)
    assert str(tmp_path / "evaluation.parquet") in line
    assert "is missing. Copy it" in line


def test_object_store_needs_a_copy_of_the_documents(prepared: Path, tmp_path: Path, capsys: Any) -> None:
    run = make_run("s3://bucket/mine")
    watch = started(run)
    assert watch.watched is None
    assert "aws s3 cp s3://bucket/mine/evaluation.parquet . and set data.watch.evaluation_file" in said(capsys)
    run = make_run("s3://bucket/mine", evaluation_file=prepared / "evaluation.parquet")
    run.data._copy = lacking(tmp_path, prepared)
    assert measured(run) == measured(make_run(prepared))


def test_named_file_that_is_not_there_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(MemSinksError, match=r"^data\.watch\.evaluation_file is '.*/none', which is no file\. Copy"):
        started(make_run(prepared, evaluation_file=tmp_path / "none"))


def test_documents_of_another_folder_are_refused(prepared: Path, several: Path) -> None:
    run = make_run(prepared, evaluation_file=several / "evaluation.parquet")
    with pytest.raises(MemSinksError, match=r"holds 41 validation documents, but the data at .* 40\. Take the file"):
        started(run)


def test_tokens_beyond_the_vocabulary_are_refused(prepared: Path) -> None:
    run = make_run(prepared)
    run.config.padded_vocab_size = 64
    with pytest.raises(MemSinksError, match="but the model embeds tokens below 64 only"):
        started(run)


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing"])
def test_damaged_documents_are_refused(prepared: Path, tmp_path: Path, content: bytes) -> None:
    (lacking(tmp_path, prepared) / "evaluation.parquet").write_bytes(content)
    with pytest.raises(MemSinksError, match="cannot be read") as caught:
        started(make_run(tmp_path))
    assert "\n" not in str(caught.value)


def test_file_of_other_columns_is_refused(prepared: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"split": ["val"]}), lacking(tmp_path, prepared) / "evaluation.parquet")
    with pytest.raises(MemSinksError, match=r"lacks the columns \['source', 'digest', 'sequence_id', 'tokens'\]"):
        started(make_run(tmp_path))


def test_an_error_of_the_first_rank_stops_all(prepared: Path, tmp_path: Path) -> None:
    """The others do not read: they are told, and would wait for ever if they were not."""
    run = make_run(prepared)
    told = MemSinksError("no such thing")
    run.fabric = SimpleNamespace(world_size=1, global_rank=1, broadcast=lambda found: told if found == "" else None)
    with pytest.raises(MemSinksError, match="no such thing"):
        started(run)


def test_loss_of_a_diverged_run_is_logged(prepared: Path) -> None:
    run = make_run(prepared, documents=2, validation_documents=2)
    watch, model = started(run), make_model(run)
    assert watch.watched is not None
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert all(math.isnan(value) for value in watch.measure(watch.watched, model).values())
