"""What lies in configs/ and benchmarks/models/ loads and does what is said of it."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

import orbq
from orbq.config import load_config

ROOT = Path(__file__).resolve().parents[1]
ACAC = ROOT.parent / "shared" / "data" / "acac" / "test_MD_300K.xyz"
HOT = ROOT / "benchmarks" / "data" / "acac_hot.extxyz.gz"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_configurations_are_valid_and_open_with_their_command(path):
    assert load_config(path).training.n_steps > 0
    assert "orbq " in path.read_text().split("\n\n")[0]


@pytest.mark.parametrize(
    ("name", "limit"), [("energy-only", 13e-3), ("onsite", 13e-3), ("gfn1-first", 7e-3)]
)
def test_acetylacetone_models_have_the_errors_of_the_results(name, limit):
    """Of 20 of the 650 test configurations; benchmarks/results/ has those of all."""
    if not ACAC.is_file():
        pytest.skip("needs ../shared/data/acac")
    calculator = orbq.Calculator(ROOT / "benchmarks" / "models" / "acac" / name)
    energies, forces = [], []
    for reference in ase.io.read(ACAC, "::33"):
        atoms = reference.copy()
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy() - reference.get_potential_energy())
        forces.append(atoms.get_forces() - reference.get_forces())
    assert np.sqrt(np.mean(np.square(energies))) < 2e-3  # eV
    assert np.sqrt(np.mean(np.square(forces))) < limit  # eV/Å


def test_hot_acetylacetone_has_labels_of_the_training_set_s_level():
    """Which those of training configurations show: a constant apart in the energy."""
    training = ACAC.with_name("train_300K.xyz")
    if not training.is_file():
        pytest.skip("needs ../shared/data/acac")
    known = ase.io.read(training, ":")
    same = [atoms for atoms in ase.io.read(HOT, ":") if atoms.info["set"] == "check"]
    assert len(same) == 5
    above = [a.get_potential_energy() - known[a.info["row"]].get_potential_energy() for a in same]
    assert np.std(above) < 2e-4  # eV
    for atoms in same:
        before = known[atoms.info["row"]]
        np.testing.assert_allclose(atoms.positions, before.positions, atol=1e-6)
        assert np.abs(atoms.get_forces() - before.get_forces()).max() < 0.01  # eV/Å


@pytest.mark.parametrize(("name", "limit"), [("energy-only", 40e-3), ("gfn1-first", 18e-3)])
def test_acetylacetone_models_hold_at_600_kelvin(name, limit):
    """Twice the temperature of their training; benchmarks/results/ has those of all 45."""
    frames = [atoms for atoms in ase.io.read(HOT, ":") if atoms.info["set"] == "600K"][::3]
    assert len(frames) == 15
    run = orbq.load(ROOT / "benchmarks" / "models" / "acac" / name)
    found = list(run.predict([Atoms(a.numbers, a.positions) for a in frames]))
    energies = [f["energy"] - a.get_potential_energy() for f, a in zip(found, frames, strict=True)]
    forces = [f["forces"] - a.get_forces() for f, a in zip(found, frames, strict=True)]
    assert np.sqrt(np.mean(np.square(energies))) < 12e-3  # eV
    assert np.sqrt(np.mean(np.square(forces))) < limit  # eV/Å
