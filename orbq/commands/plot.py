"""``orbq plot``: learning curves and parity plots of several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from orbq.errors import InputError
from orbq.output import output

if TYPE_CHECKING:
    from orbq.scores import Evaluation

INTERRUPTED = "Pictures that were written are whole; run the same command again."
SPLITS = "test|validation|train|all"


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Directories of runs, which may be training; others are left out."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for pictures and tables.")
    ] = Path("plots"),
    dataset: Annotated[
        str | None,
        typer.Option(help="Data set for the parity plots (default: each run's own)."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar=SPLITS, help="Which structures (default: test of a run's own data, else all)."
        ),
    ] = None,
    parity: Annotated[
        bool, typer.Option(help="Predict, and draw predictions against labels.")
    ] = True,
    batch_size: Annotated[
        float, typer.Option(min=1, help="Structures per predicted batch, on average.")
    ] = 16,
) -> None:
    """Draw learning curves and parity plots of runs side by side.

    Writes learning-curves.png (validation errors against steps, meV and meV/Å) and, for every label
    that the runs predict, parity-LABEL.png with a panel per run on the same axes; beside each
    picture a CSV of what is drawn.

    \b
    Examples:
      orbq plot runs/demo/*
      orbq plot runs/plain runs/taught --out comparison --split validation
      orbq plot runs/a runs/b --dataset datasets/other
      orbq plot runs/* --no-parity                      # also while they train
    """
    from orbq.plots import clear_parity, learning_curve_figure
    from orbq.preprocess.links import make_directory, refuse_links
    from orbq.run_files import names_of
    from orbq.run_plots import (
        curves_csv,
        labels_of,
        parity_comparison,
        parity_csv,
        progress_of,
        runs_among,
    )

    if not parity and (dataset or split):
        raise InputError("--dataset and --split are of the parity plots: leave out --no-parity")
    refuse_links(out, "--out", ["learning-curves.*", "parity-*"])
    runs, others = runs_among(runs)
    told = [f"left out, no runs: {', '.join(map(str, others))}"] if others else []
    told += filter(None, map(progress_of, runs))
    named = dict(zip(names_of(runs), runs, strict=True))
    make_directory(out, "--out")
    learning_curve_figure(named, out / "learning-curves.png")
    written = [out / "learning-curves.png", curves_csv(named, out / "learning-curves.csv")]
    settings = dataset, split, batch_size
    found = {n: _evaluate(d, settings, told) for n, d in named.items()} if parity else {}
    clear_parity(out)  # of other runs
    for label in labels_of(found.values()):
        picture = out / f"parity-{label}.png"
        parity_comparison(found, label, picture)
        written += [picture, parity_csv(found, label, out / f"parity-{label}.csv")]
    console = output()  # when all is written: who reads may have enough
    for text in told:
        console.print(Text(text, "yellow"))
    console.print("wrote " + ", ".join(map(str, written)))


def _evaluate(
    directory: Path, settings: tuple[str | None, str | None, float], told: list[str]
) -> Evaluation:
    """Errors of one run; ``told`` grows by what is to be known of them. settings: data set, split
    and batch size."""
    from orbq.datasets import open_dataset
    from orbq.evaluate import evaluate, is_own, split_rows
    from orbq.inference import open_run
    from orbq.initial import taught_among
    from orbq.run_plots import own_dataset

    name, split, batch_size = settings
    run = open_run(directory)
    data = open_dataset(name or own_dataset(run, directory))
    part, rows = split_rows(run, data, split)
    text = f"{directory}: predicting {len(rows):,} structures ({part} of {data.path})"
    output(stderr=True).print(text)
    if not is_own(run, data) and (known := taught_among(directory, data, rows)):
        told.append(known)
    return evaluate(run, data, rows, batch_size=batch_size)
