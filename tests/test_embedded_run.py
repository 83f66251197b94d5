"""The embedded network "gfn1-metals": found by its name, knows charges, begins a training run."""

from __future__ import annotations

from pathlib import Path

import ase.io
import jax
import numpy as np
import pytest
from ase import Atoms
from jax_md import space

import orbq
from orbq.annotate import RESOLVED_CHARGES, annotate
from orbq.config import Config, load_config
from orbq.demo import demo_config
from orbq.errors import InputError
from orbq.initial import TAUGHT_FILE, prepare_from, with_own_copy
from orbq.preprocess.frames import find_sources
from orbq.preprocess.label import preprocess
from orbq.preprocess.read import Reader
from orbq.preprocess.store import Dataset
from orbq.run_files import EMBEDDED, run_directory
from orbq.stablehlo import export

(NAME,) = EMBEDDED
ROOT = Path(orbq.__file__).parent
COMMON = {"H", "C", "N", "O", "Cl", "Ti", "Zr", "Pd"}  # each many times, whatever is held out


def reader(path: object) -> Reader:
    """Of the structures of a file, to be predicted."""
    return Reader(find_sources([str(path)]), labels=False)


@pytest.fixture(scope="module")
def run() -> orbq.Run:
    return orbq.load(NAME)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Complexes with DFT, which the network has never seen, and their own GFN1-xTB labels."""
    return preprocess(_common("tmc"), tmp_path_factory.mktemp("embedded") / "set")


def _common(name: str) -> list[Atoms]:
    frames = ase.io.read(ROOT / "data" / f"{name}.extxyz.gz", ":")
    complexes = [atoms for atoms in frames if atoms.info["metal"] != "none"]
    return [atoms for atoms in complexes if set(atoms.symbols) <= COMMON]


def test_its_charges_are_those_of_complexes_it_has_never_seen(
    run: orbq.Run, labelled: Dataset
) -> None:
    errors = run.evaluate(labelled, "all").errors()
    charges = RESOLVED_CHARGES["orbital_charges"]("onsite", np.asarray(labelled["onsite"]))
    numbers, spread = np.asarray(labelled["numbers"]), []
    for z in np.unique(numbers):
        own = charges[numbers == z]
        spread.append(np.abs(own - own.mean(0))[:, own.std(0) > 0].ravel())
    assert errors["orbital_mae_e"] < 0.5 * np.concatenate(spread).mean()
    assert errors["xtb_energy_mae_meV"] < 600
    assert "energy_mae_meV" not in errors


def test_what_it_was_not_taught_is_not_given(run: orbq.Run) -> None:
    atoms = ase.io.read(ROOT / "data" / "tmc.extxyz.gz", 0)
    assert set(run.predict(atoms)) == {"onsite"}
    assert [set(found) for found in run.predict([atoms, atoms])] == [{"onsite"}] * 2
    calculator = orbq.Calculator(run)
    assert calculator.implemented_properties == ["charges", "dipole"]
    with pytest.raises(NotImplementedError):
        calculator.get_property("energy", atoms)
    with pytest.raises(NotImplementedError, match="neither energies nor forces"):
        calculator.calculate(atoms)  # by hand, ASE looks at no list
    assert abs(calculator.get_property("charges", atoms).sum() - atoms.info["charge"]) < 1e-4


def test_files_get_its_charges_and_no_energy(run: orbq.Run, tmp_path: Path) -> None:
    atoms = ase.io.read(ROOT / "data" / "tmc.extxyz.gz", 0)
    ase.io.write(tmp_path / "one.extxyz", atoms)
    source = reader(str(tmp_path / "one.extxyz"))
    (found,) = annotate(run, source, charges=True)
    assert found.arrays["orbital_charges"].shape == (len(atoms), 10)
    came = ase.io.read(tmp_path / "one.extxyz")  # its energy and forces are DFT's still
    assert found.get_potential_energy() == came.get_potential_energy()
    np.testing.assert_array_equal(found.get_forces(), came.get_forces())
    bare = ase.Atoms(atoms.numbers, atoms.positions, info={"charge": atoms.info["charge"]})
    ase.io.write(tmp_path / "bare.extxyz", bare)
    (found,) = annotate(run, reader(str(tmp_path / "bare.extxyz")), charges=True)
    assert "energy" not in found.calc.results
    with pytest.raises(InputError, match="neither energies nor forces"):
        next(annotate(run, source))


def test_nothing_else_gives_its_energies(run: orbq.Run, tmp_path: Path) -> None:
    atoms = ase.io.read(ROOT / "data" / "tmc.extxyz.gz", 0)
    with pytest.raises(InputError, match="neither energies nor forces"):
        jax.grad(run.energy, argnums=1)(run.params, *run.graph(atoms))
    with pytest.raises(InputError, match="neither energies nor forces"):
        orbq.jax_md(run, atoms, space.free()[0])
    with pytest.raises(InputError, match="neither energies nor forces"):
        export(run, tmp_path / "exported")
    assert set(orbq.Ensemble([run, run]).predict(atoms)) == {"onsite", "onsite_std"}


def test_a_directory_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME, "evaluation").mkdir(parents=True)  # what `orbq evaluate gfn1-metals` leaves here
    assert run_directory(NAME) == ROOT / "data" / "networks" / NAME
    Path(NAME, "run.json").write_text("{}")
    assert run_directory(NAME) == Path(NAME)
    with pytest.raises(InputError, match=r"runs/none .*gfn1-metals"):
        orbq.load("runs/none")


def _config(labelled: Dataset, directory: Path) -> Config:
    own = (f"data.dataset='{labelled.path}'", f"run.directory='{directory}'", "data.split='within'")
    own += ("data.unlabelled=[]", "training.unlabelled_share=0.0", "data.validation_fraction=0.3")
    return load_config(demo_config(), own)


def test_a_run_begins_from_it_and_knows_that_nothing_held_out_was_taught(
    run: orbq.Run, labelled: Dataset, tmp_path: Path
) -> None:
    data = prepare_from(_config(labelled, tmp_path / "run"))
    assert data.initial is not None and not data.initial.notes  # the check was made
    assert data.constants.elements == run.elements
    copied = with_own_copy(_config(labelled, tmp_path / "run"), tmp_path)
    assert (Path(copied.training.initial) / TAUGHT_FILE).is_file()


def test_structures_it_was_taught_are_refused_where_they_are_held_out(
    labelled: Dataset, tmp_path: Path
) -> None:
    known = _common("tmc_unlabelled")
    for atoms in known:
        atoms.info["energy"] = -1.0 * len(atoms)
        atoms.arrays["forces"] = np.zeros((len(atoms), 3))
    dataset = preprocess(known, tmp_path / "known")
    with pytest.raises(InputError, match=r"taught\.npy"):
        prepare_from(_config(dataset, tmp_path / "run"))
    hashes = np.load(run_directory(NAME) / TAUGHT_FILE)
    assert not np.isin(labelled["content_hash"].astype(hashes.dtype), hashes).any()
