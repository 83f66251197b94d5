"""Every test runs on the CPU with NaNs forbidden and compiled programs kept between runs."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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


COMPILED = _compilation_cache()


def _own_cache() -> Path:
    """orbq's cache directory for this process: compiled programs from ``COMPILED``, all else new,
    so that no test finds a data set that older code has labelled.
    """
    directory = Path(tempfile.mkdtemp(prefix="orbq-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    (directory / "jax").symlink_to(COMPILED)
    return directory


os.environ["ORBQ_CACHE_DIR"] = str(_own_cache())
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_DEBUG_NANS"] = "True"


@pytest.fixture
def own_settings_of_jax() -> Iterator[None]:
    """What a test changes of JAX's settings is undone."""
    from training_runs import settings_put_back

    with settings_put_back():
        yield
