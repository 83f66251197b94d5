"""``orbq train``: train a configuration, with a live display; it can be stopped and continued."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
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

from orbq.output import output

if TYPE_CHECKING:
    from orbq.reporter import Speed

INTERRUPTED = "The checkpoints are kept; run the same command again to go on."


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; configs/base.toml has every key.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. training.seed=3")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this run if there is one; so it is anyway.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete a run in the same directory, start anew.")
    ] = False,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="One of several processes; SLURM, Open MPI or a TPU pod say which.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of process 0, where nothing says which."),
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    process: Annotated[int | None, typer.Option(help="Which one this is, from 0.")] = None,
) -> None:
    """Train a potential on energies, forces and the targets that have a weight.

    The same command goes on where it was stopped, by whatever: Ctrl-C, SIGTERM, a power cut.
    SIGTERM (preemption) writes a checkpoint and ends with status 143. Of several processes every
    one has to see run.directory and the data sets.

    Writes checkpoints, metrics.jsonl and run.json to run.directory (default runs/<name of CONFIG>);
    load it with orbq.load, or use orbq evaluate and orbq predict.

    \b
    Examples:
      orbq train configs/demo.toml
      orbq train configs/demo.toml loss.weights.onsite=3 run.directory=runs/w3
      CUDA_VISIBLE_DEVICES=0 orbq train mine.toml       # on one GPU of this machine
      orbq train mine.toml training.batch_size=64       # on all its devices
      orbq train mine.toml training.initial=runs/charges   # from the parameters of another run
      srun orbq train mine.toml --distributed           # SLURM: one task for each GPU
      orbq train mine.toml --distributed                # TPU pod: the same on every worker
      orbq train mine.toml --coordinator host0:8476 --processes 2 --process 0   # by hand
    """
    from orbq.config import load_config

    settings = load_config(config, overrides or [])  # before JAX, whose import takes seconds
    from orbq import devices
    from orbq.fit import fit
    from orbq.trackers import with_trackers

    if distributed or coordinator:
        devices.join(devices.Cluster(coordinator, processes, process))
    with Display(output()) as display, with_trackers(settings, display) as told:
        summary = fit(settings, overwrite=overwrite, reporter=told)
    if devices.is_main():
        display.finished(summary)


class _Bars(Progress):
    """A bar per stage, and under them one line of numbers: a terminal of 80 columns holds both."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks[-1:]:
            yield Text(task.fields["state"])


class Display:
    """The terminal: facts first, a progress bar per stage, one line per validation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = _Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
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
        shown = {*SHOWN_LABELS, *facts.get("scales", {})}
        labels = {k: v for k, v in facts["labels"].items() if k in shown}
        budget, fill = facts["budget"], facts["fill"]
        rows = {
            "run": facts["directory"],
            **({"begun from": facts["initial"]["directory"]} if "initial" in facts else {}),
            **_probed(facts.get("probe")),
            "structures": _pairs(facts["structures"]),
            "labels": _pairs(labels),
            "parameters": f"{facts['n_parameters']:,}",
            "devices": f"{facts['devices']}, {facts['parts']} batches an update",
            "batch": f"{budget['n_node']} atoms, {budget['n_edge']} edges, "
            f"{budget['n_graph']} structures at most; filled {fill['edge']:.1%} (edges), "
            f"{fill['node']:.1%} (atoms)",
        }
        for name, text in rows.items():
            table.add_row(Text(name, "bold"), Text(text))
        self.console.print(table)

    def stepped(self, stage: str, step: int, n_steps: int, loss: float, speed: Speed) -> None:
        """Move the bar of a stage; loss, speed, fill and compilations beside it."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=n_steps, state="")
        state = (
            f"loss {loss:.4g}, {speed.atoms_per_second:,.0f} atoms/s, filled {speed.fill:.0%}, "
            f"compiled {speed.compilations}x"
        )
        self.progress.update(self.tasks[stage], completed=step, state=state)

    def warned(self, text: str) -> None:
        """What went wrong and did not stop the run."""
        self.console.print(Text.assemble(("warning: ", "bold yellow"), text))

    def validated(self, record: dict[str, Any]) -> None:
        """Raw validation errors in their units, and the training losses since the last ones."""
        told = f"step {record['step']:>7}  {_errors(record)}"
        if losses := _losses(record):
            told += f"\n{'':14}losses: {losses}"
        self.console.print(Text(told))

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


def _losses(record: dict[str, Any]) -> str:
    """The mean training loss since the validation before, and its terms before their weights."""
    terms = {k.removeprefix("train/"): v for k, v in record.items() if k.startswith("train/")}
    for other in ("gradient_norm", "learning_rate"):
        terms.pop(other, None)
    total = {"total": terms.pop("loss")} if "loss" in terms else {}
    return ", ".join(f"{name} {value:.4g}" for name, value in (total | terms).items())


def _probed(probe: dict[str, Any] | None) -> dict[str, str]:
    if probe is None:
        return {}
    error = probe["leave_one_out_meV"]
    said = "" if error is None else f"; a structure left out is missed by {error:,.0f} meV"
    return {"references": f"fitted with the energy readout it begins from{said}"}


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _errors(record: dict[str, Any]) -> str:
    from orbq.metrics import unit_of

    shown = []
    for key, value in record.items():
        if key.startswith("validation/") and "_mae_" in key:
            name, unit = key.removeprefix("validation/").split("_mae_")
            unit = unit_of(unit)
            digits = {"e": ".4f", "meV/Å^3": ".2f"}.get(unit, ".1f")
            shown.append(f"{name} {value:{digits}} {unit}")
    best = "  best" if record.get("best") else ""
    return "MAE " + ", ".join(shown) + best
