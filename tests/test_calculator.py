"""The ASE calculator: derivatives, neighbours with a skin, compilations, dynamics."""

from __future__ import annotations

import copy
import pickle
import warnings

import ase
import jax
import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from tiny_run import random_run, save_run

from orbq.calculator import Calculator, SkinNeighbors
from orbq.capacity import Capacities, Capacity, rounded_up
from orbq.ensemble import Ensemble
from orbq.errors import InputError
from orbq.preprocess.neighbors import neighbor_list
from orbq.run import Run
from orbq.schema import Structure


@pytest.fixture(scope="module")
def run():
    return random_run(("atomic",), lmax=1)


@pytest.fixture(scope="module")
def calculator(run):
    """In float64; compiled once for all tests of this file."""
    return Calculator(run, dtype="float64")


STEP = 2e-4  # Å: errors of h^4 and of rounding are both far below 1e-6


def ethanol(seed: int = 0) -> ase.Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.positions += 0.05 * np.random.default_rng(seed).normal(size=(9, 3))
    return atoms


def crystal() -> ase.Atoms:
    atoms = bulk("TiO", "rocksalt", a=4.2, cubic=True)
    rng = np.random.default_rng(2)
    atoms.set_cell(atoms.cell.array + 0.1 * rng.normal(size=(3, 3)), scale_atoms=True)
    atoms.positions += 0.1 * rng.normal(size=(8, 3))
    return atoms


def finite_difference(energy, displace, step: float) -> float:
    """Central difference of fourth order of ``energy(displace(x))`` at x = 0."""
    values = [energy(displace(k * step)) for k in (-2, -1, 1, 2)]
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)


def energy_with(calculator):
    def energy(atoms):
        atoms.calc = calculator
        return atoms.get_potential_energy()

    return energy


@pytest.mark.parametrize("make", [ethanol, crystal])
def test_forces_are_the_gradient_of_the_energy(calculator, make):
    atoms = make()
    atoms.calc = calculator
    forces = atoms.get_forces()
    direction = np.random.default_rng(1).normal(size=forces.shape)

    def displaced(x):
        moved = atoms.copy()
        moved.positions += x * direction
        return moved

    numeric = -finite_difference(energy_with(calculator), displaced, STEP)
    exact = (forces * direction).sum()
    assert abs(exact) > 1e-3
    assert numeric == pytest.approx(exact, rel=1e-6)


def test_stress_is_the_strain_derivative(calculator):
    atoms = crystal()
    atoms.calc = calculator
    stress = atoms.get_stress(voigt=False)
    np.testing.assert_allclose(stress, stress.T)
    strain = np.random.default_rng(3).normal(size=(3, 3))
    strain = (strain + strain.T) / 2

    def strained(x):
        deformed = atoms.copy()
        deformed.set_cell(atoms.cell.array @ (np.eye(3) + x * strain), scale_atoms=True)
        return deformed

    numeric = finite_difference(energy_with(calculator), strained, STEP) / atoms.get_volume()
    exact = (stress * strain).sum()
    assert abs(exact) > 1e-5
    assert numeric == pytest.approx(exact, rel=1e-6)
    np.testing.assert_allclose(  # the stress program's energy and forces are those of the other
        atoms.get_forces(), fresh(calculator, atoms).get_forces(), atol=1e-12
    )


def fresh(calculator, atoms):
    """The same atoms with another calculator of the same run, which never saw a stress."""
    copy = atoms.copy()
    copy.calc = Calculator(calculator.run, dtype="float64")
    return copy


def test_supercell_has_equal_energy_per_atom_and_stress(calculator):
    small = crystal()
    large = small.repeat((1, 1, 2))
    small.calc = large.calc = calculator
    reference = small.get_potential_energy(), small.get_stress()
    assert large.get_potential_energy() == pytest.approx(2 * reference[0], abs=1e-9)
    np.testing.assert_allclose(large.get_stress(), reference[1], atol=1e-12)


def test_a_crystal_may_have_any_multiplicity(calculator):
    """The lowest one of a cell goes with its number of electrons, odd or even, and so would the
    energy of each atom, where a network has been told of spins."""
    one = ase.Atoms("N", cell=(2.3, 2.4, 2.5), pbc=True)
    one.info["spin_multiplicity"] = 1
    two = one.repeat((2, 1, 1))
    energies = [energy_with(calculator)(atoms) for atoms in (one, two)]
    assert energies[1] == pytest.approx(2 * energies[0], abs=1e-9)
    one.info.clear()
    assert abs(energy_with(calculator)(one) - energies[0]) > 1e-4
    one.info["spin_multiplicity"] = 0
    with pytest.raises(InputError, match="multiplicity is 0"):
        energy_with(calculator)(one)


def test_equals_the_run_in_float32(run):
    atoms = ethanol()
    atoms.info["charge"] = 1
    atoms.positions += 100.0  # float32 loses no digits far from the origin
    atoms.calc = Calculator(run)
    near = atoms.copy()
    near.positions -= 100.0
    expected = run.predict(near)
    assert atoms.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=2e-5)
    assert atoms.get_forces().dtype == np.float64


def test_charge_and_spin_in_info_are_noticed(calculator):
    atoms = ethanol()
    atoms.calc = calculator
    energies = {}
    for charge, multiplicity in ((0, 1), (1, 2), (-1, 2), (0, 3)):
        atoms.info.update(charge=charge, spin_multiplicity=multiplicity)
        energies[charge, multiplicity] = atoms.get_potential_energy()
        assert atoms.get_charges().sum() == pytest.approx(charge, abs=1e-10)
    assert len(set(energies.values())) == 4


@pytest.mark.parametrize(
    "named",
    [
        lambda charge: {"key_value_pairs": {"total_charge": charge}},
        lambda charge: {"data": {"charge": charge}},
        lambda charge: {"CSD_code": "ABCDEF", "MND": 4, "q": charge, "S": charge / 2},
    ],
    ids=["pairs", "data", "tmQM"],
)
def test_charges_are_noticed_wherever_they_are_read(calculator, named):
    """Of rows of a database, and of tmQM: an ionisation energy is a difference of two of them."""
    found = []
    for charge in (0, 1):
        atoms = molecule("H2O")
        atoms.info = named(charge)
        atoms.calc = calculator
        found.append(atoms.get_potential_energy())
        assert found[-1] == pytest.approx(calculator.run.predict(atoms)["energy"], abs=1e-4)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_charges_only_when_asked_for():
    atoms = ethanol()
    atoms.calc = Calculator(random_run(("atomic",), lmax=1))
    atoms.get_forces()
    assert "charges" not in atoms.calc.results and atoms.calc.compilations == 1
    charges = atoms.get_charges()
    assert charges.shape == (9,) and atoms.calc.compilations == 2
    assert "energy" in atoms.calc.results  # kept beside them


def test_calculate_by_hand_keeps_nothing_of_another_structure(calculator):
    calculator.calculate(ethanol(), ["charges"])
    small = molecule("CH4")
    calculator.calculate(small, ["energy"])
    assert {"charges", "dipole"}.isdisjoint(calculator.results)
    assert calculator.get_property("charges", small).shape == (5,)
    assert calculator.results["forces"].shape == (5, 3)  # of the same structure: kept


@pytest.mark.parametrize("charge", [0, 1])
def test_dipole_of_the_atomic_charges(calculator, charge):
    atoms = ethanol()
    atoms.info["charge"] = charge
    atoms.calc = calculator
    charges = atoms.get_charges()
    centre = np.average(atoms.positions, axis=0, weights=atoms.get_masses())
    expected = sum(q * (x - centre) for q, x in zip(charges, atoms.positions, strict=True))
    assert np.linalg.norm(expected) > 1e-3
    np.testing.assert_allclose(atoms.get_dipole_moment(), expected, atol=1e-12)
    atoms.positions += 7.0  # of no consequence, for an ion too
    np.testing.assert_allclose(atoms.get_dipole_moment(), expected, atol=1e-8)


def test_no_dipole_of_a_periodic_structure(calculator):
    atoms = crystal()
    atoms.calc = calculator
    assert atoms.get_charges().shape == (8,)
    with pytest.raises(PropertyNotImplementedError, match="pbc = False"):
        atoms.get_dipole_moment()


def test_what_the_run_lacks_is_not_implemented():
    plain = Calculator(random_run(targets=()))
    atoms = ethanol()
    atoms.calc = plain
    assert not {"charges", "dipole", "magmoms"} & set(plain.implemented_properties)
    for absent in (atoms.get_charges, atoms.get_dipole_moment, atoms.get_magnetic_moments):
        with pytest.raises(PropertyNotImplementedError):
            absent()
    with pytest.raises(PropertyNotImplementedError, match="without a charge target"):
        atoms.get_charges()
    with pytest.raises(PropertyNotImplementedError, match="periodic"):
        atoms.get_stress()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"skin": -1.0}, "skin"),
        ({"skin": "a"}, "skin 'a'"),
        ({"charge_target": "dft"}, "predicts atomic"),
    ],
)
def test_bad_options(run, options, message):
    with pytest.raises(InputError, match=message):
        Calculator(run, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, r"dtype of a calculator cannot be changed: make a new one"),
        ({"skin": 0.1, "xc": "PBE"}, "xc: no parameter of"),
    ],
)
def test_parameters_cannot_be_changed(calculator, changes, message):
    with pytest.raises(InputError, match=message):
        calculator.set(**changes)


def test_what_is_no_run(run):
    for wrong in (None, 3, [run]):
        with pytest.raises(InputError, match=r"is no run: orbq\.Calculator takes a run"):
            Calculator(wrong)
    with pytest.raises(InputError, match=r"ensemble\.calculator\(\)"):
        Calculator(Ensemble([run, run]))


def test_a_directory_of_a_float64_run_is_computed_in_full(run, tmp_path):
    """No parameter is rounded, and nothing is said of float32."""
    training = run.config.training.model_copy(update={"precision": "float64"})
    config = run.config.model_copy(update={"training": training})
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: np.asarray(p, np.float64) * (1 + 1e-12), run.params)
        place = save_run(Run(run.potential, params, config, run.references, {}), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calculator = Calculator(place)
    for found, expected in zip(*map(jax.tree.leaves, (calculator.params, params)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_unknown_element(calculator):
    with pytest.raises(InputError, match="Au was not in the training data"):
        energy_with(calculator)(molecule("H2") + ase.Atoms("Au", positions=[[0, 0, 3]]))


def structure(positions: np.ndarray, cell: np.ndarray | None = None) -> Structure:
    periodic = cell is not None
    box = cell if periodic else np.zeros((3, 3))
    return Structure(np.ones(len(positions), int), positions, box, np.full(3, periodic), 0, 1)


@pytest.mark.parametrize("cell", [None, 6.0 * np.eye(3) + 0.5])
def test_skin_changes_nothing(cell):
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 6, (20, 3))
    skin = SkinNeighbors(3.0, 0.6)
    for _ in range(40):
        x = x + rng.uniform(-0.04, 0.04, x.shape)
        found = skin.of(structure(x, cell))
        expected = neighbor_list(x, 3.0, cell, cell is not None)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert 1 < skin.n_searches < 20


def test_sizes_grow_by_steps():
    sizes = {rounded_up(n) for n in range(1, 1025)}
    assert len(sizes) <= 8 * 16
    for n in range(1, 1025):
        assert n <= rounded_up(n) <= max(8, n * 17 / 16 + 1)


def test_a_large_structure_is_hardly_padded():
    """1,000 atoms with 30 neighbours: the calculator may cost 1.3 times the bare program."""
    capacity = Capacity(0, 0).holding(1000, 30_000)
    assert capacity.n_edge < 1.07 * 30_000 and capacity.n_node < 1.07 * 1000
    assert capacity.holding(1000, 30_600) is capacity


def test_calculators_of_a_run_share_the_sizes_they_are_compiled_for():
    """Of a path whose images have ever fewer neighbours: none compiles but the first."""
    run = random_run((), lmax=0, n_layers=1)
    compilations, numbers = [], set()
    for k in range(7):
        atoms = molecule("C2H6") + molecule("C2H6")
        atoms.positions[8:, 0] += 4.0 + 0.1 * k
        numbers.add(len(run.graph(atoms)[1].senders))
        atoms.calc = Calculator(run)
        expected = -jax.grad(run.energy, argnums=1)(run.params, *run.graph(atoms))
        np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-5)
        compilations.append(atoms.calc.compilations)
    assert len(numbers) == 4
    assert compilations == [1, 0, 0, 0, 0, 0, 0]


def test_the_smallest_known_size_that_is_not_far_too_large():
    known = Capacities()
    large = known.holding(100, 2000)
    small = known.holding(20, 300)
    assert small != large and known.holding(20, 310) == small
    assert known.holding(90, 1200) == large
    assert known.holding(40, 600) not in (small, large)


def test_pickled_and_copied():
    """For pools of processes, and for calculators of their own that compile nothing again."""
    atoms = ethanol()
    calculator = Calculator(random_run((), lmax=0, n_layers=1), dtype="float64")
    calculator.run.energy, calculator.run.batches  # noqa: B018 (compiled things that stay behind)
    expected = energy_with(calculator)(atoms)
    sent = pickle.loads(pickle.dumps(calculator))
    assert energy_with(sent)(ethanol(1)) != expected and sent.compilations == 1
    assert energy_with(sent)(atoms) == expected
    copied = copy.deepcopy(calculator)
    assert energy_with(copied)(ethanol(1)) == energy_with(sent)(ethanol(1))
    assert calculator.compilations == 1 and copied.neighbors is not calculator.neighbors
    another = Calculator(calculator.run, dtype="float64")  # shares what is compiled, too
    assert energy_with(another)(atoms) == expected and another.compilations == 0


def energy_spread(calculator: Calculator, atoms: ase.Atoms, step: float, n_steps: int) -> float:
    """Range of the total energy (eV) over velocity-Verlet dynamics; step in fs."""
    atoms = atoms.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, step * units.fs)
    total: list[float] = []
    dynamics.attach(lambda: total.append(atoms.get_total_energy()))
    dynamics.run(n_steps)
    return float(np.ptp(total))


def test_dynamics_compile_once_and_conserve_energy():
    calculator = Calculator(random_run(("atomic",), lmax=1), dtype="float64")
    atoms = ethanol()
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    coarse, fine = (energy_spread(calculator, atoms, 5 / n, n) for n in (25, 50))
    # the error of velocity Verlet is of second order in the step, if forces and energy agree
    assert 3.5 < coarse / fine < 4.5
    assert fine / len(atoms) < 1e-2 * 1.5 * units.kB * 300
    assert calculator.compilations == 1
    assert calculator.neighbors.n_searches < 15
