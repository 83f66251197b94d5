"""Nothing is lost: kills at any moment, labelling processes that die, clusters that shrink."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import molecule

from orbq.preprocess import supervise
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import Dataset
from tests import faulty_worker
from tests.test_label import ONE, TWO, fingerprint, molecules

ROOT = Path(__file__).parents[1]
# A job that synchronises after every chunk of a few structures, and that may end itself with
# SIGKILL in the middle of its n-th write, of which then only a part is on the disk.
JOB = """
import os, signal, sys
from orbq.preprocess import job, label, schedule
job.COMMIT_EVERY, schedule.SHORTEST = 0.0, 1e-3
left, real_write, real_sync = int(sys.argv[3]), os.pwrite, os.fsync
def end_at_the_last(what):
    global left
    left -= 1
    if left == 0:
        what()
        os.kill(os.getpid(), signal.SIGKILL)
def write(descriptor, data, position):
    end_at_the_last(lambda: real_write(descriptor, data[: len(data) // 2], position))
    return real_write(descriptor, data, position)
def sync(descriptor):
    end_at_the_last(lambda: None)
    real_sync(descriptor)
os.pwrite, os.fsync = write, sync
label.preprocess([sys.argv[1]], sys.argv[2], resources=label.Resources(workers=2))
"""
FOREVER = 10**9  # writes until the end


def start(source: Path, out: Path, writes: int = FOREVER) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", JOB, str(source), str(out), str(writes)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> int:
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of 120 structures, two of which cannot be used and one of which cannot be labelled."""
    frames = molecules(12)
    frames[5].positions[1] = frames[5].positions[0]
    frames[50].positions[0] = np.nan
    frames[70].set_cell([6, 6, 6])
    frames[70].pbc = True
    path = tmp_path_factory.mktemp("source") / "frames.extxyz"
    ase.io.write(path, frames)
    return path


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "set"
    assert finish(start(source, out)) == 0
    assert len(Dataset.open(out)) == 118
    return fingerprint(out)


def test_kill_at_random_moments(source, expected, tmp_path):
    """Ten kills by the clock and ten inside a write, then the same command: the same bytes."""
    rng, out, kills = random.Random(0), tmp_path / "set", 0
    while kills < 20:
        if kills % 2:
            process = start(source, out, rng.randrange(1, 200))
        else:
            process = start(source, out)
            time.sleep(rng.uniform(0.2, 3.0))
            process.send_signal(signal.SIGKILL)
        if finish(process) == 0:  # it was done before the kill: begin anew
            assert fingerprint(out) == expected
            out = tmp_path / f"set{kills}"
        kills += 1
    assert finish(start(source, out)) == 0
    assert fingerprint(out) == expected


@pytest.mark.parametrize("tail", ['{"chunk": 7, "fail', "garbage\n", ""])
def test_a_torn_journal_is_cut_off(source, expected, tmp_path, tail):
    out = tmp_path / "set"
    while not (out / ".job" / "journal.jsonl").exists():
        assert finish(start(source, out, 400)) == -signal.SIGKILL
    with (out / ".job" / "journal.jsonl").open("a") as journal:
        journal.write(tail)
    assert finish(start(source, out)) == 0
    assert fingerprint(out) == expected


@pytest.fixture(scope="module")
def half_done(source, tmp_path_factory):
    """A job that was killed after some chunks were in the journal."""
    out = tmp_path_factory.mktemp("half") / "set"
    assert finish(start(source, out, 500)) == -signal.SIGKILL
    assert len((out / ".job" / "journal.jsonl").read_text().splitlines()) > 5
    return out


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("onsite.npy", None, "onsite.npy is missing: all structures are labelled again"),
        ("xtb_forces.npy", 1000, "xtb_forces.npy has 1,000 bytes, .* are labelled again"),
        ("positions.npy", None, "positions.npy is missing: reading and labelling begin again"),
        ("positions.npy", 1000, "positions.npy has 1,000 bytes, .*: reading and labelling begin"),
        (".job/rejected.jsonl", None, "rejected.jsonl is missing: reading and labelling begin"),
    ],
)
def test_what_was_lost_meanwhile_is_made_again(
    half_done, source, expected, tmp_path, name, size, told
):
    """Files that a scratch disk's cleaning took away, or cut: never zeros as labels."""
    out = shutil.copytree(half_done, tmp_path / "set")
    if size is None:
        (out / name).unlink()
    else:
        os.truncate(out / name, size)
    with pytest.warns(UserWarning, match=told):
        preprocess([source], out, resources=TWO)
    assert fingerprint(out) == expected


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    command = (sys.executable, "-m", "tests.faulty_worker")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(supervise, "WORKER", command)
    monkeypatch.setenv("ORBQ_TEST_MARKER", str(tmp_path / "marker"))


def faulty_molecule(fault: float):
    atoms = molecule("CH4")
    atoms.positions[:, 0] += fault - atoms.positions[0, 0]
    return atoms


def test_deaths_and_hangs_cost_one_structure_each(faulty, tmp_path):
    good = molecules(2)
    bad = {
        3: (faulty_worker.ABORT, "ended by SIGABRT"),
        7: (faulty_worker.CRASH, "ended by SIGSEGV"),
        8: (faulty_worker.HANG, "no result within 3 s"),
        15: (faulty_worker.MEMORY, "out of memory"),
        20: (faulty_worker.KILLED, "ended by SIGKILL (out of memory?)"),
    }
    mixed = list(good)
    for index, (fault, _) in bad.items():
        mixed.insert(index, faulty_molecule(fault))
    # no molecule here takes longer than 10 ms of an idle core
    dataset = preprocess(mixed, tmp_path / "set", resources=Resources(workers=2, timeout=3.0))
    np.testing.assert_array_equal(~dataset.mask("onsite"), np.isin(np.arange(25), list(bad)))
    told = {entry["frame"]: entry["reason"] for entry in dataset.failures()}
    assert told.keys() == bad.keys()
    for index, (_, reason) in bad.items():
        assert reason in told[index]
        assert told[index].endswith("(twice)") == (reason != "out of memory")
    clean = preprocess(good, tmp_path / "clean", resources=ONE)
    kept = np.repeat(dataset.mask("onsite"), dataset.n_atoms)
    np.testing.assert_array_equal(dataset["onsite"][kept], clean["onsite"])


def test_a_process_killed_once_costs_nothing(faulty, tmp_path):
    mixed = [*molecules(), faulty_molecule(faulty_worker.ONCE), *molecules()]
    dataset = preprocess(mixed, tmp_path / "set", resources=TWO)
    assert (tmp_path / "marker").exists()
    assert dataset.mask("onsite").all()
    assert not list(dataset.failures())


def test_a_worker_that_cannot_start_is_told(monkeypatch, tmp_path):
    from orbq.errors import OrbqError

    monkeypatch.setattr(supervise, "WORKER", (sys.executable, "-c", "raise SystemExit('no luck')"))
    with pytest.raises(OrbqError, match=r"does not start: .*exit status 1: no luck"):
        preprocess(molecules(), tmp_path / "set", resources=ONE)
