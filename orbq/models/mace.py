"""MACE-like message passing: high body order in few layers.

Each layer sums over neighbours as ``nequip`` does, to features A of degrees 0..lmax, and then takes
products of up to three of them on every atom, channel by channel, with weights that depend on the
element: four-body messages without edges of edges. Two layers suffice, and what goes from one to
the next may have a lower degree. Batatia et al., NeurIPS 2022, arXiv:2206.07697.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from orbq.models.fused import product
from orbq.models.initial import dense, normal
from orbq.models.layers import (
    MODULATION,
    DegreeLinear,
    Features,
    Geometry,
    Interaction,
    Settings,
    degree_slice,
    environment,
)
from orbq.models.tensor_product import Path, Term, coupling, form


class Products(NamedTuple):
    """Which products of A are taken, as terms of ``tensor_product.form``.

    pairs: A x A to the n_pairs rows of all pairs. terms: [1, A, pairs] x A to the output's rows,
    one weight per linearly independent product. scale: per weight, so that outputs keep the
    variance of A. order: per weight, how many A are multiplied.
    """

    pairs: tuple[Term, ...]
    n_pairs: int
    terms: tuple[Term, ...]
    scale: tuple[float, ...]
    order: tuple[int, ...]


@cache
def products(lmax: int, lmax_out: int) -> Products:
    """All independent products of one, two and three features of degrees 0..lmax.

    Triples are coupled through pairs of natural parity and degree up to ``lmax``, which reaches
    every symmetric product for lmax <= 2.
    """
    rows, n_a = _pair_rows(lmax), (lmax + 1) ** 2
    sample = np.random.default_rng(0).normal(size=(400, n_a))
    pairs, start, known = [], 0, [np.ones((400, 1)), sample]
    for path in rows:
        terms = _terms(path, path.l1**2, path.l2**2, 0, start)
        values = _evaluate(terms, sample, sample, start + 2 * path.l3 + 1)[:, start:]
        size = float(np.sqrt((values**2).mean()))
        pairs += [t._replace(value=t.value / size) for t in terms]
        known.append(values / size)
        start += 2 * path.l3 + 1
    first = np.concatenate(known, axis=1)
    out: list[Term] = []
    scale: list[float] = []
    order: list[int] = []
    for l in range(lmax_out + 1):
        found = _independent(_candidates(lmax, rows, l), l, first, sample)
        for terms, size in found:
            out += [t._replace(p=len(scale), value=t.value / size) for t in terms]
            scale.append(len(found) ** -0.5)
            order.append(1 + (terms[0].i > 0) + (terms[0].i > n_a))
    merged = _merged(pairs, 0, n_a), _merged(out, 1, n_a)
    return Products(merged[0], start, merged[1], tuple(scale), tuple(order))


def _merged(terms: list[Term], first: int, n_a: int) -> tuple[Term, ...]:
    """One term in place of two that differ by the order of two features of A, which are the rows
    from ``first`` of the left factor."""
    values: dict[tuple[int, int, int, int], float] = {}
    for t in terms:
        i, j = t.i, t.j
        if first <= i < first + n_a and i - first > j:
            i, j = j + first, i - first
        key = (i, j, t.p, t.k)
        values[key] = values.get(key, 0.0) + t.value
    return tuple(Term(*key, value) for key, value in values.items() if abs(value) > 1e-9)


def _pair_rows(lmax: int) -> list[Path]:
    """Symmetric pairs A x A of natural parity, to degrees up to ``lmax``."""
    return [
        Path(a, b, c)
        for c in range(lmax + 1)
        for a in range(lmax + 1)
        for b in range(a, lmax + 1)
        if abs(a - b) <= c <= a + b and (a + b + c) % 2 == 0
    ]


def _terms(path: Path, i: int, j: int, p: int, k: int) -> list[Term]:
    """The coupling of a path between rows from i and rows from j, to rows from k."""
    q = coupling(path)
    return [
        Term(i + a, j + b, p, k + c, float(q[a, b, c]))
        for a, b, c in np.argwhere(np.abs(q) > 1e-9).tolist()
    ]


def _candidates(lmax: int, rows: list[Path], l: int) -> list[list[Term]]:
    """Every product to degree l, of one feature, of two, of three."""
    out_row, n_a = l * l, (lmax + 1) ** 2
    found = [_terms(Path(0, l, l), 0, l * l, 0, out_row)]
    places = [(d, 1 + d * d) for d in range(lmax + 1)]  # degree, first row among [1, A, pairs]
    start = 1 + n_a
    for path in rows:
        places.append((path.l3, start))
        start += 2 * path.l3 + 1
    for n, (a, row) in enumerate(places):
        for b in range(lmax + 1):
            double = n <= lmax and b < a  # of A x A, each pair once
            if abs(a - b) <= l <= a + b and (a + b + l) % 2 == 0 and not double:
                found.append(_terms(Path(a, b, l), row, b * b, 0, out_row))
    return found


def _evaluate(terms: list[Term], x: np.ndarray, y: np.ndarray, n_out: int) -> np.ndarray:
    out = np.zeros((len(x), n_out))
    for t in terms:
        out[:, t.k] += t.value * x[:, t.i] * y[:, t.j]
    return out


def _independent(
    candidates: list[list[Term]], l: int, first: np.ndarray, sample: np.ndarray
) -> list[tuple[list[Term], float]]:
    """Candidates that are not combinations of those before them, and their root mean squares."""
    kept: list[tuple[list[Term], float]] = []
    basis = np.zeros((first.shape[0] * (2 * l + 1), 0))
    for terms in candidates:
        values = _evaluate(terms, first, sample, (l + 1) ** 2)[:, degree_slice(l)].ravel()
        size = float(np.sqrt((values**2).mean()))
        if size < 1e-9:
            continue
        column = values / np.linalg.norm(values)
        rest = column - basis @ (basis.T @ column)
        rest -= basis @ (basis.T @ rest)
        if np.linalg.norm(rest) > 1e-6:
            basis = np.column_stack([basis, rest / np.linalg.norm(rest)])
            kept.append((terms, size))
    return kept


class ProductBasis(nn.Module):
    """Weighted products of up to three features of an atom, channel by channel.

    Weights start at 1, ``product_init`` and its square by the number of features: A has a long
    tail, and third powers of third powers, layer after layer, would be forces of 1e8 eV/Å.
    """

    lmax_out: int
    settings: Settings

    @nn.compact
    def __call__(
        self, features: Float[Array, "N D C"], attributes: Float[Array, "N A"]
    ) -> Float[Array, "N D2 C"]:
        n, rows, channels = features.shape
        dtype = features.dtype
        table = products(round(rows**0.5) - 1, self.lmax_out)
        one = jnp.ones((n, 1, channels), dtype)
        pairs = self._form(features, features, one, table.pairs, table.n_pairs)
        shape = (len(table.scale), channels)
        std = [self.settings.product_init ** (n - 1) for n in table.order]
        common = self.param("weights", normal(tuple((s,) for s in std)), shape)
        fan = math.sqrt(MODULATION / attributes.shape[1])
        own = nn.Dense(
            shape[0] * channels,
            use_bias=False,
            dtype=dtype,
            kernel_init=normal(tuple(fan * s for s in std for _ in range(channels))),
            name="species",
        )(attributes)
        scale = jnp.asarray(table.scale, dtype)[:, None]
        weights = (common.astype(dtype) + own.reshape(n, *shape)) * scale
        first = jnp.concatenate([one, features, pairs], axis=1)
        return self._form(first, features, weights, table.terms, (self.lmax_out + 1) ** 2)

    def _form(self, x: Array, y: Array, w: Array, table: tuple[Term, ...], n_out: int) -> Array:
        if self.settings.kernels == "cuequivariance":
            return product(x, y, w, table)
        return form(x, y, w, table, n_out)


class Layer(nn.Module):
    """Interaction to A, products of A, species-modulated residual. Returns the features, and A."""

    lmax_out: int
    settings: Settings

    @nn.compact
    def __call__(
        self, features: Float[Array, "N D C"], geometry: Geometry
    ) -> tuple[Float[Array, "N D2 C"], Float[Array, "N D3 C"]]:
        channels, dtype = self.settings.n_channels, features.dtype
        sent = DegreeLinear(channels, name="up")(features)
        summed = Interaction(self.settings.lmax, self.settings)(sent, geometry)
        a = DegreeLinear(channels, name="mix")(summed)
        out = ProductBasis(self.lmax_out, self.settings, name="products")(a, geometry.attributes)
        out = DegreeLinear(channels, name="down")(out)
        kept = features[:, : (self.lmax_out + 1) ** 2]
        species = dense(channels, "species", dtype, MODULATION, bias=False)(geometry.attributes)
        residual = DegreeLinear(channels, name="residual")(kept * (1 + species[:, None]))
        rows = kept.shape[1]
        out = jnp.concatenate([out[:, :rows] + residual, out[:, rows:]], axis=1) * 2**-0.5
        return out, a


class MACE(nn.Module):
    """The backbone; the last layer keeps scalars, and heads read its A."""

    settings: Settings

    @nn.compact
    def __call__(
        self,
        vectors: Float[Array, "E 3"],
        species: Int[Array, " N"],
        senders: Int[Array, " E"],
        receivers: Int[Array, " E"],
        condition: Float[Array, "N K"],
    ) -> Features:
        """As ``layers.environment``."""
        settings = self.settings
        features, geometry = environment(vectors, species, senders, receivers, condition, settings)
        equivariant, scalars = features, []
        for n in range(settings.n_layers):
            lmax = 0 if n == settings.n_layers - 1 else settings.lmax_hidden
            layer = Layer(lmax, settings, name=f"layer{n}")
            features, equivariant = layer(features, geometry)
            scalars.append(features[:, 0])
        return Features(tuple(scalars), equivariant, geometry)


BACKBONE = MACE
