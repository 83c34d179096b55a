"""The plan against what PyTorch, stock LitGPT and drawn masks really do, never against itself."""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import litgpt.__main__
import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.pretrain import setup
from litgpt.utils import chunked_cross_entropy, num_parameters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.profiler import ProfilerActivity, profile

from litgpt_memsinks.__main__ import main
from litgpt_memsinks.bench.full_size import measuring
from litgpt_memsinks.config import LaunchArgs, MemSinksConfig, SinkArgs
from litgpt_memsinks.drop_sinks.drop_sinks import without_sinks
from litgpt_memsinks.model.model import GPT, Block
from litgpt_memsinks.plan.expectations import Data, active, colliding_pairs, coverage, overlap, private, sink_warnings
from litgpt_memsinks.plan.plan import Throughput, make_plan, parse_pretrain
from litgpt_memsinks.plan.sizing import (
    PRECISIONS,
    activations,
    adamw_state,
    block_activations,
    checkpoint,
    count_parameters,
    flops_per_token,
    logits,
    memory,
    sharding,
    weights,
)
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.pretrain.pretrain import pair_cross_entropy
from litgpt_memsinks.sinks.masks import sink_mask
from tests.console import litgpt as run_litgpt
from tests.console import pretrain_arguments

RECIPES = Path(__file__).parent.parent / "recipes"
TRAINING = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("demo/*.yaml")])
SMALL = {"n_embd": 96, "n_head": 6, "intermediate_size": 200, "padded_vocab_size": 512, "block_size": 64, "n_layer": 3}
ARCHITECTURES = {
    "grouped queries": ("Tiny-MemSinks", {"n_query_groups": 2}),
    "all queries": ("Tiny-MemSinks", {"n_query_groups": 6}),
    "ungated": ("GPT2-Medium-MemSinks", {"n_query_groups": 6}),
}


def planned(recipe: Path, *overrides: Any, throughput: Throughput = Throughput()) -> dict[str, Any]:  # noqa: B008
    return make_plan(parse_pretrain([str(one) for one in ("--config", recipe, *overrides)]), throughput)


def run_plan(*arguments: Any) -> None:
    main(["plan", *(str(one) for one in arguments)])


def small_config(architecture: str = "grouped queries", **others: Any) -> MemSinksConfig:
    name, changes = ARCHITECTURES[architecture]
    return MemSinksConfig.from_name(name, SinkArgs(shared_fraction=0.5), **{**SMALL, **changes, **others})


def batch(rows: int = 2, block_size: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    tokens, ids = torch.randint(0, 512, (rows, block_size + 1)), torch.randint(1, 2**31, (rows, block_size + 1))
    return torch.stack((tokens, ids), dim=-1)


def tied_model(config: MemSinksConfig, precision: str = "32-true") -> GPT:
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    return model.bfloat16() if precision == "bf16-true" else model


def autocast(precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()


def allocated(events: Any) -> list[int]:
    """Bytes in use after each allocation and release, from the profiler."""
    sizes, now = [0], 0
    for event in events.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            sizes.append(now)
    return sizes


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda path: str(path.relative_to(RECIPES)))
def test_parameters_are_those_of_stock_litgpts_models(recipe: Path) -> None:
    count = planned(recipe)["parameters"]
    settings = parse_pretrain(["--config", str(recipe)])
    plain = settings["model_config"] or Config.from_name(settings["model_name"])
    sinks = MemSinksConfig.from_base(plain, settings["data"].sinks)
    with torch.device("meta"):
        whole, released = BaseGPT(plain), BaseGPT(replace(plain, intermediate_size=sinks.n_shared))
    for model in (whole, released):
        model.transformer.wte.weight = model.lm_head.weight
    assert count["total"] == num_parameters(whole)
    assert count["dropped"] == num_parameters(released)
    assert count["sinks"] == count["total"] - count["dropped"]
    assert count["embeddings"] == whole.lm_head.weight.numel()


def test_parameters_of_the_papers_models_are_the_published_ones() -> None:
    assert planned(RECIPES / "smollm360_memsinks.yaml")["parameters"]["total"] == 361_821_120
    assert planned(RECIPES / "smollm1.7b_memsinks.yaml")["parameters"]["total"] == 1_711_376_384


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropped_parameters_are_those_that_drop_sinks_keeps(architecture: str) -> None:
    config = small_config(architecture)
    kept = without_sinks(GPT(config).state_dict(), config)
    count = count_parameters(config, tied=False)
    assert count.dropped == sum(weight.numel() for weight in kept.values())
    assert count_parameters(config, tied=True).dropped == count.dropped - count.embeddings


# --------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name", ["SmolLM-360M-MemSinks", "SmolLM-1.7B-MemSinks", "GPT2-Medium-MemSinks"])
def test_flops_are_those_that_litgpt_measures(name: str) -> None:
    from lightning.fabric.utilities.throughput import measure_flops

    config = MemSinksConfig.from_name(name)
    with torch.device("meta"):  # as in litgpt.pretrain.fit
        model = GPT(config)
        x = torch.randint(0, 1, (1, config.block_size))
        measured = measure_flops(model, lambda: model(x), lambda y: chunked_cross_entropy(y, x, chunk_size=0))
    formula = flops_per_token(config, count_parameters(config, tied=True).linear, config.block_size)
    assert formula * config.block_size == pytest.approx(measured, rel=0.01)


# -------------------------------------------------------------------------------------------------------------- memory


def saved(config: MemSinksConfig, precision: str, compiled: bool = False) -> int:
    """Bytes that a real forward pass keeps for the backward pass."""
    model, pairs = tied_model(config, precision), batch()
    # This backend cuts the graph as Inductor does, without its code. Inductor kept the same to the byte where it was
    # tried (torch 2.15), but takes half a minute to compile.
    backend = "aot_eager_decomp_partition"
    forward: Callable[..., torch.Tensor] = torch.compile(model, backend=backend) if compiled else model
    inputs, targets = pairs[:, :-1].contiguous(), pairs[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters())
    if compiled:
        with autocast(precision):
            forward(inputs)
    with measuring(512) as measured:
        with autocast(precision):
            outputs = forward(inputs)
        pair_cross_entropy(outputs, targets).backward()
        optimizer.step()
    return measured["activations"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_what_autograd_saves(architecture: str, precision: str) -> None:
    config = small_config(architecture)
    formula = activations(config, 2 * 64, PRECISIONS[precision], compiled=False)
    assert formula == pytest.approx(saved(config, precision), rel=0.02)


@pytest.mark.long
def test_compiled_code_saves_what_the_formula_says() -> None:
    config, precision = small_config(n_layer=2), "bf16-mixed"  # as in the recipes
    formula = activations(config, 2 * 64, PRECISIONS[precision], compiled=True)
    assert formula == pytest.approx(saved(config, precision, compiled=True), rel=0.02)
    assert formula < 0.9 * activations(config, 2 * 64, PRECISIONS[precision], compiled=False)


def test_activation_checkpointing_frees_what_the_formula_says() -> None:
    config, tokens = small_config(), 2 * 64

    def kept(checkpointing: bool) -> int:
        model = tied_model(config)
        if checkpointing:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        inputs = batch()[:, :-1].contiguous()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            outputs = model(inputs)
        assert outputs.requires_grad
        return allocated(events)[-1]

    without, with_it = (activations(config, tokens, PRECISIONS["32-true"], False, flag) for flag in (False, True))
    one_block = block_activations(config, tokens, PRECISIONS["32-true"], compiled=False)
    # with_it counts the one block that is computed again in the backward pass, where it is not yet
    assert without - (with_it - one_block) == pytest.approx(kept(False) - kept(True), rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_are_the_peak_of_the_loss(precision: str) -> None:
    config = Config(n_embd=8, padded_vocab_size=4096, n_layer=1, n_head=1)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    head = torch.nn.Linear(8, 4096, bias=False, dtype=dtype)
    x, targets = torch.randn(4, 256, 8, dtype=dtype, requires_grad=True), torch.randint(0, 4096, (4, 256))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        with autocast(precision):
            outputs = head(x)
        chunked_cross_entropy(outputs, targets).backward()
    assert logits(config, 4 * 256, PRECISIONS[precision]) == pytest.approx(max(allocated(events)), rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_gradients_and_adamw_are_exact(precision: str) -> None:
    config, pairs = small_config(), batch()
    model = tied_model(config, precision)
    optimizer = torch.optim.AdamW(model.parameters())
    with measuring(512) as measured:
        pair_cross_entropy(model(pairs[:, :-1]), pairs[:, 1:]).backward()
        optimizer.step()
    count = count_parameters(config, tied=True)
    assert measured["parameters"] == count.total
    assert measured["weights"] == measured["gradients"] == weights(count.total, PRECISIONS[precision])
    assert measured["optimizer"] == adamw_state(count.total, count.tensors, PRECISIONS[precision])


def test_strategies_spread_what_they_shard() -> None:
    config = MemSinksConfig.from_name("SmolLM-1.7B-MemSinks")
    count, precision = count_parameters(config, tied=True), PRECISIONS["bf16-mixed"]

    def on(strategy: str, devices: int = 8, nodes: int = 2, shard_size: int | None = None) -> Any:
        return memory(config, count, 2048, precision, sharding(strategy, devices, nodes, shard_size))

    one = on("one", 1, 1)
    assert one.weights == 4 * 1_711_376_384
    assert one.gathered == 0
    assert (on("ddp").weights, on("ddp").gradients) == (one.weights, 2 * one.gradients)
    assert on("fsdp").weights == one.weights // 16
    assert on("hsdp").weights == one.weights // 8  # nodes hold copies
    assert on("hsdp", shard_size=4).gradients == one.gradients // 4
    # the embedding, the last normalisation and two blocks of 67,112,960, in bfloat16, and their gradients
    assert on("fsdp").gathered == 2 * 2 * (49152 * 2048 + 2048 + 2 * 67_112_960)
    assert on("fsdp").activations == one.activations
    assert one.total == sum(vars(one).values())


# ------------------------------------------------------------------------------------------------------ a run, for real


@pytest.mark.long
def test_steps_checkpoints_and_disk_are_those_of_a_stock_run(prepared: Path, tmp_path: Path) -> None:
    arguments = pretrain_arguments(
        tmp_path / "run",
        prepared,
        model_name="Tiny-MemSinks",
        train__global_batch_size=5,  # not a multiple of the micro batch: litgpt steps every 4 rows
        train__micro_batch_size=2,
        train__max_tokens=11 * 2 * 32 + 7,
        train__save_interval=2,
    )
    run = run_litgpt(*arguments)
    result = make_plan(parse_pretrain([str(one) for one in arguments[1:]]), Throughput())
    schedule = result["schedule"]
    assert schedule["rows_per_step"] == 4
    assert (schedule["iterations"], schedule["steps"], schedule["idle"]) == (11, 5, 1)
    assert re.findall(r"step (\d+) \|", run.stdout) == [str(step + 1) for step in range(schedule["steps"])]
    assert f"Total tokens  : {schedule['tokens']:,}" in run.stdout
    assert len(list((tmp_path / "run").glob("step-*"))) == schedule["checkpoints"] == 2
    sizes = [path.stat().st_size for path in (tmp_path / "run").rglob("lit_model.pth")]
    assert sum(sizes) == pytest.approx(result["disk"]["checkpoints"], rel=0.02)
    assert f"Total parameters: {result['parameters']['total']:,}" in run.stdout
    stream = sum(path.stat().st_size for name in ("train", "val") for path in (prepared / name).glob("*.bin"))
    assert result["disk"]["data"] == pytest.approx(stream, rel=0.02)
    assert result["missing"] == []
    warned = " ".join(result["warnings"])
    assert "train.global_batch_size is 5, but litgpt steps every 4 rows" in warned
    assert "The last 1 of 11 micro batches" in warned
    assert "documents occur 6 times" in warned


def test_repeats_are_read_off_the_manifest(prepared: Path) -> None:
    data = Data.of(Manifest.read(prepared), "train")
    assert (data.documents, data.repeated_documents, data.repeats) == (300, 8, 6.0)


# ----------------------------------------------------------------------------------------------------------- the sinks


def test_expectations_are_those_of_drawn_masks() -> None:
    n, p = 768, 0.3
    masks = sink_mask(torch.arange(1, 4001).unsqueeze(0), n, p, seed=0)[0].double()
    mean, deviation = active(n, p)
    counts = masks.sum(dim=1)
    assert mean == pytest.approx(counts.mean().item(), rel=0.01)
    assert deviation == pytest.approx(counts.std().item(), rel=0.05)
    assert overlap(n, p) == pytest.approx((masks[:-1] * masks[1:]).sum(dim=1).mean().item(), rel=0.01)
    for documents in (1, 4, 10):
        groups = masks.reshape(-1, documents, n)
        assert coverage(p, documents) == pytest.approx(groups.amax(dim=1).mean().item(), rel=0.01)
        alone = (groups[:, 0] * (1 - groups[:, 1:]).prod(dim=1)).sum(dim=1)
        assert private(n, p, documents - 1) == pytest.approx(alone.mean().item(), rel=0.03)


def test_collisions_are_the_known_ones() -> None:
    assert colliding_pairs(1_000_000) == pytest.approx(232.8, abs=0.1)  # 1e12 / 2 / 2**31
    assert colliding_pairs(1) == 0


FINE = Data(
    documents=300,
    repeated_documents=8,
    repeated_tokens=100_000,
    repeats=96.0,
    noise=0.0,
    schemes={"train": "hash"},
    colliding_pairs=0,
    left_out=False,
)
TINY = SinkArgs(shared_fraction=0.5, active_probability=0.3)


@pytest.mark.parametrize(
    ("sinks", "data", "rate", "words"),
    [
        (replace(TINY, active_probability=0.7), FINE, 3e-3, ["active_probability is 0.7", "from 0.7 on (Fig. 5a)"]),
        (replace(TINY, shared_fraction=0.9), FINE, 3e-3, ["38 sinks", "128"]),
        (TINY, replace(FINE, repeats=16.0), 3e-3, ["occur 16 times", "2 to 22%", "Sec. 5.2"]),
        (TINY, replace(FINE, noise=0.1), 3e-3, ["id_noise is 0.1", "Fig. 5c"]),
        (TINY, replace(FINE, schemes={"train": "index"}), 3e-3, ["IDs of train", "ids: index", "App. I.1"]),
        (TINY, replace(FINE, repeated_tokens=10**7), 3e-3, ["0.1 MB", "147,456 sink parameters", "3.6 bits"]),
        (TINY, replace(FINE, repeats=None, repeated_documents=0), 3e-3, ["0 repeat", "text that occurs once"]),
        (
            replace(TINY, sinks_for="repeated"),
            replace(FINE, repeats=None, repeated_documents=0, left_out=True),
            3e-3,
            ["were left out", "no sink is ever on"],
        ),
        (TINY, FINE, 5e-4, ["learning rate is 0.0005", "1e-3"]),
        (replace(TINY, attention="document"), FINE, 3e-3, ["attention is document", "(rows, 1, T, T)"]),
    ],
)
def test_what_is_known_not_to_work_is_said_in_one_sentence(
    sinks: SinkArgs, data: Data, rate: float, words: list[str]
) -> None:
    config = MemSinksConfig.from_name("Tiny-MemSinks", sinks)
    (line,) = sink_warnings(config, count_parameters(config, tied=True), rate, data)
    assert all(word in line for word in words), line
    assert "\n" not in line


def test_what_is_known_to_work_is_not_warned_of() -> None:
    config = MemSinksConfig.from_name("Tiny-MemSinks", TINY)
    assert sink_warnings(config, count_parameters(config, tied=True), 3e-3, FINE) == []
    plain = MemSinksConfig.from_name("Tiny-MemSinks", SinkArgs(shared_fraction=1.0))
    assert sink_warnings(plain, count_parameters(plain, tied=True), 3e-3, replace(FINE, repeats=2.0)) == []


@pytest.mark.parametrize(("size", "rate"), [("smollm360", 5e-4), ("smollm1.7b", 5e-5)])
def test_another_learning_rate_than_the_papers_is_said(size: str, rate: float, tmp_path: Path) -> None:
    recipe = RECIPES / f"{size}_memsinks.yaml"
    assert not any("learning rate" in line for line in planned(recipe)["warnings"])
    other = tmp_path / "other.yaml"
    other.write_text(re.sub(r"\n    lr: \S+", "\n    lr: 3e-3", recipe.read_text(encoding="utf-8")), encoding="utf-8")
    (line,) = (one for one in planned(other)["warnings"] if "learning rate" in one)
    assert "is 0.003" in line
    assert f"at {rate:g}" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.max_tokens", 1000], "no step is made"),
        (["--train.max_steps", 10], "train.max_steps is set"),
        (["--train.lr_warmup_steps", 10_000], "the learning rate is not reached"),
        (["--eval.interval", 10_000], "none is validated"),
        (["--optimizer", "SGD"], "worked out for AdamW"),
        (["--optimizer.init_args.lr", 0.1], "optimizer.lr is 0.1, but litgpt 0.5.13 reads optimizer.init_args only"),
    ],
)
def test_what_litgpt_does_otherwise_is_said(overrides: list[Any], words: str) -> None:
    assert words in " ".join(planned(RECIPES / "demo/memsinks.yaml", *overrides)["warnings"])


# --------------------------------------------------------------------------------------------------------- the command


def test_settings_are_parsed_as_stock_litgpt_does(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--config", str(RECIPES / "smollm1.7b_memsinks.yaml"), "--data.sinks.active_probability", "0.1"]
    arguments += ["--devices", "2", "--train.micro_batch_size", "4", "--optimizer.init_args.lr", "1e-3"]
    stock: dict[str, Any] = {}

    @wraps(setup)
    def record(**settings: Any) -> None:
        stock.update(settings)

    monkeypatch.setitem(litgpt.__main__.PARSER_DATA, "pretrain", record)
    monkeypatch.setattr(sys, "argv", ["litgpt", "pretrain", *arguments])
    litgpt.__main__.main()
    assert stock["data"].sinks.active_probability == 0.1
    assert parse_pretrain(arguments) == stock
    received: dict[str, Any] = {}

    def receive(**settings: Any) -> None:
        """Stands for plan."""
        received.update(settings)

    monkeypatch.setattr("litgpt_memsinks.plan.plan.plan", receive)
    run_plan(*arguments)
    assert received == stock


def test_command_line_overrides_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES / "smollm360_memsinks.yaml"
    overrides = ["--devices", 4, "--precision", "bf16-true", "--data.sinks.active_probability", 0.1]
    speed = ["--tokens_per_second", 50_000, "--out_file", tmp_path / "plan.json"]
    run_plan("--config", recipe, *overrides, *speed, "--data.data_path", tmp_path / "nothing")
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["precision"] == "bf16-true"
    assert (result["strategy"], result["schedule"]["accumulation"]) == ("hsdp", 32)
    assert result["sinks"]["active_mean"] == pytest.approx(76.8)
    assert result["compute"]["device_hours"] == pytest.approx(1e9 / 50_000 / 3600, rel=1e-3)
    assert result["compute"]["hours"] == pytest.approx(result["compute"]["device_hours"] / 4)
    (missing,) = result["missing"]
    assert missing.startswith("There is no prepared data at")
    printed = capsys.readouterr().out
    for text in (
        "361,821,120",
        "HYBRID_SHARD *",
        "50,000 tokens per second and device, as given",
        f"missing: {missing}",
    ):
        assert text in " ".join(printed.split())
    assert "…" not in printed
    assert max(map(len, printed.split("missing:")[0].splitlines())) <= 120


def test_a_launch_that_will_be_refused_is_said() -> None:
    warnings = planned(RECIPES / "smollm360_memsinks.yaml", "--devices", 1, "--num_nodes", 2)["warnings"]
    assert warnings[0].startswith("litgpt pretrain will refuse this run: ")


@pytest.mark.parametrize(
    ("launch", "strategy"),
    [
        (LaunchArgs("litgpt"), "hsdp"),
        (LaunchArgs("ddp"), "ddp"),
        (LaunchArgs("fsdp"), "fsdp"),
        (LaunchArgs("hsdp", 2), "hsdp"),
    ],
)
def test_strategy_of_the_run_is_the_one_that_is_launched(launch: LaunchArgs, strategy: str) -> None:
    settings = parse_pretrain(["--config", str(RECIPES / "smollm1.7b_memsinks.yaml")])
    settings["data"].launch = launch
    result = make_plan(settings, Throughput())
    assert result["strategy"] == strategy
    weight = {one["strategy"]: one["weights"] for one in result["memory"] if one["precision"] == "32-true"}
    total = result["parameters"]["total"]
    assert weight == {"ddp": 4 * total, "fsdp": 4 * (total // 8), "hsdp": 4 * (total // (launch.shard_size or 8))}
    settings["devices"] = 1
    assert make_plan(settings, Throughput())["strategy"] == "one"


def test_rows_of_the_run_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, checkpointing = RECIPES / "smollm360_memsinks.yaml", "--data.launch.activation_checkpointing"
    for value, marked in (("false", {"compiled", "eager"}), ("true", {"compiled +", "eager +"})):
        run_plan("--config", recipe, checkpointing, value)
        rows = [line.split("bf16-mixed") for line in capsys.readouterr().out.splitlines() if "one device *" in line]
        assert {" ".join(after.split()[: 1 + ("+" in after)]) for _, after in rows} == marked


def test_utilisation_and_peak_give_hours() -> None:
    recipe = RECIPES / "smollm360_standard.yaml"
    compute = planned(recipe, throughput=Throughput(mfu=0.5, peak_tflops=1000))["compute"]
    assert compute["hours"] == pytest.approx(compute["flops"] / 0.5e15 / 3600)
    assert planned(recipe)["compute"]["hours"] is None
    assert planned(recipe)["sinks"] == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SmolLM-5B"], "LitGPT knows no model 'SmolLM-5B'"),
        (["--mfu", "0.4"], "give both"),
        (["--mfu", "40", "--peak_tflops", "989"], "at most 1"),
        (["--mfu", "0.4", "--peak_tflops", "989", "--tokens_per_second", "5"], "Give one of them"),
        (["--tokens_per_second", "0"], "above 0"),
        (["--devices", "0"], "devices is 0"),
        (["--train.micro_batch_size", "9"], "each of 1 devices takes 8 rows"),
        (["--train.epochs", "2"], "Use train.max_tokens"),
        (["--train.max_tokens", "null"], "train.max_tokens is null"),
        (["--train.max_seq_length", "1024"], "block_size is 512"),
        (["--data.sinks.active_probability", "1.5"], "at most 1"),
        (["--data", "TextFiles", "--data.train_data_path", "."], "data is TextFiles"),
        (["--out_file", __file__], "is not overwritten"),
    ],
)
def test_bad_input_ends_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run_plan("--config", RECIPES / "demo/memsinks.yaml", *overrides)
    assert str(stop.value.code).startswith("Error: ")
    assert words in str(stop.value.code)
    assert "\n" not in str(stop.value.code)


def test_checkpoint_holds_weights_and_both_moments() -> None:
    config = small_config()
    count = count_parameters(config, tied=True)
    assert checkpoint(count, PRECISIONS["32-true"]) == 12 * count.total + 4 * count.tensors
