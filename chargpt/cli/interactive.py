"""`chargpt sample --interactive`: a prompt, several answers side by side, one of which goes on."""

import dataclasses

from prompt_toolkit import PromptSession
from rich.console import Console

from chargpt.cli.columns import Columns, columns_that_fit, printable
from chargpt.config import SampleConfig
from chargpt.errors import ChargptError, ConfigError
from chargpt.generation import Generator

USUAL = 3  # answers at a time, where the terminal is wide enough
HELP = """1, 2, …           go on with that answer
Enter             other answers
/undo             take back the last answer or line
/temperature 0.5  how daring the answers are; 0 is not at all
/text             all of the text so far
/new              begin again
/help, /quit      this; leave (Ctrl-D too)
Anything else is written behind the text so far. A backslash in front makes text of what would mean something here.
Ctrl-C stops the answers; twice leaves."""


def converse(generator: Generator, prompt: str, config: SampleConfig, samples: int | None) -> None:
    """Ask for lines until the user leaves. samples: None is as many as fit, up to USUAL"""
    console = Console(highlight=False)
    count = min(USUAL, columns_that_fit(console)) if samples is None else samples
    Columns(count)  # that so many fit is said at once
    talk = Conversation(console, generator, dataclasses.replace(config, num_samples=count))
    console.print("Write the beginning of a text; /help says what else you can do.")
    session: PromptSession[str] = PromptSession()  # with editing, pasting and a history
    stopped = False  # by one Ctrl-C, so another one leaves
    if prompt:
        stopped = not talk.write(prompt)
    while True:
        try:
            line = session.prompt("> ")
            if line.strip() == "/quit":
                return
            stopped = not talk.answer(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if stopped:
                return
            stopped = True
            console.print("Ctrl-C again leaves.")
        except ChargptError as error:
            console.print(printable(str(error)))


class Conversation:
    """The text so far, how it came to be, and the answers that are offered."""

    def __init__(self, console: Console, generator: Generator, config: SampleConfig) -> None:
        self.console, self.generator, self.config = console, generator, config
        self.texts = [""]  # after each step; the last one goes on
        self.offered: list[str] = []

    def answer(self, line: str) -> bool:
        """Do what a line of the user's says. False when Ctrl-C stopped it. Raises ChargptError for what cannot be."""
        command, _, value = line.strip().partition(" ")
        if command == "/help":
            self.console.print(HELP)
        elif command == "/text":
            self.console.print(printable(self.texts[-1]))
        elif command == "/new":
            self.texts, self.offered = [""], []
        elif command == "/undo":
            if len(self.texts) == 1:
                raise ConfigError("there is nothing to take back")
            self.texts.pop()
            self.offered = []
            self._show_end()
        elif command == "/temperature":
            self.config = dataclasses.replace(self.config, temperature=_number(value))
            return self._offer()
        elif command.startswith("/"):
            raise ConfigError(f"{command} is no command; /help lists them. To write it, put a backslash in front")
        elif command.isdecimal() and self.offered:
            return self._choose(int(command))
        elif not line:
            return self._offer()
        else:
            return self.write(line.removeprefix("\\"))
        return True

    def write(self, text: str) -> bool:
        """Go on behind a text of the user's. False when Ctrl-C stopped it."""
        self.generator.stream(self.texts[-1] + text, self.config)  # characters that the model does not know
        self.texts.append(self.texts[-1] + text)
        return self._offer()

    def _choose(self, number: int) -> bool:
        if not 1 <= number <= len(self.offered):
            raise ConfigError(f"there are the answers 1 to {len(self.offered)}")
        self.texts.append(self.texts[-1] + self.offered[number - 1])
        self._show_end()
        return self._offer()

    def _offer(self) -> bool:
        columns = Columns(self.config.num_samples, numbered=True)
        steps = self.generator.stream(self.texts[-1], self.config)
        self.config = dataclasses.replace(self.config, seed=(self.config.seed + 1) % 2**63)  # others the next time
        finished = True
        try:
            columns.show(steps)
        except KeyboardInterrupt:
            finished = False
        self.offered = columns.texts
        return finished

    def _show_end(self) -> None:
        lines = self.texts[-1].splitlines()[-3:]
        self.console.print(printable("\n".join(lines)), style="dim")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"/temperature takes a number, as in /temperature 0.8, not {text!r}") from None
