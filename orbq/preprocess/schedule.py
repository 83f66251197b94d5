"""Who computes what, when: chunks by cost, largest first, on a pool of processes.

The labelling loop knows ``concurrent.futures.Executor`` alone: threads that each hold one labelling
process on this machine, or a Dask cluster whose workers do the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from orbq import orbitals
from orbq.errors import InputError
from orbq.preprocess import supervise
from orbq.preprocess.blas import find_blas

# Seconds for n orbitals on one core of the machine of benchmarks/results/labelling.md; only ratios
# matter.
OVERHEAD = 1.5e-3
PER_ORBITAL, EXPONENT = 1.6e-7, 2.6
# A chunk is this part of the work that is left, within bounds in seconds: large enough that sending
# it costs nothing, and smaller towards the end, so that the last one is not waited for.
PART, SHORTEST, LONGEST = 1 / 32, 0.03, 2.0

CONNECT_SECONDS = 30  # to a Dask scheduler
BATCH_SYSTEMS = {"slurm": "SLURMCluster", "pbs": "PBSCluster"}  # of dask-jobqueue


class Resources(NamedTuple):
    """Where and how the labels are computed; nothing here changes a label.

    workers: processes on this machine (None: one per core), or per job of a batch system.
    scheduler: None (this machine), the address of a Dask scheduler, "slurm" or "pbs".
    timeout: seconds after which one structure is given up. blas: "auto", "off" or a path (blas.py).
    """

    workers: int | None = None
    scheduler: str | None = None
    timeout: float | None = 600.0
    blas: str = "auto"


class Pool(NamedTuple):
    """An executor; how many chunks it works on at once; why it works on none, if so."""

    executor: Executor
    width: Callable[[], int]
    stalled: Callable[[], str | None] = lambda: None


def costs(numbers: np.ndarray, offsets: np.ndarray, method: str) -> np.ndarray:
    """Estimated seconds [S] of each structure: overhead + n_orbitals^2.6."""
    per_element = orbitals.shells(method).slot_mask.sum(1)
    n_orbitals = np.empty(len(offsets) - 1)
    block = 1 << 16  # structures at a time: constant memory
    for start in range(0, len(n_orbitals), block):
        rows = offsets[start : start + block + 1]
        counted = per_element[numbers[rows[0] : rows[-1]]]
        n_orbitals[start : start + block] = np.add.reduceat(counted, rows[:-1] - rows[0])
    return OVERHEAD + PER_ORBITAL * n_orbitals**EXPONENT


class Plan(NamedTuple):
    """Division of S structures into C chunks: order [S], bounds [C + 1], cost [C] in seconds.

    Chunk c holds the structures ``order[bounds[c]:bounds[c + 1]]``.
    """

    order: np.ndarray
    bounds: np.ndarray
    cost: np.ndarray

    def members(self, chunk: int) -> np.ndarray:
        """The structures of a chunk."""
        return self.order[self.bounds[chunk] : self.bounds[chunk + 1]]

    def digest(self) -> str:
        """Identifies the division."""
        arrays = (self.order.astype("<i8"), self.bounds.astype("<i8"))
        return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def plan(cost: np.ndarray) -> Plan:
    """Divide structures of these costs [S] into chunks whose cost falls towards the end.

    The most expensive structures come first. Depends on the costs alone, so that an interrupted job
    finds the same chunks again on any number of workers.
    """
    order = np.argsort(-cost, kind="stable")
    total = np.concatenate([[0.0], np.cumsum(cost[order])])
    bounds = [0]
    while bounds[-1] < len(order):
        start = bounds[-1]
        limit = float(np.clip((total[-1] - total[start]) * PART, SHORTEST, LONGEST))
        stop = int(np.searchsorted(total, total[start] + limit, side="right")) - 1
        bounds.append(min(max(stop, start + 1), len(order)))
    return Plan(order, np.array(bounds), np.diff(total[bounds]))


def check_resources(resources: Resources) -> None:
    """Raise InputError for resources that cannot be right, before any work is done."""
    scheduler, timeout = resources.scheduler, resources.timeout
    if resources.workers is not None and resources.workers < 1:
        raise InputError(f"--workers {resources.workers}: at least 1 is needed")
    if timeout is not None and not timeout > 0:
        raise InputError(f"--timeout {timeout:g}: it must be above 0 seconds")
    if scheduler is None:
        find_blas(resources.blas)
    elif "://" not in scheduler and scheduler not in BATCH_SYSTEMS:
        raise InputError(
            f"--scheduler {scheduler!r}: give tcp://HOST:PORT of a Dask scheduler, or one of "
            f"{', '.join(BATCH_SYSTEMS)}"
        )


@contextmanager
def open_pool(resources: Resources) -> Iterator[Pool]:
    """The executor for ``resources``; its processes are ended on the way out.

    Raises InputError for a scheduler that is unknown or cannot be reached.
    """
    if resources.scheduler is None:
        workers = usable_cores() if resources.workers is None else resources.workers
        with _local_pool(workers) as pool:
            yield pool
    else:
        with _dask_pool(resources) as pool:
            yield pool


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _local_pool(workers: int) -> Iterator[Pool]:
    supervise.STABLE.reopen()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="orbq")
    try:
        yield Pool(executor, lambda: workers)
    finally:
        supervise.STABLE.close()
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _dask_pool(resources: Resources) -> Iterator[Pool]:
    try:
        import distributed
    except ImportError as error:
        raise InputError(
            f"--scheduler {resources.scheduler} needs Dask: pip install 'orbq[dask]'"
        ) from error
    with _dask_cluster(resources) as address:
        try:
            client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise InputError(
                f"--scheduler {resources.scheduler}: no Dask scheduler answers there ({error}); "
                "start one with `dask scheduler`, and workers with `dask worker ADDRESS`"
            ) from error
        with client:
            try:
                yield Pool(
                    client.get_executor(pure=False),
                    lambda: max(1, _threads(client)),
                    lambda: None if _threads(client) else _without_workers(resources),
                )
            finally:
                with suppress(Exception):  # the workers may be gone; they outlive this job if not
                    client.run(supervise.STABLE.empty)


def _threads(client: Any) -> int:
    return sum(client.nthreads().values())


def _without_workers(resources: Resources) -> str:
    if resources.scheduler in BATCH_SYSTEMS:
        look = "its jobs are in the queue, or died on their nodes (the batch system's output tells)"
    else:
        look = "start some with `dask worker ADDRESS`"
    return f"--scheduler {resources.scheduler}: no worker is there: {look}; waiting for one"


@contextmanager
def _dask_cluster(resources: Resources) -> Iterator[Any]:
    """What ``distributed.Client`` connects to: an address, or a cluster of batch jobs."""
    scheduler = resources.scheduler or ""
    if "://" in scheduler:
        yield scheduler
        return
    try:
        import dask_jobqueue
    except ImportError as error:
        raise InputError(
            f"--scheduler {scheduler} needs dask-jobqueue: pip install 'orbq[dask]'"
        ) from error
    with _batch_jobs(getattr(dask_jobqueue, BATCH_SYSTEMS[scheduler]), resources) as cluster:
        yield cluster


@contextmanager
def _batch_jobs(kind: type, resources: Resources) -> Iterator[Any]:
    """A cluster of ``kind`` whose jobs are in the queue.

    Raises InputError with the batch system's own words when it does not take them.
    """
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(kind())
            cluster.sync(_submit, cluster, resources.workers or 1)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            told = " ".join(str(error).split())
            raise InputError(
                f"--scheduler {resources.scheduler}: {told}; cores, memory, queue and walltime of "
                "a job come from Dask's jobqueue.yaml (dask-jobqueue's documentation, "
                "'Configuration'), and the command must run where jobs can be submitted"
            ) from error
        yield cluster


async def _submit(cluster: Any, n_jobs: int) -> None:
    """Put jobs into the queue.

    As ``cluster.scale`` does, which however only logs an error and waits for workers for ever.
    """
    from distributed.core import Status

    for _ in range(n_jobs):
        cluster.worker_spec.update(cluster.new_worker_spec())
    try:
        await cluster
    except Exception:
        for job in cluster.workers.values():
            if job.status == Status.created:  # closing the cluster would stumble over it
                job.status = Status.failed
        raise
