"""Every test runs on the CPU with NaNs forbidden and compiled programs kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# before anything imports JAX, in this process and in those that the tests start
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"


def _compilation_cache() -> Path:
    """A directory of this user's; where the home cannot be written, one in the temporary files."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = base / "orbq" / "tests" / "jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except (OSError, RuntimeError):
        writable = False
    return directory if writable else Path(tempfile.mkdtemp(prefix="orbq-tests-"))


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# in this process and in those that the tests start: a NaN anywhere is an error
os.environ["JAX_DEBUG_NANS"] = "True"
