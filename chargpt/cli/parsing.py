"""What the commands' parsers share."""

import argparse
import itertools
import re
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
    known = [name for action in parser._actions for name in action.option_strings]
    options = list(itertools.takewhile(lambda word: word != "--", words))
    for word in options:
        option = word.partition("=")[0]
        if option in known:
            raise ConfigError(f"options come after the command: {parser.prog} {shown(word)[1:-1]} …")
        if re.match("--?[a-zA-Z]", option):
            hint = nearest(option.lstrip("-"), [name[2:] for name in known if name.startswith("--")], "--")
            raise ConfigError(f"{parser.prog} has no {shown(option)}{hint}")
    for word in (*options, *words[len(options) + 1 :]):
        raise ConfigError(f"{parser.prog} takes no {shown(word)}; see {parser.prog} --help")
