"""Files as users have them: formats, packings, charges, spins, cells, missing labels."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect

from orbq.errors import InputError
from orbq.preprocess.label import Recipe, Resources, preprocess
from orbq.preprocess.read import Keys
from orbq.preprocess.store import Dataset
from orbq.preprocess.xtb import Settings
from tests.test_read import water

ONE = Resources(workers=1)
COPPER_STRESS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # Voigt


def make_heap(place: Path) -> None:
    """Ten structures in eight files, in the order of the files' names."""
    (place / "a").mkdir()
    (place / "b" / "deep").mkdir(parents=True)
    packers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    for number, (end, opener) in enumerate(packers.items()):
        with opener(place / "a" / f"{number}.extxyz{end}", "wt") as out:
            out.write(water(f"energy={-number}"))
    (place / "a" / "3.xyz").write_text("3\nno label at all\n" + water().split("\n", 2)[2])

    radical = Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], info={"charge": 0, "multiplicity": 2})
    radical.calc = SinglePointCalculator(radical, energy=-5.0, forces=np.ones((2, 3)))
    anion = Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], info={"charge": -1})
    ase.io.write(place / "b" / "0.traj", [radical, anion])

    with connect(place / "b" / "1.db") as database:
        database.write(molecule("NH3"), charge=1, TotEnergy=-7.0, data={"bader": [0.1] * 4})
        database.write(molecule("O2"), multiplicity=3)
    with connect(place / "b" / "2.json") as database:
        database.write(molecule("CH4"), charge=1, TotEnergy=-8.0)
    copper = bulk("Cu", cubic=True)
    copper.calc = SinglePointCalculator(
        copper, energy=-9.0, forces=np.zeros((4, 3)), stress=COPPER_STRESS
    )
    ase.io.write(place / "b" / "deep" / "3.traj", copper)


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    place = tmp_path_factory.mktemp("heap")
    make_heap(place)
    out = place / "set"
    return preprocess([f"{place}/a/*", f"{place}/b/**/*.*"], out, resources=ONE)


def test_every_structure_of_every_file_is_there_in_order(heap):
    np.testing.assert_array_equal(heap.n_atoms, [3, 3, 3, 3, 2, 2, 4, 2, 5, 4])
    assert [Path(s["name"]).name for s in heap.manifest["sources"]] == [
        *("0.extxyz.gz", "1.extxyz.xz", "2.extxyz.bz2", "3.xyz"),
        *("0.traj", "1.db", "2.json", "3.traj"),
    ]
    files = [0, 1, 2, 3, 4, 4, 5, 5, 6, 7]
    frames = [0, 0, 0, 0, 0, 1, 0, 1, 0, 0]
    np.testing.assert_array_equal(heap["source"], np.column_stack([files, frames]))


def test_what_a_structure_lacks_is_masked_and_the_rest_is_kept(heap):
    has_energy = [1, 1, 1, 0, 1, 0, 1, 0, 1, 1]
    np.testing.assert_array_equal(heap.mask("energy"), np.array(has_energy, bool))
    np.testing.assert_array_equal(heap["energy"], [0, -1, -2, 0, -5, 0, -7, 0, -8, -9])
    np.testing.assert_array_equal(np.flatnonzero(heap.mask("forces")), [4, 9])
    np.testing.assert_array_equal(np.flatnonzero(heap.mask("stress")), [9])


def test_charges_and_spins(heap):
    np.testing.assert_array_equal(heap["total_charge"], [0, 0, 0, 0, 0, -1, 1, 0, 1, 0])
    np.testing.assert_array_equal(heap["spin_multiplicity"], [1, 1, 1, 1, 2, 1, 2, 3, 2, 1])
    for i in range(9):  # the ten orbital charges are those of the state that was asked for
        onsite = heap["onsite"][heap.structure_slice(i)]
        total = (onsite[:, :4] * np.sqrt([1, 1, 3, 5])).sum()
        assert total == pytest.approx(heap["total_charge"][i], abs=1e-6)


def test_a_small_cell_keeps_all_but_the_labels_of_the_gamma_point(heap):
    np.testing.assert_array_equal(heap.mask("onsite"), [True] * 9 + [False])
    np.testing.assert_array_equal(heap.mask("xtb_energy"), [True] * 9 + [False])
    (failure,) = heap.failures()
    assert failure["kind"] == "labels missing"
    assert failure["file"].endswith("3.traj")
    assert "cell height 3.61 Å below 10 Å: xTB samples the Gamma point alone" in failure["reason"]
    xx, yy, zz, yz, xz, xy = COPPER_STRESS
    np.testing.assert_array_equal(heap["stress"][9], [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    assert heap["pbc"][9].all()
    assert heap["energy"][9] == -9.0


def test_a_lower_limit_of_the_cell_is_the_users_choice(tmp_path):
    small = Recipe(settings=Settings(min_height=3.0))
    dataset = preprocess([bulk("Cu", cubic=True)], tmp_path / "set", small, ONE)
    np.testing.assert_array_equal(dataset.mask("onsite"), [True])
    assert dataset.manifest["settings"]["min_height"] == 3.0


def test_atomic_charges_under_any_key(tmp_path):
    """Read from an array of the structure, and from the data of a database's row."""
    atoms = molecule("NH3")
    atoms.arrays["bader"] = np.array([-0.3, 0.1, 0.1, 0.1])
    with connect(tmp_path / "a.db") as database:
        database.write(molecule("NH3"), data={"bader": np.array([-0.6, 0.2, 0.2, 0.2])})
    ase.io.write(tmp_path / "b.extxyz", atoms)
    recipe = Recipe(keys=Keys(dft_charges="bader"))
    files = [tmp_path / "a.db", tmp_path / "b.extxyz"]
    dataset = preprocess(files, tmp_path / "set", recipe, ONE)
    expected = [-0.6, 0.2, 0.2, 0.2, -0.3, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(dataset["dft_charges"], expected)
    assert dataset.manifest["keys"]["dft_charges"] == {"bader": 2}


def test_spin_polarised_labels_are_another_job_and_lower_the_triplet(tmp_path, heap):
    oxygen = molecule("O2")
    oxygen.info["multiplicity"] = 3
    recipe = Recipe(settings=Settings(spin_polarization=True))
    polarised = preprocess([oxygen], tmp_path / "set", recipe, ONE)
    assert polarised["xtb_energy"][0] < heap["xtb_energy"][7] - 0.1  # eV
    assert polarised.manifest["settings"]["spin_polarization"] is True
    with pytest.raises(InputError, match="its settings is different"):
        preprocess([oxygen], tmp_path / "set", resources=ONE)


def test_a_list_and_a_stream_of_atoms_are_the_same(tmp_path):
    molecules = [molecule(name) for name in ("H2O", "CH4")]
    listed = preprocess(molecules, tmp_path / "list", resources=ONE)
    streamed = preprocess((a for a in molecules), tmp_path / "stream", resources=ONE)
    assert len(streamed) == 2
    assert listed.manifest["arrays"]["onsite"] == streamed.manifest["arrays"]["onsite"]
    alone = preprocess(molecule("H2O"), tmp_path / "alone", resources=ONE)
    np.testing.assert_array_equal(alone["numbers"], [8, 1, 1])


def test_reopened_from_disk(heap):
    again = Dataset.open(heap.path)
    assert again.manifest["counts"]["labels"]["energy"] == 7
