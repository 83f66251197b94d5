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

from orbq.output import Whole, output

if TYPE_CHECKING:
    from orbq.scores import Evaluation

INTERRUPTED = "Nothing was written; run the same command again."
EVALUATION, METRICS = "evaluation", "metrics.json"
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
        typer.Option(
            "--out",
            "-o",
            help="Directory for the results (default: RUN/evaluation; of other structures than "
            "RUN's own test split RUN/evaluation/DATASET-SPLIT).",
        ),
    ] = None,
    batch_size: Annotated[
        float, typer.Option(min=1, help="Structures per batch, on average.")
    ] = 16,
    plots: Annotated[bool, typer.Option(help="Draw the parity plots.")] = True,
) -> None:
    """Compare a run's predictions with the labels of a data set.

    Prints MAE and RMSE of every label, and of forces and charges by element and shell. Writes them
    to metrics.json, and parity plots, into --out. Structures with elements that the run was not
    trained on are left out and counted; of another data set than the run's own, those that it was
    trained on are counted, too.

    \b
    Examples:
      orbq evaluate runs/demo/multitask-seed0 tmc
      orbq evaluate runs/mine datasets/mine --split validation
      orbq evaluate runs/mine datasets/other --out comparison
    """
    from orbq.datasets import open_dataset
    from orbq.evaluate import evaluate as compare
    from orbq.evaluate import is_own, not_compared, split_rows
    from orbq.inference import open_run
    from orbq.initial import taught_among
    from orbq.preprocess.links import make_directory, refuse_links
    from orbq.scores import report

    console = output()
    if out is None:
        refuse_links(run, "--out", [EVALUATION])
    else:
        refuse_links(out, "--out", [METRICS, "parity*.png"])
    loaded, data = open_run(run), open_dataset(dataset)
    name, rows = split_rows(loaded, data, split)
    own = is_own(loaded, data)
    place = out or run / EVALUATION
    if out is None and not (own and name == "test"):  # which stay what the run was judged by
        place /= f"{Path(dataset).name}-{name}"
    make_directory(place, "--out")
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
    metrics = place / METRICS
    text = json.dumps(report(found, facts.items()), indent=1)
    metrics.write_text(text + "\n", encoding="utf-8")
    pictures = draw(found, place, plots)  # before anything is told: who reads may have enough
    console.print(Text(f"{run} on {dataset}, split {name}"))
    if not own and (told := taught_among(run, data, rows)):
        console.print(Text(told, "yellow"))
    if lost := not_compared(loaded, data):
        console.print(Text(lost, "yellow"))
    show(found, console)
    console.print(Text(f"wrote to {place}: " + ", ".join(p.name for p in [metrics, *pictures])))


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
    )


def draw(found: Evaluation, place: Path, wanted: bool) -> list[Path]:
    """All parity plots on one page, and each on its own; none that are not ``wanted``."""
    from orbq.plots import clear_parity, parity_figure

    clear_parity(place)  # of another data set or run
    if not wanted:
        return []
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
    console.print(Whole(_overview(found)))
    console.print(Whole(_by_element(found)))


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


def _by_element(found: Evaluation) -> Table:
    """MAE by element: forces, and charges by shell."""
    from orbq.metrics import display_unit

    names: list[str] = [n for n in ("forces", "xtb_forces", "dft") if n in found.values]
    names += [n for n in ("orbital", "shell", "atomic") if n in found.values][:1]
    table = Table(title="MAE by element", title_justify="left", box=None, padding=(0, 3, 0, 0))
    table.add_column("element")
    table.add_column("atoms", justify="right")
    columns: list[tuple[str, dict[str, float]]] = []  # unit, {symbol: MAE}
    for name in names:
        unit, errors = display_unit(name)[0], found.by_element(name)
        for shell in dict.fromkeys(shell for _, shell in errors):
            inner = f" {shell}" if shell not in ("", "atom") else ""
            table.add_column(f"{name}{inner}\n{unit}", justify="right")
            maes = {symbol: e["mae"] for (symbol, s), e in errors.items() if s == shell}
            columns.append((unit, maes))
    for symbol, n_atoms in found.atoms_of().items():
        cells = [_number(maes[symbol], unit) if symbol in maes else "" for unit, maes in columns]
        table.add_row(symbol or "all", f"{n_atoms:,}", *cells)
    return table


def _number(value: float, unit: str) -> str:
    digits = {"e": 4, "meV/Å^3": 2}.get(unit, 1)
    return "-" if value != value else f"{value:.{digits}f}"
