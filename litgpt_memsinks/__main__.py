"""The console script ``litgpt-memsinks``: one function per command, help from signatures and docstrings."""

import ast
import errno
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import docstring_parser
from jsonargparse import ArgumentParser

from litgpt_memsinks.errors import MemSinksError, end, flush_output
from litgpt_memsinks.version import __version__

USER_FIXABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE),
}
"""Failures that are no fault of the program: no space, no permission, no such place, a failing disk."""


class Command(NamedTuple):
    """A function of the command line. It is imported when it is asked for: PyTorch and LitGPT take seconds."""

    module: str
    """Module of this package that has it"""
    name: str
    """Of the function"""
    positional: bool = False
    """Whether arguments without a default are given by position"""
    several: str | None = None
    """An argument that is given by position, once or more"""
    settings_of: tuple[str, str] | None = None
    """Module and name of a command of LitGPT whose settings are taken too, parsed as it does"""

    @property
    def function(self) -> Callable[..., object]:
        """The function itself."""
        return getattr(import_module(f"litgpt_memsinks.{self.module}"), self.name)

    @property
    def summary(self) -> str:
        """The first line of its docstring, read without importing it."""
        spec = find_spec(f"litgpt_memsinks.{self.module}")
        assert spec is not None  # a module of this package
        assert spec.origin is not None
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
        (function,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == self.name)
        return (ast.get_docstring(function) or "").partition("\n")[0]


COMMANDS = {
    "demo": Command("experiments.demo", "demo"),
    "corpus": Command("corpus.embedded", "write_corpus"),
    "tokenizer": Command("corpus.embedded", "train_tokenizer_on"),
    "prepare": Command("prepare.prepare", "prepare"),
    "merge": Command("prepare.prepare", "merge"),
    "verify": Command("prepared.verify", "verify", positional=True),
    "inspect": Command("prepared.inspect_data", "inspect", positional=True),
    "lookup": Command("prepared.lookup", "lookup", positional=True),
    "plan": Command("plan.plan", "plan", settings_of=("litgpt.pretrain", "setup")),
    "drop_sinks": Command("drop_sinks.drop_sinks", "drop_sinks", positional=True),
    "remove": Command("remove.remove", "remove", positional=True),
    "generate": Command("remove.generate", "generate", positional=True),
    "export_hf": Command("drop_sinks.export_hf", "export_hf", positional=True),
    "certify": Command("certificate.certificate", "certify", positional=True),
    "verify_removal": Command("certificate.verify_removal", "verify_removal", positional=True),
    "evaluate": Command("evaluate.evaluate", "evaluate"),
    "export_evals": Command("evaluate.export_evals", "export_evals"),
    "localise": Command("localise.localise", "localise", positional=True),
    "tune_localise": Command("localise.tune", "tune_localise", positional=True),
    "drop_neurons": Command("localise.drop_neurons", "drop_neurons", positional=True),
    "report": Command("report.report", "report", several="results"),
    "bench": Command("bench.bench", "bench"),
    "bench_data": Command("bench.data", "bench_data"),
    "full_size": Command("bench.full_size", "full_size"),
    "release_size": Command("bench.release_size", "release_size"),
    "removal_curve": Command("bench.removal_curve", "removal_curve"),
    "frontier": Command("experiments.frontier", "frontier"),
    "theory": Command("theory.theory", "theory"),
    "experiment": Command("experiments.experiment", "experiment", positional=True),
}


def build_parser(*names: str) -> ArgumentParser:
    """The parser with one subcommand per function.

    Args:
        names: The commands whose arguments are wanted, all by default. The others are listed only.
    """
    parser = ArgumentParser(
        prog="litgpt-memsinks",
        description="Pretrain with memorization sinks, then drop what was memorised. "
        "Training itself is the stock command: litgpt pretrain --config RECIPE.yaml",
        version=__version__,
    )
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        summary = command.summary
        subparser = ArgumentParser(description=summary)
        if not names or name in names:
            add_arguments(subparser, command)
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def add_arguments(parser: ArgumentParser, command: Command) -> None:
    """What a command takes."""
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    skip: set[str | int] = set()
    if command.several is not None:
        skip.add(command.several)
        parser.add_argument(command.several, nargs="+", type=Path, help=_meaning(command))
    parser.add_function_arguments(command.function, as_group=False, as_positional=command.positional, skip=skip)
    if command.settings_of is not None:
        module, name = command.settings_of
        setup = getattr(import_module(module), name)
        parser.add_function_arguments(setup, as_group=False, as_positional=True, sub_configs=True)


def _meaning(command: Command) -> str:
    """What the docstring says of the argument that is given once or more."""
    entries = docstring_parser.parse(command.function.__doc__ or "").params
    return next(entry.description or "" for entry in entries if entry.arg_name == command.several)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one command. Errors that the user can fix end in one line and status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser(*arguments[:1] or [""])  # a command comes first; without one there is only help
    settings = parser.instantiate_classes(parser.parse_args(arguments))
    values = settings[settings.subcommand].as_dict()
    values.pop("config", None)
    try:
        COMMANDS[settings.subcommand].function(**values)
    except MemSinksError as error:
        end(error)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `lookup ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in USER_FIXABLE:
            raise
        end(f"{error}. What was finished is kept; run the same command again when it is mended.")
    except KeyboardInterrupt:
        flush_output()
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
