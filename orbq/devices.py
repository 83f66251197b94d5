"""Which devices share an update, and how arrays get there: one process, or many on several hosts.

An update is made of ``parts`` packed batches. Each device takes as many of them, one after the
other, as there are parts to a device; each process packs those of its own devices. The same parts
give the same update on any number of devices, to rounding.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbq.errors import InputError, OrbqError
from orbq.losses import Batch
from orbq.train import DEVICES

T = TypeVar("T")
_MESSAGE_BYTES = 2048  # of a failure that one process tells the others
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat")  # in the error of the ones that are left


class Layout(NamedTuple):
    """parts: packed batches of an update. mesh: the devices that share it; None for a single batch
    on the default device."""

    parts: int
    mesh: Mesh | None

    @property
    def n_devices(self) -> int:
        """Devices in use, over all processes."""
        return 1 if self.mesh is None else int(self.mesh.size)

    @property
    def n_idle(self) -> int:
        """Devices that have no part in it."""
        return int(jax.device_count()) - self.n_devices

    @property
    def mine(self) -> list[int]:
        """The parts that this process packs, in the order of ``spread``."""
        if self.mesh is None:
            return [0]
        n, me = self.n_devices, jax.process_index()
        own = [d for d, device in enumerate(self.mesh.devices.flat) if device.process_index == me]
        return [turn * n + d for turn in range(self.parts // n) for d in own]


ALONE = Layout(1, None)


class Cluster(NamedTuple):
    """How the processes of a job find each other; all None: as SLURM, a TPU pod or the like say.

    coordinator: HOST:PORT of the first process.
    """

    coordinator: str | None = None
    n_processes: int | None = None
    process: int | None = None


def join(cluster: Cluster) -> None:
    """Become one of the processes of a job; before anything is computed.

    Raises InputError when the others cannot be found.
    """
    given = [value is not None for value in cluster]
    if any(given) and not all(given):
        raise InputError("give --coordinator, --processes and --process together, or none of them")
    try:
        jax.distributed.initialize(*cluster, local_device_ids=own_gpus(os.environ))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of the job cannot find each other ({str(error).splitlines()[0]}): "
            "start all of them, and give --coordinator HOST:PORT --processes N --process 0..N-1 "
            "where no cluster manager says so"
        ) from error


def own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this task among those that SLURM lets it see; None where SLURM names none.

    (JAX alone takes the one GPU whose number is the task's on its node: too few for one task per
    node, and one that does not exist where each task sees only its own.)
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES")
    if not visible or "SLURM_LOCALID" not in environment:
        return None
    n_gpus, task = len(visible.split(",")), int(environment["SLURM_LOCALID"])
    n_tasks = int(environment["SLURM_NTASKS"]) // int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if "SLURM_GPUS_PER_TASK" in environment or n_gpus < n_tasks:
        return list(range(n_gpus))
    share = n_gpus // max(n_tasks, 1)
    return list(range(task * share, (task + 1) * share))


def choose(parts: int, begun: bool = False) -> Layout:
    """The devices for updates of so many parts (0: one for each device there is).

    begun: the parts are those of a run that is gone on with. Raises InputError when the devices of
    several processes do not divide the parts.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    parts = parts or len(devices)
    n = max(d for d in range(1, len(devices) + 1) if parts % d == 0)
    if jax.process_count() > 1 and n < len(devices):
        remedy = (
            "the run was begun so: go on with fewer processes, or begin another run with "
            if begun
            else "start fewer processes, or set "
        )
        raise InputError(
            f"an update of {parts} batches cannot be shared by the {len(devices)} devices of "
            f"{jax.process_count()} processes: {remedy}training.batches_per_update a multiple of "
            f"{len(devices)}"
        )
    return ALONE if parts == 1 else Layout(parts, Mesh(np.array(devices[:n]), (DEVICES,)))


def spread(layout: Layout, batches: Sequence[Batch]) -> Batch:
    """This process's parts of an update (``layout.mine``), NumPy, as what the step takes."""
    if layout.mesh is None:
        return batches[0]
    n, turns = layout.n_devices, layout.parts // layout.n_devices
    sharding = NamedSharding(layout.mesh, PartitionSpec(None, DEVICES))

    def put(*arrays: np.ndarray) -> jax.Array:
        stacked = np.stack(arrays).reshape(turns, -1, *arrays[0].shape)
        shape = (turns, n, *arrays[0].shape)
        return jax.make_array_from_process_local_data(sharding, stacked, shape)

    out: Batch = jax.tree.map(put, *batches)
    return out


def named(layout: Layout) -> str:
    """The devices in use, in words."""
    return f"{layout.n_devices} x {jax.devices()[0].device_kind}"


def replicated(layout: Layout) -> NamedSharding | None:
    """How parameters lie on the devices: whole on each."""
    return None if layout.mesh is None else NamedSharding(layout.mesh, PartitionSpec())


def replicate(layout: Layout, tree: Any) -> Any:
    """Arrays that every process has, whole on every device."""
    sharding = replicated(layout)
    if sharding is None:
        return tree

    def put(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def local(layout: Layout, tree: Any) -> Any:
    """Replicated arrays as arrays of this process's first device."""
    if layout.mesh is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


# --------------------------------------------------------------------------- between processes


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return bool(jax.process_index() == 0)


def wait_for_all(name: str) -> None:
    """Go on when every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def main_first(work: Callable[[], T]) -> T:
    """What ``work`` returns in this process, which the main one does before the others begin.

    If it fails in the main process, that is raised there, and told in every other.
    """
    if jax.process_count() == 1:
        return work()
    if not is_main():
        if failure := _said(""):
            raise InputError(failure)
        return work()
    try:
        result = work()
    except Exception as error:
        told = "" if isinstance(error, OrbqError) else f"{type(error).__name__}: "
        _said(f"{told}{error}")
        raise
    _said("")
    return result


def main_decides(work: Callable[[], bool | None]) -> bool:
    """The truth of what ``work`` returns in the main process, which alone does it; see above."""
    found = False

    def only_there() -> None:
        nonlocal found
        if is_main():
            found = bool(work())

    main_first(only_there)
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(found)))


def _said(text: str) -> str:
    """What the main process says, in every process."""
    from jax.experimental import multihost_utils

    said = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    said[: len(encoded)] = encoded
    heard = np.asarray(multihost_utils.broadcast_one_to_all(said))
    return heard.tobytes().rstrip(b"\0").decode(errors="replace")


def total(sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Sums over all processes, each of which has the same names."""
    if jax.process_count() == 1:
        return dict(sums)
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(dict(sums))
    return {name: np.asarray(values).sum(0) for name, values in gathered.items()}


@contextmanager
def term_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, which then no longer ends the process at once."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def make_stop(asked: Callable[[], bool]) -> Callable[[int], bool]:
    """``step -> whether to stop there``, the same in every process. asked: in a single one."""
    if jax.process_count() == 1:
        return lambda step: asked()
    from jax.experimental import multihost_utils

    return lambda step: bool(multihost_utils.reached_preemption_sync_point(step))


@contextmanager
def told_when_a_process_is_lost() -> Iterator[None]:
    """Turn what a collective operation says when another process has died into what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if jax.process_count() == 1 or not any(sign in text for sign in _LOST):
            raise
        raise OrbqError(
            f"another process of the job was lost ({text.splitlines()[0][:200]}): its own output "
            "says why; the checkpoints are kept: start all processes again with the same command"
        ) from error


# --------------------------------------------------------------------------- memory


@contextmanager
def told_when_memory_is_short(layout: Layout, budget: Any) -> Iterator[None]:
    """Turn the device's error into one that says what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
            raise
        raise OrbqError(
            f"the device's memory is too small for batches of {budget.n_node} atoms and "
            f"{budget.n_edge} edges ({text.splitlines()[0][:200]}): raise "
            f"training.batches_per_update (now {layout.parts}), which makes the same update of "
            "smaller batches one after the other, lower training.batch_size, or use a smaller "
            "model.n_channels, lmax or cutoff; the checkpoints are kept"
        ) from error
