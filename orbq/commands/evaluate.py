"""``orbq evaluate``: the errors of a trained run, as tables, JSON and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orbq.errors import InputError

if TYPE_CHECKING:
    from orbq.evaluate import Evaluation

INTERRUPTED = "Nothing was written; run the same command again."
SPLITS = "test|validation|train|all"


def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of a trained run.")],
    dataset: Annotated[
        str, typer.Argument(help="Data set made by orbq preprocess, or an embedded one (tmc).")
    ],
    split: Annotated[
        str | None,
        typer.Option(
            metavar=SPLITS,
            help="Which structures (default: test if RUN was trained on DATASET, else all).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory for the results (default RUN/evaluation)."),
    ] = None,
    batch_size: Annotated[
        float, typer.Option(min=1, help="Structures per batch, on average.")
    ] = 16,
    plots: Annotated[bool, typer.Option(help="Draw the parity plots.")] = True,
) -> None:
    """Compare a run's predictions with the labels of a data set.

    Prints MAE and RMSE of every label, and of forces and charges by element and shell. Writes them
    to metrics.json, and parity plots, into --out. Structures with elements that the run was not
    trained on are left out and counted.

    \b
    Examples:
      orbq evaluate runs/demo tmc
      orbq evaluate runs/mine datasets/mine --split validation
      orbq evaluate runs/mine datasets/other --out comparison
    """
    from orbq.data import open_dataset
    from orbq.evaluate import evaluate as compare
    from orbq.evaluate import report, split_rows
    from orbq.inference import open_run

    console = Console(highlight=False, soft_wrap=True)
    loaded, data = open_run(run), open_dataset(dataset)
    name, rows = split_rows(loaded, data, split)
    place = out or run / "evaluation"
    _claim(place)
    with _bar() as bar:
        task = bar.add_task(f"predicting {name}", total=len(rows))
        found = compare(
            loaded,
            data,
            rows,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    facts = {"run": str(run), "dataset": dataset, "split": name}
    document = report(found, facts.items())
    console.print(Text(f"{run} on {dataset}, split {name}"))
    show(found, console)
    written = [place / "metrics.json"]
    written[0].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if plots:
        written += draw(found, place)
    console.print(Text("wrote " + ", ".join(str(path) for path in written)))


def _claim(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {place}: the directory cannot be made ({error.strerror}); name another"
        ) from error


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
    )


def draw(found: Evaluation, place: Path) -> list[Path]:
    """All parity plots on one page, and each on its own."""
    from orbq.plots import parity_figure

    paths = [place / "parity.png"]
    parity_figure(found, paths[0])
    for name, values in found.values.items():
        if values.mask.any():
            paths.append(place / f"parity-{name}.png")
            parity_figure(found, paths[-1], [name])
    return paths


# --------------------------------------------------------------------------- tables


def show(found: Evaluation, console: Console) -> None:
    """Print what was evaluated, and its errors."""
    console.print(
        f"{len(found.rows):,} structures, {int(found.n_node.sum()):,} atoms; "
        f"{found.cost.seconds:.1f} s, {found.cost.compilations} compilation"
        f"{'s' * (found.cost.compilations != 1)}, batches filled {found.cost.edge_fill:.0%}"
    )
    if found.n_left_out:
        elements = ", ".join(f"{s} ({n:,})" for s, n in found.left_out.items())
        text = f"left out {found.n_left_out:,} structures with elements new to the run: {elements}"
        console.print(Text(text, "yellow"))
    console.print(_overview(found))
    for name in _resolved(found):
        console.print(_by_element(found, name))


def _overview(found: Evaluation) -> Table:
    """MAE and RMSE of every label."""
    from orbq.metrics import display_unit

    table = Table("label", box=None, padding=(0, 3, 0, 0))
    for column in ("MAE", "RMSE"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("values", justify="right")
    for name, values in found.values.items():
        for shown in ("energy", "energy_per_atom") if name == "energy" else (name,):
            unit, factor = display_unit(shown)
            label = f"{name} (from {values.source})" if values.source else name
            errors = [_number(f(shown) * factor, unit) for f in (found.mae, found.rmse)]
            table.add_row(label, *errors, unit, f"{int(values.mask.sum()):,}")
    return table


def _resolved(found: Evaluation) -> list[str]:
    """Labels shown by element: forces, and the most telling charges."""
    forces = [n for n in ("forces", "xtb_forces") if n in found.values]
    charges = [n for n in ("orbital", "shell", "atomic") if n in found.values][:1]
    return forces + charges + [n for n in ("dft",) if n in found.values]


def _by_element(found: Evaluation, name: str) -> Table:
    """MAE by element, and by shell where the label has shells."""
    from orbq.metrics import display_unit

    unit = display_unit(name)[0]
    errors = found.by_element(name)
    shells = list(dict.fromkeys(shell for _, shell in errors))
    symbols = list(dict.fromkeys(symbol for symbol, _ in errors))
    table = Table(title=f"{name}: MAE by element, {unit}", title_justify="left", box=None)
    table.add_column("element")
    table.add_column("atoms", justify="right")
    for shell in shells:
        table.add_column(shell or "MAE", justify="right")
    for symbol in symbols:
        cells = [errors.get((symbol, shell)) for shell in shells]
        shown = [_number(cell["mae"], unit) if cell else "" for cell in cells]
        table.add_row(symbol or "all", f"{found.count(name, symbol):,}", *shown)
    return table


def _number(value: float, unit: str) -> str:
    return "-" if value != value else f"{value:.{4 if unit == 'e' else 1}f}"
