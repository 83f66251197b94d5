"""``orbq train``: train a configuration, with a live display; it can be stopped and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

INTERRUPTED = "The checkpoints are kept; run the same command with --resume to go on."


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; configs/base.toml has every key.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. training.seed=3")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete a run in the same directory, start anew.")
    ] = False,
) -> None:
    """Train a potential on energies, forces and the targets that have a weight.

    Writes checkpoints, metrics.jsonl and run.json to run.directory (default runs/<name of CONFIG>);
    load it with orbq.load, or use orbq evaluate and orbq predict.

    \b
    Examples:
      orbq train configs/demo.toml
      orbq train configs/demo.toml loss.weights.onsite=3 run.directory=runs/w3
      orbq train configs/demo.toml --resume
    """
    from orbq.config import load_config
    from orbq.fit import fit

    settings = load_config(config, overrides or [])
    with Display(Console(highlight=False)) as display:
        summary = fit(settings, resume=resume, overwrite=overwrite, reporter=display)
    display.finished(summary)


class Display:
    """The terminal: facts first, a progress bar per stage, one line per validation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, facts: dict[str, Any]) -> None:
        """Structures, labels, size of the network and of the batches."""
        table = Table.grid(padding=(0, 2))
        labels = {k: v for k, v in facts["labels"].items() if k in SHOWN_LABELS}
        budget, fill = facts["budget"], facts["fill"]
        rows = {
            "run": facts["directory"],
            "structures": _pairs(facts["structures"]),
            "labels": _pairs(labels),
            "parameters": f"{facts['n_parameters']:,}",
            "batch": f"{budget['n_node']} atoms, {budget['n_edge']} edges, "
            f"{budget['n_graph']} structures at most; filled {fill['edge']:.1%} (edges), "
            f"{fill['node']:.1%} (atoms)",
        }
        for name, text in rows.items():
            table.add_row(Text(name, "bold"), Text(text))
        self.console.print(table)

    def stepped(self, stage: str, step: int, n_steps: int, loss: float) -> None:
        """Move the bar of a stage."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=n_steps, loss="")
        self.progress.update(self.tasks[stage], completed=step, loss=f"{loss:.4g}")

    def validated(self, record: dict[str, Any]) -> None:
        """One line of raw validation errors in their units."""
        self.console.print(Text(f"step {record['step']:>7}  {_errors(record)}"))

    def finished(self, summary: dict[str, Any]) -> None:
        """What was compiled, how long it took, and what to do next."""
        compiled = _pairs(summary["compilations"])
        self.console.print(
            Text(
                f"done in {summary['seconds']:.0f} s; compilations: {compiled}\n"
                f"next: orbq evaluate {summary['directory']} DATASET"
            )
        )


SHOWN_LABELS = ("energy", "forces", "dft_charges", "onsite", "xtb_energy", "xtb_forces")


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _errors(record: dict[str, Any]) -> str:
    shown = []
    for key, value in record.items():
        if key.startswith("validation/") and "_mae_" in key:
            name, unit = key.removeprefix("validation/").split("_mae_")
            unit = unit.replace("_per_", "/").replace("meV/A", "meV/Å")
            digits = ".4f" if unit == "e" else ".1f"
            shown.append(f"{name} {value:{digits}} {unit}")
    best = "  best" if record.get("best") else ""
    return "MAE " + ", ".join(shown) + best
