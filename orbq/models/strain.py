"""Stress: the derivative of the energy with respect to a homogeneous strain of atoms and lattice.

With r' = r (1 + e) for positions and lattice vectors, e symmetric,

    stress_ij = (1 / V) dE / de_ij          (positive: the crystal pulls inwards)

Knuth, Carbogno, Atalla, Blum, Scheffler, Comput. Phys. Commun. 190, 33 (2015), section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from orbq.models.potential import Params, Potential


class StressPrediction(NamedTuple):
    """energy [M] eV, forces [N, 3] eV/Å, stress [M, 3, 3] eV/Å^3 (0 where there is no cell)."""

    energy: Array
    forces: Array
    stress: Array


def predict_stress(
    potential: Potential,
    params: Params,
    positions: Float[Array, "N 3"],
    graph: jraph.GraphsTuple,
    cell: Float[Array, "M 3 3"],
) -> StressPrediction:
    """Energies, forces and stresses with one forward and one backward pass.

    cell: lattice vectors in rows, Å; zeros for molecules and padding.
    """
    n_structures = graph.n_node.shape[0]
    node = jnp.repeat(
        jnp.arange(n_structures), graph.n_node, total_repeat_length=positions.shape[0]
    )
    edge = node[graph.senders]

    def energies(x: Array, strain: Array) -> tuple[Array, Array]:
        symmetric = (strain + jnp.swapaxes(strain, 1, 2)) / 2
        shifts = graph.edges["shifts"]
        strained = graph._replace(edges={**graph.edges, "shifts": _deform(shifts, symmetric[edge])})
        energy, _ = potential.apply(params, _deform(x, symmetric[node]), strained)
        return energy.sum(), energy

    no_strain = jnp.zeros((n_structures, 3, 3), positions.dtype)
    gradient = jax.grad(energies, argnums=(0, 1), has_aux=True)
    (along_x, along_strain), energy = gradient(positions, no_strain)
    volume = jnp.abs(jnp.linalg.det(cell))[:, None, None]
    crystal = volume > 0
    stress = jnp.where(crystal, along_strain / jnp.where(crystal, volume, 1.0), 0.0)
    return StressPrediction(energy, -along_x, stress)


def _deform(vectors: Float[Array, "n 3"], strain: Float[Array, "n 3 3"]) -> Float[Array, "n 3"]:
    return vectors + jnp.einsum("ni,nij->nj", vectors, strain)
