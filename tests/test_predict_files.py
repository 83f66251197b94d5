"""Files of predictions: what came with the structures is kept, under whatever format."""

from __future__ import annotations

import ase
import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.db import connect
from tiny_run import random_run, save_run
from typer.testing import CliRunner

import orbq
from orbq.cli import make_app


@pytest.fixture(scope="module")
def run() -> orbq.Run:
    return random_run(("atomic",), lmax=0, n_layers=1)


def command(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(make_app(), [str(a) for a in arguments])
    return found.exit_code, found.output


def test_predict_into_a_json_database_and_formats_that_cannot_hold_it(run, tmp_path):
    place = save_run(run, tmp_path / "run")
    structures = [molecule("CH4"), molecule("H2O")]
    ase.io.write(tmp_path / "given.xyz", structures)
    out = tmp_path / "out.json"
    status, text = command("predict", place, tmp_path / "given.xyz", "--out", out)
    assert status == 0, text
    for atoms, expected in zip(ase.io.read(out, ":"), structures, strict=True):
        energy = run.predict(expected)["energy"]
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-3)
    out = tmp_path / "out.pdb"  # of one size of structures alone
    status, text = command("predict", place, tmp_path / "given.xyz", "--out", out)
    assert status == 2 and "cannot hold these structures" in text and ".extxyz" in text
    assert not list(tmp_path.glob("out.pdb*"))


@pytest.mark.parametrize("end", ["db", "json"])
def test_rows_of_a_database_keep_their_pairs_and_data(run, tmp_path, end):
    """Among them the total charge, which the next prediction reads."""
    place = save_run(run, tmp_path / "run")
    given, out = tmp_path / "given.db", tmp_path / f"out.{end}"
    with connect(given) as database:
        database.write(molecule("H2O"), tag="water", total_charge=1, data={"more": [1, 2]})
    status, text = command("predict", place, given, "--out", out)
    assert status == 0, text
    row = connect(out).get()
    assert row.key_value_pairs == {"tag": "water", "total_charge": 1}
    assert row.data["more"] == [1, 2]
    atoms = molecule("H2O")
    atoms.info["charge"] = 1
    assert row.energy == pytest.approx(run.predict(atoms)["energy"], abs=1e-3)


def test_what_extxyz_says_of_a_structure_goes_into_a_database(run, tmp_path):
    """Its numbers, which ASE reads as NumPy's: the next prediction is of the same ion."""
    place, given, out = save_run(run, tmp_path / "run"), tmp_path / "a.extxyz", tmp_path / "a.db"
    ion = molecule("H2O")
    ion.info.update(charge=1, spin_multiplicity=2, idx=7, ok=True, temp=300.5, many=[1, 2])
    ase.io.write(given, ion)
    assert command("predict", place, given, "--out", out)[0] == 0
    row = connect(out).get()
    there = {name: row.data[name] for name in ("charge", "spin_multiplicity", "idx", "ok", "temp")}
    assert there == {"charge": 1, "spin_multiplicity": 2, "idx": 7, "ok": True, "temp": 300.5}
    assert list(row.data["many"]) == [1, 2]
    assert row.energy == pytest.approx(run.predict(ion)["energy"], abs=1e-3)
    status, text = command("predict", place, out, "--out", tmp_path / "again.db")
    assert status == 0, text
    assert connect(tmp_path / "again.db").get().energy == pytest.approx(row.energy, abs=1e-4)


def test_charges_under_another_name_are_read_as_asked(run, tmp_path):
    """As preprocess reads them; and what was found, or assumed, is said."""
    place, given = save_run(run, tmp_path / "run"), tmp_path / "a.extxyz"
    ion, other = molecule("H2O"), molecule("H2O")
    ion.info.update(q=1, mult=2)
    ase.io.write(given, [ion, other])
    named = molecule("H2O")
    named.info.update(charge=1, spin_multiplicity=2)
    status, text = command("predict", place, given, "--out", tmp_path / "plain.extxyz")
    assert status == 0 and "charge: not in the input: 0 assumed" in text
    keys = ("--charge-key", "q", "--spin-key", "mult")
    status, text = command("predict", place, given, "--out", tmp_path / "own.extxyz", *keys)
    assert status == 0 and "charge: q" in text and "spin: mult" in text, text
    found = [atoms.get_potential_energy() for atoms in ase.io.read(tmp_path / "own.extxyz", ":")]
    expected = [run.predict(atoms)["energy"] for atoms in (named, other)]
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    assert found == pytest.approx(expected, abs=1e-4)
    out = tmp_path / "none.extxyz"
    status, text = command("predict", place, given, "--out", out, "--charge-key", "Q")
    assert status == 2 and not out.exists()
    assert "no structure has the charge key 'Q'; keys present: mult, q" in text, text


@pytest.mark.parametrize("end", ["traj", "db", "json"])
def test_arrays_of_the_input_are_kept(run, tmp_path, end):
    """In info, where the format has no place for arrays of other names than its own."""
    place, given, out = (
        save_run(run, tmp_path / "run"),
        tmp_path / "a.extxyz",
        tmp_path / f"a.{end}",
    )
    water = molecule("H2O")
    water.new_array("REF_forces", np.arange(9.0).reshape(3, 3))
    water.new_array("mulliken", np.array([-0.6, 0.3, 0.3]))
    ase.io.write(given, water)
    status, text = command("predict", place, given, "--out", out)
    assert status == 0, text
    found = ase.io.read(out).info if end == "traj" else connect(out).get().data
    np.testing.assert_array_equal(found["REF_forces"], water.arrays["REF_forces"])
    np.testing.assert_array_equal(found["mulliken"], water.arrays["mulliken"])


def test_names_stay_as_they_are_written(run, tmp_path):
    """Those of groups, which ASE would read as numbers and truths, and words with backslashes."""
    place, given = save_run(run, tmp_path / "run"), tmp_path / "given.extxyz"
    names = ["007", "1e5", "F", "C\\C", "plain", "two words"]
    lines = [
        f'2\nProperties=species:S:1:pos:R:3 group="{name}" note="{name}"\nH 0 0 0\nH 0 0 .8\n'
        for name in (name.replace("\\", "\\\\") for name in names)
    ]
    given.write_text("".join(lines))
    for out in (tmp_path / "out.extxyz", tmp_path / "again.extxyz"):
        status, text = command("predict", place, given, "--out", out)
        assert status == 0, text
        found = ase.io.read(out, ":")
        assert [atoms.info["group"] for atoms in found] == names
        assert [atoms.info["note"] for atoms in found][3:] == names[3:]
        given = out


@pytest.mark.parametrize("end", ["extxyz", "traj"])
def test_values_of_the_same_name_are_replaced(run, tmp_path, end):
    """In a trajectory info and arrays may hold what the calculator does, too; extxyz may not."""
    given, out = tmp_path / "given.traj", tmp_path / f"out.{end}"
    water = molecule("H2O")
    water.info |= {"energy": -5.0, "stress": [1.0, 2.0]}
    water.set_array("forces", np.ones((3, 3)))
    ase.io.write(given, [molecule("CH4"), water, molecule("NH3")])
    status, text = command("predict", save_run(run, tmp_path / "run"), given, "--out", out)
    assert status == 0, text
    found = ase.io.read(out, ":")
    assert len(found) == 3 and "energy" not in found[1].info
    expected = run.predict(molecule("H2O"))
    assert found[1].get_potential_energy() == pytest.approx(expected["energy"], abs=1e-3)
    np.testing.assert_allclose(found[1].get_forces(), expected["forces"], atol=1e-4)
