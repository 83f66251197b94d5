"""A directory that is written to: making it, its name, and links to files outside of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from orbq.errors import InputError


def refuse_links(
    directory: Path, option: str, written: Sequence[str] = ("*",), foreign: Sequence[str] = ()
) -> None:
    """Refuse links in a directory, at any depth, that lead out of it.

    The directory may be a link itself, to another disk say, or not be there yet. option: what names
    it, for the message. written: patterns of the entries that are written to; others may lead
    anywhere. foreign: directories in it that are looked at, but not into.

    Raises InputError.
    """
    root = directory.resolve()
    for path in _links(directory, written, foreign):
        if _leads_out(path, root):
            raise InputError(
                f"{path} is a link out of {directory}, and orbq writes to no file outside of it: "
                f"take it away, or choose another {option}"
            )


def refuse_brackets(directory: Path, option: str) -> None:
    """Refuse a place of checkpoints whose path holds "[": Orbax looks for what it has written by a
    pattern, does not find it there, and leaves a checkpoint that nothing can read.

    Raises InputError.
    """
    if "[" in str(directory.absolute()):
        raise InputError(
            f"{option} {directory.absolute()}: checkpoints in a path with '[' cannot be read; "
            "choose one without"
        )


def make_directory(directory: Path, option: str) -> None:
    """Make what the option names, with its parents; raises InputError where that cannot be, or
    nothing can be written there."""
    try:
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{option} {directory} is a file: name another")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{option} {directory}: the directory cannot be made ({error.strerror}); name another"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"{option} {directory}: nothing can be written there; name another")


def _links(directory: Path, written: Sequence[str], foreign: Sequence[str]) -> Iterator[Path]:
    for place, directories, files in os.walk(directory):  # never into a link
        here, found = Path(place), sorted([*directories, *files])
        if here == directory:
            found = [name for name in found if any(fnmatch(name, p) for p in written)]
            directories[:] = [name for name in directories if name in {*found} - {*foreign}]
        yield from (here / name for name in found if (here / name).is_symlink())


def _leads_out(link: Path, root: Path) -> bool:
    try:
        return not link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # in a circle
        return True
