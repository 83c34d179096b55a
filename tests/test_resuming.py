"""Which checkpoint a run goes on from: torn ones are passed over, those of other runs refused."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from litgpt.args import EvalArgs, TrainArgs

from litgpt_memsinks import MemSinksConfig, MemSinksData, SinkArgs
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.pretrain import resuming, saving
from litgpt_memsinks.pretrain.run import Run
from tests.training_process import TWO_RANKS, arguments, assert_same, ddp, finish, training_state


@pytest.fixture
def run(tmp_path, prepared, tiny_config):
    """One that has not begun."""
    return Run(
        L.Fabric(accelerator="cpu", devices=1),
        MemSinksConfig.from_base(tiny_config, SinkArgs()),
        MemSinksData(data_path=prepared, num_workers=1),
        TrainArgs(micro_batch_size=4, max_seq_length=32),
        EvalArgs(),
        tmp_path / "out",
        devices=1,
        num_nodes=1,
        tokenizer_dir=prepared / "tokenizer",
        data_digest="d1",
    )


def make(folder: Path) -> Path:
    """A checkpoint as LitGPT writes it, of a model of one tensor."""
    folder.mkdir(parents=True)
    state = {"model": {"w": torch.ones(9999)}, "optimizer": {}, "train_dataloader": {}, "iter_num": 1, "step_count": 1}
    torch.save(state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text("name: tiny\n")
    return folder / "lit_model.pth"


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


def without_state(path):
    torch.save({"w": torch.ones(1)}, path)


TORN = {
    "half": (lambda path: cut(path, path.stat().st_size // 2), "its lit_model.pth is cut short"),
    "last byte": (lambda path: cut(path, path.stat().st_size - 1), "its lit_model.pth is cut short"),
    "empty": (lambda path: cut(path, 0), "its lit_model.pth is empty"),
    "no weights": (lambda path: path.unlink(), "it has no lit_model.pth"),
    "no config": (lambda path: (path.parent / "model_config.yaml").unlink(), "it has no model_config.yaml"),
    "config cut": (lambda path: cut(path.parent / "model_config.yaml", 3), "its model_config.yaml is cut short"),
    "model only": (
        without_state,
        "its lit_model.pth holds no iter_num, model, optimizer, step_count, train_dataloader",
    ),
}


@pytest.mark.parametrize("case", sorted(TORN))
def test_torn_checkpoint_is_passed_over_or_refused_if_named(case, run, capsys):
    tear, reason = TORN[case]
    whole, torn = make(run.out_dir / "step-00000009"), make(run.out_dir / "step-00000010")
    tear(torn)
    assert resuming.find(run, "auto") == whole
    assert resuming.find(run, True) == whole
    assert capsys.readouterr().out.splitlines()[0] == (
        f"Warning: the checkpoint {str(torn.parent)!r} is passed over, because {reason}."
    )
    with pytest.raises(MemSinksError) as caught:
        resuming.find(run, torn.parent)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(whole.parent)
    assert resuming.find(run, "auto") is None
    with pytest.raises(MemSinksError, match=r"^resume is true, but there is no whole checkpoint"):
        resuming.find(run, True)


def test_newest_is_taken_by_number_and_a_path_may_be_the_folder(run):
    make(run.out_dir / "step-00000002")
    newest = make(run.out_dir / "step-100000000")
    (run.out_dir / "step-by-step").mkdir()
    assert resuming.find(run, "auto") == newest
    assert resuming.find(run, newest) == resuming.find(run, newest.parent) == newest
    assert resuming.find(run, False) is None


def test_leftovers_of_killed_processes_are_cleared_and_a_replaced_folder_gets_its_name_back(run):
    out_dir = run.out_dir
    for name in (".step-00000001.999999999.incomplete", ".final.999999999.replaced", ".old.999999999.replaced"):
        make(out_dir / name)
    make(out_dir / "old")
    make(out_dir / ".step-00000002.1.incomplete")  # process 1 runs
    resuming.clear_leftovers(out_dir)
    assert sorted(path.name for path in out_dir.iterdir()) == [".step-00000002.1.incomplete", "final", "old"]


CHANGES = [
    ("data_seed", {"data": {"seed": 43}}, "data_seed = 42, but this run has 43"),
    ("workers", {"data": {"num_workers": 2}}, "num_workers = 1, but this run has 2"),
    ("batch", {"train": {"micro_batch_size": 8}}, "micro_batch_size = 4, but this run has 8"),
    ("block", {"train": {"max_seq_length": 16}}, "max_seq_length = 32, but this run has 16"),
    ("digest", {"data_digest": "d2"}, "a stream with digest d1, but"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES, ids=[name for name, *_ in CHANGES])
def test_another_run_is_refused(name, change, message, run, tmp_path):
    (tmp_path / saving.RUN_FILE).write_text(json.dumps(saving.facts(run)))
    changed = {
        key: dataclasses.replace(getattr(run, key), **value) if isinstance(value, dict) else value
        for key, value in change.items()
    }
    with pytest.raises(MemSinksError) as caught:
        resuming.check_same_run(dataclasses.replace(run, **changed), tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_number_of_devices_is_refused(run, tmp_path):
    (tmp_path / saving.RUN_FILE).write_text(json.dumps(saving.facts(run) | {"world_size": 2}))
    with pytest.raises(MemSinksError, match="world_size = 2, but this run has 1"):
        resuming.check_same_run(run, tmp_path)


def test_what_does_not_change_the_blocks_is_not_refused(run, tmp_path, capsys):
    assert not resuming.check_same_run(run, tmp_path)  # nothing noted
    facts = saving.facts(run)
    (tmp_path / saving.RUN_FILE).write_text(json.dumps(facts | {"num_workers": 0, "data_path": "elsewhere"}))
    assert resuming.check_same_run(run, tmp_path)
    assert not capsys.readouterr().out
    facts["versions"]["litdata"] = "0.1"
    (tmp_path / saving.RUN_FILE).write_text(json.dumps(facts))
    assert resuming.check_same_run(run, tmp_path)
    assert "litdata 0.1 -> " in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the loader


def loader(data_path, num_workers, same_content=False):
    data = MemSinksData(data_path=data_path, num_workers=num_workers, seed=7)
    data.same_content = same_content
    data.connect(batch_size=64, max_seq_length=32)
    data.setup()
    return data.train_dataloader()


def take(source, count):
    """The next batches, and the state as it comes back from a checkpoint."""
    taken = []
    while len(taken) < count:
        for batch in source:
            taken.append(batch)
            if len(taken) == count:
                break
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    return taken, torch.load(file, weights_only=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_again_and_again_the_batches_are_the_same(num_workers, prepared):
    """Twice in the second epoch: litdata alone shuffles for the first one then."""
    length = len(loader(prepared, 0))
    parts = [length + 2, 3, 2, length - 7, 2]
    expected, _ = take(loader(prepared, num_workers), sum(parts))
    got, state = [], None
    for count in parts:
        source = loader(prepared, num_workers)
        if state is not None:
            source.load_state_dict(state)
        taken, state = take(source, count)
        got += taken
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_moved_data_is_refused_unless_known_to_be_the_same(prepared, tmp_path):
    moved = shutil.copytree(prepared, tmp_path / "moved")
    expected, _ = take(loader(prepared, 0), 5)
    _, state = take(loader(prepared, 0), 3)
    source = loader(moved, 0)
    source.load_state_dict(state)
    with pytest.raises(ValueError, match="input_dir"):
        next(iter(source))
    source = loader(moved, 0, same_content=True)
    source.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(take(source, 2)[0], expected[3:], strict=True))


# ---------------------------------------------------------------------------------------------------------- real runs


@pytest.mark.long
def test_real_runs_go_on_in_a_moved_folder_and_are_refused_in_one_line(prepared, tmp_path):
    """The newest checkpoint is torn; the run from the one before ends as the whole run did."""
    moved, out_dir = tmp_path / "moved", tmp_path / "out"
    whole = finish(arguments(tmp_path / "whole", prepared, 24, train__save_interval=4), tmp_path / "log0")
    assert whole.status == 0, whole.text[-3000:]
    shutil.copytree(tmp_path / "whole", out_dir)
    shutil.rmtree(out_dir / "final")
    cut(out_dir / "step-00000012/lit_model.pth", 1000)
    shutil.copytree(prepared, moved)

    for number, (change, message) in enumerate(
        [
            ({"data__num_workers": 2}, "num_workers = 0, but this run has 2"),
            ({"resume": out_dir / "step-00000012"}, "its lit_model.pth is cut short"),
            ({"resume": "auto", "initial_checkpoint_dir": out_dir / "step-00000008"}, "Both resume (auto) and"),
        ]
    ):
        run = finish(arguments(out_dir, moved, 24, **({"resume": "auto"} | change)), tmp_path / f"refused{number}")
        assert run.status == 1
        assert run.last_line.startswith("Error: ")
        assert message in run.last_line
        assert "Traceback" not in run.text

    run = finish(arguments(out_dir, moved, 24, resume="auto"), tmp_path / "log1")
    assert run.status == 0, run.text[-3000:]
    assert f"the checkpoint {str(out_dir / 'step-00000012')!r} is passed over" in run.text
    assert f"Resuming training from {out_dir / 'step-00000008/lit_model.pth'}" in run.text
    assert_same(training_state(out_dir), training_state(tmp_path / "whole"))
    assert json.loads((out_dir / "final" / saving.RUN_FILE).read_text())["data_path"] == str(moved)


def test_full_disk_leaves_older_checkpoints_and_says_what_to_do(prepared, tmp_path):
    """A limit on the size of files stands for the disk: it needs no rights, and fails in the same call."""
    out_dir = tmp_path / "out"
    older = make(out_dir / "step-00000001")
    settings = arguments(out_dir, prepared, 8, train__save_interval=2)
    run = finish(settings, tmp_path / "log", file_limit=100_000)
    assert run.status == 1
    assert run.last_line.startswith(f"Error: {str(out_dir / 'step-00000002')!r} cannot be written (File too large).")
    assert "bytes, and " in run.last_line
    assert "Traceback" not in run.text
    assert sorted(path.name for path in out_dir.iterdir()) == ["logs", "step-00000001"]
    assert resuming.flaw(older) is None


@pytest.mark.long
def test_full_disk_ends_both_ranks_with_one_line(prepared, tmp_path):
    more = TWO_RANKS | {"train__save_interval": 2}
    with ddp(arguments(tmp_path / "out", prepared, 8, **more), tmp_path / "log", file_limit=100 * 1024) as process:
        assert process.wait(240) == 1  # killed for a rank that hangs, it would be another
    text = (tmp_path / "log").read_text()
    assert text.count("cannot be written (File too large)") == 1
    assert "Traceback" not in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["logs"]


def test_finished_run_is_replaced_as_a_whole(tmp_path):
    target, scratch = make(tmp_path / "final").parent, make(tmp_path / "scratch").parent
    (scratch / "new").touch()
    saving.put_in_place(scratch, target)
    assert (target / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
