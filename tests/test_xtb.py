"""Labels against direct tblite calls, for every element, and under rotation."""

from __future__ import annotations

import numpy as np
import pytest
import tblite.interface as tblite
from ase.build import molecule

from orbq import orbitals, units
from orbq.preprocess import xtb
from orbq.preprocess.check import check, unpaired
from orbq.preprocess.read import read_structures
from orbq.preprocess.sane import LabelError
from orbq.schema import Structure

# The same SCF, summed in another order: a few ulp of numbers of order one.
ROUND_OFF = 1e-10


def structure(numbers, positions, charge=0, multiplicity=None, cell=None) -> Structure:
    numbers = np.asarray(numbers)
    lowest = 1 + int(numbers.sum() - charge) % 2
    return Structure(
        numbers=numbers,
        positions=np.asarray(positions, float).reshape(-1, 3),
        cell=np.zeros((3, 3)) if cell is None else np.asarray(cell, float),
        pbc=np.full(3, cell is not None),
        total_charge=charge,
        spin_multiplicity=multiplicity or lowest,
    )


def of_ase(name: str) -> Structure:
    atoms = molecule(name)
    return structure(atoms.numbers, atoms.positions)


def sulfur_hexafluoride() -> Structure:
    fluorines = 1.56 * np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    return structure([16] + 6 * [9], np.concatenate([np.zeros((1, 3)), fluorines, -fluorines]))


def complex_of(metal: str) -> Structure:
    """The first embedded complex of ``metal``."""
    z = orbitals.SYMBOLS.index(metal)
    return next(s for s in read_structures(["tmc"]) if z in s.numbers)


def direct(s: Structure, method: str):
    """A plain tblite calculation in the frame that labels use, and its calculator."""
    calculator = tblite.Calculator(
        method,
        s.numbers,
        s.positions[:, [2, 0, 1]] / units.BOHR,
        float(s.total_charge),
        unpaired(s, method),
        logger=lambda message: None,
    )
    calculator.set("verbosity", 0)
    calculator.set("accuracy", 0.1)
    calculator.set("save-integrals", 1)
    return calculator, calculator.singlepoint()


def shell_populations(calculator, result, n_atoms: int) -> np.ndarray:
    """[n, 4] populations of s, s', p, d from tblite's own maps of orbitals and shells."""
    p, s = result.get("density-matrix"), result.get("overlap-matrix")
    population = np.einsum("ij,ji->i", p, s)
    shell_of = calculator.get("orbital-map")
    atom_of, l_of = calculator.get("shell-map"), calculator.get("angular-momenta")
    out, seen_s = np.zeros((n_atoms, 4)), np.zeros(n_atoms, bool)
    for shell, (atom, degree) in enumerate(zip(atom_of, l_of, strict=True)):
        column = degree + 1 if degree else int(seen_s[atom])
        seen_s[atom] |= degree == 0
        out[atom, column] += population[shell_of == shell].sum()
    return out


@pytest.mark.parametrize("method", orbitals.METHODS)
def test_every_element_agrees_with_a_direct_call(method):
    table = orbitals.shells(method)
    direction = np.array([0.3, -0.5, 0.81])
    worst = 0.0
    for z in range(1, orbitals.MAX_Z + 1):
        radius = 0.32 + (0.4 if z < 3 else 0.9 if z < 11 else 1.3)
        s = structure([z, 1], [np.zeros(3), radius * direction])
        assert check(s, method) is None
        calculator, result = direct(s, method)
        label = xtb.label(s, method)
        assert label.note == "", orbitals.SYMBOLS[z]
        charges = np.abs(orbitals.atomic_charges(label.onsite) - result.get("charges"))
        expected = table.occupation[s.numbers] - shell_populations(calculator, result, 2)
        shells = np.abs(orbitals.shell_charges(label.onsite) - expected)
        worst = max(worst, charges.max(), shells.max())
        assert label.energy == pytest.approx(float(result.get("energy")) * units.HARTREE, abs=1e-8)
    assert worst < ROUND_OFF


def test_isolated_atoms_hold_their_valence_electrons():
    for z in range(1, orbitals.MAX_Z + 1):
        label = xtb.label(structure([z], [0, 0, 0]))
        assert orbitals.orbital_charges(label.onsite).sum() == pytest.approx(0, abs=ROUND_OFF)
        absent = ~orbitals.onsite_mask()[z]
        assert np.all(label.onsite[0, absent] == 0)


def test_orbital_populations_are_in_slot_order():
    """In the labels' frame, tblite's own diagonal of PS is the slots' populations."""
    s = of_ase("SO2")
    _, result = direct(s, "GFN1-xTB")
    p, overlap = result.get("density-matrix"), result.get("overlap-matrix")
    population = np.einsum("ij,ji->i", p, overlap)
    table = orbitals.shells()
    order = np.concatenate([10 * i + table.order[z] for i, z in enumerate(s.numbers)])
    reference = (table.occupation / (2 * orbitals.SHELL_L + 1))[s.numbers][:, orbitals.SLOT_SHELL]
    charges = orbitals.orbital_charges(xtb.label(s).onsite)
    np.testing.assert_allclose(
        charges.ravel()[order], reference.ravel()[order] - population, atol=ROUND_OFF
    )


SMALL = {"H2O": lambda: of_ase("H2O"), "SF6": sulfur_hexafluoride}


@pytest.mark.parametrize("name", ["H2O", "SF6", "Pt", "Fe", "La"])
def test_labels_turn_with_the_molecule(name):
    s = complex_of(name) if name in orbitals.SYMBOLS else SMALL[name]()
    rotation = orbitals._random_rotations(3)[2]
    before = xtb.label(s)
    after = xtb.label(s._replace(positions=s.positions @ rotation.T))
    for c in orbitals.COMPONENTS:
        d = orbitals.rotation_matrix(c.l, rotation)
        expected = before.onsite[:, c.columns] @ d.T
        # the SCF of the rotated molecule stops at its own last digits, not at the same ones
        np.testing.assert_allclose(after.onsite[:, c.columns], expected, atol=ROUND_OFF)
    np.testing.assert_allclose(after.forces, before.forces @ rotation.T, atol=1e-8)
    assert after.energy == pytest.approx(before.energy, abs=1e-8)


def test_forces_are_minus_the_gradient_of_the_energy():
    s = of_ase("CH3OH")
    s = s._replace(positions=s.positions + 0.05 * np.random.default_rng(0).normal(size=(6, 3)))
    forces, step = xtb.label(s).forces, 1e-3
    for atom, axis in [(0, 0), (1, 1), (3, 2)]:
        energies = []
        for sign in (1, -1):
            moved = s.positions.copy()
            moved[atom, axis] += sign * step
            energies.append(xtb.label(s._replace(positions=moved)).energy)
        # central differences: error of order step^2 times the third derivative, below 1e-3 eV/Å
        expected = -(energies[0] - energies[1]) / (2 * step)
        assert forces[atom, axis] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("method", ["GFN1-xTB", "GFN2-xTB"])
def test_spin_polarisation_lowers_the_triplet_of_oxygen(method):
    s = of_ase("O2")._replace(spin_multiplicity=3)
    plain = xtb.label(s, method)
    polarised = xtb.label(s, method, xtb.Settings(spin_polarization=True))
    assert polarised.energy < plain.energy - 0.1
    assert orbitals.atomic_charges(polarised.onsite).sum() == pytest.approx(0, abs=ROUND_OFF)


def test_spin_polarised_ipea1_is_refused():
    with pytest.raises(LabelError, match="no spin-polarised form"):
        xtb.label(of_ase("H2O"), "IPEA1-xTB", xtb.Settings(spin_polarization=True))


def test_a_large_box_is_the_molecule_and_a_small_one_is_refused():
    s = of_ase("H2O")
    cell = np.array([[22.0, 0, 0], [3.0, 21.0, 0], [0, 1.0, 25.0]])
    boxed = s._replace(cell=cell, pbc=np.ones(3, bool))
    free, periodic = xtb.label(s), xtb.label(boxed)
    # images 20 Å away polarise the molecule by some 1e-4 e
    np.testing.assert_allclose(periodic.onsite, free.onsite, atol=2e-3)
    np.testing.assert_allclose(periodic.forces, free.forces, atol=2e-2)
    with pytest.raises(LabelError, match=r"cell height 6\.29 Å below 10 Å"):
        xtb.label(boxed._replace(cell=cell * 0.3))


def test_charge_collapse_is_caught_and_the_ladder_climbed(monkeypatch):
    """A collapsed result is never returned: the next rung is tried, and the reason is told."""
    s = of_ase("H2O")
    real, tried = xtb.singlepoint, []

    def collapsed(structure, *how):
        raw = real(structure, *how)
        moved = raw.blocks.copy()
        moved[:, 0, 0] += [16.6, -8.3, -8.3]  # electrons from the hydrogens to the oxygen
        return raw._replace(blocks=moved)

    def at_first(structure, method, settings, temperature, damping=None, given=None):
        tried.append((temperature, damping))
        compute = collapsed if len(tried) < 3 else real
        return compute(structure, method, settings, temperature, damping, given)

    monkeypatch.setattr(xtb, "singlepoint", at_first)
    assert xtb.label(s).note == "2000 K"
    assert tried == [(300.0, None), (1000.0, None), (2000.0, None)]
    monkeypatch.setattr(xtb, "singlepoint", collapsed)
    with pytest.raises(LabelError, match=r"charge collapse: -17\.\d e on atom 0 \(O\)"):
        xtb.label(s)


INSANE = {
    "not finite": lambda raw: raw._replace(energy=float("nan")),
    "is not finite": lambda raw: raw._replace(forces=raw.forces * np.inf),
    "e more than the total charge": lambda raw: raw._replace(blocks=raw.blocks * 1.001),
    "orbital populations from .* to": lambda raw: raw._replace(
        blocks=raw.blocks + np.diag([1.5, 0, -0.5, -0.5, -0.5, 0, 0, 0, 0, 0])
    ),
}


@pytest.mark.parametrize("reason", INSANE)
def test_insane_results_are_refused(monkeypatch, reason):
    real = xtb.singlepoint
    monkeypatch.setattr(xtb, "singlepoint", lambda *how: INSANE[reason](real(*how)))
    s = structure([9, 9], [[0, 0, 0], [0, 0, 1.4]])
    with pytest.raises(LabelError, match=reason):
        xtb.label(s)


def test_many_are_labelled_as_each_alone():
    structures = [of_ase(name) for name in ("H2O", "C6H6", "COF2")]
    structures.insert(1, structures[0]._replace(pbc=np.ones(3, bool), cell=5 * np.eye(3)))
    many = xtb.label_many(structures, "GFN1-xTB", xtb.DEFAULTS)
    assert "cell height" in str(many[1])
    for i in (0, 2, 3):  # to the last bit: a finished set must not depend on who was with whom
        alone = xtb.label(structures[i])
        np.testing.assert_array_equal(many[i].onsite, alone.onsite)
        np.testing.assert_array_equal(many[i].forces, alone.forces)


def test_several_methods_give_charges_of_the_first_and_mean_energies_and_forces():
    s = of_ase("H2CO")
    first, second = (xtb.label(s, method) for method in ("GFN1-xTB", "GFN2-xTB"))
    both = xtb.label(s, "GFN1-xTB+GFN2-xTB")
    np.testing.assert_array_equal(both.onsite, first.onsite)
    assert both.energy == pytest.approx((first.energy + second.energy) / 2, abs=1e-12)
    assert abs(first.energy - second.energy) > 1.0
    np.testing.assert_allclose(both.forces, (first.forces + second.forces) / 2, atol=1e-12)
    np.testing.assert_array_equal(xtb.label(s, "GFN2-xTB+GFN1-xTB").onsite, second.onsite)


def test_a_structure_that_one_of_several_methods_cannot_label_has_no_labels(monkeypatch):
    s = of_ase("O2")._replace(spin_multiplicity=3)
    polarised = xtb.Settings(spin_polarization=True)
    with pytest.raises(LabelError, match="IPEA1-xTB: IPEA1-xTB has no spin-polarised form"):
        xtb.label(s, "GFN1-xTB+IPEA1-xTB", polarised)
    real, begun = xtb.singlepoint, []

    def flaky(structure, method, settings, temperature, *rest):
        if method == "GFN2-xTB" and temperature < 500:
            raise MemoryError
        return real(structure, method, settings, temperature, *rest)

    monkeypatch.setattr(xtb, "singlepoint", flaky)
    (found,) = xtb.label_many([s], "GFN1-xTB+GFN2-xTB", xtb.DEFAULTS, begun.append)
    assert found.note == "GFN2-xTB: 1000 K"
    assert begun == [0, 0, 0]  # the clock begins anew with each method


@pytest.mark.parametrize("method", ["GFN1-xTB+PM6", "GFN1-xTB+GFN1-xTB", "+GFN1-xTB", ""])
def test_what_is_no_method(method):
    with pytest.raises(KeyError, match="two or three of them joined by"):
        orbitals.shells(method)


def test_components_are_those_of_the_contract():
    s = of_ase("SO2")
    raw = xtb.singlepoint(s, "GFN1-xTB", xtb.DEFAULTS, 300.0)
    present = orbitals.shells().slot_mask[s.numbers]
    blocks = 0.5 * (raw.blocks + raw.blocks.transpose(0, 2, 1))
    blocks = blocks * present[:, :, None] * present[:, None, :]
    expected = orbitals.onsite_from_blocks(blocks, s.numbers)
    np.testing.assert_allclose(xtb.label(s).onsite, expected, atol=1e-14)


def test_more_charge_than_valence_electrons_never_reaches_tblite():
    with pytest.raises(LabelError, match="above the valence electrons"):
        xtb.label(structure([3], [0, 0, 0], charge=3, multiplicity=1))
