"""``orbq predict``: energies, forces and charges of any structures, into any format ASE writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from orbq.errors import InputError
from orbq.output import found_as, output

if TYPE_CHECKING:
    from orbq.annotate import Refused, Writer

INTERRUPTED = "What was predicted so far, if anything, is in the file beside --out named .partial."
SHOWN = 10  # structures that could not be predicted, in the summary


def predict(
    run: Annotated[
        Path, typer.Argument(help="Directory of a trained run; several, for their mean and spread.")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="[RUN...] INPUT...", help="Files that ASE reads (.gz, .xz too)."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="File to write; its name says the format, as in ASE."),
    ] = Path("predicted.extxyz"),
    charges: Annotated[
        bool,
        typer.Option(
            "--charges",
            help="Also atomic charges and, where the run has them, orbital and shell charges.",
        ),
    ] = False,
    stress: Annotated[
        bool,
        typer.Option("--stress", help="Also the stress of structures with a lattice."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Structures per batch, on average.")] = 16,
    charge_key: Annotated[str | None, typer.Option(help="Total charge, e (default 0).")] = None,
    spin_key: Annotated[
        str | None,
        typer.Option(help="Spin multiplicity 2S + 1 (default: the lowest possible)."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing --out.")
    ] = False,
) -> None:
    """Predict energies (eV) and forces (eV/Å) of every structure, in the order of the input.

    The structures are written with all they came with; energy and forces are those predicted,
    in place of what followed from another energy (free energy, stress). A run that predicts
    charges alone leaves energies and forces as they came.
    With --stress: stress [eV/Å^3] of structures that are periodic in three directions.
    With --charges: charges [e], and per atom orbital_charges (s, s', p x y z, d in e3nn's order)
    and shell_charges (s, s', p, d). Total charge and spin multiplicity are read from the input
    (charge, spin_multiplicity and the like, or what --charge-key and --spin-key name; default:
    neutral, lowest spin); what they were found as is said. A structure that cannot be
    predicted is left out and listed; the others are not affected.

    With several runs (directories before the files; same elements and charge targets) everything
    is their mean, and the standard deviation over the runs is written beside it: energy_std of the
    structure, forces_std and charges_std of every atom.

    \b
    Examples:
      orbq predict runs/mine mine.xyz --out predicted.extxyz
      orbq predict runs/mine 'md/*.traj' --out predicted.traj
      orbq predict runs/mine complexes.extxyz.gz --out charges.extxyz --charges
      orbq predict runs/seed* mine.xyz --out mean.extxyz
      orbq predict runs/mine ions.xyz --charge-key q
    """
    from orbq.annotate import Refused, Writer, annotate
    from orbq.ensemble import Ensemble
    from orbq.inference import open_run
    from orbq.preprocess.frames import find_sources
    from orbq.preprocess.read import Keys, Reader
    from orbq.run_files import names_of

    directories, inputs = _split(run, inputs)
    names_of(directories)  # refuses a run that is named twice
    sources = find_sources(inputs)
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} exists: name another file, or replace it with --overwrite")
    runs = [open_run(directory) for directory in directories]
    loaded = runs[0] if len(runs) == 1 else Ensemble(runs, [str(path) for path in directories])
    reader = Reader(sources, Keys(charge=charge_key, spin=spin_key), labels=False)
    writer = Writer(out)
    refused: list[Refused] = []
    with closing(writer), _bar() as bar:
        task = bar.add_task("", total=None, state="compiling")
        for item in annotate(loaded, reader, charges, batch_size, stress):
            if isinstance(item, Refused):
                refused.append(item)
            else:
                writer.write(item)
            bar.update(task, state=_state(writer.count, len(refused)))
        writer.finish()
    _summarise(writer, refused, reader.names_used)


def _split(run: Path, rest: list[str]) -> tuple[list[Path], list[str]]:
    """The runs and the files. Raises InputError when no file is among them."""
    from orbq.run_files import RUN_FILE, run_directory

    runs = [run, *(Path(text) for text in rest if (run_directory(text) / RUN_FILE).is_file())]
    files = [text for text in rest if Path(text) not in runs[1:]]
    if not files:
        raise InputError(f"{', '.join(map(str, runs))}: only runs; name the structure files too")
    return runs, files


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("predicting: {task.fields[state]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _state(written: int, refused: int) -> str:
    left_out = f", {refused:,} left out" if refused else ""
    return f"{written:,} structures{left_out}"


def _summarise(
    writer: Writer, refused: list[Refused], names: Mapping[str, Mapping[str, int]]
) -> None:
    """Say what was written and what was left out, and why. Raises InputError if that was all."""
    out, written = writer.path, writer.count
    console = output()
    listed = out.with_name(out.name + ".failures.jsonl")
    listed.unlink(missing_ok=True)  # of an earlier command
    if refused:
        lines = [json.dumps(item._asdict()) + "\n" for item in refused]
        listed.write_text("".join(lines), encoding="utf-8")
        for item in refused[:SHOWN]:
            text = f"left out: {item.file} frame {item.frame}: {item.reason}"
            console.print(Text(text, "yellow"))
        if len(refused) > SHOWN:
            console.print(Text(f"... and {len(refused) - SHOWN:,} more; all in {listed}", "yellow"))
    if not written:
        raise InputError(f"none of the {len(refused):,} structures could be predicted")
    console.print(Text(f"{out}: {_state(written, len(refused))}"))
    for field in ("charge", "spin"):
        console.print(f"{field}: {found_as(field, names[field])}")
    if not writer.keeps:
        console.print(
            Text(
                f"the format {writer.format!r} holds no energies, forces or charges, only the "
                "structures: for what was predicted name a file that ends in .extxyz, .traj or .db",
                "yellow",
            )
        )
