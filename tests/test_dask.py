"""Labelling on a real Dask scheduler with two real workers, one of which is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from orbq.errors import InputError
from orbq.preprocess import schedule
from orbq.preprocess.label import Progress, Resources, preprocess
from tests.test_label import ONE, fingerprint, molecules

pytest.importorskip("distributed", reason="needs the extra 'dask'")
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


@pytest.mark.parametrize("system", ["slurm", "pbs"])
def test_batch_systems_ask_for_their_configuration(tmp_path, system):
    pytest.importorskip("dask_jobqueue", reason="needs the extra 'dask'")
    with pytest.raises(InputError, match=r"jobqueue\.yaml"):
        preprocess(molecules(), tmp_path / "set", resources=Resources(scheduler=system))
