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


def crystals(n: int) -> list[Atoms]:
    """Too thin for the Gamma point, with energies."""
    found = [Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=5 * np.eye(3), pbc=True) for _ in range(n)]
    for i, atoms in enumerate(found):
        atoms.cell[2, 2] += 0.1 * i
        atoms.info["TotEnergy"] = -30.0 - 0.1 * i**2
    return found


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


def test_one_bad_structure_never_stops_the_others(tmp_path: Path) -> None:
    """Neither an energy nor an atom that is not a number, nor a charge of a half: they are told,
    and take no place of the others in the sample."""
    place = written(tmp_path, "GFN2-xTB")
    good = ase.io.read(place, ":")
    bad = [molecule("H2O") for _ in range(4)]
    for atoms in bad:
        atoms.info["TotEnergy"] = -1.0
    bad[0].info["TotEnergy"] = bad[3].info["TotEnergy"] = np.nan
    bad[1].positions[0] = bad[1].positions[1]
    bad[2].info["charge"] = 0.5
    ase.io.write(place, [*bad[:3], *good, bad[3]], format="extxyz")
    found = nearest_methods(place, limit=len(NAMES), resources=ONE)
    assert (found.n, found.left_out) == (len(NAMES), 4)
    assert found.why == f"2 rejected, e.g. {place} frame 0: energy is not finite"
    assert found.nearness[0].method == "GFN2-xTB" and found.nearness[0].error < 1e-6
    told = CliRunner().invoke(make_app(), ["methods", str(place), "--workers", "1"])
    assert told.exit_code == 0, told.output
    assert f"of {len(NAMES)} structures, 4 left out: {found.why}\n" in told.output


def test_energies_that_the_composition_tells_exactly_are_refused(tmp_path: Path) -> None:
    """Placeholders; atoms alone; and copies, of which nothing but rounding is left."""
    place = written(tmp_path, "GFN2-xTB")
    frames = ase.io.read(place, ":")
    exactly = "molecules.xyz: the composition tells these energies exactly: are they placeholders"
    for energies in ({}, ATOMS):
        for atoms in frames:
            atoms.info["TotEnergy"] = sum(energies.get(s, 0.0) for s in atoms.symbols)
        ase.io.write(place, frames, format="extxyz")
        with pytest.raises(InputError, match=exactly):
            nearest_methods(place, resources=ONE)
    ase.io.write(place, 40 * ase.io.read(written(tmp_path, "GFN1-xTB"), ":1"), format="extxyz")
    with pytest.raises(InputError, match=r"exactly: .* or copies of one structure"):
        nearest_methods(place, resources=ONE)


def test_copies_are_refused_when_the_others_get_no_labels(tmp_path: Path) -> None:
    place = written(tmp_path, "GFN2-xTB")
    frames = 20 * ase.io.read(place, ":1") + crystals(2)
    ase.io.write(place, frames, format="extxyz")
    with pytest.raises(InputError, match="the composition tells these energies exactly"):
        nearest_methods(place, resources=ONE)


def test_the_commonest_reason_is_told_where_too_few_are_left(tmp_path: Path) -> None:
    place = tmp_path / "crystals.xyz"
    ase.io.write(place, crystals(14), format="extxyz")
    with pytest.raises(InputError) as told:
        nearest_methods(place, resources=ONE)
    assert "; 14 left out: 14 labels missing, e.g. " in str(told.value)
    assert f"{place} frame 0: cell height 5.00 Å below 10 Å" in str(told.value)
    assert "--limit" not in str(told.value)
    frames = ase.io.read(written(tmp_path, "GFN2-xTB"), ":")
    place = tmp_path / "molecules.xyz"
    for atoms in frames[1:]:
        atoms.info["charge"] = 0.5
    ase.io.write(place, frames, format="extxyz")
    with pytest.raises(InputError) as told:
        nearest_methods(place, resources=ONE)
    assert str(told.value).endswith(
        f"1 structures with a reference energy and labels of every method, of 2 elements: at least "
        f"12 are needed; 14 left out: 14 rejected, e.g. {place} frame 1: charge is 0.5: it must be "
        "a whole number"
    )


def test_faults_are_told_beside_a_missing_energy(tmp_path: Path) -> None:
    place, frames = tmp_path / "molecules.xyz", [molecule("H2O"), molecule("CH4")]
    frames[1].info["charge"] = 0.5
    ase.io.write(place, frames, format="extxyz")
    with pytest.raises(InputError, match=r"no structure has a .* 1 left out: .* charge is 0\.5"):
        nearest_methods(place, resources=ONE)


def test_the_limit_is_told_only_where_it_is_too_small(tmp_path: Path) -> None:
    place = written(tmp_path, "GFN2-xTB")
    with pytest.raises(InputError, match=r"at least 14 are needed \(--limit is 12\)$"):
        nearest_methods(place, limit=12, resources=ONE)
    ase.io.write(place, ase.io.read(place, ":12"), format="extxyz")
    with pytest.raises(InputError, match=r"12 structures .*: at least 14 are needed$"):
        nearest_methods(place, limit=12, resources=ONE)


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
