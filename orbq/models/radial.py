"""Radial basis and smooth cutoff of an edge."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

BOND_CENTRES = (0.8, 1.0, 1.2, 1.5, 1.8, 2.2)  # of the sum of covalent radii
BOND_WIDTH = 0.25


def polynomial_cutoff(
    distance: Float[Array, " E"], cutoff: float, p: int = 6
) -> Float[Array, " E"]:
    """Envelope u(d): u(0) = 1, u = u' = u'' = 0 at the cutoff, 0 beyond.

    u(x) = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2), x = d / cutoff.
    Gasteiger, Gross, Guennemann, "Directional message passing", arXiv:2003.03123, eq. 8.
    """
    x = distance / cutoff
    x = jnp.where(x < 1.0, x, 1.0)  # beyond the cutoff the polynomial is flat at 0
    return (
        1.0
        - (p + 1) * (p + 2) / 2 * x**p
        + p * (p + 2) * x ** (p + 1)
        - p * (p + 1) / 2 * x ** (p + 2)
    )


def bessel_basis(
    distance: Float[Array, " E"], cutoff: float, n: int, damping: float = 0.0
) -> Float[Array, "E n"]:
    """sin(n pi x) / (sqrt(2) x n^damping), x = d / cutoff, for n = 1..n.

    arXiv:2003.03123, eq. 7, but for the constant: with this one the functions' root mean square
    over the neighbours of a molecule at 5 Å is about 1. ``damping`` makes what is learnt of
    distances smoother: functions that oscillate faster need larger weights to matter as much.
    ``distance`` (Å) must be positive; see ``safe_norm``.
    """
    frequencies = jnp.arange(1, n + 1, dtype=distance.dtype) * jnp.pi
    x = distance[:, None] / cutoff  # [E, 1]
    functions = jnp.sin(frequencies * x) / (2.0**0.5 * x)
    return (
        functions / jnp.arange(1, n + 1, dtype=distance.dtype) ** damping if damping else functions
    )


def bond_basis(
    distance: Float[Array, " E"], bond_length: Float[Array, " E"]
) -> Float[Array, "E 6"]:
    """Gaussians of the distance in units of the sum of the two covalent radii, centred at
    BOND_CENTRES: what is a bond between one pair of elements is one between another."""
    scaled = distance / bond_length
    centres = jnp.asarray(BOND_CENTRES, distance.dtype)
    return jnp.exp(-(((scaled[:, None] - centres) / BOND_WIDTH) ** 2))


def safe_norm(vectors: Float[Array, "E 3"], floor: float = 1e-3) -> Float[Array, " E"]:
    """Length of each vector (Å), at least ``floor``, with a zero gradient below it.

    Both branches of the ``where`` are finite at the origin, so that first and second derivatives
    are too; no pair of atoms is ever that close (the labelling stage refuses it).
    """
    square = jnp.sum(vectors * vectors, axis=-1)
    inside = square < floor * floor
    return jnp.where(inside, floor, jnp.sqrt(jnp.where(inside, 1.0, square)))
