"""A directory that another takes the place of: out of the way until the other one stands."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path


def put_aside(directory: Path, held_by: ExitStack) -> None:
    """Rename a directory in one step. When ``held_by`` is closed it comes back, unless ``replaced``
    was called before."""
    aside = _aside(directory)
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    held_by.callback(_bring_back, directory, aside)


def replaced(directory: Path) -> None:
    """What takes the place of a directory stands: delete what was put aside, if anything was."""
    shutil.rmtree(_aside(directory.resolve()), ignore_errors=True)


def _bring_back(directory: Path, aside: Path) -> None:
    if aside.is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)


def _aside(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.deleted")
