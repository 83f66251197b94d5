"""The edge tensor product's primitive against the same sums in plain jnp, side by side.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/bench_tensor_product.py     # about a minute

One interaction of 5,040 edges on 336 atoms, 32 channels, features and harmonics to lmax 2; medians
of CPU milliseconds. "gradient": of an energy with respect to the positions; "training": of a loss
of its forces with respect to the radial weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orbq.models.tensor_product import coupling, edge_tensor_product, paths

N_ATOMS, N_EDGES, CHANNELS, LMAX, N_RADIAL = 336, 5040, 32, 2, 8
TABLE = paths(LMAX, LMAX, range(LMAX + 1))


def plain(features: Array, harmonics: Array, weights: Array) -> Array:
    """The definition of ``edge_tensor_product``, one product per non-zero coefficient."""
    rows: list[Array | None] = [None] * (LMAX + 1) ** 2
    for p, path in enumerate(TABLE):
        q = coupling(path)
        for i, j, k in np.argwhere(np.abs(q) > 1e-9).tolist():
            y = float(q[i, j, k]) * harmonics[:, path.l2**2 + j, None]
            term = y * features[:, path.l1**2 + i] * weights[:, p]
            row, known = path.l3**2 + k, rows[path.l3**2 + k]
            rows[row] = term if known is None else known + term
    return jnp.stack([r for r in rows if r is not None], axis=1)


def energy(product: Callable[..., Array], weight: Array, positions: Array, x: Array) -> Array:
    """An energy that depends on every message."""
    vectors = positions[RECEIVERS] - positions[SENDERS]
    distance = jnp.sqrt((vectors**2).sum(-1) + 1e-9)
    harmonics = e3nn.spherical_harmonics(
        range(LMAX + 1), e3nn.IrrepsArray("1o", vectors), normalize=True
    ).array
    radial = jnp.sin(distance[:, None] * jnp.arange(1, N_RADIAL + 1))
    weights = (radial @ weight).reshape(N_EDGES, len(TABLE), CHANNELS)
    messages = product(x[SENDERS], harmonics, weights)
    out = jax.ops.segment_sum(messages, RECEIVERS, N_ATOMS, indices_are_sorted=True)
    return jnp.sum(jnp.tanh(out[:, 0]) * (out**2).sum(1))


def main() -> None:
    """Time both, print both and the ratio; the results must agree."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(N_RADIAL, len(TABLE) * CHANNELS)) * 0.1, jnp.float32)
    positions = jnp.asarray(rng.normal(size=(N_ATOMS, 3)) * 5, jnp.float32)
    x = jnp.asarray(rng.normal(size=(N_ATOMS, (LMAX + 1) ** 2, CHANNELS)), jnp.float32)
    products = {
        "plain": plain,
        "primitive": lambda f, y, w: edge_tensor_product(f, y, w, TABLE),
    }

    def forces(product: Callable[..., Array]) -> Callable[..., Array]:
        return jax.grad(lambda w, r, f: energy(product, w, r, f), argnums=1)

    def training(product: Callable[..., Array]) -> Callable[..., Array]:
        return jax.grad(lambda w, r, f: jnp.sum(forces(product)(w, r, f) ** 2))

    for name, make in (("gradient", forces), ("training", training)):
        found = {n: measure(make(p), weight, positions, x) for n, p in products.items()}
        a, b = (np.asarray(found[n][1]) for n in products)
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max(), "the two do not agree"
        times = {n: found[n][0] for n in products}
        print(
            f"{name}: plain {times['plain']:.1f} ms, primitive {times['primitive']:.1f} ms, "
            f"ratio {times['plain'] / times['primitive']:.1f}"
        )


def measure(function: Callable[..., Array], *arguments: Array) -> tuple[float, Array]:
    """Median CPU milliseconds of the compiled function, and its result."""
    compiled = jax.jit(function).lower(*arguments).compile()
    times = []
    for _ in range(12):
        start = time.process_time()
        result = jax.block_until_ready(compiled(*arguments))
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times)), result


_EDGES = np.random.default_rng(1).integers(0, N_ATOMS, (2, N_EDGES))
SENDERS, RECEIVERS = jnp.asarray(_EDGES[0]), jnp.asarray(np.sort(_EDGES[1]))

if __name__ == "__main__":
    main()
