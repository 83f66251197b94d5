"""The potential in jax-md: equal to the calculator, its dynamics on the device conserve energy."""

from __future__ import annotations

import sys
import textwrap

import ase
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import bulk, molecule
from tiny_run import random_run

import orbq
import orbq.jaxmd
from orbq.errors import InputError, OrbqError

partition = pytest.importorskip("jax_md.partition", reason="needs the extra jax-md")
space = pytest.importorskip("jax_md.space")


@pytest.fixture(scope="module")
def run() -> orbq.Run:
    return random_run(("atomic",), lmax=1, n_layers=1, cutoff=3.0)


@pytest.fixture(scope="module")
def calculator(run) -> orbq.Calculator:
    return orbq.Calculator(run, dtype="float64")


def ethanol() -> ase.Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.positions += 0.05 * np.random.default_rng(0).normal(size=(9, 3))
    atoms.info["charge"] = 1
    return atoms


def crystal() -> ase.Atoms:
    """A triclinic cell wide enough for nearest images; lattice vectors as jax-md wants them."""
    atoms = bulk("TiO", "rocksalt", a=4.2, cubic=True).repeat(2)
    rng = np.random.default_rng(1)
    atoms.set_cell(atoms.cell.array + np.tril(0.2 * rng.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += 0.1 * rng.normal(size=atoms.positions.shape)
    return atoms


def energy_and_forces(potential, positions) -> tuple[float, np.ndarray]:
    with jax.enable_x64(True):
        x = jnp.asarray(positions)
        neighbors = potential.neighbor_fn.allocate(x)
        energy, gradient = jax.jit(jax.value_and_grad(potential.energy_fn))(x, neighbor=neighbors)
        return float(energy), -np.asarray(gradient)


def expected(run, calculator, atoms) -> tuple[float, np.ndarray]:
    atoms.calc = calculator
    reference = run.reference_energy(run.structure(atoms))
    return atoms.get_potential_energy() - reference, atoms.get_forces()


@pytest.mark.parametrize("layout", ["Sparse", "Dense"])
def test_a_molecule_equals_the_calculator(run, calculator, layout):
    atoms = ethanol()
    options = {"format": partition.NeighborListFormat[layout]}
    potential = orbq.jax_md(run, atoms, space.free()[0], **options)
    energy, forces = energy_and_forces(potential, atoms.positions)
    exact = expected(run, calculator, atoms)
    assert energy == pytest.approx(exact[0], abs=1e-9)
    np.testing.assert_allclose(forces, exact[1], atol=1e-9)


def test_a_crystal_equals_the_calculator(run, calculator):
    atoms = crystal()
    with jax.enable_x64(True):
        box = jnp.asarray(atoms.cell.array.T)
        displacement, _ = space.periodic_general(box, fractional_coordinates=False)
        potential = orbq.jax_md(run, atoms, displacement, box, fractional_coordinates=False)
    energy, forces = energy_and_forces(potential, atoms.positions)
    exact = expected(run, calculator, atoms)
    assert energy == pytest.approx(exact[0], abs=1e-8)
    np.testing.assert_allclose(forces, exact[1], atol=1e-8)


def test_padding_and_order_of_the_list_do_not_matter(run):
    """What ``lax.scan`` carries: pairs in any order, N where there is none."""
    atoms = ethanol()
    potential = orbq.jax_md(run, atoms, space.free()[0])
    x = jnp.asarray(atoms.positions, jnp.float32)
    idx = potential.neighbor_fn.allocate(x).idx
    padded = jnp.concatenate([idx, jnp.full((2, 7), 9)], axis=1)[:, ::-1]
    energies = [float(potential.energy_fn(x, neighbor=i)) for i in (idx, padded)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-5)


def example() -> str:
    """The dynamics in the module's docstring."""
    text = orbq.jaxmd.__doc__ or ""
    begin, end = text.index("    import jax\n"), text.index("\nUnits:")
    return textwrap.dedent(text[begin:end])


def test_dynamics_on_the_device_conserve_energy(run):
    """The documented example: the error of velocity Verlet is of second order in the step."""
    spreads = []
    for time_step, n_steps in ((0.2, 25), (0.1, 50)):
        given = {"orbq": orbq, "run": run, "atoms": ethanol()}
        names = {**given, "time_step": time_step, "n_steps": n_steps}
        with jax.enable_x64(True):
            exec(example(), names)
        energies = np.asarray(names["energies"])
        assert energies.shape == (n_steps,)
        moved = np.abs(np.asarray(names["state"].position) - given["atoms"].positions).max()
        assert moved > 0.01
        spreads.append(np.ptp(energies))
    assert 3.0 < spreads[0] / spreads[1] < 5.0
    assert spreads[1] / 9 < 1e-3  # eV/atom, of 300 K


def test_a_box_that_is_too_small(run):
    atoms = bulk("TiO", "rocksalt", a=4.2, cubic=True)
    displacement, _ = space.periodic(4.2)
    with pytest.raises(InputError, match=r"4\.20 Å wide.*atoms\.repeat"):
        orbq.jax_md(run, atoms, displacement, 4.2)


def test_a_box_that_has_become_too_small_gives_no_number(run):
    atoms = crystal()
    box = jnp.asarray(atoms.cell.array.T)
    displacement, _ = space.periodic_general(box, fractional_coordinates=True)
    potential = orbq.jax_md(run, atoms, displacement, box, fractional_coordinates=True)
    x = jnp.asarray(atoms.get_scaled_positions())
    neighbors = potential.neighbor_fn.allocate(x)
    plain = potential.energy_fn(x, neighbor=neighbors)
    assert potential.energy_fn(x, neighbor=neighbors, box=box) == pytest.approx(float(plain))
    assert np.isfinite(potential.energy_fn(x, neighbor=neighbors, box=0.9 * box))
    assert np.isnan(potential.energy_fn(x, neighbor=neighbors, box=0.7 * box))


def test_lattice_vectors_in_rows_are_refused(run):
    """ASE has them in rows, jax-md in columns: a tilted cell would be another one, in silence."""
    atoms = bulk("TiO", "rocksalt", a=4.2, cubic=True).repeat(3)
    atoms.cell[1, 0] = 2.0
    displacement, _ = space.periodic_general(atoms.cell.array.T)
    with pytest.raises(InputError, match=r"in rows.*pass atoms\.cell\.array\.T"):
        orbq.jax_md(run, atoms, displacement, atoms.cell.array)
    orbq.jax_md(run, atoms, displacement, atoms.cell.array.T)


def test_a_crystal_without_a_box_and_positions_of_other_atoms(run):
    """A crystal would be computed as a cluster; an index beyond an array is none to JAX."""
    with pytest.raises(InputError, match="no box is given"):
        orbq.jax_md(run, crystal(), space.free()[0])
    potential = orbq.jax_md(run, ethanol(), space.free()[0])
    x = jnp.asarray(molecule("H2O").positions)
    neighbors = potential.neighbor_fn.allocate(x)
    with pytest.raises(InputError, match="9 atoms need"):
        potential.energy_fn(x, neighbor=neighbors)


def test_half_a_neighbour_list(run):
    layout = partition.NeighborListFormat.OrderedSparse
    with pytest.raises(InputError, match="Sparse or Dense"):
        orbq.jax_md(run, ethanol(), space.free()[0], format=layout)


def test_without_jax_md(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_md", None)
    with pytest.raises(OrbqError, match=r"orbq\[jax-md\]"):
        orbq.jax_md(run, ethanol(), space.free()[0])
