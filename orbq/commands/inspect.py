"""``orbq inspect``: what a data set holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orbq.output import Whole, output

if TYPE_CHECKING:
    from orbq.preprocess.summary import Edges, Range, Summary

SHOWN_FAILURES = 8
MEANING = {
    "energy": "energy",
    "forces": "forces",
    "dft_charges": "charges",
    "xtb_energy": "xTB energy",
    "xtb_forces": "xTB forces",
    "xtb_charges": "xTB charges",
}


def inspect(
    dataset: Annotated[
        str, typer.Argument(help="Directory of a data set, or an embedded one (tmc).")
    ],
    cutoff: Annotated[
        float | None,
        typer.Option(help="Also count edges within this distance (Å), and the fill of batches."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Structures per batch, on average.")] = 32,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write histograms (.png, .pdf, .svg).")
    ] = None,
) -> None:
    """Show the composition, ranges, labels and failures of a data set.

    Reads in constant memory, so any size will do. Neighbour lists are kept beside the data set.

    \b
    Examples:
      orbq inspect tmc
      orbq inspect datasets/tmc
      orbq inspect datasets/tmc --cutoff 5 --batch-size 16 --plot tmc.png
    """
    from orbq.datasets import open_dataset
    from orbq.preprocess.links import make_directory
    from orbq.preprocess.plausible import strange_units
    from orbq.preprocess.summary import edges, summarise

    if plot is not None:
        make_directory(plot.parent, "--plot")
    opened = open_dataset(dataset)
    console = output()
    summary = summarise(opened)
    manifest = opened.manifest
    console.print(
        f"{dataset}: {summary.structures:,} structures, {summary.atoms:,} atoms; "
        f"{manifest['method']}, tblite {manifest['tblite_version']}, "
        f"schema version {manifest['schema_version']}"
    )
    for source in manifest["sources"]:
        console.print(f"  from {source['name']} (SHA-256 {source['sha256'][:12]}...)")
    _composition(summary, console)
    _ranges(summary, console)
    for text in strange_units(opened):
        console.print(Text(text, "yellow"))
    _faults(summary, console, dataset)
    if cutoff is not None:
        _edges(edges(opened, cutoff, batch_size), console)
    if plot is not None:
        from orbq.dataset_plots import plot_dataset

        plot_dataset(opened, summary, plot, cutoff)
        console.print(f"histograms: {plot}")


def _composition(summary: Summary, console: Console) -> None:
    low, mean, high, _, largest = summary.sizes
    console.print(
        f"atoms per structure: {low:.0f} to {high:.0f} (structure {largest}), mean {mean:.1f}"
    )
    told = "  ".join(f"{s} {n:,}/{a:,}" for s, (n, a) in summary.elements.items())
    console.print(f"elements (structures/atoms): {told}")
    told = "  ".join(f"{q:+d}: {n:,}" for q, n in summary.charges.items())
    console.print(f"total charge, e: {told}")
    told = "  ".join(f"{m}: {n:,}" for m, n in summary.multiplicities.items())
    console.print(f"spin multiplicity: {told}")
    console.print(
        f"periodic: {summary.periodic:,}   groups: {summary.groups:,}   "
        f"duplicates: {summary.duplicates:,}"
    )


def _ranges(summary: Summary, console: Console) -> None:
    table = Table("label", "known", "from", "mean", "to", "unit", box=None, padding=(0, 1))
    for column in table.columns:
        column.justify = "left" if column.header in ("label", "unit") else "right"
    rows = {**{name: name for name in summary.coverage}, "onsite": "xtb_charges"}
    for label, number in summary.coverage.items():
        name = rows[label]
        if name not in summary.ranges or not number:
            table.add_row(MEANING.get(name, label), f"{number:,}")
            continue
        (low, mean, high, low_at, high_at), unit = summary.ranges[name]
        numbers = (f"{low:.4g} (#{low_at})", f"{mean:.4g}", f"{high:.4g} (#{high_at})")
        table.add_row(MEANING[name], f"{number:,}", *numbers, unit)
    console.print(Whole(table))
    console.print("(#: structure; forces: norm on an atom)")


def _faults(summary: Summary, console: Console, dataset: str) -> None:
    for (kind, _), (number, example) in list(summary.failures.items())[:SHOWN_FAILURES]:
        console.print(f"{number:,} {kind}, e.g. {example}")
    if summary.failures:
        console.print(f"all failures: {dataset}/failures.jsonl")


def _edges(found: Edges, console: Console) -> None:
    around: Range = found.neighbors
    console.print(
        f"within {found.cutoff:g} Å: {found.edges:,} directed edges; {around.mean:.1f} neighbours "
        f"per atom, in a structure's mean {around.low:.1f} to {around.high:.1f}"
    )
    n_node, n_edge, n_graph = found.budget
    console.print(
        f"batches of {found.batch_size}: {n_node - 1:,} atoms, {n_edge - 1:,} edges, "
        f"{n_graph - 1:,} structures at most; filled {found.fill.node:.1%} of atoms, "
        f"{found.fill.edge:.1%} of edges"
    )
