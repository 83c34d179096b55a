"""The dropped checkpoint: the same function, a plain model, whole or not there."""

import ast
import json
import os
import signal
import sys
import time
from dataclasses import asdict

import pytest
import torch
import yaml
from litgpt.config import Config
from litgpt.model import GPT as BaseGPT
from litgpt.utils import save_config

from litgpt_memsinks.config import MemSinksConfig, SinkArgs
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks, without_sinks
from litgpt_memsinks.drop_sinks.plain_weights import alone
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import load_model, read_config, read_weights
from litgpt_memsinks.model.model import GPT
from tests.console import REPOSITORY, SCRIPTS, TINY_MODEL, memsinks, run, started
from tests.released import MODELS, save


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "converted"])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_logits_equal_the_models_in_eval_mode_bit_for_bit(kind, raw, tmp_path):
    model = save(tmp_path / "in", raw=raw, **MODELS[kind])
    drop_sinks(tmp_path / "in", tmp_path / "out")
    plain = BaseGPT(Config.from_file(tmp_path / "out/model_config.yaml"))
    plain.load_state_dict(torch.load(tmp_path / "out/lit_model.pth", weights_only=True))  # strict, stock LitGPT
    tokens = torch.randint(0, 512, (3, 64))
    assert torch.equal(plain(tokens), model(tokens))
    assert not torch.equal(plain(tokens), model(tokens, sequence_ids=torch.ones_like(tokens)))


def test_configuration_is_litgpts_with_the_new_width(tmp_path):
    save(tmp_path / "in")
    drop_sinks(tmp_path / "in", tmp_path / "out")
    values = yaml.safe_load((tmp_path / "out/model_config.yaml").read_text())
    assert values == asdict(Config(**{**TINY_MODEL, "intermediate_size": 16}))
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_file_holds_the_kept_neurons_only_and_tied_embeddings_once(tmp_path):
    save(tmp_path / "in", intermediate_size=4096)
    drop_sinks(tmp_path / "in", tmp_path / "out")
    kept = read_weights(tmp_path / "out")
    assert kept["lm_head.weight"].data_ptr() == kept["transformer.wte.weight"].data_ptr()
    parameters = sum(weight.numel() for name, weight in kept.items() if name != "lm_head.weight")
    size = (tmp_path / "out/lit_model.pth").stat().st_size
    assert 4 * parameters < size < 4 * parameters + 20_000


def test_embeddings_that_are_equal_in_two_storages_are_tied(tmp_path):
    """As writers leave them that copy each weight: LitGPT's convert_pretrained_checkpoint, and full FSDP states."""
    save(tmp_path / "in")
    state = torch.load(tmp_path / "in/lit_model.pth", weights_only=True)["model"]
    torch.save({name: weight.clone() for name, weight in state.items()}, tmp_path / "in/lit_model.pth")
    drop_sinks(tmp_path / "in", tmp_path / "out")
    kept = read_weights(tmp_path / "out")
    assert kept["lm_head.weight"].data_ptr() == kept["transformer.wte.weight"].data_ptr()
    assert torch.equal(kept["lm_head.weight"], state["lm_head.weight"])


def test_untied_embeddings_stay_untied(tmp_path):
    model = save(tmp_path / "in", tie=False)
    drop_sinks(tmp_path / "in", tmp_path / "out")
    kept = read_weights(tmp_path / "out")
    assert torch.equal(kept["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(kept["transformer.wte.weight"], model.transformer.wte.weight)


def test_weights_that_are_parts_of_one_storage_are_saved_alone(tmp_path):
    save(tmp_path / "in")
    state = torch.load(tmp_path / "in/lit_model.pth", weights_only=True)["model"]
    flat = torch.cat([weight.flatten() for weight in state.values()])
    parts = flat.split([weight.numel() for weight in state.values()])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    views["n_shared"] = state["n_shared"]
    torch.save(views, tmp_path / "in/lit_model.pth")
    drop_sinks(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/lit_model.pth").stat().st_size < (tmp_path / "in/lit_model.pth").stat().st_size
    assert torch.equal(read_weights(tmp_path / "out")["transformer.ln_f.weight"], state["transformer.ln_f.weight"])


MEMORY = """
import resource, sys, threading, time
from pathlib import Path
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
peak = before = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
drop_sinks(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which memory is not of files")
def test_memory_is_less_than_the_output(tmp_path):
    save(tmp_path / "in", tie=False, n_layer=8, n_embd=512, intermediate_size=4096)
    output = run([sys.executable, "-c", MEMORY, tmp_path / "in", tmp_path / "out"]).stdout
    assert int(output.split()[-1]) < 1.2 * (tmp_path / "out/lit_model.pth").stat().st_size


def test_hugging_face_configuration_is_the_models_own(tmp_path):
    """A copied one is of the model that the tokenizer came with."""
    save(tmp_path / "in")
    (tmp_path / "in/config.json").write_text('{"intermediate_size": 64, "hidden_size": 9, "eos_token_id": 3}')
    drop_sinks(tmp_path / "in", tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert {values[name] for name in ("intermediate_size", "hidden_size", "eos_token_id", "model_type")} == {
        *(16, 32, 3, "llama")
    }


def test_hugging_face_configuration_without_an_architecture_is_corrected(tmp_path):
    save(tmp_path / "in", bias=True)
    (tmp_path / "in/config.json").write_text('{"intermediate_size": 64, "hidden_size": 32}')
    drop_sinks(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() == '{\n  "intermediate_size": 16,\n  "hidden_size": 32\n}\n'
    (tmp_path / "in/config.json").unlink()
    drop_sinks(tmp_path / "in", tmp_path / "another")
    assert not (tmp_path / "another/config.json").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_alone_in_a_storage_without_being_copied_and_columns_are_copied(dtype):
    weight = torch.randn(6, 4).to(dtype)
    rows, columns = alone(weight[:2]), alone(weight[:, :3])
    assert torch.equal(rows, weight[:2])
    assert torch.equal(columns, weight[:, :3])
    assert rows.data_ptr() == weight.data_ptr()
    assert columns.data_ptr() != weight.data_ptr()
    assert rows.untyped_storage().nbytes() == rows.nbytes
    assert columns.untyped_storage().nbytes() == columns.nbytes
    assert alone(weight) is weight
    assert alone(weight[0, 0]).untyped_storage().nbytes() == weight.element_size()


def test_without_sinks_slices_exactly_the_mlps():
    config = MemSinksConfig.from_base(
        Config(
            **TINY_MODEL,
        ),
        SinkArgs(0.25, 0.3),
    )
    weights = GPT(config).state_dict()
    kept = without_sinks(weights, config)
    changed = {name.split(".", 3)[-1] for name in kept if kept[name].shape != weights[name].shape}
    assert changed == {"mlp.fc_1.weight", "mlp.fc_2.weight", "mlp.proj.weight"}
    assert torch.equal(kept["transformer.h.1.mlp.proj.weight"], weights["transformer.h.1.mlp.proj.weight"][:, :16])
    assert torch.equal(kept["transformer.h.1.mlp.fc_2.weight"], weights["transformer.h.1.mlp.fc_2.weight"][:16])
    assert set(weights) - set(kept) == {"n_shared"}


def other_vocabulary(folder):
    save(folder)
    path = folder / "model_config.yaml"
    path.write_text(path.read_text().replace("padded_vocab_size: 512", "padded_vocab_size: 576"))


def shards(folder):
    save(folder)
    (folder / "lit_model.pth").unlink()
    (folder / "lit_model.pth").mkdir()
    (folder / "lit_model.pth/.metadata").touch()


def plain_checkpoint(folder):
    folder.mkdir()
    config = Config(**TINY_MODEL)
    torch.save(BaseGPT(config).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)


def truncate(folder):
    save(folder)
    weights = folder / "lit_model.pth"
    weights.write_bytes(weights.read_bytes()[:1000])


def wrong_width(folder):
    save(folder)
    path = folder / "model_config.yaml"
    path.write_text(path.read_text().replace("intermediate_size: 64", "intermediate_size: 48"))


def wrong_depth(folder):
    save(folder)
    path = folder / "model_config.yaml"
    path.write_text(path.read_text().replace("n_layer: 2", "n_layer: 3"))


def other_number_of_sinks(folder):
    save(folder)
    path = folder / "model_config.yaml"
    path.write_text(path.read_text().replace("sink_n_shared: 16", "sink_n_shared: 8"))


class Malicious:
    def __reduce__(self):
        return os.system, ("echo pwned",)


def pickle(folder):
    save(folder)
    torch.save({"model": Malicious()}, folder / "lit_model.pth")


def junk_config(folder):
    save(folder)
    (folder / "model_config.yaml").write_text("sink_n_shared: [1\n")


REFUSED = {
    "plain checkpoint": (plain_checkpoint, "is a plain checkpoint: it has no sinks to drop"),
    "no checkpoint": (lambda folder: folder.mkdir(), "is not a LitGPT checkpoint: it has no model_config.yaml"),
    "missing folder": (lambda folder: None, "is not a LitGPT checkpoint"),
    "truncated weights": (truncate, "cannot be read as model weights"),
    "width of another model": (wrong_width, "but intermediate_size is 48"),
    "depth of another model": (wrong_depth, "6 MLP weights were found, but the model has 9"),
    "number of sinks of another model": (other_number_of_sinks, "are not of one model"),
    "vocabulary of another model": (other_vocabulary, "lm_head.weight has shape (512, 32) in lit_model.pth, but (576"),
    "folder of shards": (shards, "is a folder of shards. Make it one file first, by `fabric consolidate "),
    "malicious pickle": (pickle, "cannot be read as model weights"),
    "junk configuration": (junk_config, "is not a model configuration"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_in_one_line_and_nothing_written(case, tmp_path, capfd):
    make, message = REFUSED[case]
    make(tmp_path / "in")
    with pytest.raises(MemSinksError) as error:
        drop_sinks(tmp_path / "in", tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["in"])
    assert "pwned" not in capfd.readouterr().out


def test_refuses_to_overwrite(tmp_path):
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(MemSinksError, match="exists and is not overwritten"):
        drop_sinks(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "kept"


def test_command_prints_one_line_for_an_error(tmp_path):
    result = memsinks("drop_sinks", tmp_path / "nothing", tmp_path / "out", check=False, imported=())
    assert result.returncode == 1
    assert result.stdout.startswith("Error: ")
    assert result.stdout.count("\n") == 1


SLOW_SAVE = """
import sys, time
from pathlib import Path
from litgpt_memsinks.drop_sinks import drop_sinks as module

class SlowSave(module.incremental_save):  # the moment in which a kill would hurt most: half the bytes are written
    def __exit__(self, *arguments):
        super().__exit__(*arguments)
        with open(self.name, "rb+") as file:
            file.truncate(self.name.stat().st_size // 2)
        print("half", flush=True)
        time.sleep(60)

module.incremental_save = SlowSave
module.drop_sinks(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_kill_9_leaves_nothing_that_looks_finished(tmp_path):
    save(tmp_path / "in")
    command = [sys.executable, "-c", SLOW_SAVE, str(tmp_path / "in"), str(tmp_path / "out")]
    with started(command) as process:
        while process.output != "half\n":
            assert process.poll() is None, process.output
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    drop_sinks(tmp_path / "in", tmp_path / "out")  # the same call afterwards clears up and succeeds
    assert load_model(tmp_path / "out").config.intermediate_size == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.6])
def test_kill_9_at_any_time_leaves_the_whole_or_nothing(delay, tmp_path):
    save(tmp_path / "in", n_layer=4, n_embd=256, intermediate_size=4096)
    with started([SCRIPTS / "litgpt-memsinks", "drop_sinks", tmp_path / "in", tmp_path / "out"]) as process:
        while process.poll() is None and not list(tmp_path.glob(".out.*.incomplete")):
            time.sleep(0.005)
        time.sleep(delay * 0.1)
        process.send_signal(signal.SIGKILL)
    if (tmp_path / "out").exists():
        assert load_model(tmp_path / "out").config.intermediate_size == 1024
    else:
        drop_sinks(tmp_path / "in", tmp_path / "out")  # clears what was left
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_load_model_gives_the_kind_that_was_saved(tmp_path):
    model = save(tmp_path / "in")
    loaded = load_model(tmp_path / "in")
    tokens = torch.randint(0, 512, (2, 20))
    assert isinstance(loaded, GPT)
    ids = torch.tensor([5, -7])
    assert torch.equal(loaded(tokens, sequence_ids=ids), model(tokens, sequence_ids=ids))
    assert read_config(tmp_path / "in") == model.config
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()


def test_nothing_but_tensors_is_ever_unpickled():
    calls = [
        (path.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in sorted((REPOSITORY / "litgpt_memsinks").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert {"checkpoint.py", "launch.py", "resuming.py"} <= {name for name, _ in calls}
    assert all(keywords.get("weights_only") == "True" for _, keywords in calls)
