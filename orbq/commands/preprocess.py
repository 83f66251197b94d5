"""``orbq preprocess``: from structure files to a labelled data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from orbq.output import Whole, found_as, output

if TYPE_CHECKING:
    from orbq.preprocess.label import Progress
    from orbq.preprocess.store import Dataset


PHASES = {"read": "reading", "label": "labelling", "store": "checksums"}
SHOWN = 8  # reasons for failures in the summary


def preprocess(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files that ASE reads (.gz, .xz too), globs, the directory of a tmQM release, or "
            "the embedded sets tmc, tmc_unlabelled.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the data set to make.")],
    workers: Annotated[
        int | None,
        typer.Option(
            help="Labelling processes (default: one per core); with slurm or pbs, jobs.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT|slurm|pbs",
            help="Label on a Dask cluster (pip install 'orbq[dask]').",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds after which one structure is given up."),
    ] = 600.0,
    blas: Annotated[
        str,
        typer.Option(
            metavar="auto|off|PATH",
            help="BLAS preloaded into the labelling processes; twice as fast where one is found.",
        ),
    ] = "auto",
    method: Annotated[
        str,
        typer.Option(
            help="GFN1-xTB, GFN2-xTB or IPEA1-xTB; GFN1-xTB+GFN2-xTB: charges of the first, "
            "energies and forces the mean of both (orbq methods tells which is nearest)."
        ),
    ] = "GFN1-xTB",
    spin_polarized: Annotated[
        bool,
        typer.Option("--spin-polarized", help="Spin-polarised xTB."),
    ] = False,
    min_height: Annotated[
        float,
        typer.Option(
            help="Periodic cells thinner than this (Å) get no xTB labels: Gamma point only.",
        ),
    ] = 10.0,
    energy_key: Annotated[str | None, typer.Option(help="Reference energy, eV.")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Reference forces, eV/Å.")] = None,
    stress_key: Annotated[str | None, typer.Option(help="Reference stress, eV/Å^3.")] = None,
    charge_key: Annotated[str | None, typer.Option(help="Total charge, e (default 0).")] = None,
    spin_key: Annotated[
        str | None,
        typer.Option(help="Spin multiplicity 2S + 1 (default: the lowest possible)."),
    ] = None,
    dft_charges_key: Annotated[
        str | None,
        typer.Option(
            "--dft-charges-key",
            "--charges-key",
            help="Atomic charges of the reference, e.",
        ),
    ] = None,
    group_key: Annotated[
        str | None,
        typer.Option(help="Name shared by structures of one split."),
    ] = None,
) -> None:
    """Read structures, label them with orbital charges from xTB, and store a data set.

    Energies in eV, lengths in Å. Structures without a reference energy are welcome: they carry
    charge labels. Structures that cannot be used are left out, and listed with their reason in
    DATASET/failures.jsonl. An interrupted job goes on when the same command is given again.

    \b
    Examples:
      orbq preprocess tmc --out datasets/tmc
      orbq preprocess 'runs/*.extxyz.gz' --out datasets/mine --workers 8
      orbq preprocess mine.xyz --out datasets/mine --energy-key TotEnergy --charge-key q
      orbq preprocess more.xyz --out datasets/more --method GFN1-xTB+GFN2-xTB
      orbq preprocess big.xyz --out datasets/big --scheduler tcp://10.0.0.1:8786
    """
    from orbq.preprocess.label import Recipe
    from orbq.preprocess.label import preprocess as run
    from orbq.preprocess.read import Keys
    from orbq.preprocess.schedule import Resources
    from orbq.preprocess.xtb import Settings

    keys = Keys(
        energy_key, forces_key, charge_key, spin_key, dft_charges_key, group_key, stress_key
    )
    settings = Settings(spin_polarization=spin_polarized, min_height=min_height)
    with _Bar() as bar:
        dataset = run(
            inputs,
            out,
            Recipe(method, keys, settings),
            Resources(workers, scheduler, timeout, blas),
            bar.show,
        )
    summarise(dataset, output())


class _Bar:
    """A progress bar on stderr whose ETA follows the estimated work, not the structure count."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Draw how far the job is."""
        done = f"{progress.done:,}" + (f"/{progress.total:,}" if progress.total else "")
        state = f"{done} structures"
        if progress.rejected:
            state += f", {progress.rejected:,} left out"
        if progress.unlabelled:
            state += f", {progress.unlabelled:,} without xTB labels"
        known = progress.phase != "read"
        for phase, task in self._tasks.items():
            if phase != progress.phase:
                self._bar.update(task, total=1.0, completed=1.0)
        if progress.phase not in PHASES:
            return
        if progress.phase not in self._tasks:
            words = PHASES[progress.phase]
            self._tasks[progress.phase] = self._bar.add_task(words, total=None, state=state)
        task = self._tasks[progress.phase]
        total = 1.0 if known else None
        self._bar.update(task, total=total, completed=progress.share, state=state)


def summarise(dataset: Dataset, console: Console) -> None:
    """Print what a data set holds, what was found under which name, and what went wrong."""
    from orbq.preprocess.plausible import strange_units

    manifest = dataset.manifest
    counts = manifest["counts"]
    console.print(
        f"{dataset.path}: {counts['structures']:,} structures, {counts['atoms']:,} atoms, "
        f"{manifest['method']} (tblite {manifest['tblite_version']}, "
        f"BLAS: {', '.join(manifest['blas'])})"
    )
    table = Table("label", "structures", "found as", box=None, padding=(0, 3, 0, 0))
    for name, number in counts["labels"].items():
        names = found_as(name, manifest["keys"].get(name, {}))
        computed = name in ("onsite", "xtb_energy", "xtb_forces")
        table.add_row(name, f"{number:,}", "computed" if computed else names)
    console.print(Whole(table))
    for name in ("charge", "spin", "group"):
        console.print(f"{name}: {found_as(name, manifest['keys'].get(name, {}))}")
    for name in ("energy", "forces", "dft_charges"):
        if len(manifest["keys"].get(name, {})) > 1:
            option = f"--{name.replace('_', '-')}-key"
            console.print(
                f"{name} is found under more than one name: if they are not of one level of "
                f"theory, choose one by {option}",
                style="yellow",
            )
    for text in strange_units(dataset):
        console.print(text, style="yellow")
    if counts["rescued"]:
        told = ", ".join(f"{n:,} with {how}" for how, n in counts["rescued"].items())
        console.print(f"converged only in a second attempt: {told}")
    _failures(dataset, console)


def _failures(dataset: Dataset, console: Console) -> None:
    """The most frequent reasons, with one example each."""
    from orbq.preprocess.summary import failure_patterns

    patterns = failure_patterns(dataset)
    for (kind, _), (number, example) in list(patterns.items())[:SHOWN]:
        console.print(f"{number:,} {kind}, e.g. {example}")
    if patterns:
        more = f"{len(patterns) - SHOWN} more reasons; " if len(patterns) > SHOWN else ""
        console.print(f"{more}all of them: {dataset.path}/failures.jsonl")
