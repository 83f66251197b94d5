"""The data set on disk: opened lazily, checked against its manifest, refused when it is wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from ase.build import molecule

from orbq.errors import InputError
from orbq.preprocess import store
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import Dataset, content_hash
from orbq.schema import FIELDS
from tests.test_xtb import of_ase


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of three molecules, two with energies and one with forces."""
    molecules = [molecule(name) for name in ("H2O", "CH4", "NH3")]
    molecules[0].info["energy"] = -1.0
    molecules[1].info.update(energy=-2.0, group="g" * 100)
    molecules[1].arrays["forces"] = np.ones((5, 3))
    out = tmp_path_factory.mktemp("store") / "set"
    return preprocess(molecules, out, resources=Resources(workers=1))


def test_arrays_have_the_schema_of_the_contract(made):
    assert len(made) == 3
    np.testing.assert_array_equal(made.n_atoms, [3, 5, 4])
    for name, field in FIELDS.items():
        array = made[name]
        rows = 3 if field.per == "structure" else 12
        assert array.shape == (rows, *field.shape), name
        assert array.dtype == np.dtype(field.dtype), name
        assert made.mask(name).shape == (3,)
    np.testing.assert_array_equal(made.mask("energy"), [True, True, False])
    np.testing.assert_array_equal(made.mask("forces"), [False, True, False])
    np.testing.assert_array_equal(made.mask("onsite"), [True, True, True])
    np.testing.assert_array_equal(made["energy"], [-1, -2, 0])
    assert made["forces"][made.structure_slice(1)].all()
    assert not made["forces"][made.structure_slice(0)].any()
    with pytest.raises(IndexError):
        made.structure_slice(3)


def test_names_of_arrays(made):
    assert "energy" in made and "energi" not in made
    with pytest.raises(InputError, match=r"'energi' is no array of .*: .*energy"):
        made["energi"]
    with pytest.raises(TypeError, match="not iterable"):
        list(made)


def test_arrays_stay_on_disk(made):
    assert all(isinstance(array, np.memmap) for array in made.arrays.values())
    with pytest.raises(ValueError, match="read-only"):
        made["energy"][0] = 0.0


def test_long_group_names_keep_apart(made):
    group = made["group"][1]
    assert len(group) <= 64
    assert group.startswith(b"ggg")
    assert b"~" in group


def test_content_hash_sees_what_labels_depend_on():
    s = of_ase("H2O")
    same = s._replace(positions=s.positions + 1e-9, energy=-1.0, group="x")
    assert content_hash(s) == content_hash(same)
    assert len(content_hash(s)) == 32
    different = [
        s._replace(positions=s.positions + 1e-3),
        s._replace(total_charge=1),
        s._replace(spin_multiplicity=3),
        s._replace(numbers=np.array([16, 1, 1])),
        s._replace(pbc=np.ones(3, bool), cell=20 * np.eye(3)),
    ]
    assert len({content_hash(x) for x in [s, *different]}) == 6


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.path, tmp_path / "copy")


def test_another_schema_version_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["schema_version"] = 0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"schema version 0, .*convert it.*orbq preprocess"):
        Dataset.open(copy)


def test_damage_is_named(copy):
    path = store.array_file(copy, "forces")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"forces\.npy is missing or damaged.*orbq verify"):
        Dataset.open(copy)
    np.save(path, np.zeros((1, 3)))
    with pytest.raises(InputError, match=r"holds float64 \(1, 3\).*states float64 \(12, 3\)"):
        Dataset.open(copy)
    path.unlink()
    with pytest.raises(InputError, match=r"forces\.npy is missing"):
        Dataset.open(copy)


def test_a_damaged_manifest_and_no_data_set(copy, tmp_path):
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        Dataset.open(copy)
    with pytest.raises(InputError, match=r"not a data set.*orbq preprocess INPUT"):
        Dataset.open(tmp_path)
    (tmp_path / ".job").mkdir()
    with pytest.raises(InputError, match="unfinished"):
        Dataset.open(tmp_path)
