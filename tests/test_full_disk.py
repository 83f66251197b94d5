"""A disk that really fills up: the job says so, keeps what it has, and goes on with more room."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest

from orbq.preprocess.label import preprocess
from tests.test_label import TWO, fingerprint, molecules

ROOT = Path(__file__).parents[1]

# Makes a set in a file system of its own that is 32 kB large, and 8 kB larger after each failure.
# Prints what it was told, whether the structures had been read, and the journal's length.
GROWING = """
import json, subprocess, sys
from pathlib import Path
from orbq.errors import OrbqError
from orbq.preprocess import job, label, schedule
from tests.test_label import fingerprint
job.COMMIT_EVERY, schedule.SHORTEST = 0.0, 1e-3
source, disk, n = sys.argv[1], Path(sys.argv[2]), 32
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n}k", "none", disk], check=True)
told = []
while n < 4096:
    try:
        label.preprocess([source], disk / "set", resources=label.Resources(workers=1))
        break
    except OrbqError as error:
        state = job.Workspace(disk / "set")
        length = state.journal.stat().st_size if state.journal.exists() else 0
        told.append((str(error), state.staged.exists(), length))
    n += 8
    subprocess.run(["mount", "-o", f"remount,size={n}k", disk], check=True)
print(json.dumps([told, fingerprint(disk / "set")]))
"""

# The largest file that may be written has argv[3] bytes.
LIMITED = """
import resource, sys
from orbq.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
main([*sys.argv[4:], sys.argv[1], "--out", sys.argv[2], "--workers", "2"])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "frames.extxyz"
    ase.io.write(path, molecules(12))
    return path


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    return fingerprint(preprocess([source], tmp_path_factory.mktemp("whole") / "set").path)


@pytest.mark.parametrize(("limit", "read"), [(10_000, False), (100_000, True)])
def test_a_file_that_cannot_grow_is_told(source, expected, tmp_path, limit, read):
    """While structures are read, and when the room for their labels is reserved."""
    out = tmp_path / "set"
    command = [sys.executable, "-c", LIMITED, str(source), str(out), str(limit), "preprocess"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    message = " ".join(done.stderr.split())
    assert "no room left on the disk (File too large); what is finished is kept: " in message
    assert "Traceback" not in done.stderr
    assert (out / ".job" / "staged.json").exists() == read
    assert fingerprint(preprocess([source], out, resources=TWO).path) == expected


def test_a_sample_that_cannot_grow_is_told(source, tmp_path):
    """While a trajectory is written."""
    out = tmp_path / "sample.extxyz"
    command = [sys.executable, "-c", LIMITED, str(source), str(out), "500", "sample"]
    options = ["--trajectories", "1", "--frames", "9", "--before", "1", "--every", "1"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "no room left on the disk (File too large); what is finished" in done.stderr
    assert "not foreseen" not in done.stderr


def namespace() -> list[str] | None:
    """Command that runs another one where it may mount file systems, None if there is none."""
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        command = ["unshare", *options]
        mount = [*command, "mount", "-t", "tmpfs", "none", "/mnt"]
        if shutil.which("unshare") and subprocess.run(mount, capture_output=True).returncode == 0:
            return command
    return None


def test_a_disk_that_is_full_at_every_step(source, expected, tmp_path):
    command = namespace()
    if command is None:
        pytest.skip("mounting a small file system is not permitted here")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [*command, sys.executable, "-c", GROWING, str(source), str(disk)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, made = json.loads(done.stdout)
    assert made == expected
    assert all("no room left on the disk (No space left" in message for message, _, _ in told)
    reading = [read for _, read, _ in told].index(True)
    lengths = [length for _, _, length in told]
    assert reading > 2  # full while reading, while reserving room, and while labelling
    assert lengths[reading] == 0
    assert len(set(lengths)) > 2
    assert lengths == sorted(lengths)  # nothing that was finished is lost again
