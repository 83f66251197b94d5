"""A trained run in jax-md: an ``energy_fn`` with its neighbour list, for dynamics on the device.

    neighbor_fn, energy_fn = orbq.jax_md(run, atoms, displacement, box)
    neighbors = neighbor_fn.allocate(positions)
    energy_fn(positions, neighbor=neighbors)                                 # eV

Constant-energy dynamics that leave the device only at the end:

    import jax
    import jax.numpy as jnp
    from ase import units
    from jax_md import quantity, simulate, space

    displacement, shift = space.free()
    neighbor_fn, energy_fn = orbq.jax_md(run, atoms, displacement)
    positions, masses = jnp.asarray(atoms.positions), jnp.asarray(atoms.get_masses())
    start, move = simulate.nve(energy_fn, shift, dt=time_step * units.fs)
    neighbors = neighbor_fn.allocate(positions)
    state = start(jax.random.key(0), positions, kT=300 * units.kB, mass=masses, neighbor=neighbors)

    def step(carry, _):
        state, neighbors = carry
        neighbors = neighbors.update(state.position)
        state = move(state, neighbor=neighbors)
        kinetic = quantity.kinetic_energy(momentum=state.momentum, mass=state.mass)
        return (state, neighbors), kinetic + energy_fn(state.position, neighbor=neighbors)

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=n_steps))
    (state, neighbors), energies = scan((state, neighbors))                  # [n_steps] eV
    assert not neighbors.did_buffer_overflow        # else allocate anew and go on from before

Units: eV, Å, atomic mass units, and so Å sqrt(amu/eV) of time, of which ``ase.units.fs`` is one
femtosecond. Schoenholz, Cubuk, NeurIPS 2020, arXiv:1912.04232.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array

from orbq.errors import InputError, OrbqError
from orbq.models.potential import energy_fn as energy_of
from orbq.run import Run, load, require_energy
from orbq.schema import Structure

if TYPE_CHECKING:
    from ase import Atoms

SKIN = 0.5  # Å


class NeighborPotential(NamedTuple):
    """neighbor_fn: jax-md's ``allocate`` and ``update``. energy_fn: ``(positions, neighbor,
    **kwargs) -> eV``, relative to the run's reference energies (``Run.reference_energy``)."""

    neighbor_fn: Any
    energy_fn: Callable[..., Array]


def jax_md(
    run: Run | str | Path,
    atoms: Atoms | Structure,
    displacement: Callable[..., Array],
    box: Any = None,
    skin: float = SKIN,
    **options: Any,
) -> NeighborPotential:
    """The run's potential for the elements, charge and spin of ``atoms`` in jax-md's convention.

    run: loaded, or its directory. displacement: jax-md's ``d(R_a, R_b, **kwargs)``, as of
    ``space.periodic_general``. box: Å, as jax-md takes it (a number, [3], or [3, 3] with lattice
    vectors in columns); None for a molecule in free space. skin: Å by which atoms may move in all
    before neighbours are searched anew.
    options: of ``jax_md.partition.neighbor_list``, as ``fractional_coordinates`` or ``format``
    (Sparse, the default, or Dense).

    Keyword arguments of ``energy_fn`` go to ``displacement``; the derivative with respect to a
    ``box`` there is that of the energy, which is not a number once that box is less than twice the
    cutoff wide. jax-md searches neighbours anew when atoms have moved, not when the box has shrunk:
    call ``allocate`` with the new box well before it has done so by ``skin / (cutoff + skin)``, or
    atoms that came near are missed. Precision is that of the positions.

    Raises OrbqError without jax-md, InputError for a structure that the run cannot take, a run that
    was taught no energies, half neighbour lists, a periodic structure without a box, a box with
    the lattice vectors of ``atoms`` in rows, or one in which an atom could meet two images of
    another; ``energy_fn`` for positions of other atoms.
    """
    try:
        from jax_md import partition
    except ImportError as error:
        raise OrbqError(f"jax-md is missing ({error}): pip install 'orbq[jax-md]'") from error
    run = run if isinstance(run, Run) else load(run)
    require_energy(run)
    structure = run.structure(atoms)
    cutoff = run.potential.architecture.cutoff
    formats = partition.NeighborListFormat
    layout = options.pop("format", formats.Sparse)
    if layout is formats.OrderedSparse:
        raise InputError("messages go both ways along a bond: use the format Sparse or Dense")
    if box is None:
        if structure.pbc.any():
            raise InputError(
                f"pbc of the structure is {structure.pbc.tolist()}, but no box is given: pass "
                "atoms.cell.array.T, or set atoms.pbc = False for a molecule in free space"
            )
        options.setdefault("disable_cell_list", True)
    else:
        _check_not_rows(np.asarray(box, float), structure)
        _check_box(np.asarray(box, float), cutoff + skin)
    neighbor_fn = partition.neighbor_list(
        displacement, 1.0 if box is None else box, cutoff, skin, format=layout, **options
    )
    return NeighborPotential(neighbor_fn, _energy_fn(run, structure, displacement))


def _energy_fn(
    run: Run, structure: Structure, displacement: Callable[..., Array]
) -> Callable[..., Array]:
    energy, cutoff = energy_of(run.potential), run.potential.architecture.cutoff
    n = len(structure.numbers)
    numbers = np.asarray(structure.numbers, np.int32)

    def energy_fn(positions: Array, neighbor: Any, **kwargs: Any) -> Array:
        """Energy (eV) at positions [n, 3]; neighbor: jax-md's list, or ``idx`` of a sparse one."""
        if positions.shape != (n, 3):  # indices beyond an array are none to JAX
            raise InputError(
                f"positions {positions.shape}: the structure's {n} atoms need {(n, 3)}"
            )
        dtype = positions.dtype
        senders, receivers = _edges(neighbor, n)
        real = senders < n
        senders = jnp.where(real, senders, n - 1)
        apart = jax.vmap(lambda a, b: displacement(a, b, **kwargs))
        vectors = apart(positions[receivers], positions[senders])
        far = jnp.array([2 * cutoff, 0.0, 0.0], dtype)
        graph = jraph.GraphsTuple(
            nodes={"numbers": numbers},
            # the displacement knows the space: all of r is in the shifts, and none in positions
            edges={"shifts": jnp.where(real[:, None], vectors, far).astype(dtype)},
            senders=senders,
            receivers=receivers,
            n_node=np.array([n], np.int32),
            n_edge=np.array([len(senders)], np.int32),
            globals={
                "total_charge": jnp.array([structure.total_charge], dtype),
                "spin_multiplicity": jnp.array([structure.spin_multiplicity], dtype),
                "mask": np.array([True]),
            },
        )
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), run.params)
        found = energy(params, jnp.zeros((n, 3), dtype), graph)
        if kwargs.get("box") is None:
            return found
        return jnp.where(_widths(kwargs["box"]).min() < 2 * cutoff, jnp.nan, found)

    return energy_fn


def _edges(neighbor: Any, n: int) -> tuple[Array, Array]:
    """Senders and receivers, receivers ascending; of padding: n, and n - 1 at the end.

    ``idx``: [2, E] pairs (sparse) or [n, K] neighbours of every atom (dense); n: none there.
    """
    idx = getattr(neighbor, "idx", neighbor)
    if getattr(getattr(neighbor, "format", None), "name", "Sparse") == "Dense":
        receivers = jnp.repeat(jnp.arange(n), idx.shape[1])
        senders = idx.reshape(-1)
    else:
        senders, receivers = idx
    real = (senders < n) & (receivers < n)
    receivers = jnp.where(real, receivers, n - 1)
    order = jnp.argsort(receivers, stable=True)
    return jnp.where(real, senders, n)[order], receivers[order]


def _check_not_rows(box: np.ndarray, structure: Structure) -> None:
    """Refuse ASE's lattice vectors, in rows, where jax-md takes them in columns."""
    cell = structure.cell
    if box.shape == (3, 3) and np.allclose(box, cell) and not np.allclose(box, cell.T):
        raise InputError(
            "box has the lattice vectors of the structure in rows, jax-md takes them in columns: "
            "pass atoms.cell.array.T"
        )


def _widths(box: Any) -> Array:
    """Distances of the box's opposite faces, Å."""
    box = jnp.asarray(box)
    if box.ndim < 2:
        return jnp.atleast_1d(box)
    return 1 / jnp.linalg.norm(jnp.linalg.inv(box), axis=1)


def _check_box(box: np.ndarray, reach: float) -> None:
    """jax-md takes the nearest image only. Raises InputError where that is not enough."""
    widths = np.asarray(_widths(box))
    if widths.min() < 2 * reach:
        raise InputError(
            f"the box is {widths.min():.2f} Å wide, less than twice the cutoff and skin, "
            f"{2 * reach:.2f} Å, and jax-md takes the nearest image of an atom only: repeat the "
            "cell (atoms.repeat), or use orbq.Calculator, which takes every image"
        )
