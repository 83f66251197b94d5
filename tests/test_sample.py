"""Structures from xTB dynamics: which they are, what ends a trajectory, going on when stopped."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.md.langevin import Langevin
from tblite.ase import TBLite
from typer.testing import CliRunner

from orbq.cli import make_app
from orbq.errors import InputError
from orbq.preprocess import supervise
from orbq.preprocess.label import preprocess
from orbq.preprocess.read import Keys, read_structures
from orbq.preprocess.sample import sample
from orbq.preprocess.schedule import Resources
from orbq.preprocess.trajectory import Sampling
from orbq.schema import Structure
from tests import faulty_worker

SHORT = Sampling((300.0, 900.0), trajectories=3, frames=3, every=3.0, before=5.0)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Water, and an ammonium ion with a group."""
    ion = molecule("NH3") + Atoms("H", [[0.0, 0.0, 1.12]])
    ion.info |= {"charge": 1, "group": "ammonium"}
    ase.io.write(tmp_path / "two.xyz", [molecule("H2O"), ion], format="extxyz")
    return tmp_path / "two.xyz"


def read(path: Path) -> list[Atoms]:
    found = ase.io.read(path, ":")
    assert isinstance(found, list)
    return found


def test_a_sample_is_a_data_set_without_reference_labels(two: Path, tmp_path: Path) -> None:
    found = sample(str(two), str(tmp_path / "out.extxyz"), SHORT)
    assert (found.frames, found.trajectories, found.starts) == (9, 3, 2)
    assert not found.ended
    assert not found.left_out
    frames = read(tmp_path / "out.extxyz")
    assert [a.info["trajectory"] for a in frames] == [0] * 3 + [1] * 3 + [2] * 3
    assert [a.info["frame"] for a in frames] == [0, 1, 2] * 3
    first, second, third = frames[0], frames[3], frames[6]
    assert {len(first), len(second)} == {3, 5}  # none twice before all were taken once
    assert len(third) == len(first)
    temperatures = [a.info["temperature"] for a in (first, second, third)]
    assert temperatures == [300.0, 900.0, 900.0]  # the structure that comes again: another one
    for atoms in frames:
        charged = len(atoms) == 5
        assert atoms.info["total_charge"] == charged
        assert atoms.info.get("group") == ("ammonium" if charged else None)
    dataset = preprocess([str(tmp_path / "out.extxyz")], tmp_path / "set")
    assert not np.asarray(dataset["energy_mask"]).any()
    assert np.asarray(dataset["onsite_mask"]).all()
    assert sorted(np.asarray(dataset["total_charge"]).tolist()) == sorted(
        atoms.info["total_charge"] for atoms in frames
    )
    assert not (tmp_path / "out.extxyz.partial").exists()


NAMES = (
    *("F", "T", "True", "007", "1e5", r"F/C=C\F", "a b", 'a"b', "é", "[O]", "{x}", "1 2", "nan"),
    *("a=", "=a", "a\\", r"\"", "'", " ", "a\tb", "a b\nc", "_JSON 1", "_JSON x", "ammonium"),
)


def test_names_of_groups_are_those_of_the_input(tmp_path: Path) -> None:
    """What is held out is told by them."""
    helium = [Atoms("He", [[0.0, 0.0, 0.0]], info={"group": name}) for name in NAMES]
    ase.io.write(tmp_path / "in.traj", helium)
    out = tmp_path / "out.extxyz"
    sample([tmp_path / "in.traj"], out, SHORT._replace(trajectories=len(NAMES), frames=1))
    assert sorted(atoms.info["group"] for atoms in read(out)) == sorted(NAMES)
    items = list(read_structures([out], Keys(group="group")))
    assert sorted(s.group for s in items if isinstance(s, Structure)) == sorted(NAMES)


def test_a_trajectory_is_that_of_ase_with_tblite(two: Path, tmp_path: Path) -> None:
    """Frame by frame: the same thermostat and random numbers with tblite's own calculator."""
    sample([two], tmp_path / "out.extxyz", SHORT)
    ours = [a for a in read(tmp_path / "out.extxyz") if a.info["trajectory"] == 0]
    atoms = next(a for a in read(two) if len(a) == len(ours[0]))
    atoms.calc = TBLite(
        method="GFN1-xTB", verbosity=0, accuracy=1.0, charge=float(atoms.info.get("charge", 0))
    )
    for frame, our in enumerate(ours):
        rng = np.random.default_rng([0, 0, frame])
        if frame == 0:
            spread = (atoms.get_masses() * units.kB * 300.0) ** 0.5
            atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * spread[:, None])
        dynamics = Langevin(
            atoms, 1.0 * units.fs, temperature_K=300.0, friction=0.02 / units.fs, rng=rng,
            fixcm=False,
        )  # fmt: skip
        dynamics.run(8 if frame == 0 else 3)
        # both converge their charges to about 1e-6 e and write 8 decimals
        np.testing.assert_allclose(our.positions, atoms.positions, atol=1e-5)
    assert np.abs(ours[-1].positions - ours[0].positions).max() > 0.05


def test_a_stopped_sample_goes_on_to_the_same_frames(two: Path, tmp_path: Path) -> None:
    """Stopped in the middle of a trajectory, half a frame written; another number of workers."""
    sample([two], tmp_path / "whole.extxyz", SHORT)
    out = tmp_path / "out.extxyz"

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample([two], out, SHORT, resources=Resources(1), on_progress=stop)
    assert not out.exists()
    place = tmp_path / "out.extxyz.partial"
    torn = place / "000001.frames"
    there = torn.read_bytes()
    assert there
    torn.write_bytes(there + b"half a frame")
    counts: list[int] = []
    sample([two], out, SHORT, resources=Resources(2), on_progress=lambda n, _: counts.append(n))
    assert counts[-1] == 9
    assert out.read_bytes() == (tmp_path / "whole.extxyz").read_bytes()


@pytest.mark.parametrize("name", ["out.extxyz.gz", "hot@600K.extxyz.gz"])
def test_a_finished_sample_given_again_is_kept(two: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    made = sample(str(two), out, SHORT)
    before = out.stat().st_mtime_ns, out.read_bytes()
    again = sample(str(two), out, SHORT)
    assert again == made and (out.stat().st_mtime_ns, out.read_bytes()) == before
    with pytest.raises(InputError, match="exists and is not what this command makes"):
        sample(str(two), out, SHORT._replace(seed=1))
    assert out.read_bytes() == before[1]
    left = tmp_path / f"{name}.partial"  # as by a kill after the file was put in its place
    left.mkdir()
    assert sample(str(two), out, SHORT) == made and not left.exists()
    damaged = bytearray(before[1])
    damaged[len(damaged) // 2] ^= 0xFF
    out.write_bytes(damaged)
    with pytest.raises(InputError, match="exists and is not what this command makes"):
        sample(str(two), out, SHORT)


def test_a_part_of_another_sample_is_refused(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.extxyz"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample([two], out, SHORT, on_progress=stop)
    with pytest.raises(InputError, match=r"part of another sample \(seed differ\)"):
        sample([two], out, SHORT._replace(seed=1))
    with (tmp_path / "out.extxyz.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing"):
            sample([two], out, SHORT)
    (tmp_path / "out.extxyz.partial" / "settings.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        sample([two], out, SHORT)


def test_seeds_and_trajectories_differ(two: Path, tmp_path: Path) -> None:
    short = SHORT._replace(trajectories=4, temperatures=(300.0,), frames=1)
    sample([two], tmp_path / "a.extxyz", short)
    sample([two], tmp_path / "b.extxyz", short._replace(seed=1))
    a, b = read(tmp_path / "a.extxyz"), read(tmp_path / "b.extxyz")
    water = [atoms.positions for atoms in (*a, *b) if len(atoms) == 3]
    assert len(water) == 4
    for i in range(4):
        for j in range(i):
            assert np.abs(water[i] - water[j]).max() > 1e-3


def test_what_falls_apart_or_dies_ends_one_trajectory(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of helium atoms of which two leave each other; a structure on which the xTB process
    crashes; water and an ion, which nothing happens to."""
    row = Atoms("He6", [[0.0, 4.99 * i, 0.0] for i in range(6)])
    crashing = molecule("H2O")
    crashing.positions += [faulty_worker.CRASH, 0.0, 0.0] - crashing.positions[0]
    ase.io.write(tmp_path / "bad.xyz", [row, crashing], format="extxyz")
    command = (sys.executable, "-m", "tests.faulty_worker")
    monkeypatch.setattr(supervise, "WORKER", command)
    out = tmp_path / "out.extxyz"
    found = sample([tmp_path / "bad.xyz", two], out, SHORT._replace(trajectories=4))
    reasons = {ended.start: ended.reason for ended in found.ended}
    assert "pieces more than 5 Å apart" in reasons.pop(f"{tmp_path / 'bad.xyz'} frame 0")
    assert "SIGSEGV (twice)" in reasons.pop(f"{tmp_path / 'bad.xyz'} frame 1")
    assert not reasons
    assert found.frames >= 6
    assert {len(atoms) for atoms in read(out)} >= {3, 5}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trajectories": 0}, "--trajectories 0: at least 1"),
        ({"frames": 0}, "--frames 0: at least 1"),
        ({"temperatures": (300.0, -1.0)}, "--temperature -1: above 0"),
        ({"temperatures": (float("nan"),)}, "--temperature nan"),
        ({"temperatures": ()}, "--temperature: at least one"),
        ({"every": 0.1}, r"--every 0\.1: at least a step"),
        ({"every": float("nan")}, "--every nan"),
        ({"every": 2.5}, r"--every 2\.5: a multiple of the step of 1 fs"),
        ({"before": 0.5}, r"--before 0\.5: a multiple"),
        ({"before": -1.0}, "--before -1: at least 0"),
        ({"before": float("inf")}, "--before inf"),
        ({"seed": -1}, "--seed -1: at least 0"),
        ({"method": "GFN0-xTB"}, "--method 'GFN0-xTB': one of GFN1-xTB"),
    ],
)
def test_settings_out_of_range_are_refused(
    two: Path, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        sample([two], tmp_path / "out.extxyz", SHORT._replace(**change))
    assert not list(tmp_path.glob("out*"))


def test_output_and_input_that_will_not_do_are_refused(two: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.extxyz"):
        sample([two], tmp_path / "out.traj", SHORT)
    with pytest.raises(InputError, match=r"two\.xyz exists"):
        sample([two], two, SHORT)
    ase.io.write(tmp_path / "copies.xyz", Atoms("H2", [[0, 0, 0], [0, 0, 0.1]]), format="extxyz")
    with pytest.raises(InputError, match=r"no structure that .* begin from; atoms 0 and 1 are"):
        sample([tmp_path / "copies.xyz"], tmp_path / "out.extxyz", SHORT)
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out.extxyz.partial").mkdir()
    (tmp_path / "out.extxyz.partial" / "000000.frames").symlink_to(outside / "frames")
    with pytest.raises(InputError, match="is a link out of"):
        sample([two], tmp_path / "out.extxyz", SHORT)


def test_the_command_tells_what_it_made(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.extxyz.gz"
    arguments = ["sample", str(two), "--out", str(out), "--trajectories", "1", "--frames", "2"]
    told = CliRunner().invoke(make_app(), [*arguments, "--before", "0", "--every", "2", "-t", "50"])
    assert told.exit_code == 0, told.output
    assert "2 structures of 1 trajectories" in told.output
    assert "1 of the 2 structures of the input begin a trajectory" in told.output
    (first, _) = read(out)
    assert first.info["temperature"] == 50.0
    again = CliRunner().invoke(make_app(), arguments)
    assert again.exit_code == 2


def test_the_settings_that_a_sample_was_made_with_are_kept_beside_its_parts(
    two: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample([two], tmp_path / "out.extxyz", SHORT, on_progress=stop)
    settings = json.loads((tmp_path / "out.extxyz.partial" / "settings.json").read_text())
    assert settings["temperatures"] == [300.0, 900.0]
    assert settings["frames"] == 3
