"""tmQM as released and tmQM_wB97MV's files: Hartree, spins, charges in a file of their own."""

from __future__ import annotations

import gzip
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.io import Trajectory

from orbq.errors import InputError
from orbq.preprocess.frames import find_sources
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.read import Failure, Keys, Reader, read_structures
from orbq.schema import Structure
from orbq.units import HARTREE

SYMBOLS = ["Zn", "C", "H", "H", "H", "C", "H", "H", "H"]
POSITIONS = [
    [0, 0, 0], [1.93, 0, 0], [2.3, 1.03, 0], [2.3, -0.5, 0.9], [2.3, -0.5, -0.9],
    [-1.93, 0, 0], [-2.3, 1.03, 0], [-2.3, -0.5, 0.9], [-2.3, -0.5, -0.9],
]  # fmt: skip
CHARGES = [1.2, -1.2, 0.2, 0.2, 0.2, -1.2, 0.2, 0.2, 0.2]
CODES = ("AAAAAA", "BBBBBB", "CCCCCC", "DDDDDD")
COLUMNS = "CSD_code;Electronic_E;Dispersion_E;Dipole_M;Metal_q;HL_Gap;HOMO_Energy;LUMO_Energy"


def head(code: str, charge: int) -> str:
    return f"CSD_code = {code} | q = {charge} | S = 0 | Stoichiometry = C2H6Zn | MND = 2"


def xyz(code: str, charge: int = 0) -> str:
    rows = [
        f"{s} {x:12.6f} {y:12.6f} {z:12.6f}"
        for s, (x, y, z) in zip(SYMBOLS, POSITIONS, strict=True)
    ]
    return "\n".join([str(len(rows)), f"{head(code, charge)} | 2020-2024 CSD", *rows]) + "\n\n"


def charges(code: str, values: list[float]) -> str:
    rows = [f"{s} {q:10.5f}" for s, q in zip(SYMBOLS, values, strict=False)]
    return "\n".join([head(code, 0), *rows, f"Total charge = {sum(values):.3f}"]) + "\n\n"


def release(directory: Path) -> Path:
    """Two parts of two complexes; the last has no energy, the third charges of a wrong number."""
    directory.mkdir()
    for n, codes in ((1, CODES[:2]), (2, CODES[2:])):
        with gzip.open(directory / f"tmQM_X{n}.xyz.gz", "wt") as part:
            part.write("".join(xyz(code, 2 * (code == "BBBBBB")) for code in codes))
    rows = [f"{code};{-1858.25 - n};-0.01;0;0.9;0.2;-0.3;-0.1" for n, code in enumerate(CODES[:3])]
    (directory / "tmQM_y.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    blocks = [charges(c, CHARGES if c != "CCCCCC" else CHARGES[:4]) for c in reversed(CODES)]
    (directory / "tmQM_X.q").write_text("".join(blocks))
    (directory / "tmQM_X1.BO.gz").write_bytes(b"")
    return directory


def test_a_release_is_read_from_its_directory(tmp_path):
    found = list(read_structures([release(tmp_path / "tmQM")]))
    first, second, third, last = found
    assert isinstance(first, Structure) and isinstance(last, Structure)
    assert first.group == "AAAAAA"
    assert first.energy == pytest.approx(-1858.25 * HARTREE, abs=1e-9)
    assert (first.total_charge, first.spin_multiplicity) == (0, 1)
    np.testing.assert_array_equal(first.dft_charges, CHARGES)
    assert second.total_charge == 2
    assert second.energy == pytest.approx(-1859.25 * HARTREE, abs=1e-9)
    assert last.energy is None
    assert last.source == (1, 1)
    np.testing.assert_array_equal(last.dft_charges, CHARGES)
    assert len(third.dft_charges) == 4  # refused by the check that follows


def test_a_release_becomes_a_data_set(tmp_path):
    inputs = release(tmp_path / "tmQM")
    made = preprocess([inputs], tmp_path / "set", resources=Resources(workers=1))
    assert len(made) == 3
    np.testing.assert_array_equal(made.mask("energy"), [True, True, False])
    names = [Path(source["name"]).name for source in made.manifest["sources"]]
    assert names == ["tmQM_X1.xyz.gz", "tmQM_X2.xyz.gz", "tmQM_y.csv", "tmQM_X.q"]
    (failure,) = made.failures()
    assert "4" in failure["reason"] and failure["frame"] == 0
    (inputs / "tmQM_y.csv").write_text(COLUMNS + "\n")
    with pytest.raises(InputError, match="other"):  # another table is another job
        preprocess([inputs], tmp_path / "set", resources=Resources(workers=1))


def test_one_file_of_a_release_finds_the_tables_beside_it(tmp_path):
    found = list(read_structures([release(tmp_path / "tmQM") / "tmQM_X1.xyz.gz"]))
    assert [s.energy is not None for s in found] == [True, True]


@pytest.mark.parametrize("name", ["tmQM_y.csv", "tmQM_X.q"])
def test_damaged_tables_are_named(tmp_path, name):
    place = release(tmp_path / "tmQM")
    (place / name).write_text("something else\n")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        list(read_structures([place]))


def test_an_energy_that_is_none_names_its_line(tmp_path):
    place = release(tmp_path / "tmQM")
    (place / "tmQM_y.csv").write_text(
        f"{COLUMNS}\nAAAAAA;-1.0;0;0;0;0;0;0\nBBBBBB;NaNa;0;0;0;0;0;0\n"
    )
    with pytest.raises(InputError, match=r"tmQM_y.csv, line 3: 'NaNa'"):
        list(read_structures([place]))


def test_charges_that_are_no_numbers_are_a_failure_of_their_structure(tmp_path):
    place = release(tmp_path / "tmQM")
    text = (place / "tmQM_X.q").read_text()
    (place / "tmQM_X.q").write_text(text.replace("1.20000", "1.2.000", 1))
    found = list(read_structures([place]))
    assert sum(isinstance(item, Failure) for item in found) == 1


@pytest.mark.parametrize("spin", [0, 1])
def test_wb97mv_trajectories(tmp_path, spin):
    atoms = Atoms(SYMBOLS, POSITIONS)
    atoms.info = {
        "CSD_code": "AAAAAA",
        "q": -2,
        "spin": spin,
        "energy": -1858.0,
        "formula": "C2H6Zn",
    }
    with Trajectory(tmp_path / "a.traj", "w") as out:
        out.write(atoms)
    reader = Reader(find_sources([tmp_path / "a.traj"]))
    (s,) = reader
    assert reader.names_used["energy"] == {"energy (Hartree, converted)": 1}
    assert (s.group, s.total_charge, s.spin_multiplicity) == ("AAAAAA", -2, 1)
    assert s.energy == pytest.approx(-1858.0 * HARTREE, abs=1e-9)


@pytest.mark.parametrize("again", [-1857.5, "NOT CONVERGED"])
def test_wb97mv_databases(tmp_path, again):
    """The recomputed energy counts; without it the one of tmQM does not take its place."""
    data = {"CSD_code": "AAAAAA", "q": 0, "S": 0, "MND": 2, "Electronic_E": -1858.0}
    with ase.db.connect(tmp_path / "a.db") as db:
        db.write(Atoms(SYMBOLS, POSITIONS), data={**data, "Recomputed_E": again})
    (s,) = read_structures([tmp_path / "a.db"])
    if isinstance(again, str):
        assert s.energy is None
    else:
        assert s.energy == pytest.approx(again * HARTREE, abs=1e-9)
        (first,) = read_structures([tmp_path / "a.db"], Keys(energy="Electronic_E"))
        assert first.energy == pytest.approx(-1858.0 * HARTREE, abs=1e-9)


def test_other_data_with_a_csd_code_stay_in_ev(tmp_path):
    atoms = Atoms(SYMBOLS, POSITIONS)
    atoms.info = {"CSD_code": "AAAAAA", "q": 0, "REF_energy": -5.0}
    ase.io.write(tmp_path / "a.extxyz", atoms)
    (s,) = read_structures([tmp_path / "a.extxyz"])
    assert s.energy == -5.0


def test_a_calculator_s_energy_is_in_ev_whatever_else_the_structure_carries(tmp_path):
    """DFT of one's own on complexes that carry all the names of tmQM."""
    atoms = Atoms(SYMBOLS, POSITIONS)
    atoms.info = {"CSD_code": "AAAAAA", "q": 0, "formula": "C2H6Zn", "energy": -5.0}
    ase.io.write(tmp_path / "a.extxyz", atoms)
    for keys in (Keys(), Keys(energy="energy")):
        reader = Reader(find_sources([tmp_path / "a.extxyz"]), keys)
        (s,) = reader
        assert s.energy == -5.0
        assert reader.names_used["energy"] == {"energy": 1}
