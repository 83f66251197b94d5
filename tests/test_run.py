"""Runs loaded from disk: the public three lines, references, what is refused, damaged files."""

from __future__ import annotations

import json
import warnings

import ase
import jax
import numpy as np
import pytest
from ase.build import molecule
from tiny_run import random_run, save_run

import orbq
from orbq.errors import InputError, OrbqError
from orbq.run_files import RUN_FILE, STATISTICS_FILE


@pytest.fixture(scope="module")
def run():
    return random_run()


@pytest.fixture
def directory(run, tmp_path):
    return save_run(run, tmp_path / "run")


def test_loaded_as_saved(run, directory):
    loaded = orbq.load(directory)
    same = jax.tree.map(np.array_equal, loaded.params, run.params)
    assert all(jax.tree.leaves(same))
    assert loaded.potential.architecture == run.potential.architecture
    assert loaded.config == run.config and loaded.targets == ("onsite",)
    for name, statistics in run.potential.constants.statistics.items():
        found = loaded.potential.constants.statistics[name]
        np.testing.assert_array_equal(found.mean, statistics.mean)
        np.testing.assert_array_equal(found.scale, statistics.scale)
    np.testing.assert_array_equal(
        loaded.references["energy"].element, run.references["energy"].element
    )


def test_three_lines_to_forces(run):
    atoms = molecule("H2O")
    positions, graph = run.graph(atoms)
    forces = -jax.grad(run.energy, argnums=1)(run.params, positions, graph)
    predicted = run.predict(atoms)
    np.testing.assert_allclose(forces, predicted["forces"], atol=1e-5)  # float32
    np.testing.assert_allclose(forces.sum(0), 0.0, atol=1e-4)
    network = run.energy(run.params, positions, graph)
    assert predicted["energy"] == pytest.approx(-100.0 + float(network), abs=1e-5)  # 2 H, 1 O
    assert predicted["onsite"].shape == (3, 47)


def test_the_precision_of_a_graph(run):
    """What JAX cannot give is refused, and not rounded with a warning."""
    atoms = molecule("H2O")
    with pytest.raises(InputError, match="jax_enable_x64"):
        run.graph(atoms, dtype="float64")
    for wrong in ("float", "double8", np.int32):
        with pytest.raises(InputError, match="dtype"):
            run.graph(atoms, dtype=wrong)
    with jax.enable_x64(True):
        positions, graph = run.graph(atoms, dtype="float64")
    assert positions.dtype == graph.edges["shifts"].dtype == np.float64
    assert run.graph(atoms)[0].dtype == np.float32


def test_charge_and_spin_from_info(run):
    atoms = molecule("H2O")
    atoms.info.update(total_charge=1, multiplicity=4)
    structure = run.structure(atoms)
    assert (structure.total_charge, structure.spin_multiplicity) == (1, 4)
    del atoms.info["multiplicity"]
    assert run.structure(atoms).spin_multiplicity == 2  # the lowest of nine electrons
    assert run.reference_energy(structure) == -100.0 + 1.5


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (ase.Atoms("Au"), "element Au was not in the training data"),
        (ase.Atoms("UAu", [[0, 0, 0], [0, 0, 3]]), "Au, Z = 92"),
        (ase.Atoms("X"), "Z = 0"),
        (ase.Atoms("O", info={"charge": 0.5}), "charge is 0.5"),
        (ase.Atoms(), "no atoms"),
        (ase.Atoms("O", info={"spin_multiplicity": 0}), "multiplicity is 0"),
        (ase.Atoms("O", info={"spin_multiplicity": 2}), "does not fit 8 electrons"),
        (ase.Atoms("H2"), "atoms 0 and 1 are 0.000 Å apart"),
    ],
)
def test_structures_that_are_refused(run, atoms, message):
    with pytest.raises(InputError, match=message):
        run.structure(atoms)


@pytest.mark.parametrize(
    ("pbc", "cell", "message"),
    [
        ((1, 1, 0), (3, 3, 0), "atoms 0 and 1 are 0.000 Å apart"),
        ((1, 0, 0), (3, 0, 0), "atoms 0 and 1 are 0.000 Å apart"),
        ((0, 1, 0), (0, 0.3, 0), "0.3 Å thin"),
        ((1, 1, 0), (3, 0, 9), "span no volume"),
    ],
)
def test_copies_across_a_periodic_face_of_a_slab(run, pbc, cell, message):
    """They add to no force, and so would not be seen in the result."""
    atoms = ase.Atoms("O2", [[0, 0, 5], [3, 0, 5]], cell=cell, pbc=pbc)
    with pytest.raises(InputError, match=message):
        run.structure(atoms)


def test_a_slab_of_one_layer_and_a_wire_are_structures(run):
    for pbc in ((1, 1, 0), (0, 0, 1)):
        atoms = ase.Atoms("O2", [[0, 0, 0], [1.5, 0, 0]], cell=(3, 3, 3), pbc=pbc)
        assert run.structure(atoms).pbc.tolist() == [bool(p) for p in pbc]


@pytest.mark.parametrize("embed_spin", [True, False])
def test_a_crystals_multiplicity_is_told_where_it_matters(embed_spin):
    seen = {"states": {"total_charge": [0], "spin_multiplicity": [1]}}
    run = random_run((), embed_spin=embed_spin)
    run = orbq.Run(run.potential, run.params, run.config, run.references, seen)
    crystal = ase.Atoms("N", cell=(2, 2, 2), pbc=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.structure(crystal)
    assert [r"atoms.info['spin_multiplicity'] sets it" in str(w.message) for w in told] == (
        [True] * embed_spin
    )


@pytest.mark.parametrize(
    ("atoms", "batch_size", "message"),
    [
        ("water.xyz", 16, "'water.xyz' is no structure"),
        (None, 16, "None is no structure"),
        ([molecule("H2O")], 0, "batch_size is 0"),
        ([molecule("H2O")], 1.5, "batch_size is 1.5"),
    ],
)
def test_what_cannot_be_predicted_is_said_at_once(run, atoms, batch_size, message):
    with pytest.raises(InputError, match=message):
        run.predict(atoms, batch_size)


def test_where_a_structure_lies_costs_no_digits(run):
    """In float32, as many as a thousand kilometres from the origin; next to it nothing is moved."""
    atoms = molecule("CH3OH")
    here = run.predict(atoms)
    np.testing.assert_array_equal(run.graph(atoms)[0], atoms.positions.astype(np.float32))
    atoms.positions += [1e6, -2e5, 3e4]
    for there in (run.predict(atoms), next(run.predict([atoms]))):
        # float64 keeps 1e-10 Å at 1e6 Å; float32 sums of the network the rest
        np.testing.assert_allclose(there["forces"], here["forces"], atol=1e-4)
        assert there["energy"] == pytest.approx(here["energy"], abs=1e-4)


@pytest.mark.parametrize("pbc", [True, (True, True, False)])
def test_periodic_atoms_that_have_left_the_cell_by_far_cost_no_digits(run, pbc):
    """As after long diffusion, each by another lattice vector; near the cell nothing is moved."""
    atoms = molecule("CH3OH", cell=[[7, 0, 0], [1, 8, 0], [0, 2, 9]], pbc=pbc)
    here = run.predict(atoms)
    np.testing.assert_array_equal(run.structure(atoms).positions, atoms.positions)
    steps = np.random.default_rng(0).integers(-40_000, 40_001, (len(atoms), 3)) * atoms.pbc
    atoms.positions += steps @ atoms.cell.array
    atoms.calc = orbq.Calculator(run)
    with_calculator = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    for there in (run.predict(atoms), next(run.predict([atoms])), with_calculator):
        np.testing.assert_allclose(there["forces"], here["forces"], atol=1e-4)
        assert there["energy"] == pytest.approx(here["energy"], abs=1e-4)


def test_element_that_charges_alone_have_taught(run):
    known = run.references["energy"]
    element = np.array(known.known)
    element[8] = False
    partly = orbq.Run(
        run.potential, run.params, run.config, {"energy": known._replace(known=element)}, {}
    )
    with pytest.raises(InputError, match="no energy can be predicted for O"):
        partly.predict(molecule("H2O"))


def test_not_a_run(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        orbq.load(tmp_path)


def test_before_the_first_validation(directory):
    (directory / "checkpoints" / "best").rename(directory / "checkpoints" / "other")
    with pytest.raises(InputError, match="no validated parameters yet"):
        orbq.load(directory)


@pytest.mark.parametrize("suffix", [".new", ".old"])
def test_a_save_killed_between_its_renames_is_put_right(run, directory, suffix):
    best = directory / "checkpoints" / "best"
    best.rename(best.with_name(best.name + suffix))
    same = jax.tree.map(np.array_equal, orbq.load(directory).params, run.params)
    assert all(jax.tree.leaves(same)) and best.is_dir()


def test_of_another_version(directory):
    path = directory / RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_version": 99}))
    with pytest.raises(InputError, match="run format 99"):
        orbq.load(directory)


@pytest.mark.parametrize("key", ["architecture", "constants", "references", "config"])
def test_description_with_a_missing_part(directory, key):
    path = directory / RUN_FILE
    info = json.loads(path.read_text())
    del info[key]
    path.write_text(json.dumps(info))
    with pytest.raises(OrbqError, match=RUN_FILE):
        orbq.load(directory)


def test_truncated_files(directory):
    path = directory / STATISTICS_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OrbqError, match="damaged"):
        orbq.load(directory)


def test_damaged_checkpoint(directory):
    for path in (directory / "checkpoints" / "best").rglob("*"):
        if path.is_file() and path.name != "orbq.json":
            path.write_bytes(b"")
    with pytest.raises(OrbqError, match="cannot be restored"):
        orbq.load(directory)


def test_float64_is_not_lost_in_silence(run, tmp_path):
    training = run.config.training.model_copy(update={"precision": "float64"})
    double = orbq.Run(
        run.potential,
        run.params,
        run.config.model_copy(update={"training": training}),
        run.references,
        {},
    )
    directory = save_run(double, tmp_path / "double")
    with pytest.warns(UserWarning, match="jax_enable_x64"):
        assert orbq.load(directory).graph(molecule("H2O"))[0].dtype == np.float32
    with jax.enable_x64(True):
        assert orbq.load(directory).graph(molecule("H2O"))[0].dtype == np.float64
