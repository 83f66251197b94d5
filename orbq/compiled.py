"""How this process compiles: precision, the cache on disk, and how often a program was compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from orbq.cache import use_compilation_cache
from orbq.config import Config


def configure_jax(config: Config) -> None:
    """Precision and compilation cache of this process."""
    jax.config.update("jax_enable_x64", config.training.precision == "float64")
    jax.config.update("jax_default_matmul_precision", config.training.matmul_precision)
    if config.training.compilation_cache:
        use_compilation_cache()


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
