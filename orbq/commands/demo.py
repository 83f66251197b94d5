"""``orbq demo``: the main job on the embedded data set."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from orbq.output import Whole, output

if TYPE_CHECKING:
    from orbq.demo import Result

TABLE, PICTURE = "table.json", "demo.png"
WIDTH = 110  # characters of a line when the output is not a terminal
INTERRUPTED = "Finished runs and checkpoints are kept; run the same command again to go on."


def demo(
    out: Annotated[Path, typer.Option(help="Directory for data, runs, table and figure.")] = Path(
        "runs/demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs per arm.")] = 3,
    steps: Annotated[int, typer.Option(min=0, help="Training steps; 0: the default.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 2,
    unlabelled: Annotated[
        bool, typer.Option(help="The third arm: structures without DFT teach as well.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier demonstration in OUT.")
    ] = False,
) -> None:
    """Label, train and compare on real DFT data: what do orbital charges buy?

    Labels the embedded transition-metal complexes with GFN1-xTB, trains the same network on DFT
    energies and forces without and with the charges, and from a network that knows the charges of
    thousands of further complexes, and compares them on complexes that no run has seen with DFT.
    Takes a few minutes on two cores; stopped, it goes on where it was.

    \b
    Examples:
      orbq demo
      orbq demo --seeds 5 --steps 30000 --out runs/demo-large
      orbq demo --seeds 1 --steps 300 --no-unlabelled --out runs/demo-quick
    """
    from orbq import demo as job
    from orbq.preprocess.label import preprocess
    from orbq.preprocess.links import refuse_links

    start = time.monotonic()
    console = output()
    if not console.is_terminal:
        console = output(width=WIDTH)
    if overwrite:
        _delete(out)
    refuse_links(out, "--out", [TABLE, PICTURE])
    arms = [arm for arm in job.ARMS if unlabelled or arm != "+ unlabelled"]
    extra = [f"training.n_steps={steps}"] if steps else []
    if steps:
        interval = max(steps // 10, 1)
        extra += [f"training.warmup_steps={min(100, steps)}"]
        extra += [f"training.validate_every={interval}", f"training.checkpoint_every={interval}"]
    console.print(Text("1. label with GFN1-xTB", "bold"))
    for name in (job.DATASET, job.UNLABELLED)[: 2 if unlabelled else 1]:
        dataset = preprocess([name], out / "data" / name)
        console.print(f"   {name}: {len(dataset):,} structures in {out / 'data' / name}")
    console.print(Text("2. train and evaluate on held-out complexes", "bold"))
    jobs = job.make_jobs(out, seeds, extra, arms)
    with _Bars(console) as bars:
        results = job.run_jobs(jobs, workers, bars.stepped, bars.finished)
    _report(console, out, results, time.monotonic() - start)


def _delete(out: Path) -> None:
    """What an earlier demonstration made there, and nothing else."""
    from orbq import demo as job
    from orbq.run_files import RUN_FILE
    from orbq.schema import MANIFEST

    for name in (job.DATASET, job.UNLABELLED):
        if (out / "data" / name / MANIFEST).is_file():
            shutil.rmtree(out / "data" / name)
    for run in out.glob("*-seed*"):
        if (run / RUN_FILE).is_file() and not run.is_symlink():
            shutil.rmtree(run)
    for name in (TABLE, PICTURE):
        (out / name).unlink(missing_ok=True)


class _Bars:
    """One progress bar per run."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("   {task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self.tasks: dict[tuple[str, int], TaskID] = {}

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _task(self, arm: str, seed: int) -> TaskID:
        if (arm, seed) not in self.tasks:
            name = f"{arm:<14} seed {seed}"
            self.tasks[arm, seed] = self.progress.add_task(name, total=None, state="")
        return self.tasks[arm, seed]

    def stepped(
        self, arm: str, seed: int, stage: str, step: int, n_steps: int, loss: float
    ) -> None:
        """Move the bar of a run."""
        state = f"{stage} {step:,}/{n_steps:,}, loss {loss:.3g}"
        self.progress.update(self._task(arm, seed), completed=step, total=n_steps, state=state)

    def finished(self, result: Result) -> None:
        """Fill the bar and show the run's error."""
        task = self._task(result.job.arm, result.job.seed)
        error = f"energy MAE {result.energy_mae * 1e3:.0f} meV on held-out complexes"
        self.progress.update(task, completed=1, total=1, state=error)


def _report(console: Console, out: Path, results: list[Result], seconds: float) -> None:
    import json

    from orbq import demo as job
    from orbq.plots import arms_figure

    rows = job.table(results)
    table = Table(title="Errors (MAE) on held-out complexes, mean ± deviation over seeds")
    for name in ("arm", "energy, meV", "meV/atom", "forces, meV/Å", "orbital charges, e"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    table.add_column("energy ratio", justify="right")
    for row in rows:
        shown = [job.spread(v, 4 if n == "charge_mae" else 1) for n, v in row.values.items()]
        ratio = job.spread(row.ratios.get("energy_mae", []), 3) if row.ratios else "1"
        table.add_row(row.arm, *shown, ratio)
    console.print(Whole(table))
    document = [{"arm": r.arm, "values": r.values, "ratios": r.ratios} for r in rows]
    (out / TABLE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    picture = out / PICTURE
    arms_figure(rows, picture)
    console.print(Text(_facts(out, results, picture, seconds)))


def _facts(out: Path, results: list[Result], picture: Path, seconds: float) -> str:
    first: dict[str, Any] = results[0].summary
    sizes = ", ".join(f"{n} {k}" for k, n in first["structures"].items())
    compilations = sorted(
        {f"{k} {v}" for r in results for k, v in r.summary["compilations"].items()}
    )
    return (
        f"structures: {sizes}; batches filled {first['fill']['edge']:.1%} (edges), "
        f"{first['fill']['node']:.1%} (atoms)\n"
        f"compilations per run: {', '.join(compilations)}\n"
        f"figure: {picture}; table: {out / TABLE}; runs: {out}/*-seed*\n"
        f"{seconds:.0f} s in all. Again: orbq demo --out {out} --overwrite; "
        f"larger: orbq demo --seeds 5 --steps 30000 --out {out}-large"
    )
