"""``orbq predict``: what is written, what is left out, formats, streams."""

from __future__ import annotations

import json

import ase
import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from tiny_run import complexes, random_run, save_run
from typer.testing import CliRunner

import orbq
from orbq.annotate import Refused, Writer, annotate
from orbq.cli import make_app
from orbq.errors import InputError
from orbq.preprocess.frames import find_sources
from orbq.preprocess.read import Reader


def reader(path: object) -> Reader:
    """Of the structures of a file, to be predicted."""
    return Reader(find_sources([str(path)]), labels=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The directory of a run."""
    return save_run(random_run(), tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The directory of a run without charges, quickly compiled."""
    run = random_run((), lmax=0, n_layers=1)
    return save_run(run, tmp_path_factory.mktemp("small") / "run")


def orbq_command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture
def structures(tmp_path):
    """Twelve structures in a file: three of them cannot be predicted."""
    frames = complexes(9, {1, 6, 7, 8, 22})
    close = molecule("H2O")
    close.positions[1] = close.positions[0] + 0.01
    broken = molecule("H2O")
    broken.positions[2, 1] = np.nan
    frames[2:2] = [close, molecule("SO2"), broken]
    path = tmp_path / "mine.extxyz"
    ase.io.write(path, frames)
    return path


def test_predict_in_order_and_past_bad_structures(stored, structures, tmp_path):
    out = tmp_path / "predicted.extxyz"
    status, text = orbq_command("predict", stored, structures, "--out", out, "--charges")
    assert status == 0, text
    assert "9 structures, 3 left out" in text
    for reason in ("at least 0.4 Å needed", "S was not in the training data", "not finite"):
        assert reason in text
    failures = (tmp_path / "predicted.extxyz.failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in failures] == [2, 3, 4]
    given = [a for i, a in enumerate(ase.io.read(structures, ":")) if i not in (2, 3, 4)]
    found, run = ase.io.read(out, ":"), orbq.load(stored)
    for before, after in zip(given, found, strict=True):
        np.testing.assert_array_equal(before.numbers, after.numbers)
        np.testing.assert_allclose(before.positions, after.positions, atol=1e-8)
        assert after.info["charge"] == before.info["charge"]
    expected = run.predict(found[-1])
    assert found[-1].get_potential_energy() == pytest.approx(expected["energy"], abs=1e-3)
    np.testing.assert_allclose(found[-1].get_forces(), expected["forces"], atol=1e-3)
    for after in found:
        charges = after.arrays["orbital_charges"]
        assert charges.shape == (len(after), 10)
        np.testing.assert_allclose(charges.sum(1), after.get_charges(), atol=1e-6)
        assert after.get_charges().sum() == pytest.approx(after.info["charge"], abs=1e-4)


def test_predict_does_not_overwrite(small, structures, tmp_path):
    out = tmp_path / "predicted.extxyz.gz"
    out.write_bytes(b"precious")
    status, text = orbq_command("predict", small, structures, "--out", out)
    assert status == 2 and "--overwrite" in text and out.read_bytes() == b"precious"
    status, text = orbq_command("predict", small, structures, "--out", out, "--overwrite")
    assert status == 0 and len(ase.io.read(out, ":")) == 9
    assert not list(tmp_path.glob("*.partial"))


def test_predict_refuses_before_computing(small, structures, tmp_path):
    status, text = orbq_command("predict", small, structures, "--out", tmp_path / "a.foo")
    assert status == 2 and ".extxyz" in text
    status, text = orbq_command("predict", small, tmp_path / "no.xyz", "--out", tmp_path / "a.xyz")
    assert status == 2 and "no such file" in text


def test_nothing_but_bad_structures(small, tmp_path):
    ase.io.write(tmp_path / "gold.xyz", ase.Atoms("Au"))
    status, text = orbq_command(
        "predict", small, tmp_path / "gold.xyz", "--out", tmp_path / "o.xyz"
    )
    assert status == 2 and "Au was not in the training data" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gold.xyz", "o.xyz.failures.jsonl"]


def test_charges_need_a_charge_target(structures):
    with pytest.raises(InputError, match="predicts no charges"):
        next(
            annotate(
                random_run((), lmax=0, n_layers=1),
                reader(structures),
                charges=True,
            )
        )


def _labelled_water() -> ase.Atoms:
    """What a calculation of another method may have left."""
    atoms = molecule("H2O")
    labels = {"energy": -1.0, "free_energy": -1.1, "forces": np.full((3, 3), 0.5)}
    atoms.calc = SinglePointCalculator(
        atoms, **labels, dipole=np.array([0.0, 0.0, 0.4]), magmoms=np.full(3, 0.25)
    )
    return atoms


def test_what_came_with_a_structure_stays(tmp_path):
    """But for what follows from an energy, where another energy takes its place."""
    path = tmp_path / "labelled.extxyz"
    ase.io.write(path, _labelled_water())
    (found,) = annotate(random_run((), lmax=0, n_layers=1), reader(path))
    assert found.get_potential_energy() != pytest.approx(-1.0)
    assert set(found.calc.results) == {"energy", "forces", "dipole", "magmoms"}
    np.testing.assert_allclose(found.get_dipole_moment(), [0.0, 0.0, 0.4])


def test_charges_alone_leave_energies_and_forces(tmp_path):
    path = tmp_path / "labelled.extxyz"
    ase.io.write(path, _labelled_water())
    (found,) = annotate(orbq.load("gfn1-metals"), reader(path), charges=True)
    assert found.get_potential_energy() == -1.0
    np.testing.assert_allclose(found.get_forces(), 0.5)
    assert found.get_charges().sum() == pytest.approx(0.0, abs=1e-5)


def test_formats_without_results_are_told(small, tmp_path):
    given, out = tmp_path / "water.xyz", tmp_path / "water.cif"
    ase.io.write(given, molecule("H2O", cell=(8, 8, 8), pbc=True))
    status, text = orbq_command("predict", small, given, "--out", out)
    assert status == 0 and "the format 'cif' holds no energies, forces or charges" in text
    ase.io.write(given, [molecule("H2O"), molecule("CH4")])
    status, text = orbq_command("predict", small, given, "--out", tmp_path / "POSCAR")
    assert status == 2 and "holds one structure" in text
    assert not list(tmp_path.glob("POSCAR*"))


def test_a_run_twice_is_no_ensemble(small, structures, tmp_path):
    status, text = orbq_command("predict", small, small, structures, "--out", tmp_path / "a.xyz")
    assert status == 2 and "is named twice" in text
    status, text = orbq_command(
        "predict", "gfn1-metals", "gfn1-metals", structures, "--out", tmp_path / "a.xyz"
    )
    assert status == 2 and "gfn1-metals is named twice" in text


def test_streams_in_chunks_with_few_compilations(tmp_path):
    """More structures than a chunk holds, the larger ones last: a new shape is compiled."""
    run = random_run((), lmax=0, n_layers=1, elements=(1, 6))
    frames = [molecule(n) for n in ("H2", "CH4", "C2H6", "C6H6")]
    path = tmp_path / "many.xyz"
    ase.io.write(path, [atoms for atoms in frames for _ in range(20)])
    found = list(annotate(run, reader(path), batch_size=1))
    assert not any(isinstance(item, Refused) for item in found)
    energies = [atoms.get_potential_energy() for atoms in found]
    for k in (0, 3):
        expected = run.predict(frames[k])["energy"]
        np.testing.assert_allclose(energies[20 * k : 20 * k + 20], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["a.traj", "a.db", "a.cif", "a.xyz.xz"])
def test_formats(name, tmp_path):
    writer = Writer(tmp_path / "new" / name)
    cell = molecule("CH4", cell=(8, 8, 8), pbc=True)
    for _ in range(3):
        writer.write(cell.copy())
    writer.finish()
    found = ase.io.read(tmp_path / "new" / name, ":")
    assert [len(atoms) for atoms in found] == [5, 5, 5]


def test_a_format_of_one_structure(tmp_path):
    writer = Writer(tmp_path / "POSCAR")
    writer.write(molecule("CH4", cell=(8, 8, 8), pbc=True))
    with pytest.raises(InputError, match="holds one structure"):
        writer.write(molecule("CH4"))
    writer.finish()
    assert len(ase.io.read(tmp_path / "POSCAR")) == 5


def test_an_unfinished_file_keeps_its_partial_name(tmp_path):
    writer = Writer(tmp_path / "a.xyz")
    writer.write(molecule("CH4"))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.xyz.partial"]
    assert len(ase.io.read(tmp_path / "a.xyz.partial", format="extxyz")) == 5


def test_slabs_crystals_and_ions_beside_each_other(tmp_path):
    """One batch, each as the calculator has it alone."""
    slab = molecule("CH4", cell=(3.0, 3.5, 20.0), pbc=(True, True, False))
    crystal = molecule("H2O", cell=(4, 4, 4), pbc=True)
    ion = molecule("CH3OH")
    ion.info["charge"] = 1
    path = tmp_path / "mixed.extxyz"
    ase.io.write(path, [slab, ion, crystal, ase.Atoms("H")])
    run = random_run((), lmax=1, n_layers=1)
    calculator = orbq.Calculator(run)
    for atoms in annotate(run, reader(path)):
        alone = atoms.copy()
        alone.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(alone.get_potential_energy(), abs=1e-4)
        np.testing.assert_allclose(atoms.get_forces(), alone.get_forces(), atol=1e-4)
