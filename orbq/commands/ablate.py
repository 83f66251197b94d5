"""``orbq ablate``: what a charge loss and its weight do; many runs, few programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from orbq.errors import InputError
from orbq.output import Whole, output

if TYPE_CHECKING:
    import numpy as np

    from orbq.config import Config
    from orbq.study.plan import Program

BAR_WIDTH = 10  # with a program's long name and all numbers beside it a line has 80 characters
INTERRUPTED = "Finished programs and checkpoints are kept; run the same command again to go on."


def ablate(
    config: Annotated[Path, typer.Argument(help="A TOML file with an [ablation] table.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. ablation.weights=[0,10]")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the programs and the runs; train nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the ablation in the same directory.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the report of what is finished; train nothing.")
    ] = False,
) -> None:
    """Train over charge weights, seeds, train sizes and targets; report what the charges bring.

    Runs that differ only in weight, seed or learning rate train as one compiled program. Writes to
    run.directory, after every finished program: report.html (a page to look at), its pictures,
    summary.csv and results.csv; results.jsonl has every run. The same command goes on where it was
    stopped. Seeds, weights, train sizes and targets may be added later, after those that are there:
    only the new runs train.

    \b
    Examples:
      orbq ablate configs/ablate_charge.toml --plan
      orbq ablate configs/ablate_charge.toml
      orbq ablate configs/ablate_charge.toml --report   # while it runs, or of a stopped one
      orbq ablate configs/ablate_charge.toml ablation.seeds='[0, 1, 2, 3]'  # two seeds more
      orbq ablate mine.toml ablation.targets='["onsite"]' run.directory=runs/onsite
    """
    from orbq.config import load_config

    settings = load_config(config, overrides or [])  # before JAX, whose import takes seconds
    from orbq.compiled import configure_jax
    from orbq.study.report import recorded_config, write_report
    from orbq.study.run import check_continues, pending_programs, read_results, run_ablation

    console = output()
    directory = Path(settings.run.directory)
    if plan:
        configure_jax(settings)
        if not overwrite:
            check_continues(directory, settings)
        done = [] if overwrite else read_results(directory)
        show_plan(pending_programs(settings, done), len(done), console)
        return
    if report:
        if overwrite:
            raise InputError("--report reads the records that --overwrite deletes: leave one out")
        recorded = recorded_config(directory)
        told = Text(write_report(directory, read_results(directory), recorded))
        console.print(told)
        return
    with Display(console, settings) as display:
        records = run_ablation(settings, overwrite=overwrite, reporter=display)
    console.print(Text(write_report(directory, records, settings)))


def show_plan(programs: list[Program], n_done: int, console: Console) -> None:
    """The programs that are left, with their runs and steps."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("program")
    for column in ("runs", "weights", "seeds", "steps each"):
        table.add_column(column, justify="right")
    for program in programs:
        runs, training = program.runs, program.config.training
        table.add_row(
            program.name,
            str(len(runs)),
            ", ".join(f"{w:g}" for w in sorted({run.weight for run in runs})),
            ", ".join(str(s) for s in sorted({run.seed for run in runs})),
            f"{training.pretrain_steps + training.n_steps:,}",
        )
    console.print(Whole(table))
    n_runs = sum(len(program.runs) for program in programs)
    steps = sum(n_steps(program) * len(program.runs) for program in programs)
    done = f"; {n_done} runs are finished" if n_done else ""
    console.print(f"{len(programs)} programs, {n_runs} runs, {steps:,} steps in all{done}")


def n_steps(program: Program) -> int:
    """Steps of one run of a program."""
    return program.config.training.pretrain_steps + program.config.training.n_steps


class Display:
    """The terminal: one bar for the program at work and one for everything, with the time left; and
    the report, written anew after every program. config: the ablation's."""

    def __init__(self, console: Console, config: Config) -> None:
        self.console, self.config = console, config
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
        )
        self.before, self.total, self.seen = 0, 0, 0
        self.all = self.own = self.progress.add_task("steps x runs", total=None, state="")
        self.name = ""

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def planned(self, pending: list[Program], n_done: int) -> None:
        """What is left to do."""
        show_plan(pending, n_done, self.console)
        self.total = sum(n_steps(p) * len(p.runs) for p in pending)
        self.progress.update(self.all, total=self.total)

    def stepped(self, program: Program, step: int, n_steps: int) -> None:
        """Move both bars."""
        if program.name != self.name:
            if self.own != self.all:
                self.progress.remove_task(self.own)
            self.name = program.name
            self.own = self.progress.add_task(program.name, total=n_steps, completed=step, state="")
        self.progress.update(self.own, completed=step)
        done = self.before + step * len(program.runs)
        if not self.seen:
            self.seen = done  # what a resumed program had done is no measure of the speed
            return
        elapsed = self.progress.tasks[0].elapsed or 0.0
        left = elapsed * (self.total - done) / max(done - self.seen, 1)
        self.progress.update(self.all, completed=done, state=f"ETA {_clock(left)}")

    def validated(self, program: Program, step: int, errors: np.ndarray) -> None:
        """The range of the runs' validation errors."""
        text = f"val {errors.min():.4g}-{errors.max():.4g} meV"
        self.progress.update(self.own, state=text)

    def finished(self, program: Program, records: list[dict[str, Any]]) -> None:
        """One line per finished program, and the report of everything so far."""
        self.before += n_steps(program) * len(program.runs)
        errors = [r["test"]["energy_mae_meV"] for r in records if not r["diverged"]]
        told = f"{program.name}: {len(records)} runs in {records[0]['program_seconds']:.0f} s"
        if errors:
            told += f", test energy MAE {min(errors):.1f} to {max(errors):.1f} meV"
        if lost := len(records) - len(errors):
            told += f", {lost} of them diverged"
        self.console.print(told)
        self.report()

    def report(self) -> None:
        """Write the report; what hinders it is told, and must not end the training."""
        from orbq.study.report import write_report
        from orbq.study.run import read_results

        directory = Path(self.config.run.directory)
        try:
            write_report(directory, read_results(directory), self.config)
        except Exception as error:  # at the end it is written again, and its failure is one then
            text = f"the report could not be written yet ({type(error).__name__}: {error})"
            self.console.print(Text(text, "yellow"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
