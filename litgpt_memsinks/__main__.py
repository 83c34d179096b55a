"""The console script ``litgpt-memsinks``: one function per command, help from signatures and docstrings."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from jsonargparse import ArgumentParser
from litgpt.pretrain import setup

from litgpt_memsinks import __version__
from litgpt_memsinks.bench import bench
from litgpt_memsinks.bench_data import bench_data
from litgpt_memsinks.corpus import train_tokenizer_on, write_corpus
from litgpt_memsinks.demo import demo
from litgpt_memsinks.drop_sinks import drop_sinks
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.evaluate import evaluate
from litgpt_memsinks.full_size import full_size
from litgpt_memsinks.generate import generate
from litgpt_memsinks.inspect_data import inspect
from litgpt_memsinks.lookup import lookup
from litgpt_memsinks.plan import plan
from litgpt_memsinks.prepare import merge, prepare
from litgpt_memsinks.removal_curve import removal_curve
from litgpt_memsinks.remove import remove
from litgpt_memsinks.report import report
from litgpt_memsinks.verify import verify

USER_FIXABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE),
}
"""Failures that are no fault of the program: no space, no permission, no such place, a failing disk."""


class Command(NamedTuple):
    """A function of the command line."""

    function: Callable[..., object]
    positional: bool = False
    """Whether arguments without a default are given by position"""
    settings_of: Callable[..., object] | None = None
    """A command of LitGPT whose settings are taken too, parsed as it does"""


COMMANDS = {
    "demo": Command(demo),
    "corpus": Command(write_corpus),
    "tokenizer": Command(train_tokenizer_on),
    "prepare": Command(prepare),
    "merge": Command(merge),
    "verify": Command(verify, positional=True),
    "inspect": Command(inspect, positional=True),
    "lookup": Command(lookup, positional=True),
    "plan": Command(plan, settings_of=setup),
    "drop_sinks": Command(drop_sinks, positional=True),
    "remove": Command(remove, positional=True),
    "generate": Command(generate, positional=True),
    "removal_curve": Command(removal_curve),
    "evaluate": Command(evaluate),
    "report": Command(report),
    "bench": Command(bench),
    "bench_data": Command(bench_data),
    "full_size": Command(full_size),
}


def build_parser() -> ArgumentParser:
    """The parser with one subcommand per function."""
    parser = ArgumentParser(
        prog="litgpt-memsinks",
        description="Pretrain with memorization sinks, then drop what was memorised. "
        "Training itself is the stock command: litgpt pretrain --config RECIPE.yaml",
        version=__version__,
    )
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        summary = (command.function.__doc__ or "").strip().splitlines()[0]
        subparser = ArgumentParser(description=summary)
        subparser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
        subparser.add_function_arguments(command.function, as_group=False, as_positional=command.positional)
        if command.settings_of is not None:
            subparser.add_function_arguments(command.settings_of, as_group=False, as_positional=True, sub_configs=True)
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run one command. Errors that the user can fix end in one line and status 1."""
    parser = build_parser()
    settings = parser.instantiate_classes(parser.parse_args(arguments))
    values = settings[settings.subcommand].as_dict()
    values.pop("config", None)
    try:
        COMMANDS[settings.subcommand].function(**values)
    except MemSinksError as error:
        sys.exit(f"Error: {error}")
    except BrokenPipeError:  # the reader of our output has seen enough, as in `lookup ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in USER_FIXABLE:
            raise
        sys.exit(f"Error: {error}. What was finished is kept; run the same command again when it is mended.")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
