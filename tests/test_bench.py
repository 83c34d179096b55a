"""`make bench`: what it measures is what it says. Its figures are never asserted."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from litgpt.model import GPT as BaseGPT

from litgpt_memsinks.bench import bench
from litgpt_memsinks.bench import data as bench_data
from litgpt_memsinks.bench import evaluate as bench_evaluate
from litgpt_memsinks.bench import generate as bench_generate
from litgpt_memsinks.bench import loader as bench_loader
from litgpt_memsinks.data.data import MemSinksData
from litgpt_memsinks.data.scored import Scored
from litgpt_memsinks.errors import MemSinksError


@pytest.fixture
def settings(tiny_config):
    return bench.Settings("cpu", tiny_config, 2, 16, [0.5], 3)


def test_bench_measures_every_contender_in_turn(monkeypatch, tiny_config, tmp_path, capsys):
    monkeypatch.setattr(bench, "small_config", lambda: tiny_config)
    monkeypatch.setattr(bench, "bench_loader", lambda: [{"loader": "pairs"}])
    monkeypatch.setattr(bench, "bench_generate", lambda device: [{"model": device}])
    monkeypatch.setattr(bench, "bench_evaluate", lambda config: [{"task": "losses"}])
    threads = torch.get_num_threads()
    try:
        bench.bench(rounds=3, compiled=False, shared_fractions=[0.5], out_file=tmp_path / "bench.json")
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found.keys() == {
        *("date", "hardware", "versions", "model", "micro_batch_size", "block_size", "rounds", "steps", "loader"),
        *("generation", "evaluation"),
    }
    stock, again, sinks = found["steps"]
    assert [one["model"] for one in found["steps"]] == ["stock", "stock again", "sinks, g = 0.5"]
    assert stock["ratio"] == stock["memory_ratio"] == 1.0
    assert again["memory_ratio"] == 1.0
    assert sinks["memory_ratio"] > 1  # the mask, at least
    assert stock["tokens_per_second"] == pytest.approx(
        found["micro_batch_size"] * found["block_size"] / stock["seconds_per_step"]
    )
    assert "stock again" in capsys.readouterr().out


def test_contenders_train_on_the_same_tokens(settings):
    made = bench.contenders(settings, compiled=False)
    stock, again, sinks = made.values()
    assert torch.equal(stock.batch, again.batch)
    assert torch.equal(stock.batch, sinks.batch[..., 0])
    assert sinks.batch.shape == (2, 17, 2)
    before = [parameter.clone() for parameter in sinks.model.parameters()]
    sinks.step()
    assert all(
        not torch.equal(old, new) for old, new in zip(before, sinks.model.parameters(), strict=True)
    )  # by AdamW's weight decay, if by nothing else


def test_peak_memory_is_what_is_held_at_once(settings, monkeypatch):
    contender = bench.contenders(settings, compiled=False)["stock"]
    contender.step()

    def step():
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        second, third = torch.empty(2_000_000, dtype=torch.uint8), torch.empty(500_000, dtype=torch.uint8)
        del second, third

    monkeypatch.setattr(contender, "step", step)
    weights = sum(parameter.numel() for parameter in contender.model.parameters())
    steps = len(list(contender.model.parameters()))  # AdamW counts them in a float each
    buffers = sum(buffer.nbytes for buffer in contender.model.buffers())
    assert contender.peak_memory() == 3 * 4 * weights + 4 * steps + buffers + 2_500_000


@pytest.mark.parametrize("most", [1, 8])
def test_largest_batch_is_the_last_that_fits(settings, monkeypatch, most):
    def contenders(settings, compiled):
        if settings.micro_batch_size > most:
            raise torch.cuda.OutOfMemoryError
        return {}

    monkeypatch.setattr(bench, "contenders", contenders)
    assert bench.largest_batch(settings) == most


def test_a_model_that_does_not_fit_is_one_line(settings, monkeypatch):
    def contenders(settings, compiled):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(bench, "contenders", contenders)
    with pytest.raises(MemSinksError, match="does not fit into the GPU with one row"):
        bench.largest_batch(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 2}, "rounds is 2"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        pytest.param(
            {"device": "cuda"},
            "finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(MemSinksError, match=message):
        bench.bench(**arguments)


def test_loaders_yield_the_same_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_loader, "_STORIES", 600)
    bench_loader.make_streams(tmp_path)
    rows = {}
    for name in ("LitData", "pairs"):
        loader = bench_loader._loader(tmp_path, name, 0)
        tokens = [batch[..., 0] if name == "pairs" else batch for batch in loader]
        rows[name] = {tuple(row.tolist()) for row in torch.cat(tokens)}
    assert rows["LitData"] == rows["pairs"]
    assert len(rows["pairs"]) > 50
    assert isinstance(MemSinksData(data_path=tmp_path / "pairs").check(1024, 256, 8).splits, dict)
    measured = bench_loader._measure(tmp_path, 0, 2)
    assert [one.loader for one in measured] == list(bench_loader.CONTENDERS)
    assert measured[0].ratio == 1.0
    assert capsys.readouterr().out.strip() == ""  # a finished progress bar leaves an empty line


def test_generation_counts_flops_and_the_dropped_models_width(tiny_config):
    """By hand: multiply-adds of the linear layers; attention's own are the same in all and not counted on a CPU."""
    wide, again, dropped = bench_generate.bench_generate(rounds=3, new_tokens=4, config=tiny_config)
    assert [one["intermediate_size"] for one in (wide, again, dropped)] == [64, 64, 32]
    assert wide["speed_ratio"] == wide["flops_ratio"] == again["flops_ratio"] == 1.0
    attention, head = 32 * (3 * 32) + 32 * 32, 32 * 512
    by_hand = {width: 2 * (attention + 3 * 32 * width) + head for width in (64, 32)}
    assert dropped["flops_ratio"] == pytest.approx(by_hand[64] / by_hand[32], rel=0.02)


def test_generation_takes_turns_with_a_kv_cache(tiny_config, monkeypatch):
    made = bench_generate.contenders(tiny_config, "cpu", 20)
    turns = []
    monkeypatch.setattr(bench_generate, "contenders", lambda *arguments: made)
    monkeypatch.setattr(bench_generate, "_flops", lambda *arguments: 1)
    monkeypatch.setattr(bench_generate, "_seconds", lambda model, *arguments: turns.append(model) or 1.0)
    bench_generate.bench_generate(rounds=3, new_tokens=4, config=tiny_config)
    first, second, third = made.values()
    assert turns == [first, second, third, second, third, first, third, first, second]
    assert first.mask_cache is not None


def test_extractors_continue_alike_and_scorers_see_the_same_tokens(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(bench_evaluate, "_DOCUMENTS", 3)
    torch.manual_seed(0)
    model = BaseGPT(tiny_config).eval()
    scored = Scored(list(torch.randint(0, 512, (3, 65))), torch.arange(3))
    first, *others = (found() for found in bench_evaluate.extractors(model, scored).values())
    assert all(torch.equal(first, other) for other in others)
    assert first.shape == (3, 32)
    seen = []
    hook = model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    for run in bench_evaluate.scorers(model, scored, 64).values():
        run()
    hook.remove()
    assert len(seen) == 3
    assert all(torch.equal(seen[0], other) for other in seen)
    measured = bench_evaluate.bench_evaluate(tiny_config, rounds=1)
    assert [one["ratio"] for one in measured if "again" not in one["contender"]][::2] == [1.0, 1.0]
    assert len(measured) == 6
    assert "32 at a time" in capsys.readouterr().out


def test_pairs_compare_cpu_time_core_by_core_and_begin_in_turns(tmp_path, monkeypatch):
    started = []

    def start(contender, inputs, tokenizer_dir, out_dir, workers, core):
        started.append((contender, core))
        assert (workers, out_dir.parent) == (2, tmp_path)
        return {("a", 4): 8.0, ("b", 4): 10.0, ("a", 5): 9.0, ("b", 5): 6.0}[contender, core]

    monkeypatch.setattr(bench_data, "_cores", lambda: [4, 5, 6])
    monkeypatch.setattr(bench_data, "_start", start)
    monkeypatch.setattr(bench_data, "_figures", lambda process, contender, out_dir: {"cpu_seconds": process})
    for turn in (0, 1):
        assert bench_data._cpu_ratios(("a", "b"), turn, tmp_path, tmp_path, tmp_path) == [0.8, 1.5]
    first, second = [("b", 4), ("a", 4), ("a", 5), ("b", 5)], [("a", 4), ("b", 4), ("b", 5), ("a", 5)]
    assert started == first + second


def test_pairs_are_summed_up_by_their_logarithms():
    found = bench_data._pair(("a", "b"), 3, [0.5, 2.0])
    assert found.cpu_speed == pytest.approx(1.0)
    # -log 2 and log 2 deviate by sqrt(2) log 2, divided by sqrt(2)
    assert found.standard_error == pytest.approx(math.log(2))
    assert bench_data._pair(("a", "b"), 3, [0.5]) == bench_data.Pair("a", "b", 3, 0.5, None, 1)


@pytest.mark.parametrize("core", [None, 3])
def test_one_of_a_pair_is_bound_to_its_core_and_tokenises_with_its_workers_alone(core, tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: seen.update(what=command[-1], env=env))
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: seen.update(cores=cores), raising=False)
    monkeypatch.setitem(bench_data._RUNS, "it", lambda *arguments: seen.update(arguments=arguments))
    bench_data._start("it again", tmp_path, tmp_path, tmp_path / "out", 2, core)
    bench_data.measure_here(seen["what"])
    assert seen["arguments"] == (tmp_path, tmp_path, tmp_path / "out", 2)
    assert seen["env"].get("TOKENIZERS_PARALLELISM") == (None if core is None else "false")
    assert seen.get("cores") == (None if core is None else {3})
    assert set(json.loads(capsys.readouterr().out)) == {"seconds", "cpu_seconds", "peak_memory"}


def test_a_contender_that_fails_is_named(tmp_path):
    (tmp_path / "out.out").touch()
    with open(tmp_path / "out.err", "wb") as err:
        process = subprocess.Popen([sys.executable, "-c", "raise KeyError('a tokenizer')"], stderr=err)
    with pytest.raises(MemSinksError, match="plain litdata failed: KeyError: 'a tokenizer'"):
        bench_data._figures(process, "plain litdata", tmp_path / "out")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_preparing_is_measured_against_plain_litdata(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "_STORIES", 400)
    bench_data.bench_data(files=2, rounds=1, growth=2, num_workers=2, out_file=tmp_path / "data.json")
    found = json.loads((tmp_path / "data.json").read_text())
    assert [one["contender"] for one in found["measurements"]] == [*bench_data.CONTENDERS, "ours"]
    assert found["measurements"][0]["wall_speed"] == found["measurements"][0]["cpu_speed"] == 1.0
    assert found["measurements"][-1]["tokens"] == 2 * found["measurements"][0]["tokens"]
    assert all(one["peak_memory"] > 1e8 for one in found["measurements"])
    assert [(one["base"], one["contender"]) for one in found["pairs"]] == list(bench_data.PAIRS)
    assert all(one["cpu_speed"] > 0 for one in found["pairs"])
    assert all(one["runs"] == len(bench_data._cores()[:2]) for one in found["pairs"])
    assert "Two at once" in capsys.readouterr().out
