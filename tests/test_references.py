"""Reference energies: recovered exactly, honest about what the data cannot determine."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_dataset import MemoryDataset, random_molecules

from orbq.errors import InputError
from orbq.preprocess import references as module
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.references import (
    References,
    fit_pool_references,
    fit_references,
    load_references,
    pool_elements,
)

E = np.zeros(87)
E[[1, 6, 7, 8, 26]] = -13.6, -1030.2, -1485.3, -2042.6, -34_000.25
WATER, METHANE = np.array([8, 1, 1]), np.array([6, 1, 1, 1, 1])


def molecules(n: int, seed: int = 0, elements: tuple[int, ...] = (1, 6, 7, 8)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(elements, rng.integers(1, 20)) for _ in range(n)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), slope=st.floats(-10, 10))
def test_exact_energies_are_recovered(seed, slope):
    numbers = molecules(40, seed)
    charge = np.zeros(40)
    atoms = np.array([E[n].sum() for n in numbers])
    fit = fit_references(numbers, atoms, charge)
    # totals of 1e4 eV in float64 leave 1e-12 relative, times a condition number below 100
    assert np.allclose(fit.references.element, np.where(fit.references.known, E, 0), atol=1e-7)
    assert fit.references.charge == 0.0 and fit.std < 1e-7 and fit.n == 40
    charge[:20] = 1.0
    both = fit_references(numbers, atoms + slope * charge, charge)
    assert both.references.charge == pytest.approx(slope, abs=1e-7)
    assert np.allclose(both.references.element, fit.references.element, atol=1e-6)


def test_charges_that_go_with_an_element_are_not_taken_for_its_energy():
    """Fitted one after the other, the atoms would take most of the slope: errors of many eV."""
    rng = np.random.default_rng(0)
    numbers = molecules(60, 1)
    oxygen = np.array([(n == 8).sum() for n in numbers])
    charge = -oxygen + rng.integers(0, 2, 60)
    energies = np.array([E[n].sum() for n in numbers]) - 4.0 * charge + rng.normal(0, 0.1, 60)
    found = fit_references(numbers, energies, charge).references
    assert found.charge == pytest.approx(-4.0, abs=0.2)
    assert np.abs(found.element - E)[[1, 6, 7, 8]].max() < 0.3


def test_where_the_composition_tells_the_charge_the_atoms_come_first():
    numbers = [np.append(n, 26) if i % 2 else n for i, n in enumerate(molecules(40))]
    charge = np.array([0, 1] * 20)
    fit = fit_references(numbers, np.array([E[n].sum() for n in numbers]), charge)
    assert abs(fit.references.charge) < 1e-7
    assert fit.references.element[26] == pytest.approx(E[26], abs=1e-6)


def test_the_slope_in_the_charge():
    water, methane = WATER, METHANE[:3]
    numbers, charge = [water, methane, water[:2], methane] * 2, np.repeat([1, -1], 4)
    energies = np.array([E[n].sum() for n in numbers]) + 5.5 * charge
    fit = fit_references(numbers, energies, charge)
    assert fit.references.charge == pytest.approx(5.5, abs=1e-8)
    assert fit.references.of(WATER, 2) == pytest.approx(E[WATER].sum() + 11.0, abs=1e-7)
    assert fit.std < 1e-7
    without = fit_references(numbers, energies, charge, fit_charge=False)
    assert without.references.charge == 0.0 and without.std == pytest.approx(5.5)


def test_residuals_describe_what_is_left():
    numbers = molecules(300)
    rest = np.random.default_rng(1).normal(size=300)
    energies = np.array([E[n].sum() for n in numbers]) + rest
    fit = fit_references(numbers, energies)
    left = energies - np.array([fit.references.of(n) for n in numbers])
    sizes = np.array([len(n) for n in numbers])
    assert fit.std == pytest.approx(left.std(), rel=1e-6)
    assert fit.mean == pytest.approx(left.mean(), abs=1e-6)
    assert fit.std_per_atom == pytest.approx(np.sqrt(((left / sizes) ** 2).mean()), rel=1e-6)


def test_fit_equals_least_squares():
    numbers = molecules(200, 3)
    energies = np.random.default_rng(2).normal(size=200)
    counts = np.array([[(n == z).sum() for z in (1, 6, 7, 8)] for n in numbers], float)
    expected = np.linalg.lstsq(counts, energies, rcond=None)[0]
    fit = fit_references(numbers, energies)
    assert np.allclose(fit.references.element[[1, 6, 7, 8]], expected, atol=1e-10)


def test_fixed_ratios_are_named_and_still_fit_their_own_composition():
    numbers = [WATER, np.tile(WATER, 2), np.append(WATER, 26)]
    energies = np.array([E[n].sum() for n in numbers])
    with pytest.warns(UserWarning, match="hold H, O only in fixed ratios"):  # Fe is determined
        fit = fit_references(numbers, energies)
    assert [fit.references.of(n) for n in numbers] == pytest.approx(energies.tolist())
    assert fit.references.element[26] == pytest.approx(E[26])
    assert fit.references.element[1] / fit.references.element[8] == pytest.approx(2.0)  # least norm


def test_one_composition_only():
    acac = np.repeat([1, 6, 8], [8, 5, 2])
    with pytest.warns(UserWarning, match=r"H, C, O only in fixed ratios \(rank 1 for 3"):
        fit = fit_references([acac] * 5, np.full(5, -9000.0) + np.arange(5) * 0.1)
    assert fit.references.of(acac) == pytest.approx(-8999.8)
    assert fit.std == pytest.approx(np.std(np.arange(5) * 0.1))


def test_given_energies_are_used_as_they_are():
    atoms = {"H": E[1], 6: E[6], "8": E[8]}
    numbers = [WATER, METHANE]
    energies = np.array([E[n].sum() for n in numbers]) - 10.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is fitted, so nothing is undetermined
        fit = fit_references(numbers, energies, np.array([0, 1]), atoms)
    assert not fit.references.fitted and fit.references.charge == 0.0
    assert fit.references.of(METHANE, 1) == E[METHANE].sum()
    assert fit.mean == pytest.approx(-10.0)


def test_some_given_the_rest_fitted():
    numbers = [WATER, METHANE, np.array([7, 1, 1, 1])]
    energies = np.array([E[n].sum() for n in numbers])
    fit = fit_references(numbers, energies, given={"H": E[1]})
    assert fit.references.fitted
    assert np.allclose(fit.references.element[[1, 6, 7, 8]], E[[1, 6, 7, 8]], atol=1e-9)


def test_elements_without_reference_are_named():
    fit = fit_references([METHANE, METHANE[1:]], np.array([-1.0, -2.0]))
    fit.references.require(METHANE, "the validation structures")
    with pytest.raises(InputError, match=r"N, Fe: in the validation structures.*isolated-atom"):
        fit.references.require(np.array([6, 26, 7, 7]), "the validation structures")


@pytest.mark.parametrize(
    ("numbers", "energies", "given", "words"),
    [
        ([], [], None, "no training structure carries energy"),
        ([WATER], [np.nan], None, "structure 0: energy nan is not finite"),
        ([WATER], [0.0], {"Hx": 1.0}, "'Hx'"),
        ([WATER], [0.0], {87: 1.0}, "87"),
        ([WATER], [0.0], {"H": np.inf}, "not finite"),
    ],
)
def test_errors(numbers, energies, given, words):
    with pytest.raises(InputError, match=words):
        fit_references(numbers, np.array(energies), given=given)


def test_json_round_trip_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    known = rng.random(87) < 0.5
    known[0] = False
    table = References(np.where(known, rng.normal(size=87) * 1e4, 0.0), 1 / 3, True, known)
    path = tmp_path / "references.json"
    path.write_text(table.to_json())
    back = load_references(path)
    assert np.array_equal(back.element, table.element) and np.array_equal(back.known, table.known)
    assert (back.charge, back.fitted) == (table.charge, table.fitted)
    for text in ("", "[]", "{}", json.dumps({"element": {"Q": 1}, "charge": 0, "fitted": True})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"references\.json"):
            load_references(path)
    with pytest.raises(InputError, match=r"none\.json"):
        load_references(tmp_path / "none.json")


def test_pool_fit_uses_labelled_training_structures_alone(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)  # many chunks
    data = MemoryDataset(random_molecules(np.full(60, 9)))
    numbers, rows = data.arrays["numbers"], np.arange(40)
    charge = data.arrays["total_charge"]
    e0 = np.array([E[numbers[data.rows(i)]].sum() for i in range(60)])
    data.arrays["energy"] = e0.copy()
    data.arrays["energy_mask"][::3] = False
    data.arrays["energy"][::3] = np.nan  # not labelled
    data.arrays["energy"][40:] = 1e9  # not in the pool
    fit = fit_pool_references(Pool([Part(data, rows)], 3.0))
    used = rows[data.arrays["energy_mask"][rows]]
    same = fit_references([numbers[data.rows(i)] for i in used], e0[used], charge[used])
    assert fit.n == len(used)
    assert np.allclose(fit.references.element, same.references.element, atol=1e-9)
    assert np.allclose(fit.references.element[[1, 6, 7, 8]], E[[1, 6, 7, 8]], atol=1e-7)
    with pytest.raises(InputError, match="no training structure carries energy"):
        fit_pool_references(Pool([Part(data, rows, ("energy",))], 3.0))


def test_a_guide_takes_away_what_is_not_of_the_atoms():
    data = MemoryDataset(random_molecules(np.full(60, 9)))
    arrays, rows = data.arrays, np.arange(60)
    numbers = [arrays["numbers"][data.rows(i)] for i in rows]
    charge = arrays["total_charge"]
    bonding = 50 * np.random.default_rng(1).normal(size=60)
    guide = References(E / 7, 2.0, True, E != 0)
    arrays["xtb_energy"] = np.array([(E / 7)[n].sum() for n in numbers]) + 2.0 * charge + bonding
    arrays["energy"] = np.array([E[n].sum() for n in numbers]) + 0.4 * bonding
    few = Pool([Part(data, rows[:12])], 3.0)
    present = pool_elements(few)
    plain = fit_pool_references(few).references
    assert np.abs(plain.element - E)[present].max() > 1.0
    guided = fit_pool_references(few, guide=("xtb_energy", guide)).references
    np.testing.assert_allclose(guided.element[present], E[present], atol=1e-6)
    assert abs(guided.charge) < 1e-6


def test_structures_without_the_guide_count_as_0():
    data = MemoryDataset(random_molecules(np.full(40, 9)))
    arrays, rows = data.arrays, np.arange(40)
    arrays["xtb_energy_mask"][:] = False
    arrays["xtb_energy"][:] = np.nan
    pool = Pool([Part(data, rows)], 3.0)
    guided = fit_pool_references(pool, guide=("xtb_energy", References.zero()))
    plain = fit_pool_references(pool)
    np.testing.assert_allclose(guided.references.element, plain.references.element, atol=1e-6)


def test_sums_over_many_equal_one_by_one():
    numbers = molecules(50)
    charge = np.random.default_rng(0).integers(-2, 3, 50)
    table = References(E, -3.25, True, E != 0)
    n_node = np.array([len(n) for n in numbers])
    many = table.of_many(np.concatenate(numbers), n_node, charge)
    each = [table.of(n, q) for n, q in zip(numbers, charge, strict=True)]
    assert many.dtype == np.float64 and np.allclose(many, each, rtol=1e-14)


def test_elements_of_a_pool():
    data = MemoryDataset(random_molecules([1, 1, 1]))
    data.arrays["numbers"][:] = 6, 8, 26
    data.arrays["energy_mask"][1] = False
    pool = Pool([Part(data)], 3.0)
    assert pool_elements(pool).tolist() == [6, 8, 26]
    assert pool_elements(pool, "energy").tolist() == [6, 26]
