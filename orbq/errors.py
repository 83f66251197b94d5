"""The one error a user can cause: it carries the exit status and never shows a traceback."""

from __future__ import annotations


class OrbqError(Exception):
    """A job that failed although its input was right (exit status 1)."""

    exit_status = 1


class InputError(OrbqError, ValueError):
    """Bad input or configuration (exit status 2); names the file, the value, limit and remedy."""

    exit_status = 2


class PreemptedError(OrbqError):
    """The job was told to end (SIGTERM) and has kept everything; it is to be started again."""

    exit_status = 143  # 128 + SIGTERM, as shells report it
