"""Many structures at once: order, shapes compiled, memory; ensembles of runs and their spread."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import ase
import ase.io
import jax
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from tiny_run import random_run, save_run
from typer.testing import CliRunner

import orbq
from orbq.cli import make_app
from orbq.errors import InputError
from orbq.inference import BatchPredictor, predict_structures

SMALL = {"lmax": 0, "n_layers": 1}
NAMES = ("CH4", "H2O", "CH3OH", "C2H6", "CO2")


@pytest.fixture(scope="module")
def run() -> orbq.Run:
    return random_run(("atomic",), **SMALL)


def other(run: orbq.Run, factor: float = 1.1) -> orbq.Run:
    """The same network with other parameters."""
    params = jax.tree.map(lambda p: factor * p, run.params)
    return orbq.Run(run.potential, params, run.config, run.references, run.info)


@pytest.fixture(scope="module")
def two(run) -> list[orbq.Run]:
    return [run, other(run)]


def distorted(n: int) -> list[ase.Atoms]:
    rng = np.random.default_rng(0)
    out = [molecule(NAMES[k % len(NAMES)]) for k in range(n)]
    for atoms in out:
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
    return out


# --------------------------------------------------------------------------- streams


def test_a_list_is_predicted_in_order(run):
    structures = distorted(40)
    found = list(run.predict(structures, batch_size=4))
    assert len(found) == 40 and set(found[0]) == {"energy", "forces", "atomic"}
    for k in (0, 17, 39):
        alone = run.predict(structures[k])
        assert found[k]["energy"] == pytest.approx(alone["energy"], abs=1e-4)  # float32
        np.testing.assert_allclose(found[k]["forces"], alone["forces"], atol=1e-5)
        np.testing.assert_allclose(found[k]["atomic"], alone["atomic"], atol=1e-5)


def test_a_second_list_compiles_nothing(run):
    list(run.predict(distorted(40), batch_size=4))
    before = run.batches.compilations
    list(run.predict(distorted(37)[5:], batch_size=4))
    list(run.predict(distorted(3), batch_size=4))
    assert run.batches.compilations == before


def breathing(n: int) -> list[ase.Atoms]:
    """Ethane ever denser: every one has more neighbours than the one before, or as many."""
    out = [molecule("C2H6") + molecule("C2H6") for _ in range(n)]
    for k, atoms in enumerate(out):
        atoms.positions[8:, 0] += 4.5 - 0.5 * k / n
    return out


def test_one_after_another_they_compile_once(run):
    """And are predicted as without padding, each alone or as a list of one."""
    structures = breathing(12)
    numbers = {len(run.graph(atoms)[1].senders) for atoms in structures}
    assert len(numbers) == 3
    fresh = other(run, 1.0)
    found = [fresh.predict(atoms) for atoms in structures]
    assert fresh.batches.compilations == 1
    for atoms, one in zip(structures, found, strict=True):
        graph = run.graph(atoms)
        forces = -jax.grad(run.energy, argnums=1)(run.params, *graph)
        assert one["forces"].shape == (16, 3) and one["atomic"].shape == (16, 1)
        np.testing.assert_allclose(one["forces"], forces, atol=1e-5)
        energy = float(run.energy(run.params, *graph))
        reference = run.reference_energy(run.structure(atoms))
        assert one["energy"] - reference == pytest.approx(energy, abs=1e-5)
    lists = [next(fresh.predict([atoms], batch_size=1)) for atoms in structures]
    assert fresh.batches.compilations == 2  # single ones, and batches
    for one, alone in zip(lists, found, strict=True):
        np.testing.assert_allclose(one["forces"], alone["forces"], atol=1e-5)


def test_structures_are_taken_as_results_are_asked_for(run):
    taken = []

    def endless() -> Iterator[ase.Atoms]:
        while True:
            taken.append(1)
            yield molecule("CH4")

    results = run.predict(endless(), batch_size=1)
    for _ in range(20):
        next(results)
    assert 20 <= len(taken) <= 64


def test_larger_and_smaller_structures_later_in_a_stream():
    """Each kind of structures in batches that suit it: one compilation each."""
    run = random_run((), elements=(1, 6), **SMALL)
    predictor = BatchPredictor(run)
    sizes = [molecule(name) for name in ("H2", "C6H6", "CH4")]
    structures = [run.structure(atoms) for atoms in [*sizes, *sizes] for _ in range(32)]
    found = [p.energy for p in predict_structures(predictor, structures, batch_size=2)]
    expected = [run.predict(atoms)["energy"] for atoms in [*sizes, *sizes]]
    np.testing.assert_allclose(found, np.repeat(expected, 32), atol=1e-4)
    assert predictor.compilations == 3


def test_the_structure_at_fault_is_named(run):
    with pytest.raises(InputError, match="structure 2: element Au was not"):
        list(run.predict([molecule("CH4"), molecule("H2O"), ase.Atoms("Au")]))
    assert list(run.predict([])) == []
    with pytest.raises(InputError, match="structure 1: 'H2O' is no structure"):
        list(run.predict([molecule("CH4"), "H2O"]))
    with pytest.raises(InputError, match="is no structure: give an"):
        run.graph([molecule("H2O")])


def test_the_stress_of_crystals(two):
    """As the calculator gives it, of one and of many; molecules beside them have none."""
    run = two[0]
    crystal = bulk("TiO", "rocksalt", a=4.2, cubic=True)
    crystal.rattle(0.1, seed=1)
    molecular = molecule("CH4")
    expected = orbq.Calculator(run).get_property("stress", crystal)
    many = list(run.predict([molecular, crystal], stress=True))
    for found in (run.predict(crystal, stress=True), many[1]):
        assert found["stress"].shape == (6,)
        np.testing.assert_allclose(found["stress"], expected, atol=1e-6)
    assert "stress" not in many[0] and "stress" not in run.predict(molecular, stress=True)
    assert "stress" not in run.predict(crystal)
    mean = orbq.Ensemble(two).predict(crystal, stress=True)
    members = [one.predict(crystal, stress=True)["stress"] for one in two]
    np.testing.assert_allclose(mean["stress"], np.mean(members, axis=0), atol=1e-7)
    assert mean["stress_std"].shape == (6,)


# --------------------------------------------------------------------------- ensembles


def test_mean_and_spread(two):
    structures = distorted(5)
    ensemble = orbq.Ensemble(two)
    members = [list(run.predict(structures)) for run in two]
    for found, a, b in zip(ensemble.predict(structures), *members, strict=True):
        for name in ("energy", "forces", "atomic"):
            mean = (a[name] + b[name]) / 2
            deviation = np.abs(np.subtract(a[name], b[name])) / 2**0.5  # n - 1 = 1
            np.testing.assert_allclose(found[name], mean, atol=1e-6)
            np.testing.assert_allclose(found[f"{name}_std"], deviation, atol=1e-6)
        assert found["energy_std"] > 1e-4 and isinstance(found["energy"], float)
    one = ensemble.predict(structures[0])
    assert one["energy"] == pytest.approx(next(ensemble.predict(structures))["energy"], abs=1e-4)


@pytest.mark.parametrize(
    ("atoms", "batch_size", "message"),
    [
        ("water.xyz", 16, "'water.xyz' is no structure"),
        (None, 16, "None is no structure"),
        ([molecule("H2O")], 0, "batch_size is 0"),
        ([molecule("H2O")], "4", "batch_size is '4'"),
        (ase.Atoms("Au"), 16, "^element Au"),
    ],
)
def test_an_ensemble_refuses_what_a_run_refuses(two, atoms, batch_size, message):
    """At once, and not by an empty answer."""
    for potential in (two[0], orbq.Ensemble(two)):
        with pytest.raises(InputError, match=message):
            potential.predict(atoms, batch_size)


def test_an_ensemble_of_different_cutoffs(run):
    wide = random_run(("atomic",), **SMALL, cutoff=5.0)
    atoms = molecule("CH3CH2OH")
    found = orbq.Ensemble([run, wide]).predict(atoms)
    expected = np.mean([r.predict(atoms)["forces"] for r in (run, wide)], axis=0)
    np.testing.assert_allclose(found["forces"], expected, atol=1e-5)


def test_calculator_of_an_ensemble(two):
    atoms = distorted(1)[0]
    atoms.calc = orbq.Ensemble(two).calculator()
    expected = orbq.Ensemble(two).predict(atoms)
    assert atoms.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-5)
    np.testing.assert_allclose(atoms.calc.results["forces_std"], expected["forces_std"], atol=1e-5)
    neutral = atoms.get_charges().sum()
    atoms.info["charge"] = 2
    assert atoms.get_charges().sum() == pytest.approx(neutral + 2, abs=1e-4)
    assert atoms.calc.results["charges_std"].shape == (len(atoms),)


def test_the_spreads_are_properties(two):
    """Of ASE's calculators, each asked for alone."""
    atoms = distorted(1)[0]
    expected = orbq.Ensemble(two).predict(atoms)
    calculator = orbq.Ensemble(two).calculator()
    found = calculator.get_property("energy_std", atoms)
    assert found == pytest.approx(expected["energy_std"], abs=1e-4)
    forces = calculator.get_property("forces_std", atoms)
    np.testing.assert_allclose(forces, expected["forces_std"], atol=1e-5)
    assert calculator.get_property("charges_std", atoms).shape == (len(atoms),)
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("stress_std", atoms)
    assert "charges_std" in calculator.implemented_properties
    assert "magmoms_std" not in calculator.implemented_properties


@pytest.mark.parametrize(
    ("other_run", "message"),
    [
        (lambda: random_run(("atomic",), elements=(1, 6), **SMALL), "elements of run 0: H, C, N"),
        (
            lambda: random_run(("shell",), **SMALL),
            "charge targets of run 0: atomic; of run 1: shel",
        ),
    ],
)
def test_runs_that_disagree(run, other_run, message):
    with pytest.raises(InputError, match=message):
        orbq.Ensemble([run, other_run()])


def test_an_ensemble_of_one(run):
    with pytest.raises(InputError, match="two runs or more"):
        orbq.Ensemble([run])


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("out", ["mean.extxyz", "mean.traj"])
def test_predict_over_several_runs(two, tmp_path, out):
    places = [save_run(run, tmp_path / f"seed{n}") for n, run in enumerate(two)]
    structures = distorted(6)
    ase.io.write(tmp_path / "given.xyz", structures)
    status, text = command(
        "predict", *places, tmp_path / "given.xyz", "--out", tmp_path / out, "--charges"
    )
    assert status == 0, text
    expected = list(orbq.Ensemble(two).predict(structures))
    for atoms, mean in zip(ase.io.read(tmp_path / out, ":"), expected, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(mean["energy"], abs=1e-3)
        assert atoms.info["energy_std"] == pytest.approx(mean["energy_std"], abs=1e-3)
        found = atoms.info | atoms.arrays  # a trajectory of ASE keeps no arrays of other names
        np.testing.assert_allclose(found["forces_std"], mean["forces_std"], atol=1e-3)
        np.testing.assert_allclose(found["charges_std"], mean["atomic_std"][:, 0], atol=1e-3)
        assert atoms.get_charges().shape == (len(atoms),)


def test_labels_that_come_with_a_structure_are_not_looked_at(run):
    water, bare = molecule("H2O"), molecule("H2O")
    water.info |= {"energy": "n/a", "stress": [1, 2], "dft_charges": "none", "forces": "x"}
    water.set_array("charge", np.full(3, 0.4))  # of each atom, no total charge
    water.set_array("spin", np.zeros(3))
    assert run.predict(water)["energy"] == run.predict(bare)["energy"]


@pytest.mark.parametrize(
    ("array", "values", "message"),
    [
        ("initial_charges", [1.0, 0, 0], "add up to a charge of 1, but 0 is taken"),
        ("initial_magmoms", [2.0, 0, 0], "add up to a spin multiplicity of 3, but 1 is taken"),
    ],
)
def test_initial_charges_and_moments_are_told_of_once(array, values, message):
    run, water = random_run(("atomic",), **SMALL), molecule("H2O")
    water.set_array(array, np.array(values))
    with pytest.warns(UserWarning, match=message):
        run.predict(water)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.predict(water)
        partial = molecule("H2O")
        partial.set_initial_charges([0.4, -0.8, 0.4])
        other = random_run(("atomic",), **SMALL)
        other.predict(partial)
        water.info |= {"charge": 0, "spin_multiplicity": 1}  # said by the user
        other.predict(water)


def test_nothing_of_an_earlier_prediction_is_left(two, tmp_path):
    """Neither the spread of an ensemble beside the energy of one run, nor what was left out."""
    places = [save_run(run, tmp_path / f"seed{n}") for n, run in enumerate(two)]
    given, out = tmp_path / "given.xyz", tmp_path / "out.extxyz"
    ase.io.write(given, [molecule("CH4"), ase.Atoms("Au")])
    assert command("predict", *places, given, "--out", out)[0] == 0
    listed = tmp_path / "out.extxyz.failures.jsonl"
    assert "Au" in listed.read_text()
    again = tmp_path / "again.extxyz"
    for found in (out, again):
        status, text = command("predict", places[0], out, "--out", found, "--overwrite")
        assert status == 0, text
        atoms = ase.io.read(found)
        assert not [name for name in {**atoms.info, **atoms.arrays} if name.endswith("_std")]
    assert not listed.exists()


def test_predict_refuses_runs_that_disagree_and_runs_alone(run, tmp_path):
    places = [save_run(run, tmp_path / "a"), save_run(random_run((), **SMALL), tmp_path / "b")]
    ase.io.write(tmp_path / "given.xyz", molecule("CH4"))
    out = tmp_path / "out.xyz"
    status, text = command("predict", *places, tmp_path / "given.xyz", "--out", out)
    assert status == 2 and str(places[1]) in text and "charge targets" in text
    status, text = command("predict", *places, "--out", out)
    assert status == 2 and "name the structure files too" in text
    assert not list(tmp_path.glob("out.*"))
