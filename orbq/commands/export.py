"""``orbq export``: a run as a StableHLO program with a loader that needs JAX alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orbq.output import output


def export(
    run: Annotated[Path, typer.Argument(help="Directory of a trained run.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory to write; default: RUN/export.")
    ] = None,
    charges: Annotated[
        bool, typer.Option("--charges", help="Also atomic charges, from the run's charge target.")
    ] = False,
    platform: Annotated[
        list[str] | None,
        typer.Option(help="cpu, cuda, rocm or tpu; may be repeated. Default: all of them."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing --out.")
    ] = False,
) -> None:
    """Export energies (eV), forces (eV/Å) and charges (e) as StableHLO, parameters included.

    Writes a directory of three files: potential.bin (jax.export, for any number of atoms and
    edges), manifest.json (units, elements, reference energies, what goes in and comes out) and
    potential.py, a loader with a neighbour list. Whoever uses it needs jax, numpy and flatbuffers,
    and nothing of orbq:

    \b
      import potential
      model = potential.load()
      found = model(numbers, positions, cell, pbc=True)   # energy, forces, charges

    \b
    Examples:
      orbq export runs/mine
      orbq export runs/mine --out my-potential --charges
      orbq export runs/mine --out my-potential-cpu --platform cpu --overwrite
    """
    from orbq.inference import open_run
    from orbq.preprocess.links import refuse_links
    from orbq.stablehlo import PLATFORMS
    from orbq.stablehlo import export as write

    if out is None:
        refuse_links(run, "--out", ["export*"])
    place = write(open_run(run), out or run / "export", charges, platform or PLATFORMS, overwrite)
    size = sum(path.stat().st_size for path in place.iterdir())
    names = ", ".join(sorted(path.name for path in place.iterdir()))
    output().print(f"{place}: {names}; {size / 1e6:.1f} MB")
