"""One writer in a directory: two trainings of one run would mix their records and checkpoints."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orbq.errors import InputError


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold the directory, which must be there, against every other process on this machine, and on
    others if the file system knows locks of directories; a process that dies lets go of it.

    Raises InputError when another one holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is training in {directory}: wait for it, or choose another "
                "run.directory"
            ) from error
        except OSError:  # no such locks on this file system
            pass
        yield
    finally:
        os.close(handle)
