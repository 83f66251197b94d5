"""What lies in configs/ and benchmarks/models/ loads and does what is said of it."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest

import orbq
from orbq.config import load_config

ROOT = Path(__file__).resolve().parents[1]
ACAC = ROOT.parent / "shared" / "data" / "acac" / "test_MD_300K.xyz"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_configurations_are_valid_and_open_with_their_command(path):
    assert load_config(path).training.n_steps > 0
    assert "orbq " in path.read_text().split("\n\n")[0]


@pytest.mark.parametrize(
    ("name", "limit"), [("energy-only", 13e-3), ("onsite", 13e-3), ("gfn1-first", 9e-3)]
)
def test_acetylacetone_models_have_the_errors_of_the_results(name, limit):
    """Of 20 of the 650 test configurations; RESULTS.md has those of all."""
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
