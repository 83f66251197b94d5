"""Which xTB energies are nearest to reference energies: those that these were made of."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from typer.testing import CliRunner

from orbq.cli import make_app
from orbq.errors import InputError
from orbq.preprocess import xtb
from orbq.preprocess.nearest import Found, Nearness, nearest_methods
from orbq.preprocess.schedule import Resources
from tests.test_xtb import of_ase

NAMES = ("H2O", "CH4", "NH3", "C2H6", "CH3OH", "HCN", "H2CO", "C2H4", "N2H4", "CO2", "H3CNH2")
NAMES += ("C2H2", "HCOOH", "N2O", "CH3CHO")
ATOMS = {"H": 3.0, "C": -100.0, "N": 20.0, "O": 7.0}  # eV, to be told from chemistry by the fit
ONE = Resources(workers=1)


def written(place: Path, method: str, names: tuple[str, ...] = NAMES) -> Path:
    """Molecules whose reference energies are a method's and a shift for each atom."""
    frames = []
    for name in names:
        atoms = molecule(name)
        energy = xtb.label(of_ase(name), method).energy
        atoms.info["TotEnergy"] = energy + sum(ATOMS[s] for s in atoms.symbols)
        frames.append(atoms)
    ase.io.write(place / "molecules.xyz", frames, format="extxyz")
    return place / "molecules.xyz"


@pytest.mark.parametrize("method", ["GFN2-xTB", "GFN1-xTB+GFN2-xTB"])
def test_the_method_that_made_the_energies_is_the_nearest(method: str, tmp_path: Path) -> None:
    found = nearest_methods(written(tmp_path, method), resources=ONE)
    assert (found.n, found.left_out, len(found.nearness)) == (len(NAMES), 0, 8)
    first, second = found.nearness[:2]
    assert first.method == method and first.error < 1e-6 < 0.02 < second.error
    assert [one.error for one in found.nearness] == sorted(one.error for one in found.nearness)
    assert "" in [one.method for one in found.nearness]


def test_what_is_left_beside_the_composition_is_that_of_a_fit(tmp_path: Path) -> None:
    """By NumPy: n structures, four elements."""
    found = nearest_methods(written(tmp_path, "GFN2-xTB"), resources=ONE)
    frames = ase.io.read(tmp_path / "molecules.xyz", ":")
    counts = np.array([[atoms.symbols.count(s) for s in ATOMS] for atoms in frames])
    gfn1 = [xtb.label(of_ase(name)).energy for name in NAMES]
    rest = np.array([atoms.info["TotEnergy"] for atoms in frames]) - gfn1
    left = rest - counts @ np.linalg.lstsq(counts, rest, rcond=None)[0]
    n = len(NAMES)
    expected = np.abs(left).mean() * np.sqrt(n / (n - 4))
    (error,) = (one.error for one in found.nearness if one.method == "GFN1-xTB")
    assert error == pytest.approx(expected, rel=1e-6)


def test_a_part_is_taken_at_random_and_what_has_no_labels_is_left_out(tmp_path: Path) -> None:
    place = written(tmp_path, "GFN2-xTB")
    frames = ase.io.read(place, ":")
    frames.append(Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=5 * np.eye(3), pbc=True))
    frames[-1].info["TotEnergy"] = -30.0  # too small a cell
    frames.append(molecule("CH4"))  # without energy
    ase.io.write(place, frames, format="extxyz")
    found = nearest_methods(place, resources=ONE)
    assert (found.n, found.left_out) == (len(NAMES), 1)
    some = nearest_methods(place, limit=15, resources=ONE)
    assert some.n + some.left_out == 15


def test_input_that_will_not_do_is_refused(tmp_path: Path) -> None:
    few = written(tmp_path, "GFN2-xTB", NAMES[:5])
    with pytest.raises(InputError, match=r"5 structures .* of 4 elements: at least 14 are needed"):
        nearest_methods(few, resources=ONE)
    with pytest.raises(InputError, match="--limit 10: more than 10"):
        nearest_methods(few, limit=10, resources=ONE)
    ase.io.write(few, molecule("H2O"), format="extxyz")
    with pytest.raises(InputError, match="no structure has a reference energy"):
        nearest_methods(few, resources=ONE)


def test_the_command_tells_what_to_label_with(tmp_path: Path) -> None:
    place = written(tmp_path, "GFN2-xTB")
    told = CliRunner().invoke(make_app(), ["methods", str(place), "--workers", "1"])
    assert told.exit_code == 0, told.output
    assert "orbq preprocess INPUT --out DATASET --method GFN2-xTB\n" in told.output
    lines = told.output.splitlines()
    assert lines[1].split()[0] == "GFN2-xTB" and f"of {len(NAMES)} structures" in told.output


def test_a_method_more_must_bring_something() -> None:
    """Labels by three methods for a hundredth less than by two are not advised; no xTB at all is,
    where none tells more."""
    three, two = Nearness("A+B+C", 0.99), Nearness("A+B", 1.0)
    others = [Nearness("A", 1.1), Nearness("", 2.0)]
    assert Found([three, two, *others], 50, 0).advised() == "A+B"
    assert Found([three._replace(error=0.8), two, *others], 50, 0).advised() == "A+B+C"
    assert Found([Nearness("", 0.7), three], 50, 0).advised() == ""
