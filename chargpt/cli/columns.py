"""Several samples side by side in a terminal, while they are written."""

import time
from collections.abc import Iterable

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chargpt.errors import ConfigError
from chargpt.generation import Piece

LEAST, GAP = 18, 2  # characters of a column that can be read, and between two
REFRESH = 1 / 15  # seconds from one picture to the next


class Columns:
    """What some samples have written so far, each in a column of its own.

    Raises ConfigError when the terminal is too narrow for so many.
    """

    def __init__(self, count: int, *, numbered: bool = False) -> None:
        self.console, self.numbered = Console(highlight=False), numbered
        most = columns_that_fit(self.console)
        if count > most:
            raise ConfigError(
                f"a terminal of {self.console.width} characters shows at most {most} samples side by side; ask for "
                f"fewer, widen it, or leave out --stream"
            )
        self.texts, self.tokens = [""] * count, 0

    def show(self, steps: Iterable[list[Piece]]) -> None:
        """Write as the pieces come: the ends of what is longer than the terminal is high, and all of it afterwards."""
        due = 0.0
        try:
            with Live(console=self.console, auto_refresh=False, transient=True) as live:
                for step in steps:
                    for i, piece in enumerate(step):
                        self.texts[i] += piece.text
                        self.tokens += len(piece.tokens)
                    if time.monotonic() >= due:
                        live.update(self._table(self.console.height - 1 - self.numbered), refresh=True)
                        due = time.monotonic() + REFRESH
        finally:  # stopped or not
            self.console.print(self._table())

    def _table(self, height: int | None = None) -> Table:
        count = len(self.texts)
        width = (self.console.width - GAP * (count - 1)) // count
        table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for _ in self.texts:
            table.add_column(width=width)
        if self.numbered:
            table.add_row(*(Text(str(i + 1), "bold") for i in range(count)))
        table.add_row(*(self._end(text, width, height) for text in self.texts))
        return table

    def _end(self, text: str, width: int, height: int | None) -> Text:
        """The last `height` lines of a text that is `width` wide, or all of them."""
        if height is not None:
            text = text[-width * height :]  # a line has at most so many
        lines = printable(text).wrap(self.console, width, tab_size=4)
        return Text("\n").join(lines if height is None else lines[-height:])


def columns_that_fit(console: Console) -> int:
    return max(1, (console.width + GAP) // (LEAST + GAP))


def printable(text: str) -> Text:
    """What a model wrote cannot command the terminal: control characters are shown as pictures."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return Text(text.translate(pictures | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)))
