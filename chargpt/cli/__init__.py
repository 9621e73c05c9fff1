"""The command line for people without DVC: train on any text, sample, evaluate, and see what this machine offers.

One module for each command: `add` adds its arguments, `run` runs it. What is heavy is imported when a command runs.
"""

import argparse

from chargpt import __version__
from chargpt.cli import compare, evaluate, info, sample, serve, train
from chargpt.cli.parsing import refuse_unknown
from chargpt.command import user_errors


def main(argv: list[str] | None = None) -> None:
    with user_errors():  # around the heavy imports too: Ctrl-C while they load is an ordinary stop
        arguments, unknown = build_parser().parse_known_args(argv)
        refuse_unknown(arguments.parser, unknown)
        arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chargpt", description="Turn any text into a small GPT.")
    parser.add_argument("--version", action="version", version=f"chargpt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, sample, serve, evaluate, compare, info):
        command.add(commands)
    return parser
