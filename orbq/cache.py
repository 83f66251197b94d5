"""Where orbq keeps what it can make again: compiled programs and downloads."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY_VARIABLE = "ORBQ_CACHE_DIR"
MIN_COMPILE_SECONDS = 0.5  # programs that compile faster are not worth a file


def cache_directory() -> Path:
    """``$ORBQ_CACHE_DIR``, else ``$XDG_CACHE_HOME/orbq``, else ``~/.cache/orbq``; may not exist."""
    if given := os.environ.get(DIRECTORY_VARIABLE):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "orbq"


def use_compilation_cache() -> Path | None:
    """Let JAX keep compiled programs on disk; returns the directory, None if it is not writable.

    Acts on the programs that are compiled from then on. JAX keys the entries by program, compiler
    options, its own version and the device, so that the directory may be shared.
    """
    import jax

    directory = (cache_directory() / "jax").resolve()  # the path is part of the entries' keys
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(directory, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
