"""Removing some documents' sinks: exactly those are zero, they stay so, and what it costs others is counted."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import litgpt.__main__
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import read_jsonl, write_jsonl

from litgpt_memsinks import MemSinksConfig, SinkArgs
from litgpt_memsinks.__main__ import main
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import load_model, read_config, read_weights
from litgpt_memsinks.model.model import GPT, removed_mask
from litgpt_memsinks.pretrain.launch import FullyShardedStrategy
from litgpt_memsinks.pretrain.pretrain import check_same_sinks, describe, with_removed
from litgpt_memsinks.remove import remove as remove_module
from litgpt_memsinks.sinks.masks import pack_neurons, unpack_neurons
from tests.console import REPOSITORY, TINY_MODEL, memsinks, pretrain_arguments
from tests.sink_models import MODELS, build, save

remove = functools.partial(remove_module.remove, certificate=False)
"""Without a certificate, whose gate random weights do not pass. With one: test_verify_removal.py"""
SINKS = SinkArgs(0.25, 0.2)
"""16 of 64 neurons are shared, 48 are sinks, about 10 of them on for a document."""


@pytest.fixture(scope="session")
def repeated(prepared: Path) -> list[int]:
    rows = pq.read_table(prepared / "documents.parquet").to_pylist()
    return [row["sequence_id"] for row in rows if row["repeats"] > 1]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return save(build(SINKS), tmp_path_factory.mktemp("checkpoint") / "final", prepared)


def mask(config: MemSinksConfig, *ids: int) -> torch.Tensor:
    """The union of the documents' masks, by a model that nothing was removed from."""
    plain = dataclasses.replace(config, sink_removed="", sink_removed_documents=0)
    with torch.device("meta"):
        model = GPT(plain)
    return model.sinks(torch.tensor(ids)).flatten(0, 1).any(0)


def own(model: GPT, tokens: torch.Tensor, sequence_id: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, sequence_ids=torch.full((len(tokens),), sequence_id))


# ------------------------------------------------------------------------------------------------------- what is zeroed


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "converted"])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_exactly_the_removed_sinks_are_zero(
    kind: str, raw: bool, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    model = build(SINKS, **MODELS[kind])
    save(model, tmp_path / "in", raw=raw)
    remove(tmp_path / "in", tmp_path / "out", prepared, ids=f"{repeated[0]},{repeated[1]}", yes=True)
    before, after = model.state_dict(), read_weights(tmp_path / "out")
    gone = {16 + int(sink) for sink in mask(model.config, *repeated[:2]).nonzero()}
    assert 0 < len(gone) < 40
    assert set(after) == {*before, "sink_removed"}
    zeroed = 0
    for name, weight in before.items():
        parts = name.split(".")
        hidden = 0 if "mlp.fc" in name else 1 if parts[-2:] == ["proj", "weight"] and "mlp" in parts else None
        if hidden is None:
            assert torch.equal(after[name], weight), name
            continue
        zero = {index for index in range(64) if not after[name].select(hidden, index).any()}
        assert zero == gone, name
        kept = sorted(set(range(64)) - gone)
        assert torch.equal(
            after[name].index_select(hidden, torch.tensor(kept)), weight[(slice(None),) * hidden + (kept,)]
        )
        zeroed += 1
    assert zeroed == {"llama": 6, "gemma": 6, "llama with biases": 10, "gpt-neox": 6}[kind]
    assert after["lm_head.weight"].data_ptr() == after["transformer.wte.weight"].data_ptr()


@pytest.mark.parametrize("sinks", [SINKS, SinkArgs(0.25, 0.3, sinks_for="repeated", scale="inverse")], ids=str)
def test_the_removed_documents_model_is_the_dropped_one_and_others_keep_the_rest(
    sinks: SinkArgs, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    model = build(sinks)
    remove(save(model, tmp_path / "in"), tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)
    after = load_model(tmp_path / "out")
    assert isinstance(after, GPT)
    tokens = torch.randint(0, 512, (2, 40))
    assert not torch.allclose(own(model, tokens, repeated[0]), model(tokens), atol=1e-2)
    torch.testing.assert_close(own(after, tokens, repeated[0]), model(tokens))
    left = mask(model.config, repeated[1]) & ~mask(model.config, repeated[0])
    assert torch.equal(own(after, tokens, repeated[1]), model(tokens, sinks=left.view(1, 1, -1)))
    assert torch.equal(after(tokens), model(tokens))
    assert torch.equal(
        after(tokens, sinks=torch.ones(1, 1, 48, dtype=torch.bool)),
        model(tokens, sinks=~mask(model.config, repeated[0]).view(1, 1, -1)),
    )


def test_removing_again_adds_up(checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]) -> None:
    both = f"{repeated[2]} {repeated[5]}"
    remove(checkpoint, tmp_path / "both", prepared, ids=both, yes=True)
    remove(checkpoint, tmp_path / "one", prepared, ids=str(repeated[2]), yes=True)
    remove(tmp_path / "one", tmp_path / "two", prepared, ids=both, yes=True)
    assert read_config(tmp_path / "two") == read_config(tmp_path / "both")
    assert read_config(tmp_path / "two").sink_removed_documents == 2
    first, second = read_weights(tmp_path / "both"), read_weights(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(MemSinksError, match="are removed already"):
        remove(tmp_path / "two", tmp_path / "three", prepared, ids=both, yes=True)


def test_dropping_and_loading_go_on_working(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    remove(checkpoint, tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)
    drop_sinks(tmp_path / "out", tmp_path / "dropped")
    drop_sinks(checkpoint, tmp_path / "reference")
    dropped, reference = read_weights(tmp_path / "dropped"), read_weights(tmp_path / "reference")
    assert set(dropped) == set(reference)
    assert all(torch.equal(dropped[name], reference[name]) for name in reference)
    for name in ("tokenizer.json", "tokenizer_config.json", "hyperparameters.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


# --------------------------------------------------------------------------------------------------- what stays removed


def backward(model: GPT, sequence_id: int) -> None:
    tokens = torch.randint(0, 512, (2, 20))
    model(tokens, sequence_ids=torch.full((2,), sequence_id)).float().logsumexp(-1).mean().backward()


def slices(model: GPT, neurons: torch.Tensor, gradients: bool) -> list[torch.Tensor]:
    """What belongs to some hidden neurons, of every MLP: rows and biases of what is before them, columns behind."""
    found = []
    for name, parameter in model.named_parameters():
        values = parameter.grad if gradients else parameter
        if "mlp.fc" in name:
            found.append(values[neurons])
        elif name.endswith("mlp.proj.weight"):
            found.append(values[:, neurons])
    return found


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_removed_sinks_get_no_gradient_and_stay_zero(kind: str, repeated: list[int]) -> None:
    model = build(SINKS, **MODELS[kind])
    gone = mask(model.config, repeated[0])
    neurons = (16 + gone.nonzero()).flatten()
    config = dataclasses.replace(model.config, sink_removed=pack_neurons(gone), sink_removed_documents=1)
    after = GPT(config)
    after.load_state_dict({**model.state_dict(), "sink_removed": gone.to(torch.uint8)})  # not zeroed: the mask alone
    for trained, expected in ((model, True), (after, False)):
        backward(trained.train(), repeated[0])
        assert all(bool(part.any()) == expected for part in slices(trained, neurons, gradients=True))
    after.load_state_dict(remove_module.without_removed(model.state_dict(), config))
    optimizer = torch.optim.AdamW(after.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(after, repeated[0])
        optimizer.step()
    assert not any(part.any() for part in slices(after, neurons, gradients=False))


def test_what_was_removed_is_not_loaded_back(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    remove(checkpoint, tmp_path / "one", prepared, ids=str(repeated[0]), yes=True)
    remove(checkpoint, tmp_path / "other", prepared, ids=str(repeated[1]), yes=True)
    folders = [checkpoint, tmp_path / "one", tmp_path / "other"]
    for weights in folders:
        for config in folders:
            with torch.device("cpu"):
                model = GPT(read_config(config))
            if weights == config:
                model.load_state_dict(read_weights(weights))
                continue
            for strict in (True, False):
                with pytest.raises(MemSinksError, match="of one checkpoint"):
                    model.load_state_dict(read_weights(weights), strict=strict)


def test_the_record_survives_initialisation_on_the_meta_device(repeated: list[int]) -> None:
    config = MemSinksConfig.from_name("Tiny-MemSinks", SINKS)
    gone = mask(config, repeated[0])
    config = dataclasses.replace(config, sink_removed=pack_neurons(gone), sink_removed_documents=1)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert torch.equal(model.sink_removed.bool(), gone)
    assert not (model.sinks(torch.tensor([repeated[0]]))).any()


def test_a_run_takes_the_record_from_where_it_begins(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    remove(checkpoint, tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)
    config = read_config(checkpoint)
    assert isinstance(config, MemSinksConfig)
    check_same_sinks(config, tmp_path / "out")
    after = with_removed(config, tmp_path / "out")
    assert after == read_config(tmp_path / "out")
    assert describe(after).endswith(f" {int(removed_mask(after).sum())} of them were removed and stay off.")
    assert with_removed(config, checkpoint) == config
    with torch.device("meta"):  # where LitGPT counts FLOPs
        model = GPT(after).train()
        assert model(torch.zeros(1, 8, dtype=torch.int64)).is_meta


def run_litgpt(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """The stock command line in this process, uncompiled."""
    monkeypatch.setattr(sys, "argv", ["litgpt", *arguments])
    with torch.compiler.set_stance("force_eager"):
        litgpt.__main__.main()


@pytest.mark.long
def test_training_that_begins_with_it_keeps_it_and_so_does_resuming(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(checkpoint, tmp_path / "start", prepared, ids=str(repeated[0]), yes=True)
    sinks = {"data__sinks__shared_fraction": 0.25, "data__sinks__active_probability": 0.2}
    settings = {"train__save_interval": 2, "train__max_steps": 4, **sinks}
    out = tmp_path / "out"
    begin = pretrain_arguments(out, prepared, initial_checkpoint_dir=tmp_path / "start", iterations=3, **settings)
    run_litgpt(monkeypatch, begin)
    run_litgpt(monkeypatch, pretrain_arguments(out, prepared, resume="auto", iterations=6, **settings))
    gone = mask(read_config(checkpoint), repeated[0])
    newest = max(out.glob("step-*"))
    for folder in (newest, out / "final"):
        assert torch.equal(removed_mask(read_config(folder)), gone)
        weights = read_weights(folder)
        for name in ("transformer.h.0.mlp.fc_1.weight", "transformer.h.1.mlp.fc_2.weight"):
            assert not weights[name][16:][gone].any()
            assert weights[name][16:][~gone].any(1).all()
            assert not torch.equal(weights[name], read_weights(tmp_path / "start")[name])
    state = torch.load(newest / "lit_model.pth", weights_only=False)["optimizer"]["state"]
    averages = [slot["exp_avg"] for slot in state.values() if slot["exp_avg"].shape == (64, 32)]
    assert len(averages) == 4
    assert not any(average[16:][gone].any() for average in averages)


# ------------------------------------------------------------------------------------------------------- what it costs


def test_coverage_and_collateral_are_those_of_the_masks(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    removal = remove(checkpoint, tmp_path / "out", prepared, ids=f"{repeated[0]},{repeated[3]}", dry_run=True)
    assert not (tmp_path / "out").exists()
    config = read_config(checkpoint)
    gone = mask(config, repeated[0], repeated[3])
    assert torch.equal(removal.removed, gone)
    shares = {}
    for other in set(repeated) - {repeated[0], repeated[3]}:
        theirs = mask(config, other)
        shares[other] = int((theirs & gone).sum()) / int(theirs.sum())
    assert removal.kept.documents == 6
    assert len(set(shares.values())) > 2
    assert removal.kept.mean == pytest.approx(sum(shares.values()) / 6)
    assert {p.sequence_id: p.share for p in removal.kept.worst} == pytest.approx({k: v for k, v in shares.items() if v})
    assert removal.kept.quantile(1.0) == pytest.approx(max(shares.values()), abs=1e-3)
    assert removal.kept.quantile(0.5) == pytest.approx(sorted(shares.values())[2], abs=1e-3)
    output = capsys.readouterr().out
    assert f"{int(gone.sum())} of 48 in each MLP ({int(gone.sum()) / 48:.1%}; 2 documents would use 36.0%" in output
    assert f"6 other repeated documents lose {sum(shares.values()) / 6:.2%}" in output
    assert "Nothing was written" in output


def test_least_shared_takes_the_cheapest_sinks_up_to_the_limit(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config(checkpoint)
    some = repeated[:3]
    candidates = mask(config, *some)
    cost = dict.fromkeys(range(48), 0.0)
    for other in repeated[3:]:
        theirs = mask(config, other)
        for sink in theirs.nonzero().flatten().tolist():
            cost[sink] += 1 / int(theirs.sum()) / len(repeated[3:])
    free = {sink for sink in candidates.nonzero().flatten().tolist() if cost[sink] == 0}
    assert free
    for limit in (0.0, 0.05, 0.1, 1.0):
        removal = remove(
            checkpoint, tmp_path / "out", prepared, ids=" ".join(map(str, some)), choice="least_shared",
            max_collateral=limit, dry_run=True,
        )  # fmt: skip
        taken = set(removal.removed.nonzero().flatten().tolist())
        left = set(candidates.nonzero().flatten().tolist()) - taken
        assert free <= taken
        assert sum(cost[sink] for sink in taken) == pytest.approx(removal.kept.mean)
        assert removal.kept.mean <= limit
        if left:
            cheapest = min(cost[sink] for sink in left)
            assert max(cost[sink] for sink in taken) <= cheapest
            assert removal.kept.mean + cheapest > limit
            assert f"left         {len(left)} of their sinks stay" in capsys.readouterr().out
        else:
            assert limit == 1.0


def test_documents_with_the_same_id_are_said_to_lose_theirs(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    table = pq.read_table(prepared / "documents.parquet")
    ids = table["sequence_id"].to_pylist()
    (place,) = [row for row, value in enumerate(ids) if value == repeated[4]]
    ids[place] = repeated[0]
    data = tmp_path / "data"
    data.mkdir()
    for file in prepared.iterdir():
        (data / file.name).symlink_to(file)
    (data / "documents.parquet").unlink()
    changed = table.set_column(6, table.schema.field("sequence_id"), pa.array(ids, pa.int32()))
    pq.write_table(changed, data / "documents.parquet")
    text = read_jsonl(Path(table["file"][0].as_py()))[table["line"][ids.index(repeated[0])].as_py() - 1]
    removal = remove(checkpoint, tmp_path / "out", data, text=text, dry_run=True)
    assert removal.chosen.rows.num_rows == 1
    assert removal.sharing == 1
    assert removal.kept.documents == 6


def test_sinks_for_repeated_documents_only(tmp_path: Path, prepared: Path, repeated: list[int]) -> None:
    folder = save(build(SinkArgs(0.25, 0.1, sinks_for="repeated")), tmp_path / "in")
    rows = pq.read_table(prepared / "documents.parquet").to_pylist()
    once = next(row["sequence_id"] for row in rows if row["repeats"] == 1 and row["split"] == "train")
    with pytest.raises(MemSinksError, match="none occurs more than once"):
        remove(folder, tmp_path / "out", prepared, ids=str(once), yes=True)
    removal = remove(folder, tmp_path / "out", prepared, ids=f"{once},{repeated[0]}", yes=True)
    assert removal.numbers == [repeated[0] % 2**31]
    assert torch.equal(removal.removed, mask(read_config(folder), repeated[0]))


# --------------------------------------------------------------------------------------------------------- the command


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ids": ""}, "Give one of --ids, --source"),
    ({"data_path": None}, "Give --data_path"),
    ({"choice": "some"}, "choice is 'some'"),
    ({"choice": "least_shared"}, "needs a limit"),
    ({"max_collateral": 1.5}, "max_collateral is 1.5"),
    ({"max_collateral": 0.001}, "Raise it, remove fewer documents, or use --choice least_shared"),
    ({"ids": "5"}, "Nothing was trained on it"),
    ({"yes": False}, "it needs --yes true"),
    ({"checkpoint_dir": Path("nothing")}, "is not a LitGPT checkpoint"),
]


@pytest.mark.parametrize(("change", "part"), REFUSED, ids=str)
def test_refused_in_one_line_and_nothing_written(
    change: dict[str, Any], part: str, checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    settings = {"checkpoint_dir": checkpoint, "data_path": prepared, "ids": f"{repeated[0]},{repeated[1]}", "yes": True}
    with pytest.raises(MemSinksError) as caught:
        remove(out_dir=tmp_path / "out", **{**settings, **change})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_checkpoints_without_sinks_are_refused(tmp_path: Path, prepared: Path, repeated: list[int]) -> None:
    folder = save(build(SinkArgs(1.0)), tmp_path / "in")
    with pytest.raises(MemSinksError, match="has no sinks to remove"):
        remove(folder, tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)


@pytest.mark.parametrize("answer", ["y", "n"])
def test_on_a_terminal_it_asks(
    answer: str, checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remove_module, "_confirmed", lambda yes, ask=None: confirmed(yes, lambda question: answer))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    remove(checkpoint, tmp_path / "out", prepared, ids=str(repeated[0]))
    assert (tmp_path / "out").exists() == (answer == "y")


confirmed = remove_module._confirmed


def test_a_failure_while_writing_leaves_nothing(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(remove_module.torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        remove(checkpoint, tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)
    assert not list(tmp_path.iterdir())


SLOW_SAVE = """
import sys, time
from pathlib import Path
from litgpt_memsinks.remove import remove as module
save = module.torch.save
def slow_save(content, path):  # the moment in which a kill would hurt most: half the bytes are written
    save(content, path)
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size // 2)
    print("half", flush=True)
    time.sleep(60)
module.torch.save = slow_save
module.remove(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), ids=sys.argv[4], yes=True, certificate=False)
"""


@pytest.mark.long
def test_kill_9_leaves_nothing_that_looks_finished(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    command = [sys.executable, "-c", SLOW_SAVE, checkpoint, tmp_path / "out", prepared, str(repeated[0])]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "half\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    remove(checkpoint, tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)  # clears what was left
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_torn_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]) -> None:
    save(build(SINKS), tmp_path / "in")
    path = tmp_path / "in/model_config.yaml"
    path.write_text(path.read_text().replace("intermediate_size: 64", "intermediate_size: 80"))
    with pytest.raises(MemSinksError, match="are not of one model"):
        remove(tmp_path / "in", tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)
    assert not (tmp_path / "out").exists()


def test_texts_to_removal_in_one_command(
    checkpoint: Path, tmp_path: Path, prepared: Path, corpus_dir: Path, repeated: list[int]
) -> None:
    rows = {row["sequence_id"]: row for row in pq.read_table(prepared / "documents.parquet").to_pylist()}
    texts = read_jsonl(corpus_dir / "train.jsonl")
    asked = write_jsonl(tmp_path / "asked.jsonl", [texts[rows[name]["line"] - 1] for name in repeated[:2]])
    settings = {"data_path": prepared, "documents": asked, "yes": "true", "certificate": "false"}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    result = memsinks("remove", checkpoint, tmp_path / "out", *flags)
    assert f"Remove the documents whose texts are in {str(asked)!r}." in result.stdout
    assert torch.equal(removed_mask(read_config(tmp_path / "out")), mask(read_config(checkpoint), *repeated[:2]))


def test_the_command_says_what_is_missing(
    checkpoint: Path, tmp_path: Path, prepared: Path, corpus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = write_jsonl(tmp_path / "asked.jsonl", [read_jsonl(corpus_dir / "train.jsonl")[0], "Another text."])
    with pytest.raises(SystemExit) as stopped:
        main(
            ["remove", str(checkpoint), str(tmp_path / "out"), "--data_path", str(prepared), "--documents", str(asked)]
        )
    assert str(stopped.value).startswith("Error: 1 of what was asked for is not in the training stream")
    assert f"{asked}:2" in str(stopped.value)


# ----------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("n_sink", [1, 7, 8, 9, 1344])
def test_the_record_holds_any_set_of_sinks_and_survives_yaml(n_sink: int) -> None:
    generator = torch.Generator().manual_seed(n_sink)
    for probability in (0.0, 0.02, 0.5, 1.0):
        removed = torch.rand(n_sink, generator=generator) < probability
        text = yaml.safe_load(yaml.safe_dump({"sink_removed": pack_neurons(removed)}))["sink_removed"]
        assert torch.equal(unpack_neurons(text, n_sink), removed)
    first = torch.zeros(9, dtype=torch.bool)
    first[[0, 8]] = True
    assert pack_neurons(first) == "0101"


@pytest.mark.parametrize(
    ("record", "documents"), [("zz", 1), ("01", 1), ("0" * 13 + "1", 1), ("1" * 12, 0), ("", 2), (7, 1), ("1" * 12, -1)]
)
def test_a_record_of_another_model_is_refused(record: Any, documents: int, tiny_config: Any) -> None:
    config = MemSinksConfig.from_base(tiny_config, SINKS)
    with pytest.raises(MemSinksError, match=r"^sink_removed.*model_config\.yaml again\.$"):
        dataclasses.replace(config, sink_removed=record, sink_removed_documents=documents)
    dataclasses.replace(config, sink_removed="1" * 12, sink_removed_documents=1)


def test_nothing_is_stored_while_nothing_is_removed() -> None:
    assert "sink_removed" not in build(SINKS).state_dict()
    assert TINY_MODEL["intermediate_size"] == 64


def test_sharded_loading_does_not_bring_it_back_either(
    checkpoint: Path, tmp_path: Path, prepared: Path, repeated: list[int]
) -> None:
    remove(checkpoint, tmp_path / "out", prepared, ids=str(repeated[0]), yes=True)
    strategy = FullyShardedStrategy(1, 2, None)
    with pytest.raises(MemSinksError, match="of one checkpoint"):
        strategy.load_checkpoint(tmp_path / "out/lit_model.pth", load_model(checkpoint))
