"""``orbq fetch``: download a public data set and verify it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orbq.output import output

INTERRUPTED = "Whole files are kept; run the same command again to go on."


def fetch(
    name: Annotated[str, typer.Argument(metavar="tmqm|qm7|acac", help="Which data set.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory (default: downloads/NAME).")
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(help="Address of a folder with the same files.")
    ] = None,
) -> None:
    """Download a public data set, verified against its published content.

    \b
      tmqm   108,000 transition-metal complexes, TPSSh energies and natural charges
      qm7    7,101 organic molecules, PBE0 atomization energies
      acac   acetylacetone at 300 K and 600 K, energies and forces

    \b
    Examples:
      orbq fetch qm7
      orbq preprocess downloads/qm7/qm7.extxyz --out datasets/qm7
      orbq fetch acac
      orbq preprocess downloads/acac/train_300K.xyz --out data/acac_train
      orbq preprocess downloads/acac/test_MD_300K.xyz --out data/acac_test
      orbq fetch tmqm --out /scratch/tmqm
      orbq preprocess /scratch/tmqm --out datasets/tmqm --workers 16
    """
    from orbq.download import fetch as download

    directory = out or Path("downloads") / name
    with _Bars() as bars:
        found = download(name, directory, mirror, bars.of)
    if name == "acac":  # training and test configurations are files, and stay apart
        following = [
            f"orbq preprocess {found}/train_300K.xyz --out data/acac_train",
            f"orbq preprocess {found}/test_MD_300K.xyz --out data/acac_test",
        ]
    else:
        following = [f"orbq preprocess {found} --out datasets/{name}"]
    lines = [f"{found}: complete and verified", *(f"next: {command}" for command in following)]
    output().print("\n".join(lines))


class _Bars:
    """A bar of bytes for every file."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def of(self, file: str) -> Any:
        """The bar of one file, as pooch wants it."""
        from orbq.download import Bar

        progress, task = self._progress, self._progress.add_task(file, total=None)

        class FileBar(Bar):
            def update(self, n: int) -> None:
                progress.update(task, advance=n, total=self.total or None)

        return FileBar()
