"""``orbq sample``: structures for labels alone, by xTB dynamics from the structures at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from orbq.output import output

if TYPE_CHECKING:
    from orbq.preprocess.sample import Sampled

SHOWN = 8  # trajectories that ended early, in the summary


def sample(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files that ASE reads (.gz, .xz too), globs, or the embedded sets tmc, "
            "tmc_unlabelled.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="extxyz file to make (.gz, .xz too).")],
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            "-t",
            help="K; give it several times: the trajectories take them in turns (default: 300, "
            "600, 1000).",
        ),
    ] = None,
    trajectories: Annotated[
        int, typer.Option(help="How many, each from another structure of the input.")
    ] = 12,
    frames: Annotated[int, typer.Option(help="Frames of each trajectory.")] = 200,
    every: Annotated[float, typer.Option(help="Time between frames, fs.")] = 15.0,
    before: Annotated[float, typer.Option(help="Time before the first frame, fs.")] = 150.0,
    seed: Annotated[int, typer.Option(help="Another one gives other structures.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Trajectories at a time (default: one per core).")
    ] = None,
    method: Annotated[str, typer.Option(help="GFN1-xTB, GFN2-xTB or IPEA1-xTB.")] = "GFN1-xTB",
    charge_key: Annotated[str | None, typer.Option(help="Total charge, e (default 0).")] = None,
    spin_key: Annotated[
        str | None,
        typer.Option(help="Spin multiplicity 2S + 1 (default: the lowest possible)."),
    ] = None,
) -> None:
    """Make structures whose xTB labels teach a network before it sees few reference energies.

    Langevin dynamics with GFN1-xTB from structures of the input, taken at random, at several
    temperatures: what is hot reaches further than the input. Only geometries, charges, spins and
    groups are written; `orbq preprocess` labels them, and a configuration names them as
    data.unlabelled. Begin from structures that train, not from those that test.

    A trajectory takes one calculation of xTB (2 to 50 ms) for each of its before + frames x every
    fs. For a set of many compounds give as many --trajectories as structures, and few --frames.
    Stopped, it goes on when the same command is given again, and with the same result; finished, it
    is kept as it is.

    \b
    Examples:
      orbq sample train.xyz --out more.extxyz
      orbq sample train.xyz --out hot.extxyz -t 600 -t 1200 --trajectories 8 --frames 300
      orbq sample compounds.extxyz.gz --out more.extxyz --trajectories 800 --frames 3
    """
    from orbq.preprocess.read import Keys
    from orbq.preprocess.sample import sample as run
    from orbq.preprocess.schedule import Resources
    from orbq.preprocess.trajectory import Sampling

    kelvins = {"temperatures": tuple(temperature)} if temperature else {}
    sampling = Sampling(
        trajectories=trajectories,
        frames=frames,
        every=every,
        before=before,
        seed=seed,
        method=method,
        **kelvins,
    )
    with _bar() as bar:
        task = bar.add_task("reading", total=None, state="")

        def show(done: int, total: int) -> None:
            state = f"{done:,}/{total:,} frames"
            bar.update(task, description="sampling", completed=done, total=total, state=state)

        found = run(
            inputs,
            out,
            sampling,
            Keys(charge=charge_key, spin=spin_key),
            Resources(workers),
            show,
        )
    _summarise(out, found, sampling.trajectories, output())


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


def _summarise(out: Path, found: Sampled, trajectories: int, console: Console) -> None:
    """Say what was written, and what was not and why."""
    for failure in found.left_out[:SHOWN]:
        console.print(f"no start: {failure.file} frame {failure.frame}: {failure.reason}")
    if len(found.left_out) > SHOWN:
        console.print(f"... and {len(found.left_out) - SHOWN:,} more structures are no start")
    for ended in found.ended[:SHOWN]:
        console.print(
            f"ended after {ended.frames} frames: trajectory {ended.trajectory} at "
            f"{ended.temperature:g} K from {ended.start}: {ended.reason}"
        )
    if len(found.ended) > SHOWN:
        console.print(f"... and {len(found.ended) - SHOWN:,} more trajectories ended early")
    console.print(f"{out}: {found.frames:,} structures of {found.trajectories:,} trajectories")
    if trajectories < found.starts:
        console.print(
            f"{trajectories:,} of the {found.starts:,} structures of the input begin a trajectory "
            "(all of them: more --trajectories)"
        )
    console.print(
        f"Label them: orbq preprocess {out} --out DATASET; then data.unlabelled=['DATASET']"
    )
