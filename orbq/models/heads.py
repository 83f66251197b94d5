"""Charge heads: from a backbone's features to the columns of a target, in its unit.

A head predicts the *normalised* target u; the value is ``mean[Z] + scale[Z] u`` with the constants
of ``targets.Statistics``. Conserved targets are then projected on the total charge Q of their
structure: the smallest change in u (least squares) with ``sum c q = Q`` exactly,

    u_k += c_k s_k (Q - sum c q) / sum (c s)^2    over all columns k of the structure's atoms,

c the column's weight in the charge, s its scale.

Equivariant head: irreps of the target from equivariant features; degrees the backbone does not
carry are made from products (4e = 2e x 2e, 2o = 1o x 2e, ...). Invariant head: the columns as
plain scalars, the baseline, which cannot know the orientation.
"""

from __future__ import annotations

from typing import NamedTuple

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from orbq import orbitals
from orbq.models.initial import dense, fan_in
from orbq.models.layers import Features, degree_slice
from orbq.targets import TARGETS, Statistics

HEADS = ("equivariant", "invariant")
N_PRODUCT_CHANNELS = 16
SMALL = 0.03  # variance of a head's last layer: it starts near the mean


class Segments(NamedTuple):
    """Which structure each atom belongs to. structure [N] int32; n_structures: static count."""

    structure: Array
    n_structures: int


class EquivariantColumns(nn.Module):
    """Columns of ``irreps`` (e3nn notation) in its order, from equivariant and scalar features."""

    irreps: str
    hidden: int = 32

    @nn.compact
    def __call__(self, features: Features) -> Float[Array, "N K"]:
        scalars = jnp.concatenate(features.scalars, axis=-1)
        dtype = scalars.dtype
        h = jax.nn.silu(dense(self.hidden, "hidden", dtype)(scalars))
        irreps = e3nn.Irreps(self.irreps)
        distinct = sorted({ir for _, ir in irreps})
        # cut into degrees once: the gradient of every cut is padded to the whole features' size
        lmax = round(features.equivariant.shape[1] ** 0.5) - 1
        parts = [features.equivariant[:, degree_slice(l)] for l in range(lmax + 1)]
        columns = {ir: self._columns(parts, h, ir, irreps.count(ir)) for ir in distinct}
        out, used = [], dict.fromkeys(columns, 0)
        for mul, ir in irreps:
            part = columns[ir][:, used[ir] : used[ir] + mul]  # [N, mul, 2l+1]
            used[ir] += mul
            out.append(part.reshape(-1, mul * ir.dim))
        return jnp.concatenate(out, axis=1)

    def _columns(self, parts: list[Array], h: Array, ir: e3nn.Irrep, mul: int) -> Array:
        """``mul`` copies of irrep ``ir`` [N, mul, 2l+1], linear in the equivariant features with
        weights that depend on the scalars; zero where the features cannot make this irrep.
        parts: of every degree l, [N, 2l+1, C]."""
        if ir.l == 0 and ir.p == 1:
            return dense(mul, str(ir), h.dtype, SMALL)(h)[:, :, None]
        basis = self._basis(parts, ir)  # [N, 2l+1, B]
        if basis is None:
            return jnp.zeros((h.shape[0], mul, ir.dim), h.dtype)
        width = basis.shape[-1]
        gate = dense(width, f"{ir}_gate", h.dtype, SMALL)(h) + 1.0
        weight = self.param(str(ir), fan_in(SMALL), (width, mul))
        return jnp.swapaxes((basis * gate[:, None]) @ weight.astype(h.dtype), 1, 2)

    def _basis(self, parts: list[Array], ir: e3nn.Irrep) -> Array | None:
        """Everything of irrep ``ir`` at hand: the features themselves and products of two."""
        lmax = len(parts) - 1
        found = []
        if ir.l <= lmax and ir.p == (-1) ** ir.l:
            found.append(parts[ir.l])
        for a, b in ((1, 1), (1, 2), (2, 2)):
            natural = ir.p == (-1) ** (a + b)
            if max(a, b) <= lmax and natural and abs(a - b) <= ir.l <= a + b:
                found.append(self._product(parts[a], parts[b], (a, b, ir.l)))
        return jnp.concatenate(found, axis=-1) if found else None

    def _product(self, left: Array, right: Array, degrees: tuple[int, int, int]) -> Array:
        a, b, l = degrees
        sides = []
        for side, part in (("left", left), ("right", right)):
            shape = (part.shape[-1], N_PRODUCT_CHANNELS)
            weight = self.param(f"{a}x{b}_{l}_{side}", fan_in(), shape)
            sides.append(part @ weight.astype(part.dtype))
        q = jnp.asarray(orbitals.coupling(a, b, l), left.dtype)
        return jnp.einsum("ijk,nic,njc->nkc", q, *sides)


class InvariantColumns(nn.Module):
    """``k`` scalars of every atom from its scalar features."""

    k: int
    hidden: int = 32

    @nn.compact
    def __call__(self, features: Features) -> Float[Array, "N K"]:
        scalars = jnp.concatenate(features.scalars, axis=-1)
        h = jax.nn.silu(dense(self.hidden, "hidden", scalars.dtype)(scalars))
        return dense(self.k, "columns", scalars.dtype, SMALL)(h)


class TargetHead(nn.Module):
    """Predicts one per-atom target [N, k] in its unit, conserving the total charge."""

    target: str
    kind: str
    statistics: Statistics
    method: str = orbitals.GFN1

    @nn.compact
    def __call__(
        self,
        features: Features,
        numbers: Int[Array, " N"],
        total_charge: Float[Array, " M"],
        segments: Segments,
    ) -> Float[Array, "N K"]:
        target = TARGETS[self.target]
        if self.kind == "equivariant":
            u = EquivariantColumns(target.irreps, name="equivariant")(features)
        else:
            u = InvariantColumns(target.k, name="invariant")(features)
        dtype = u.dtype
        if u.shape[1] != target.k:  # 23 irreps to the ten orbital charges
            u = u @ jnp.asarray(orbitals.orbital_from_density().T, dtype)
        present = jnp.asarray(target.elements(self.method))[numbers]
        mean, scale = (jnp.asarray(t, dtype)[numbers] for t in self.statistics)
        values = jnp.where(present, mean + scale * u, 0.0)
        if target.charge is None:
            return values
        weight = jnp.where(present, jnp.asarray(target.charge, dtype), 0.0)
        return conserve(values, weight, scale, total_charge, segments)


def conserve(
    values: Float[Array, "N K"],
    weight: Float[Array, "N K"],
    scale: Float[Array, "N K"],
    total_charge: Float[Array, " M"],
    segments: Segments,
) -> Float[Array, "N K"]:
    """``values`` moved so that ``sum weight * values`` over each structure is its total charge."""

    def per_structure(x: Array) -> Array:
        return jax.ops.segment_sum(x.sum(1), segments.structure, segments.n_structures)

    missing = total_charge - per_structure(weight * values)
    metric = per_structure((weight * scale) ** 2)
    share = jnp.where(metric > 0, missing / jnp.where(metric > 0, metric, 1.0), 0.0)
    return values + weight * scale**2 * share[segments.structure][:, None]


def n_parameters(params: object) -> int:
    """Number of trainable numbers in a parameter tree."""
    return int(sum(np.size(leaf) for leaf in jax.tree.leaves(params)))
