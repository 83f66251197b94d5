"""The one error a user can cause: it carries the exit status and never shows a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OrbqError(Exception):
    """A job that failed although its input was right (exit status 1)."""

    exit_status = 1


class InputError(OrbqError, ValueError):
    """Bad input or configuration (exit status 2); names the file, the value, limit and remedy."""

    exit_status = 2


class PreemptedError(OrbqError):
    """The job was told to end (SIGTERM) and has kept everything; it is to be started again."""

    exit_status = 143  # 128 + SIGTERM, as shells report it


@contextmanager
def told_when_full(out: Path) -> Iterator[None]:
    """Turn the error of a full disk, met in writing ``out``, into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OrbqError(
            f"{out}: no room left on the disk ({error.strerror}); what is finished is kept: "
            "make room and run the same command again to go on"
        ) from error
