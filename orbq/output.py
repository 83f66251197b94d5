"""How commands print: text as it is, lines that the terminal breaks, tables that nothing cuts.

A name that holds brackets is a name, not rich's markup; whoever reads a file or a pipe gets whole
lines.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table


def output(**settings: Any) -> Console:
    """Standard output, for what a command finds; settings: others of rich's Console."""
    return Console(soft_wrap=True, highlight=False, markup=False, **settings)


class Whole:
    """A table as wide as its cells need, however narrow the terminal."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(width=1 << 16, max_width=1 << 16)
        width = max(Measurement.get(console, unlimited, self.table).maximum, options.max_width)
        yield from console.render(self.table, options.update(width=width, max_width=width))
