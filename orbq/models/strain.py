"""Stress: the derivative of the energy with respect to a homogeneous strain of atoms and lattice.

With r' = r (1 + e) for positions and lattice vectors, e symmetric,

    stress_ij = (1 / V) dE / de_ij          (positive: the crystal pulls inwards)

Knuth, Carbogno, Atalla, Blum, Scheffler, Comput. Phys. Commun. 190, 33 (2015), section 2.
"""

from __future__ import annotations

import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float


def no_strain(graph: jraph.GraphsTuple, dtype: jnp.dtype) -> Float[Array, "M 3 3"]:
    """The strain of every structure at which the stress is the derivative."""
    return jnp.zeros((graph.n_node.shape[0], 3, 3), dtype)


def strained(
    positions: Float[Array, "N 3"], graph: jraph.GraphsTuple, strain: Float[Array, "M 3 3"] | None
) -> tuple[Float[Array, "N 3"], jraph.GraphsTuple]:
    """Positions and graph of structures that the symmetric part of ``strain`` deforms; None: as
    they are."""
    if strain is None:
        return positions, graph
    n_structures = graph.n_node.shape[0]
    node = jnp.repeat(
        jnp.arange(n_structures), graph.n_node, total_repeat_length=positions.shape[0]
    )
    symmetric = (strain + jnp.swapaxes(strain, 1, 2)) / 2
    shifts = _deformed(graph.edges["shifts"], symmetric[node[graph.senders]])
    edges = {**graph.edges, "shifts": shifts}
    return _deformed(positions, symmetric[node]), graph._replace(edges=edges)


def stress_of(
    along_strain: Float[Array, "M 3 3"], cell: Float[Array, "M 3 3"]
) -> Float[Array, "M 3 3"]:
    """Stress, eV/Å^3, from dE/de, eV; cell: lattice vectors in rows, Å. 0 where there is none."""
    volume = jnp.abs(jnp.linalg.det(cell))[:, None, None]
    crystal = volume > 0
    return jnp.where(crystal, along_strain / jnp.where(crystal, volume, 1.0), 0.0)


def _deformed(vectors: Float[Array, "n 3"], strain: Float[Array, "n 3 3"]) -> Float[Array, "n 3"]:
    return vectors + jnp.einsum("ni,nij->nj", vectors, strain, precision="highest")
