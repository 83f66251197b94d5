"""Reading: names of values, formats, compression, and what a lattice without periodicity means."""

from __future__ import annotations

import gzip
import lzma
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import key_val_str_to_dict

from orbq.errors import InputError
from orbq.preprocess.comment import texts
from orbq.preprocess.frames import Source, find_sources
from orbq.preprocess.read import FIRST_FOUND, Failure, Keys, Reader, read_structures
from orbq.schema import Structure

SHARED = Path(__file__).parents[2] / "shared" / "data"


def water(info: str = "", properties: str = "", columns: str = "") -> str:
    """One extxyz frame."""
    rows = ["O 0 0 0.12", "H 0 0.76 -0.47", "H 0 -0.76 -0.47"]
    head = f"Properties=species:S:1:pos:R:3{properties} {info}"
    return "\n".join(["3", head, *(f"{row} {columns}" for row in rows)]) + "\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def one(path: Path, keys: Keys = FIRST_FOUND) -> Structure:
    (item,) = read_structures([path], keys)
    assert isinstance(item, Structure), item
    return item


@pytest.mark.parametrize("name", ["energy", "TotEnergy", "REF_energy", "dft_energy"])
@pytest.mark.parametrize("forces", ["forces", "force", "REF_forces"])
def test_usual_names_are_found(tmp_path, name, forces):
    s = one(write(tmp_path / "a.xyz", water(f"{name}=-1.5", f":{forces}:R:3", "0.1 0.2 0.3")))
    assert s.energy == -1.5
    np.testing.assert_array_equal(s.forces, np.tile([0.1, 0.2, 0.3], (3, 1)))
    assert (s.total_charge, s.spin_multiplicity, s.stress, s.dft_charges) == (0, 1, None, None)


@pytest.mark.parametrize("names", ["charge=-1 multiplicity=2", "Charge=-1 Multiplicity=2"])
def test_charge_spin_group_and_charges(tmp_path, names):
    text = water(f"{names} group=aqua", ":dft_mulliken:R:1", "0.5")
    s = one(write(tmp_path / "a.xyz", text))
    assert (s.total_charge, s.spin_multiplicity, s.group) == (-1, 2, "aqua")
    np.testing.assert_array_equal(s.dft_charges, [0.5, 0.5, 0.5])


def test_the_lowest_multiplicity_is_assumed(tmp_path):
    assert one(write(tmp_path / "a.xyz", water("charge=1"))).spin_multiplicity == 2


def test_keys_choose_among_names(tmp_path):
    path = write(tmp_path / "a.xyz", water("energy=-1 mp2=-2 q=1"))
    s = one(path, Keys(energy="mp2", charge="q"))
    assert (s.energy, s.total_charge) == (-2.0, 1)


def test_a_demanded_key_missing_in_some_is_masked_and_in_all_an_error(tmp_path):
    path = write(tmp_path / "a.xyz", water("mp2=-2") + water("energy=-1"))
    first, second = read_structures([path], Keys(energy="mp2"))
    assert first.energy == -2.0
    assert second.energy is None
    with pytest.raises(
        InputError, match=r"energy key 'mp3'; keys present: energy, mp2; .*--energy"
    ):
        list(read_structures([path], Keys(energy="mp3")))


def test_a_lattice_without_periodicity_is_dropped(tmp_path):
    box = 'Lattice="50 0 0 0 50 0 0 0 50"'
    free, periodic = read_structures(
        [
            write(tmp_path / "a.xyz", water(f'{box} pbc="F F F"')),
            write(tmp_path / "b.xyz", water(f'{box} pbc="T T T"')),
        ]
    )
    assert not free.pbc.any()
    assert not free.cell.any()
    assert periodic.pbc.all()
    np.testing.assert_array_equal(periodic.cell, 50 * np.eye(3))


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files(tmp_path, suffix, opener):
    path = tmp_path / f"a.extxyz{suffix}"
    with opener(path, "wt") as out:
        out.write(water("energy=-1") + water("energy=-2"))
    assert [s.energy for s in read_structures([path])] == [-1.0, -2.0]


@pytest.mark.parametrize("suffix", ["traj", "db", "json", "xyz"])
def test_formats_of_ase_carry_energy_forces_and_stress(tmp_path, suffix):
    atoms = bulk("Cu", cubic=True) * 2
    rng = np.random.default_rng(0)
    forces, stress = rng.normal(size=(len(atoms), 3)), rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=forces, stress=stress)
    ase.io.write(tmp_path / f"a.{suffix}", atoms)
    s = one(tmp_path / f"a.{suffix}")
    assert s.energy == -3.0
    np.testing.assert_allclose(s.forces, forces, atol=1e-7)  # extxyz prints eight decimals
    xx, yy, zz, yz, xz, xy = stress
    np.testing.assert_allclose(s.stress, [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], atol=1e-7)


def test_the_virial_of_a_crystal_is_minus_its_stress_times_the_volume(tmp_path):
    """As GAP, MACE and GPUMD write it; that of a molecule, or of every atom, is left."""
    atoms = bulk("Cu", cubic=True)
    stress = np.random.default_rng(0).normal(size=(3, 3))
    atoms.info["virial"] = -stress * atoms.get_volume()
    ase.io.write(tmp_path / "a.extxyz", atoms)
    reader = Reader(find_sources([tmp_path / "a.extxyz"]))
    (found,) = reader
    np.testing.assert_allclose(found.stress, stress, rtol=1e-7)
    assert list(reader.names_used["stress"]) == ["virial (divided by minus the volume)"]
    atoms.info["stress"] = np.eye(3)
    ase.io.write(tmp_path / "b.extxyz", atoms)
    np.testing.assert_array_equal(one(tmp_path / "b.extxyz").stress, np.eye(3))
    (tmp_path / "c.extxyz").write_text(water('virial="1 0 0 0 1 0 0 0 1"'))
    assert one(tmp_path / "c.extxyz").stress is None
    del atoms.info["stress"], atoms.info["virial"]
    atoms.arrays["virials"] = np.ones((4, 9))
    assert next(read_atoms(atoms)).stress is None
    demanded = Reader(find_sources([tmp_path / "c.extxyz"]), Keys(stress="virial"))
    with pytest.raises(InputError, match="stress key 'virial' is a virial: it needs a lattice"):
        list(demanded)


def read_atoms(*atoms: Atoms):
    """Structures that are in memory already."""
    return iter(Reader([Source("atoms", Path(), "")], atoms=atoms))


def test_database_values_and_plain_xyz(tmp_path):
    from ase.db import connect

    with connect(tmp_path / "a.db") as db:
        db.write(molecule("NH3"), charge=1, TotEnergy=-7.0)
    s = one(tmp_path / "a.db")
    assert (s.total_charge, s.spin_multiplicity, s.energy) == (1, 2, -7.0)
    plain = one(write(tmp_path / "b.xyz", "2\njust a comment\nH 0 0 0\nH 0 0 0.74\n"))
    assert (plain.energy, len(plain.numbers)) == (None, 2)


def test_globs_are_sorted_and_sources_numbered(tmp_path):
    for name, energy in (("b", -2), ("a", -1)):
        write(tmp_path / f"{name}.xyz", water(f"energy={energy}"))
    items = list(read_structures([tmp_path / "*.xyz"]))
    assert [(s.energy, s.source) for s in items] == [(-1.0, (0, 0)), (-2.0, (1, 0))]


@pytest.mark.parametrize(
    "broken",
    [
        "4\nProperties=species:S:1:pos:R:3\nO 0 0 0\nH 0 0 1\n",
        "1\nProperties=species:S:1:pos:R:3\nO 0 0 0\nH 0 0 1\n",
        "1\nProperties=species:S:1:pos:R:3\nO 0 zero 0\n",
        "1\nProperties=species:S:1:pos:R:3\nQq 0 0 0\n",
        "1\nProperties=species:S:1:pos:R:3 charge=0.5\nO 0 0 0\n",
        "1\nProperties=species:S:1:pos:R:3 energy=low\nO 0 0 0\n",
    ],
    ids=["too few lines", "too many lines", "not a number", "no element", "half charge", "word"],
)
def test_one_bad_frame_leaves_its_neighbours(tmp_path, broken):
    text = water("energy=-1") + broken + "\n" + water("energy=-2")
    first, bad, last = read_structures([write(tmp_path / "a.xyz", text)])
    assert (first.energy, last.energy) == (-1.0, -2.0)
    assert isinstance(bad, Failure)
    assert bad.frame == 1
    assert bad.reason


def test_atoms_in_memory():
    atoms = molecule("H2O")
    atoms.info["charge"] = 1
    bad = Atoms("H", [[0, 0, 0]], info={"charge": 0.3})
    items = list(Reader(find_sources(["tmc"]), atoms=[atoms, bad]))
    assert items[0].total_charge == 1
    assert "0.3" in items[1].reason


def test_embedded_data():
    items = list(read_structures(["tmc"]))
    assert len(items) == 770
    assert all(s.energy is not None and s.dft_charges is not None and s.group for s in items)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_public_data_sets():
    acac = next(iter(read_structures([SHARED / "acac/train_300K.xyz"])))
    assert not acac.cell.any()
    assert acac.energy == pytest.approx(-9391.4555, abs=1e-3)
    assert (
        sum(isinstance(s, Structure) for s in read_structures([SHARED / "qm7.extxyz.gz"])) == 6000
    )


@pytest.mark.parametrize(
    "comment", ["Lowest energy conformer", "energy -76.4", "the charge scan", "charge spin group"]
)
def test_bare_words_of_a_comment_line_are_no_values(tmp_path: Path, comment: str) -> None:
    """ASE reads them as True, which would pass for 1 eV, a cation, a group called True."""
    atoms = "O 0 0 0.12\nH 0 0.76 -0.47\nH 0 -0.76 -0.47\n"
    found = one(write(tmp_path / "a.xyz", f"3\n{comment}\n{atoms}"))
    assert (found.energy, found.total_charge, found.spin_multiplicity) == (None, 0, 1)
    assert found.group == ""


def test_a_demanded_key_without_a_value_is_a_failure(tmp_path: Path) -> None:
    place = write(tmp_path / "a.xyz", "1\nLowest energy\nHe 0 0 0\n1\nenergy=-2\nHe 0 0 0\n")
    failure, found = read_structures([place], Keys(energy="energy"))
    assert failure == Failure(str(place), 0, "the energy key 'energy' has no value")
    assert isinstance(found, Structure) and found.energy == -2.0


def test_a_group_for_each_atom_is_no_group_of_the_structure(tmp_path: Path) -> None:
    """As GPUMD writes it."""
    rows = "O 0 0 0.12 0\nH 0 0.76 -0.47 1\nH 0 -0.76 -0.47 2\n"
    text = f"3\nProperties=species:S:1:pos:R:3:group:I:1\n{rows}"
    assert one(write(tmp_path / "a.xyz", text)).group == ""
    with pytest.raises(InputError, match=r"'group' is a value for each atom.*--group-key"):
        list(read_structures([tmp_path / "a.xyz"], Keys(group="group")))


@pytest.mark.parametrize("key", ["", "group"])
@pytest.mark.parametrize(
    ("written", "name"),
    [
        *((text, text) for text in ("F", "T", "True", "FALSE", "007", "1e5", "-1.50", "nan")),
        *((f'"{text}"', text) for text in ("F", "007", "1 2", "T F")),
        ("{F}", "F"),
        (" F", "F"),
        ("F=C", "F=C"),
        (r"F/C=C\\F", r"F/C=C\F"),
        (r'"_JSON \"F\""', "F"),
    ],
)
def test_a_group_keeps_its_text(tmp_path: Path, written: str, name: str, key: str) -> None:
    """F is hydrogen fluoride in SMILES: no truth, and no number without its zeros."""
    path = write(tmp_path / "a.xyz", water(f"energy=-1 group={written} charge=0"))
    assert one(path, Keys(group=key or None)).group == name


def test_a_bare_word_or_nothing_is_no_group(tmp_path: Path) -> None:
    for comment in ("group charge=1", "charge=1 group", "charge=1 group="):
        path = write(tmp_path / "a.xyz", water(comment))
        reader = Reader(find_sources([path]))
        (found,) = reader
        assert isinstance(found, Structure) and found.group == "" and found.total_charge == 1
        assert not reader.names_used["group"]
        with pytest.raises(InputError, match="group key 'group' has no value, in every structure"):
            one(path, Keys(group="group"))


def test_a_truth_in_a_trajectory_is_no_group_and_is_told(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.traj", Atoms("He", info={"group": False}))
    reader = Reader(find_sources([tmp_path / "a.traj"]))
    (found,) = reader
    assert isinstance(found, Structure) and found.group == ""
    assert reader.names_used["group"] == {"group (true or false, left out)": 1}
    with pytest.raises(InputError, match="group key 'group' has no value"):
        one(tmp_path / "a.traj", Keys(group="group"))


def test_comment_lines_are_split_as_ase_splits_them() -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(5000):
        line = "".join(rng.choice(list("ab== \t\\\"'{}[]TF1.,"), rng.integers(1, 14)))
        try:
            read = key_val_str_to_dict(line)
        except (IndexError, ValueError):  # it begins with "="
            continue
        written = texts(line)
        assert written.keys() <= read.keys()
        for key, value in read.items():
            if key not in written:
                assert value is True, line
            elif isinstance(value, str):
                assert value == written[key], line
                checked += 1
    assert checked > 500


def test_a_byte_order_mark_is_no_text_and_another_encoding_is_named(tmp_path: Path) -> None:
    rest = b" energy=-14.0\nO 0 0 0.12\nH 0 1 0\nH 1 0 0\n"
    (tmp_path / "a.xyz").write_bytes(b"\xef\xbb\xbf3\nplain" + rest)
    assert one(tmp_path / "a.xyz").energy == -14.0
    (tmp_path / "b.xyz").write_bytes(b"3\nnote=\xc5" + rest)
    with pytest.raises(InputError, match=r"UnicodeDecodeError.*save it as UTF-8"):
        one(tmp_path / "b.xyz")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.xyz.zst", "unpack it first, or pack it as .gz, .xz, .bz2"),
        ("a.tar.gz", "files that end in .tar are not read: unpack it first"),
        ("rmd17.NPZ", "write the structures as extxyz, by ase.io.write"),
    ],
)
def test_endings_that_are_not_read_name_the_remedy(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=re.escape(remedy)):
        find_sources([tmp_path / name])
