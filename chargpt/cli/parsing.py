"""What the commands' parsers share."""

import argparse
from collections.abc import Callable, Sequence
from typing import TypeAlias

from chargpt.errors import ConfigError, nearest, shown

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
    made.set_defaults(run=run, parser=made)
    return made


def refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raise ConfigError for words that a command's parser left over."""
    words = [word for word in words if word != "--"]
    for word in words:
        if word.startswith("-"):
            option = word.partition("=")[0]
            names = [name for action in parser._actions for name in action.option_strings]
            known = [name[2:] for name in names if name.startswith("--")]
            raise ConfigError(f"{parser.prog} has no {shown(option)}{nearest(option.lstrip('-'), known)}")
    if words:
        raise ConfigError(f"{parser.prog} takes no {shown(words[0])}; see {parser.prog} --help")
