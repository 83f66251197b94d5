"""Labelling on a real Dask scheduler with two real workers, one of which is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from orbq.errors import InputError
from orbq.preprocess import label, schedule
from orbq.preprocess.label import Progress, Resources, preprocess
from tests.test_label import ONE, fingerprint, molecules

pytest.importorskip("distributed", reason="needs the extra 'dask'")
pytest.importorskip("dask_jobqueue", reason="needs the extra 'dask'")
ROOT = Path(__file__).parents[1]


def launch(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dask", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def line_with(process: subprocess.Popen[str], pattern: str) -> str:
    """The first match in what the process prints; the rest is read and forgotten."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(pattern, line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[0]
    raise AssertionError(f"{process.args} ended without printing {pattern}")


@pytest.fixture
def cluster():
    """(address, worker processes); the workers have no nanny, so that a killed one stays dead."""
    scheduler = launch("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    processes = [scheduler]
    try:
        address = line_with(scheduler, r"tcp://127\.0\.0\.1:\d+")
        workers = [
            launch("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
            for _ in range(2)
        ]
        processes += workers
        for worker in workers:
            line_with(worker, "Registered to")
        yield address, workers
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_killed_worker_loses_nothing(cluster, tmp_path, monkeypatch):
    address, workers = cluster
    monkeypatch.setattr(schedule, "SHORTEST", 0.02)
    frames = molecules(30)

    def kill_in_the_middle(progress: Progress) -> None:
        if progress.phase == "label" and progress.done > 60 and workers[0].poll() is None:
            workers[0].send_signal(signal.SIGKILL)

    resources = Resources(scheduler=address)
    dataset = preprocess(
        frames, tmp_path / "cluster", resources=resources, on_progress=kill_in_the_middle
    )
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert workers[1].poll() is None
    assert dataset.mask("onsite").all()
    local = preprocess(frames, tmp_path / "local", resources=ONE)
    np.testing.assert_array_equal(local["onsite"], dataset["onsite"])
    assert fingerprint(local.path) == fingerprint(dataset.path)


def test_a_scheduler_that_does_not_answer_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match="no Dask scheduler answers there"):
        preprocess(
            molecules(), tmp_path / "set", resources=Resources(scheduler="tcp://127.0.0.1:9")
        )
    assert len(preprocess(molecules(), tmp_path / "set", resources=ONE)) == 10


def test_a_scheduler_without_workers_is_told_and_waited_for(tmp_path, monkeypatch):
    """As when the jobs of a batch system die on their nodes, or wait for days."""
    monkeypatch.setattr(label, "STALLED_SECONDS", 0.3)
    scheduler = launch("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    processes = [scheduler]
    try:
        address = line_with(scheduler, r"tcp://127\.0\.0\.1:\d+")

        def bring_a_worker(message: str, stacklevel: int) -> None:
            told.append(str(message))
            processes.append(launch("worker", address, "--nthreads", "1", "--no-dashboard"))

        told: list[str] = []
        monkeypatch.setattr(label.warnings, "warn", bring_a_worker)
        monkeypatch.setattr(label, "STALLED_AGAIN_SECONDS", 60.0)
        dataset = preprocess(molecules(), tmp_path / "set", resources=Resources(scheduler=address))
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    assert dataset.mask("onsite").all()
    assert len(told) == 1
    assert f"{address}: no worker is there: start some with `dask worker ADDRESS`" in told[0]


# --------------------------------------------------------------------------- batch systems

SYSTEMS = {"slurm": ("sbatch", "scancel"), "pbs": ("qsub", "qdel")}
ASKED_FOR = {
    "slurm": ["#SBATCH -p long", "#SBATCH -t 02:00:00", "--cpus-per-task=2", "#SBATCH --mem=4G"],
    "pbs": ["#PBS -q long", "#PBS -l walltime=02:00:00", "#PBS -l select=1:ncpus=2:mem=3815MB"],
}
# Takes a job script as the batch system's command does, keeps a copy, and runs it here.
SUBMIT = """#!/bin/sh
cp "$1" "$JOBS/$$.script"
setsid sh "$JOBS/$$.script" > "$JOBS/$$.log" 2>&1 &
echo "$!" > "$JOBS/$$.pid"
echo "Submitted batch job $$"
"""
CANCEL = """#!/bin/sh
kill -- "-$(cat "$JOBS/$1.pid")"
"""


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """batch(system, submit): puts commands of the batch system on the path; returns its jobs."""
    import dask

    jobs = tmp_path / "jobs"
    jobs.mkdir()
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setenv("PATH", f"{jobs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = {"cores": 2, "processes": 1, "memory": "4GB", "queue": "long", "walltime": "02:00:00"}
    here = {"interface": "lo", "local-directory": str(tmp_path), "death-timeout": 30}

    def install(system: str, submit: str = SUBMIT) -> Path:
        for name, script in zip(SYSTEMS[system], (submit, CANCEL), strict=True):
            (jobs / name).write_text(script)
            (jobs / name).chmod(0o755)
        settings.update({f"jobqueue.{system}.{k}": v for k, v in {**asked, **here}.items()})
        return jobs

    settings: dict = {}
    yield lambda *arguments: (install(*arguments), dask.config.set(settings))[0]
    for file in jobs.glob("*.pid"):
        with suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)
    dask.config.refresh()


@pytest.mark.parametrize("system", SYSTEMS)
def test_jobs_of_a_batch_system_label(batch, tmp_path, system):
    """Two jobs of two cores each are submitted with what was asked for, work, and are cancelled."""
    jobs = batch(system)
    resources = Resources(workers=2, scheduler=system)
    dataset = preprocess(molecules(2), tmp_path / "set", resources=resources)
    scripts = [path.read_text() for path in jobs.glob("*.script")]
    assert len(scripts) == 2
    for script in scripts:
        assert all(words in script for words in ASKED_FOR[system]), script
        command = script.splitlines()[-1]
        assert command.startswith(f"{sys.executable} -m distributed.cli.dask_worker tcp://127.")
        assert "--nthreads 2 --memory-limit 3.73GiB" in command
    local = preprocess(molecules(2), tmp_path / "local", resources=ONE)
    assert fingerprint(local.path) == fingerprint(dataset.path)


def test_a_job_that_is_refused_is_told(batch, tmp_path):
    batch("slurm", "#!/bin/sh\necho 'invalid partition specified: long' >&2\nexit 1\n")
    with pytest.raises(InputError, match=r"slurm: .*invalid partition specified: long.*jobqueue"):
        preprocess(molecules(), tmp_path / "set", resources=Resources(scheduler="slurm"))


def test_a_batch_system_that_is_not_here_is_told(batch, tmp_path):
    jobs = batch("pbs")
    (jobs / "qsub").unlink()
    with pytest.raises(InputError, match=r"pbs: .*qsub.*must run where jobs can be submitted"):
        preprocess(molecules(), tmp_path / "set", resources=Resources(scheduler="pbs"))


@pytest.mark.parametrize("system", SYSTEMS)
def test_batch_systems_ask_for_their_configuration(tmp_path, system):
    with pytest.raises(InputError, match=r"jobqueue\.yaml"):
        preprocess(molecules(), tmp_path / "set", resources=Resources(scheduler=system))
