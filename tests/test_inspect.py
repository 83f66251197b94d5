"""`orbq inspect` and `orbq verify`: numbers against NumPy, damage named with its remedy."""

from __future__ import annotations

import json
import shlex
import shutil

import ase.io
import numpy as np
import pytest
from ase.build import molecule

from orbq.cli import COMMANDS, make_app
from orbq.orbitals import atomic_charges
from orbq.preprocess import summary as summaries
from orbq.preprocess.label import preprocess
from orbq.preprocess.neighbor_cache import neighbors
from orbq.preprocess.store import Dataset, array_file
from orbq.preprocess.verify import verify
from tests.test_label import ONE, molecules


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twenty molecules in a file, one repeated, one rejected, two of four failures alike."""
    frames = molecules(2)
    frames[4].info["energy"] = -500.0
    frames.append(frames[0].copy())
    for _ in range(2):
        twins = molecule("N2")
        twins.positions[:] = 0.0
        frames.append(twins)
    small = molecule("CH4")
    small.set_cell([5, 6, 7])
    small.pbc = True
    frames.append(small)
    directory = tmp_path_factory.mktemp("inspect")
    ase.io.write(directory / "in.extxyz", frames)
    return preprocess([directory / "in.extxyz"], directory / "set", resources=ONE)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.path, tmp_path / "copy")


@pytest.mark.parametrize("block", [1, 5, 1 << 14])
def test_summary_agrees_with_numpy(made, monkeypatch, block):
    monkeypatch.setattr(summaries, "BLOCK", block)
    found = summaries.summarise(made)
    assert (found.structures, found.atoms) == (22, len(made["numbers"]))
    assert found.duplicates == 1
    assert found.groups == 10
    assert found.periodic == 1
    assert found.charges == {0: 22}
    assert found.multiplicities == {1: 22}
    assert found.coverage["energy"] == 21
    assert found.coverage["onsite"] == 21
    carbon = [bool((made["numbers"][made.structure_slice(i)] == 6).any()) for i in range(22)]
    assert found.elements["C"] == (sum(carbon), int((made["numbers"] == 6).sum()))
    energy, unit = found.ranges["energy"]
    per_atom = (made["energy"] / made.n_atoms)[made.mask("energy")]
    assert unit == "eV/atom"
    assert (energy.low, energy.low_at) == (pytest.approx(per_atom.min()), 4)
    assert energy.mean == pytest.approx(per_atom.mean())
    charges = atomic_charges(np.asarray(made["onsite"]))[
        np.repeat(made.mask("onsite"), made.n_atoms)
    ]
    xtb, _ = found.ranges["xtb_charges"]
    assert (xtb.low, xtb.high) == (pytest.approx(charges.min()), pytest.approx(charges.max()))
    assert found.ranges["forces"][0].low_at == -1
    numbers = [number for number, _ in found.failures.values()]
    assert numbers == [2, 1]


def test_edges_and_fill(made):
    found = summaries.edges(made, 4.0, 4)
    positions = [made["positions"][made.structure_slice(i)] for i in range(21)]
    expected = sum(
        int((np.linalg.norm(x[:, None] - x[None], axis=-1) < 4.0).sum()) - len(x) for x in positions
    )
    assert found.edges >= expected  # and those of the periodic cell
    assert 0.3 < found.fill.edge <= 1.0
    assert found.neighbors.mean == pytest.approx(found.edges / len(made["numbers"]))  # of an atom
    assert found.neighbors.low < found.neighbors.mean < found.neighbors.high


def run(*arguments: str):
    from typer.testing import CliRunner

    for name in ("inspect", "preprocess", "verify"):
        COMMANDS[name] = f"orbq.commands.{name}"
    return CliRunner().invoke(make_app(), list(arguments))


def test_inspect_prints_and_plots(made, tmp_path):
    plot = tmp_path / "a.png"
    result = run("inspect", str(made.path), "--cutoff", "4", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    for words in ("22 structures", "duplicates: 1", "2 rejected", "1 labels missing", "directed"):
        assert words in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = run("inspect", str(made.path), "--plot", "a.docx")
    assert result.exit_code == 2
    assert ".png" in result.output


def test_no_number_is_cut_in_a_narrow_terminal(made, monkeypatch):
    wide = run("inspect", str(made.path)).output
    monkeypatch.setenv("COLUMNS", "30")
    assert run("inspect", str(made.path)).output.split() == wide.split() and "…" not in wide


def test_a_whole_data_set_passes(made):
    assert verify(made.path) == []
    result = run("verify", str(made.path))
    assert result.exit_code == 0
    assert "whole" in result.output


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit rot": (flip_a_bit, "its bytes have changed"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated: "),
    "too long": (lambda p: p.write_bytes(p.read_bytes() + b"0"), "too long: "),
    "missing": (lambda p: p.unlink(), "missing"),
}


def test_the_command_that_labels_again_makes_the_same(tmp_path):
    """With the names that were given, the settings, and names that a shell would take apart."""
    ion = molecule("H2O")
    ion.info.update(q=1, mult=2, Eref=-7.0)
    given = tmp_path / "my data.extxyz"
    ase.io.write(given, ion)
    keys = ["--charge-key", "q", "--spin-key", "mult", "--energy-key", "Eref"]
    place = tmp_path / "my set"
    options = [*keys, "--spin-polarized", "--min-height", "9"]
    assert run("preprocess", str(given), "--out", str(place), *options).exit_code == 0
    before = (place / "manifest.json").read_text()
    array_file(place, "onsite").write_bytes(b"x")
    told = run("verify", str(place)).output
    words = shlex.split(told[told.index("orbq preprocess") :].splitlines()[0])
    shutil.rmtree(place)
    assert run(*words[1:]).exit_code == 0
    again = json.loads((place / "manifest.json").read_text())
    assert again["job"] == json.loads(before)["job"]
    assert verify(place) == []


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["onsite", "energy_mask", "offsets"])
def test_damage_is_named_with_the_remedy(copy, kind, name):
    damage, words = DAMAGE[kind]
    damage(array_file(copy, name))
    (problem,) = verify(copy)
    assert problem.startswith(f"{copy / name}.npy: ")
    assert words in problem
    result = run("verify", str(copy))
    assert result.exit_code == 1
    assert "delete it and label again: orbq preprocess" in result.output


def test_damaged_failures_are_seen(copy):
    (copy / "failures.jsonl").write_text("")
    (problem,) = verify(copy)
    assert "failures.jsonl" in problem


@pytest.mark.parametrize("name", ["offsets", "senders", "receivers"])
def test_a_damaged_neighbour_list_is_named(copy, name):
    neighbors(Dataset.open(copy), 3.0)
    assert run("verify", str(copy)).exit_code == 0
    flip_a_bit(copy / "neighbors-3" / f"{name}.npy")
    assert verify(copy) == []
    result = run("verify", str(copy))
    assert result.exit_code == 1
    assert f"{name}.npy: its bytes have changed" in result.output.replace("\n", "")
    shutil.rmtree(copy / "neighbors-3")
    assert run("verify", str(copy)).exit_code == 0


def test_wrong_values_with_right_checksums_are_seen(copy):
    """A set whose charges do not sum up was not written by this program."""
    from orbq.preprocess.store import sha256_of

    path = array_file(copy, "onsite")
    onsite = np.load(path)
    onsite[0, 0] += 0.1
    np.save(path, onsite)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["arrays"]["onsite"]["sha256"] = sha256_of(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(copy)
    assert "structure 0 sum to +1.00e-01 e more" in problem


def test_what_is_no_data_set_ends_with_status_2(tmp_path):
    for command in ("inspect", "verify"):
        assert run(command, str(tmp_path)).exit_code == 2
