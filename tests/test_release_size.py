"""`make releasesize`: what it measures is what it says. Its figures are never asserted."""

import json
import subprocess
import sys

import pytest

from litgpt_memsinks.bench import release_size as module
from litgpt_memsinks.bench.release_size import make_checkpoint, release_size
from litgpt_memsinks.config import MemSinksConfig
from litgpt_memsinks.drop_sinks.drop_sinks import drop_sinks
from litgpt_memsinks.drop_sinks.export_hf import export_hf
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.model.checkpoint import WEIGHTS, check_fits, read_config, read_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which memory is anonymous")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("size") / "checkpoint"
    make_checkpoint(MemSinksConfig.from_name("Tiny-MemSinks"), folder)
    return folder


def test_the_checkpoint_is_one_of_litgpt_in_bfloat16(checkpoint):
    weights = read_weights(checkpoint)
    check_fits(checkpoint, weights, read_config(checkpoint))
    assert {str(weight.dtype) for name, weight in weights.items() if name != "n_shared"} == {"torch.bfloat16"}
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


@pytest.mark.parametrize(("command", "file"), [(drop_sinks, WEIGHTS), (export_hf, "model.safetensors")])
def test_whole_is_told_from_a_part(command, file, checkpoint, tmp_path):
    command(checkpoint, tmp_path / "out")
    assert module._is_whole(command.__name__, tmp_path / "out", checkpoint)
    other = MemSinksConfig.from_name("Tiny-MemSinks", n_layer=3)
    make_checkpoint(other, tmp_path / "larger")
    if command is export_hf:
        assert not module._is_whole(command.__name__, tmp_path / "out", tmp_path / "larger")
    content = (tmp_path / "out" / file).read_bytes()
    (tmp_path / "out" / file).write_bytes(content[: len(content) // 2])
    assert not module._is_whole(command.__name__, tmp_path / "out", checkpoint)


def test_anonymous_memory_is_that_of_the_process():
    code = "import sys; held = bytearray(b'x') * 300_000_000; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert 300e6 < module._anonymous(process.pid) < 400e6
        process.stdin.close()
    assert module._anonymous(process.pid) == 0


@pytest.mark.long
def test_both_commands_are_measured_and_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "MOMENTS", (0.0,))
    with pytest.raises(MemSinksError, match=r"drop_sinks took .* × its output in memory"):  # PyTorch's own, here
        release_size("Tiny-MemSinks", tmp_path / "out", repeats=1)
    found = json.loads((tmp_path / "out/release_size.json").read_text())
    assert [one["command"] for one in found["commands"]] == ["drop_sinks", "export_hf"]
    for one in found["commands"]:
        assert one["killed"][0] in ("nothing", "the whole")
        assert one["memory"] == pytest.approx(one["anonymous_bytes"] / one["output_bytes"])
        assert one["copies"] == pytest.approx(one["seconds"] / one["copy_seconds"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["release_size.json"]
