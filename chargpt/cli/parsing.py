"""What the commands' parsers share."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

CHECKPOINTS = "the folder of a run (its best checkpoint) or of a checkpoint; several predict together, by the mean"

DEVICES = "auto, cpu, cuda or cuda:N"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], examples: str, summary: str
) -> argparse.ArgumentParser:
    """A command's parser, to which its arguments are added."""
    made = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(run=run)
    return made
