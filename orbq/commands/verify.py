"""``orbq verify``: whether a data set is still what was written."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from orbq.errors import OrbqError


def verify(
    dataset: Annotated[
        str, typer.Argument(help="Directory of a data set, or an embedded one (tmc).")
    ],
) -> None:
    """Check every file of a data set against its manifest, the sums of its charges, and its cached
    neighbour lists.

    Ends with exit status 1 and names each damaged file and the remedy.

    \b
    Example:
      orbq verify datasets/tmc
    """
    from orbq.datasets import place_of
    from orbq.preprocess import store
    from orbq.preprocess import verify as checks

    directory = place_of(dataset)
    manifest = store.read_manifest(directory)
    with Console(stderr=True).status("") as status:
        problems = checks.verify(
            directory, lambda name, done, total: status.update(f"{name} ({done + 1}/{total})")
        )
    if problems:
        told = "\n  ".join(problems)
        raise OrbqError(f"{dataset} is damaged:\n  {told}\n{checks.remedy(directory, manifest)}")
    if cached := checks.cache_problems(directory):
        raise OrbqError("\n".join(cached))
    counts = manifest["counts"]
    Console(soft_wrap=True, highlight=False, markup=False).print(
        f"{dataset}: whole; {len(manifest['arrays'])} arrays of {counts['structures']:,} "
        f"structures, {counts['atoms']:,} atoms"
    )
