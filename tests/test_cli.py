"""The console script: help from docstrings, one line for an error, a status that says so."""

import json
import subprocess
import sys
from functools import wraps
from unittest.mock import Mock

import pytest

from litgpt_memsinks import __version__
from litgpt_memsinks.__main__ import COMMANDS, main
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepared import verify
from tests.console import BOTH, LIBRARIES, SCRIPTS, memsinks, run


def test_help_lists_every_command_with_its_docstring():
    output = memsinks("--help", imported=()).stdout
    for name, command in COMMANDS.items():
        assert name in output
        assert command.function.__doc__.split()[0] in output


def test_help_imports_neither_pytorch_nor_litgpt():
    """They take seconds. Nor does anything else that is not needed for a list of the commands."""
    code = """
import sys
from litgpt_memsinks.__main__ import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "lightning", "litgpt", "litdata", "pyarrow", "matplotlib"} & {*sys.modules}))
"""
    output = run([sys.executable, "-c", code]).stdout
    assert output.splitlines()[-1] == "[]"
    for name, command in COMMANDS.items():
        assert f"{name} " in output
        assert command.summary == command.function.__doc__.splitlines()[0]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_describes_every_argument(name):
    """In a process that has imported none of our commands, each of which imports what it needs."""
    output = " ".join(run([SCRIPTS / "litgpt-memsinks", name, "--help"], imported=LIBRARIES).stdout.split())
    documented = COMMANDS[name].function.__doc__.split("Args:")[1]
    for argument in COMMANDS[name].function.__annotations__:
        if argument != "return":
            assert argument in output
            assert f"{argument}:" in documented


def test_installed_script_is_the_module():
    output = run([SCRIPTS / "litgpt-memsinks", "--version"]).stdout
    assert output == run([sys.executable, "-m", "litgpt_memsinks", "--version"]).stdout
    assert __version__ in output


BAD_INPUT = {
    "missing file": ("nothing.jsonl", None, [], "There is no file"),
    "empty corpus": ("corpus.jsonl", "", [], "holds no document with text"),
    "not JSON": ("corpus.jsonl", '{"text": "a"}\n{"text": \n', [], "line 2 is not JSON"),
    "missing field": (
        "corpus.jsonl",
        '{"story": "a"}\n',
        [],
        "has the fields ['story'], but an object with the text in",
    ),
    "too few": ("corpus.jsonl", '{"text": "a"}\n{"text": "b"}\n', ["--documents", "9"], "documents is 9, but"),
    "repeats missing": ("corpus.jsonl", '{"text": "a"}\n', ["--repeated_documents", "1"], "repeats is 1"),
}


@pytest.mark.parametrize("case", sorted(BAD_INPUT))
def test_bad_input_to_prepare_ends_in_one_line(case, tmp_path, tokenizer_dir, capsys):
    name, content, extra, message = BAD_INPUT[case]
    if content is not None:
        (tmp_path / name).write_text(content)
    arguments = ["--train", tmp_path / name, "--out_dir", tmp_path / "out", "--tokenizer_dir", tokenizer_dir]
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *map(str, arguments), *extra])
    error = str(stop.value.code)
    assert error.startswith("Error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_error_of_the_real_script_is_one_line_and_status_1(tmp_path, tokenizer_dir):
    arguments = ["--train", tmp_path / "x.jsonl", "--out_dir", tmp_path / "out", "--tokenizer_dir", tokenizer_dir]
    result = memsinks("prepare", *arguments, check=False)
    assert result.returncode == 1
    assert result.stdout.strip().startswith("Error: There is no file")
    assert result.stdout.strip().count("\n") == 0


def test_settings_can_come_from_a_file(tmp_path, tokenizer_dir, capsys):
    texts = [json.dumps({"text": f"One day {name} went out."}) for name in ("Tom", "Mia", "Sam", "Eva", "Ben")]
    (tmp_path / "corpus.jsonl").write_text("\n".join(texts))
    settings = {
        "train": str(tmp_path / "corpus.jsonl"),
        "out_dir": str(tmp_path / "out"),
        "tokenizer_dir": str(tokenizer_dir),
        "validation_fraction": 0.2,
    }
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))
    main(["prepare", "--config", str(tmp_path / "settings.yaml")])
    assert "4 distinct" in capsys.readouterr().out


def test_tokenizer_and_corpus_commands(tmp_path, capsys):
    main(["corpus", "--out_dir", str(tmp_path / "corpus"), "--documents", "20", "--validation_documents", "5"])
    main(["tokenizer", "--corpus", str(tmp_path / "corpus"), "--out_dir", str(tmp_path / "tokenizer")])
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()
    assert len((tmp_path / "corpus/train.jsonl").read_text().splitlines()) == 20


def test_no_space_is_one_line(tmp_path, corpus_dir, tokenizer_dir):
    arguments = ["--train", corpus_dir / "train.jsonl", "--out_dir", tmp_path / "out", "--tokenizer_dir", tokenizer_dir]
    limit = 20_000  # bytes in a file: the tokens take 178,000, in a worker process
    code = f"""
import resource
from litgpt_memsinks.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
main()
"""
    command = [sys.executable, "-c", code, "prepare", *arguments]
    result = run(command, imported=BOTH, check=False, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("Error: [Errno 27] File too large")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prepare", "merge"])
def test_output_must_be_local(command, tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"prepare": ["--train", "x.jsonl", "--tokenizer_dir", str(tokenizer_dir)], "merge": ["--shards", "x.*"]}
    with pytest.raises(SystemExit, match="out_dir is 's3:/bucket/out', but it must be a local folder"):
        main([command, "--out_dir", "s3://bucket/out", *given[command]])
    assert not list(tmp_path.iterdir())


def test_shards_are_merged_by_a_pattern(tmp_path, corpus_dir, tokenizer_dir):
    arguments = ["prepare", "--train", str(corpus_dir / "train.jsonl"), "--tokenizer_dir", str(tokenizer_dir)]
    for shard in ("0/2", "1/2"):
        main([*arguments, "--out_dir", str(tmp_path / "x"), "--shard", shard])
    main(["merge", "--shards", str(tmp_path / "x.shard-*"), "--out_dir", str(tmp_path / "x")])
    main([*arguments, "--out_dir", str(tmp_path / "whole")])
    merged, whole = (Manifest.read(tmp_path / name) for name in ("x", "whole"))
    assert merged.splits == whole.splits
    with pytest.raises(SystemExit, match="There are no shards"):
        main(["merge", "--shards", str(tmp_path / "y.shard-*"), "--out_dir", str(tmp_path / "y")])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(KeyboardInterrupt, 130, "Interrupted.\n"), (MemSinksError("no such file"), "Error: no such file", "")],
)
def test_reader_that_is_gone_hides_no_error(error, status, line, monkeypatch, capsys):
    """Ctrl-C ends `tee`, too, in `... | tee log`: what was printed can no longer be written."""

    with monkeypatch.context() as patch:

        @wraps(verify.verify)
        def fails(**_):
            patch.setattr(sys.stdout, "flush", Mock(side_effect=BrokenPipeError))
            raise error

        patch.setattr(verify, "verify", fails)
        with pytest.raises(SystemExit) as ended:
            main(["verify", "data"])
    assert ended.value.code == status
    assert capsys.readouterr().err == line
