"""Initial parameters from one random draw per submodule.

Compiling JAX's counter-based generator for each of fifty parameters takes ten seconds on a CPU.
Here an initialiser only states its standard deviation (in a Flax box, so that it survives an
abstract evaluation), and all parameters of a top-level submodule are cut out of one normal draw
whose key is folded with the submodule's name: adding a head leaves the others' parameters alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

Initializer = Callable[..., Any]
Std = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


@struct.dataclass
class Drawn(nn.meta.AxisMetadata):
    """A parameter that is drawn with standard deviation ``std``, one for all of its numbers or
    nested tuples that broadcast to its shape."""

    value: Any
    std: Std = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Drawn:
        return self.replace(value=val)  # type: ignore[attr-defined]

    def add_axis(self, index: int, params: dict[Any, Any]) -> Drawn:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Drawn:
        return self


def normal(std: Std) -> Initializer:
    """Normal with mean 0 and this standard deviation, as ``Drawn``."""

    def initialise(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Drawn:
        return Drawn(jnp.zeros(shape, dtype), std)

    return initialise


def fan_in(variance: float = 1.0) -> Initializer:
    """Normal with variance ``variance / shape[0]``: keeps the variance of what passes through."""

    def initialise(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Drawn:
        return Drawn(jnp.zeros(shape, dtype), math.sqrt(variance / shape[0]))

    return initialise


def dense(width: int, name: str, dtype: Any, variance: float = 1.0, bias: bool = True) -> nn.Dense:
    """A dense layer with ``fan_in(variance)`` weights and zero bias."""
    return nn.Dense(width, bias, dtype=dtype, kernel_init=fan_in(variance), name=name)


def draw(key: Array, boxed: Any, dtype: Any) -> dict[str, Any]:
    """Parameters for a tree of ``Drawn`` boxes (others are zeros), by top-level submodule."""
    return {
        name: _draw(jax.random.fold_in(key, zlib.crc32(name.encode())), branch, dtype)
        for name, branch in boxed.items()
    }


def _draw(key: Array, branch: Any, dtype: Any) -> Any:
    leaves, tree = jax.tree.flatten(branch, is_leaf=lambda x: isinstance(x, Drawn))
    sizes = [math.prod(b.value.shape) if isinstance(b, Drawn) else 0 for b in leaves]
    numbers = jax.random.normal(key, (sum(sizes),), dtype)
    out, start = [], 0
    for box, size in zip(leaves, sizes, strict=True):
        if isinstance(box, Drawn):
            std = jnp.asarray(box.std, dtype)
            out.append(std * numbers[start : start + size].reshape(box.value.shape))
        else:
            out.append(jnp.zeros(box.shape, dtype))
        start += size
    return jax.tree.unflatten(tree, out)
