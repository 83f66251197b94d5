"""How commands print: text as it is, lines that the terminal breaks, tables that nothing cuts.

A name that holds brackets is a name, not rich's markup; whoever reads a file or a pipe gets whole
lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

DEFAULTED = {
    "charge": "not in the input: 0 assumed",
    "spin": "not in the input: the lowest possible multiplicity assumed",
}


def output(**settings: Any) -> Console:
    """Standard output, for what a command finds; settings: others of rich's Console."""
    return Console(soft_wrap=True, highlight=False, markup=False, **settings)


def found_as(field: str, names: Mapping[str, int]) -> str:
    """Under which names the input has a field, with how many structures have each if there are
    several; what is taken where it has none."""
    if not names:
        return DEFAULTED.get(field, "not in the input")
    return ", ".join(f"{n} ({k:,})" if len(names) > 1 else n for n, k in names.items())


class Whole:
    """A table as wide as its cells need, however narrow the terminal."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(width=1 << 16, max_width=1 << 16)
        width = max(Measurement.get(console, unlimited, self.table).maximum, options.max_width)
        yield from console.render(self.table, options.update(width=width, max_width=width))
