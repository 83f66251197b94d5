"""How this process compiles: precision, the cache on disk, and how often a program was compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orbq.cache import use_compilation_cache
from orbq.config import Config
from orbq.errors import InputError


def configure_jax(config: Config) -> None:
    """Floats and compilation cache of this process."""
    jax.config.update("jax_enable_x64", config.training.precision == "float64")
    if config.training.compilation_cache:
        use_compilation_cache()


def available_dtype(dtype: Any) -> np.dtype:
    """A type of floats that JAX has at present. Raises InputError for others."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise InputError(f"dtype {dtype!r}: give float32 or float64")
    if found != jax.dtypes.canonicalize_dtype(found):
        raise InputError(
            f"dtype {found}: JAX has only float32 until it is told otherwise: call "
            'jax.config.update("jax_enable_x64", True) first (orbq.Calculator(run, '
            'dtype="float64") needs no such call)'
        )
    return found


class Counted:
    """A jitted function that counts how often it was compiled."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.compilations = 0

        def traced(*args: Any) -> Any:
            self.compilations += 1
            return function(*args)

        self._jitted = jax.jit(traced, **options)

    def __call__(self, *args: Any) -> Any:
        return self._jitted(*args)
