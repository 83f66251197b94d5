"""Data sets by name: a directory, or one that comes with the package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from orbq.cache import cache_directory
from orbq.errors import InputError
from orbq.preprocess.frames import EMBEDDED
from orbq.preprocess.store import Dataset


def open_dataset(name: str) -> Dataset:
    """A data-set directory, or an embedded data set by name, labelled once into the cache.

    Raises InputError when it is neither.
    """
    return Dataset.open(place_of(name))


def place_of(name: str) -> Path:
    """The directory of ``open_dataset``, which an embedded data set is labelled into first."""
    name = os.path.expanduser(name)
    try:
        there = Path(name).exists()
    except (OSError, ValueError):  # longer than a name can be, or with characters it cannot have
        there = False
    if there:
        return Path(name)
    if name not in EMBEDDED:
        known = ", ".join(EMBEDDED)
        raise InputError(f"no data set {name[:200]!r}: not a directory, nor embedded ({known})")
    from orbq import __version__
    from orbq.preprocess.label import preprocess

    place = cache_directory() / "datasets" / f"{name}-{__version__}"
    try:
        Dataset.open(place)
    except InputError:
        if place.exists() and (place / "manifest.json").exists():
            shutil.rmtree(place)  # of another version or damaged: made again
        preprocess([name], place)
    return place
