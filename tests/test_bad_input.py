"""Every kind of bad input: one structure's fault is listed, a whole file's is one clear error."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from orbq.cli import make_app
from orbq.errors import InputError
from orbq.preprocess.check import check, closest_pair
from orbq.preprocess.label import Recipe, Resources, preprocess
from orbq.preprocess.read import Keys, read_structures
from tests.test_read import water, write
from tests.test_xtb import of_ase, structure

ONE = Resources(workers=1)
WATER = of_ase("H2O")


def shifted(atom: int, value: float):
    positions = WATER.positions.copy()
    positions[atom, 1] = value
    return WATER._replace(positions=positions)


FAULTS = {
    "no atoms": (structure([], []), "no atoms"),
    "NaN": (shifted(2, np.nan), "positions of atom 2 are not finite"),
    "infinite": (shifted(1, np.inf), "positions of atom 1 are not finite"),
    "coincident": (
        structure([8, 1, 1], [[0, 0, 0], [0, 0, 1], [0, 0, 1]]),
        r"atoms 1 and 2 are 0\.000 Å apart: at least 0\.4 Å",
    ),
    "near-coincident": (
        structure([6, 6], [[0, 0, 0], [0.1, 0.2, 0.2]]),
        r"atoms 0 and 1 are 0\.300 Å apart",
    ),
    "periodic image": (
        structure([6, 6], [[0.1, 5, 5], [11.8, 5, 5]], cell=12 * np.eye(3)),
        r"atoms 0 and 1 are 0\.300 Å apart",
    ),
    "Z = 0": (structure([0, 1], [[0, 0, 0], [0, 0, 1]]), "atom 0 has atomic number 0: 1 to 86"),
    "Z = 92": (structure([1, 92], [[0, 0, 0], [0, 0, 2]]), "atom 1 has atomic number 92"),
    "forces' length": (
        WATER._replace(forces=np.zeros((2, 3))),
        r"forces has shape \(2, 3\): \(3, 3\) needed for 3 atoms",
    ),
    "charges' length": (WATER._replace(dft_charges=np.zeros(4)), r"dft_charges has shape \(4,\)"),
    "NaN forces": (WATER._replace(forces=np.full((3, 3), np.nan)), "forces of atom 0 are not fin"),
    "NaN energy": (WATER._replace(energy=float("nan")), "energy is not finite"),
    "charge": (
        structure([3, 1], [[0, 0, 0], [0, 0, 1.6]], charge=3, multiplicity=2),
        r"charge \+3 is above the 2 valence electrons",
    ),
    "half charge": (WATER._replace(total_charge=0.5), "charge is 0.5: it must be a whole"),
    "odd electrons": (
        WATER._replace(total_charge=1),
        r"multiplicity 1 does not fit 9 electrons .* an odd number needs an even multiplicity",
    ),
    "multiplicity 0": (WATER._replace(spin_multiplicity=0), "multiplicity is 0: .* at least 1"),
    "multiplicity 11": (
        WATER._replace(spin_multiplicity=11),
        r"multiplicity 11 and charge \+0 do not fit 8 valence electrons",
    ),
    "orbitals full": (
        structure([2], [0, 0, 0], multiplicity=3),
        "do not fit 2 valence electrons in 1 orbitals",
    ),
    "partial periodicity": (
        WATER._replace(pbc=np.array([True, True, False]), cell=20 * np.eye(3)),
        r"partial periodicity \(pbc T T F\)",
    ),
    "flat cell": (
        WATER._replace(pbc=np.ones(3, bool), cell=np.diag([20.0, 20.0, 0.0])),
        "the cell has volume 0",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_structures_fault_is_named(name):
    faulty, reason = FAULTS[name]
    told = check(faulty)
    assert told is not None
    assert re.search(reason, told), told


@pytest.mark.parametrize(
    "good",
    [
        WATER,
        structure([1, 1], [[0, 0, 0], [0, 0, 0.6]]),  # a hot H2
        structure([1], [0, 0, 0], charge=1),  # a bare proton
        structure([58], [0, 0, 0], charge=3, multiplicity=2),  # Ce(III): its f electron is core
        structure([64], [0, 0, 0], charge=3, multiplicity=8),
        of_ase("O2")._replace(spin_multiplicity=3),
    ],
)
def test_good_structures_pass(good):
    assert check(good) is None


def test_the_closest_pair_is_found_among_many():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(8.0)] * 3), -1).reshape(-1, 3) * 1.5
    points = grid + 0.1 * rng.normal(size=grid.shape)
    points[77] = points[400] + [0.0, 0.2, 0.0]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + 9 * np.eye(len(points))
    i, j = np.unravel_index(distance.argmin(), distance.shape)
    found = closest_pair(points, None, 0.4)
    assert found is not None
    assert (found[0], found[1]) == (i, j)
    assert found[2] == pytest.approx(distance.min())
    assert closest_pair(grid, None, 0.4) is None


def test_faults_among_good_structures(tmp_path):
    atoms = [molecule("H2O"), Atoms("N2", [[0, 0, 0], [0, 0, 0.1]]), molecule("CH4")]
    half = molecule("NH3")
    half.info["charge"] = 0.5
    dataset = preprocess([*atoms, half], tmp_path / "set", resources=ONE)
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset["source"], [[0, 0], [0, 2]])
    told = [(e["file"], e["frame"]) for e in dataset.failures()]
    assert told == [("atoms in memory", 1), ("atoms in memory", 3)]


# --------------------------------------------------------------------------- whole files


def cut_gzip(path):
    whole = gzip.compress("".join(water(f"energy={-i}") for i in range(2000)).encode())
    path.write_bytes(whole[: len(whole) // 2])


FILES = {
    "empty": ("a.xyz", lambda p: p.write_text(""), "the file is empty"),
    "not xyz": ("a.xyz", lambda p: p.write_text("hello\nworld\n"), "not an atom count"),
    "binary": ("a.xyz", lambda p: p.write_bytes(bytes(range(128, 256))), "truncated or corrupt"),
    "cut frame": (
        "a.xyz",
        lambda p: p.write_text(water() + water()[:-20]),
        r"truncated in frame 1 \(line 6\), which promises 3 atoms and has 2",
    ),
    "cut gzip": ("a.xyz.gz", cut_gzip, r"truncated or corrupt after frame \d+"),
    "no gzip": ("a.xyz.gz", lambda p: p.write_text(water()), "truncated or corrupt after frame 0"),
    "cut traj": ("a.traj", lambda p: p.write_bytes(b"- of UlmASE-Trajectory"), "cannot be read"),
    "unknown format": ("a.quux", lambda p: p.write_text("hello"), "cannot be read after frame 0"),
    "all bad": ("a.xyz", lambda p: p.write_text("1\n\nQq 0 0 0\n"), "no frame could be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_files_fault_is_one_clear_error(tmp_path, name):
    file, make, reason = FILES[name]
    make(tmp_path / file)
    with pytest.raises(InputError, match=reason) as error:
        preprocess([tmp_path / file], tmp_path / "set", resources=ONE)
    assert file in str(error.value)
    assert not (tmp_path / "set").exists()


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_structures([tmp_path / "none.xyz"]))
    with pytest.raises(InputError, match="no such file"):
        list(read_structures([tmp_path / "*.xyz"]))
    with pytest.raises(InputError, match="is a directory"):
        list(read_structures([tmp_path]))


def test_a_missing_energy_key_lists_those_present(tmp_path):
    path = write(tmp_path / "a.xyz", water("TotEnergy=-1 charge=0"))
    with pytest.raises(InputError, match=r"'E0'; keys present: TotEnergy, charge"):
        preprocess([path], tmp_path / "set", Recipe(keys=Keys(energy="E0")), ONE)
    assert not (tmp_path / "set").exists()


def test_no_usable_structure_is_told_with_the_reasons(tmp_path):
    path = write(tmp_path / "a.xyz", "2\n\nH 0 0 0\nH 0 0 0.1\n")
    with pytest.raises(InputError, match=r"no usable structure: 1 x atoms 0 and 1 are 0\.100"):
        preprocess([path], tmp_path / "set", resources=ONE)


def test_foreign_directories_are_left_alone(tmp_path):
    write(tmp_path / "precious.txt", "mine")
    with pytest.raises(InputError, match=r"not empty and not a data set.*precious\.txt"):
        preprocess([molecule("H2O")], tmp_path, resources=ONE)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(InputError, match="is a file"):
        preprocess([molecule("H2O")], tmp_path / "precious.txt", resources=ONE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.xyz"], "no such file"),
        (["a.xyz", "--energy-key", "E0"], "keys present"),
        (["a.xyz", "--method", "PM6"], "known: GFN1-xTB"),
        (["a.xyz", "--workers", "0"], "at least 1"),
        (["a.xyz", "--timeout", "-1"], "above 0"),
        (["a.xyz", "--scheduler", "lsf"], "tcp://HOST:PORT"),
        (["a.xyz", "--blas", "none.so"], "use 'auto', 'off'"),
    ],
)
def test_the_command_ends_with_status_2(tmp_path, monkeypatch, arguments, said):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.xyz", water("energy=-1"))
    result = CliRunner().invoke(make_app(), ["preprocess", *arguments, "--out", "set"])
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
