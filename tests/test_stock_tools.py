"""The stock commands of LitGPT on a dropped checkpoint, in processes that know nothing of us."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from tests.console import NOT_AUTOLOADED, SCRIPTS, litgpt
from tests.released import save

pytestmark = pytest.mark.long
TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
EVALUATE = """
import sys
from functools import partial
from litgpt.__main__ import main
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path="{folder}")  # LitGPT has no option for a task of one's own
evaluator.simple_evaluate = partial(evaluator.simple_evaluate, task_manager=manager)
sys.argv[0] = "litgpt"
main()
"""
FINETUNING = {
    "data": "JSON",
    "data.val_split_fraction": "0.5",
    "data.num_workers": "0",
    "train.epochs": "1",
    "train.global_batch_size": "1",
    "train.micro_batch_size": "1",
    "train.max_steps": "2",
    "train.max_seq_length": "32",
    "train.lr_warmup_steps": "1",
    "eval.max_iters": "1",
    "eval.max_new_tokens": "2",
    "precision": "32-true",
    "devices": "1",
}


@pytest.fixture(scope="module")
def dropped(tokenizer_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    save(folder / "in", block_size=256)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder / "in")
    drop_sinks(folder / "in", folder / "out", keep="5")
    return folder / "out"


def test_chat(dropped):
    command = [SCRIPTS / "litgpt", "chat", dropped, "--max_new_tokens", "4", "--precision", "32-true"]
    result = subprocess.run(command, input="Hello\n\n", text=True, capture_output=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert ">> Reply:" in result.stdout


@pytest.mark.parametrize("method", ["finetune_full", "finetune_lora"])
def test_finetuning(method, dropped, tmp_path):
    examples = [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(examples))
    settings = FINETUNING | {"data.json_path": str(tmp_path / "data.json"), "out_dir": str(tmp_path / "out")}
    arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
    litgpt(method, dropped, *arguments, imported=(), **NOT_AUTOLOADED)  # as where we are not installed
    before = torch.load(dropped / "lit_model.pth", weights_only=True)
    after = torch.load(tmp_path / "out/final/lit_model.pth", weights_only=True)
    after = after.get("model", after)
    assert {name: weight.shape for name, weight in after.items()} == {n: weight.shape for n, weight in before.items()}
    assert any(not torch.equal(after[name].float(), before[name]) for name in before)


def test_evaluate(dropped, tmp_path):
    pytest.importorskip("lm_eval")  # of litgpt's extras; not among those of our tests
    (tmp_path / "test.jsonl").write_text('{"question": "Is it?", "answer": 0}\n{"question": "Not?", "answer": 1}\n')
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    code = EVALUATE.format(folder=tmp_path)
    command = [sys.executable, "-c", code, "evaluate", dropped, "--tasks", "tiny", "--out_dir", tmp_path / "out"]
    result = subprocess.run(command, text=True, capture_output=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "acc" in json.loads((tmp_path / "out/results.json").read_text())["results"]["tiny"].__repr__()
