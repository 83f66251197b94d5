"""From structures to a labelled data set: read, label on every core, store, lose nothing."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbq.errors import InputError, OrbqError, told_when_full
from orbq.orbitals import check_method
from orbq.preprocess import store, supervise, wire, xtb
from orbq.preprocess.flat import release
from orbq.preprocess.frames import Source, every_file, find_sources
from orbq.preprocess.job import Ledger, Workspace
from orbq.preprocess.manifest import write_manifest
from orbq.preprocess.read import FIRST_FOUND, Keys, Reader, named_values
from orbq.preprocess.schedule import Plan, Pool, Resources, check_resources, costs, open_pool, plan
from orbq.preprocess.stage import Staged, lost_input, stage
from orbq.preprocess.store import Dataset
from orbq.schema import MANIFEST, SCHEMA_VERSION

__all__ = ["Progress", "Recipe", "Resources", "preprocess"]
HERE = Resources()
RELEASE_EVERY = 8  # chunks submitted: what was read of the mapped inputs is let go
STALLED_SECONDS, STALLED_AGAIN_SECONDS = 30.0, 600.0  # without a result, before asking the pool why
MAX_LOST = 3  # times that a pool may lose the same chunk


class Recipe(NamedTuple):
    """What is computed. method: of xTB, or several joined by + ("GFN1-xTB+GFN2-xTB"): charges of
    the first, energies and forces that are the mean of all. keys: names in the input. settings: of
    each method."""

    method: str = "GFN1-xTB"
    keys: Keys = FIRST_FOUND
    settings: xtb.Settings = xtb.DEFAULTS


class Progress(NamedTuple):
    """How far the job is.

    phase: "read", "label", "store" or "done". done, total: structures. share: of the estimated work
    that is done, 0 to 1. rejected: structures left out. unlabelled: kept without labels.
    """

    phase: str
    done: int
    total: int
    share: float
    rejected: int
    unlabelled: int


DEFAULT_RECIPE = Recipe()


def preprocess(
    inputs: Any,
    out: str | Path,
    recipe: Recipe = DEFAULT_RECIPE,
    resources: Resources = HERE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Dataset:
    """Read structures, label them with xTB, and store a data set in the directory ``out``.

    inputs: one or several files (also globs and names of embedded data sets), or one ``ase.Atoms``
    or any iterable of them, which are held in memory. Structures that cannot be used are left out,
    those that xTB cannot label are kept without labels; both are in failures.jsonl with the reason.
    An interrupted job goes on when called again the same way, and the finished data set does not
    depend on interruptions or on ``resources``.

    Raises InputError when a whole file is at fault, or ``out`` holds something else; OrbqError when
    the disk is full or the labelling processes cannot be run.
    """
    try:
        check_method(recipe.method)
    except KeyError as error:
        raise InputError(error.args[0]) from error
    if not recipe.settings.min_height >= 0:
        raise InputError(
            f"the smallest cell height is {recipe.settings.min_height:g} Å: it must be 0 or more"
        )
    check_resources(resources)
    reader = _reader(inputs, recipe.keys)
    work = Workspace(Path(out))
    identity = _identity(reader, recipe)
    if finished := _finished(work, identity):
        return finished
    with told_when_full(work.out):
        work.acquire()
        try:
            if (work.out / MANIFEST).is_file():  # by another process, before the directory was ours
                return _taken_from(work, identity)
            staged = _read(reader, work, recipe.method, identity, on_progress)
            ledger = _label(work, staged, recipe, resources, on_progress)
            on_progress(_progress("store", staged, ledger))
            write_manifest(work, _sources(reader), identity, staged, ledger)
            work.finish()
            on_progress(_progress("done", staged, ledger))
        finally:
            work.release()
    return Dataset.open(work.out)


def _progress(phase: str, staged: Staged, ledger: Ledger) -> Progress:
    n = staged.structures
    return Progress(phase, n, n, 1.0, staged.rejected, len(ledger.failures))


def _sources(reader: Reader) -> list[dict[str, str]]:
    return [{"name": source.name, "sha256": source.sha256} for source in every_file(reader.sources)]


def _reader(inputs: Any, keys: Keys) -> Reader:
    one = isinstance(inputs, str | Path) or hasattr(inputs, "get_positions")
    inputs = [inputs] if one else list(inputs)
    if not inputs:
        raise InputError("no input given")
    if all(isinstance(item, str | Path) for item in inputs):
        return Reader(find_sources(inputs), keys)
    if not all(hasattr(item, "get_positions") for item in inputs):
        raise InputError("inputs must be all files or all ase.Atoms")
    digest = hashlib.sha256()
    for atoms in inputs:
        for name, value in sorted(named_values(atoms, bare=False).items()):
            array = np.asarray(value)
            data = _encoded(repr(value)) if array.dtype == object else array.tobytes()
            digest.update(_encoded(f"{name} {array.dtype} {array.shape}") + data)
        digest.update(atoms.cell.array.tobytes() + atoms.pbc.tobytes())
    return Reader([Source("atoms in memory", Path(), digest.hexdigest())], keys, inputs)


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


# --------------------------------------------------------------------------- which job it is


def _identity(reader: Reader, recipe: Recipe) -> dict[str, Any]:
    """Everything the finished data set depends on."""
    return {
        "schema version": SCHEMA_VERSION,
        "input": [source.sha256 for source in every_file(reader.sources)],
        "method": recipe.method,
        "settings": recipe.settings._asdict(),
        "keys": {name: key for name, key in recipe.keys._asdict().items() if key},
        "tblite version": xtb.version(),
    }


def _finished(work: Workspace, identity: dict[str, Any]) -> Dataset | None:
    """The data set in ``out`` if this very job has finished there, None if there is none."""
    if not (work.out / MANIFEST).is_file():
        return None
    _same_job(work.out, store.read_manifest(work.out).get("job", {}), identity)
    if work.state.is_dir():  # killed between the manifest and the last removal
        work.acquire()
    return _taken_from(work, identity)


def _taken_from(work: Workspace, identity: dict[str, Any]) -> Dataset:
    """The finished data set in ``out``, without what is left of the state of its job."""
    _same_job(work.out, store.read_manifest(work.out).get("job", {}), identity)
    if work.state.is_dir():
        work.finish()
    return Dataset.open(work.out)


def _same_job(out: Path, there: dict[str, Any], identity: dict[str, Any]) -> None:
    different = [name for name, value in identity.items() if there.get(name) != value]
    if different:
        name = different[0]
        detail = "" if name == "input" else f" ({there.get(name)} there, {identity[name]} here)"
        raise InputError(
            f"{out} belongs to another job: its {name} is different{detail}; choose another "
            "directory for --out, or delete this one"
        )


# --------------------------------------------------------------------------- read


def _read(
    reader: Reader,
    work: Workspace,
    method: str,
    identity: dict[str, Any],
    on_progress: Callable[[Progress], None],
) -> Staged:
    if work.staged.is_file():
        state = json.loads(work.staged.read_text(encoding="utf-8"))
        _same_job(work.out, state["job"], identity)
        staged = Staged(**state["staged"])
        if not (lost := lost_input(work, staged)):
            return staged
        warnings.warn(f"{lost}: reading and labelling begin again", stacklevel=2)
    work.clear()  # reading that was interrupted begins again
    try:
        staged = stage(
            reader,
            work,
            method,
            lambda kept, bad: on_progress(Progress("read", kept, 0, 0.0, bad, 0)),
        )
    except InputError:
        work.discard()
        raise
    state = {"job": identity, "staged": staged._asdict()}
    store.write_atomically(work.staged, json.dumps(state))
    return staged


# --------------------------------------------------------------------------- label


def _label(
    work: Workspace,
    staged: Staged,
    recipe: Recipe,
    resources: Resources,
    on_progress: Callable[[Progress], None],
) -> Ledger:
    names = (store.OFFSETS, *wire.PER_ATOM, *wire.PER_STRUCTURE)
    arrays = {name: np.load(store.array_file(work.out, name), mmap_mode="r") for name in names}
    offsets = np.array(arrays[store.OFFSETS])
    chunks = plan(costs(arrays["numbers"], offsets, recipe.method))
    release(arrays["numbers"])
    ledger = Ledger(work, offsets, chunks)
    sizes, whole = np.diff(chunks.bounds), chunks.cost.sum()

    def tell() -> None:
        done = np.array(list(ledger.done), int)
        n, share = int(sizes[done].sum()), float(chunks.cost[done].sum() / whole)
        failed = len(ledger.failures)
        on_progress(Progress("label", n, staged.structures, share, staged.rejected, failed))

    try:
        tell()
        left = [c for c in range(len(sizes)) if c not in ledger.done]
        if left:
            inputs = {**arrays, store.OFFSETS: offsets}
            with open_pool(resources) as pool:
                _run(left, _Calls(pool, recipe, resources, inputs, chunks), ledger, tell)
        ledger.finish()
    finally:
        ledger.close()
    return ledger


class _Calls:
    """Submits chunks to a pool, and counts how often the pool lost one."""

    def __init__(
        self,
        pool: Pool,
        recipe: Recipe,
        resources: Resources,
        arrays: dict[str, np.ndarray],
        chunks: Plan,
    ) -> None:
        self.pool, self.recipe, self.resources = pool, recipe, resources
        self._mapped = list(arrays.values())
        # plain views: a slice of a memmap costs several times as much
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.chunks, self._submitted = chunks, 0
        self._lost: Counter[int] = Counter()

    def submit(self, chunk: int) -> Future[bytes]:
        """Begin a chunk."""
        note = {
            "method": self.recipe.method,
            "settings": self.recipe.settings._asdict(),
            "timeout": self.resources.timeout,
        }
        arrays = wire.select(self.arrays, self.chunks.members(chunk))
        data = wire.pack(wire.Message(arrays, note))
        self._submitted += 1
        if self._submitted % RELEASE_EVERY == 0:
            for array in self._mapped:
                release(array)
        spec = supervise.Spec(supervise.WORKER, self.resources.blas)
        return self.pool.executor.submit(supervise.label_chunk, data, spec)

    def result(self, future: Future[bytes], chunk: int) -> wire.Message | None:
        """The reply, or None if the pool lost the chunk, which may then be submitted again.

        Raises OrbqError when this happened MAX_LOST times to one chunk.
        """
        try:
            return wire.unpack(future.result())
        except OrbqError:
            raise
        except (Exception, CancelledError) as error:  # each executor has its own for lost workers
            self._lost[chunk] += 1
            if self._lost[chunk] < MAX_LOST:
                return None
            raise OrbqError(
                f"the labelling pool lost its workers ({type(error).__name__}: {error}); what is "
                "finished is kept: run the same command again to go on"
            ) from error


def _run(left: list[int], calls: _Calls, ledger: Ledger, tell: Callable[[], None]) -> None:
    """Keep the pool busy until every chunk is in the ledger; memory is bounded by the pool."""
    waiting: dict[Future[bytes], int] = {}
    queue, told, patience = iter(left), time.monotonic(), STALLED_SECONDS
    exhausted = False
    try:
        while waiting or not exhausted:
            while not exhausted and len(waiting) < 2 * calls.pool.width() + 2:
                chunk = next(queue, None)
                exhausted = chunk is None
                if chunk is not None:
                    waiting[calls.submit(chunk)] = chunk
            finished, _ = wait(waiting, timeout=patience, return_when=FIRST_COMPLETED)
            patience = STALLED_SECONDS
            if not finished and (reason := calls.pool.stalled()):
                warnings.warn(reason, stacklevel=2)
                patience = STALLED_AGAIN_SECONDS
            for future in finished:
                chunk = waiting.pop(future)
                reply = calls.result(future, chunk)
                if reply is None:
                    waiting[calls.submit(chunk)] = chunk
                else:
                    ledger.record(chunk, reply)
            if time.monotonic() - told > 0.2:
                told = time.monotonic()
                tell()
        tell()
    finally:
        with suppress(OSError):
            ledger.commit()
        for future in waiting:
            future.cancel()
