"""``orbq methods``: which xTB energies come nearest to one's own reference energies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from orbq.output import Whole, output

if TYPE_CHECKING:
    from orbq.preprocess.label import Progress
    from orbq.preprocess.nearest import Found


def methods(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help="Files that ASE reads, with reference energies; globs."
        ),
    ],
    limit: Annotated[int, typer.Option(help="Structures to compare, taken at random.")] = 500,
    workers: Annotated[
        int | None, typer.Option(help="Labelling processes (default: one per core).")
    ] = None,
    energy_key: Annotated[str | None, typer.Option(help="Reference energy, eV.")] = None,
    charge_key: Annotated[str | None, typer.Option(help="Total charge, e (default 0).")] = None,
    spin_key: Annotated[
        str | None,
        typer.Option(help="Spin multiplicity 2S + 1 (default: the lowest possible)."),
    ] = None,
) -> None:
    """Tell which xTB energies come nearest to the reference energies of some structures.

    The nearer the labels of structures without a reference energy are to it, the more they teach.
    Every method, and the means of two and of three, are compared: by what a fit of composition and
    charge leaves of the differences to the reference. Takes three calculations of xTB (2 to 50 ms
    each) a structure; nothing is written.

    \b
    Examples:
      orbq methods train.xyz
      orbq methods 'runs/*.extxyz.gz' --limit 2000 --energy-key TotEnergy
    """
    from orbq.preprocess.nearest import nearest_methods
    from orbq.preprocess.read import Keys
    from orbq.preprocess.schedule import Resources

    with Console(stderr=True).status("reading") as status:

        def show(method: str, progress: Progress) -> None:
            status.update(f"{method}: {progress.done:,}/{progress.total:,} structures")

        keys = Keys(energy=energy_key, charge=charge_key, spin=spin_key)
        found = nearest_methods(inputs, limit, keys, resources=Resources(workers), on_progress=show)
    _tell(found, output())


def _tell(found: Found, console: Console) -> None:
    """The table, the best first, and what to do with it."""
    table = Table("energies of", "leave, meV", "to composition", box=None, padding=(0, 3, 0, 0))
    alone = next(one.error for one in found.nearness if not one.method)
    for method, error in found.nearness:
        ratio = f"{error / alone:.2f}" if method else ""
        table.add_row(method or "composition", f"{1000 * error:.4g}", ratio)
    console.print(Whole(table))
    left_out = f", {found.left_out:,} left out: {found.why}" if found.left_out else ""
    console.print(f"mean absolute error of {found.n:,} structures{left_out}")
    if method := found.advised():
        console.print(f"Label with: orbq preprocess INPUT --out DATASET --method {method}")
    else:
        console.print("No xTB energy tells more than the composition: leave xtb_energy out")
