"""An unfinished data set: what is already there, and what a kill or a power cut cannot take away.

Inside the data set's directory, ``.job/`` holds

    lock           held by the running process
    rejected.jsonl structures that cannot be used, in the order of the input
    staged.json    written when all structures are read: what the job is, and how many they are
    journal.jsonl  one line per finished chunk, after its labels are on the disk

Labels are written in place into arrays of the final size; a chunk without a line in the journal is
computed again and gives the same bytes. ``manifest.json``, written last, makes the set valid; then
``.job/`` is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from orbq.errors import InputError
from orbq.preprocess import store
from orbq.preprocess.wire import Message
from orbq.schema import FAILURES, FIELDS, MANIFEST

LABELS = ("onsite", "xtb_energy", "xtb_forces")
COMMIT_EVERY = 1.0  # seconds between synchronisations with the disk


class Workspace:
    """The directory of one data set and its ``.job``, held by one process at a time."""

    def __init__(self, out: Path) -> None:
        self.out, self.state = out, out / store.JOB
        self._lock: IO[str] | None = None

    @property
    def rejected(self) -> Path:
        return self.state / "rejected.jsonl"

    @property
    def staged(self) -> Path:
        return self.state / "staged.json"

    @property
    def journal(self) -> Path:
        return self.state / "journal.jsonl"

    def acquire(self) -> None:
        """Make the directory ours.

        Raises InputError when it holds something else, or another process is at work in it.
        """
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is a file: choose another directory for --out")
        if self.out.is_dir() and not self.state.is_dir():
            others = sorted(p.name for p in self.out.iterdir())
            if others and MANIFEST not in others:
                raise InputError(
                    f"{self.out} is not empty and not a data set of orbq (it holds {others[0]}): "
                    "choose another directory for --out"
                )
        self.state.mkdir(parents=True, exist_ok=True)
        self._lock = (self.state / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise InputError(f"another process is writing to {self.out}: wait for it") from error

    def release(self) -> None:
        """Let go of the directory."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Remove everything an unfinished job has written."""
        for name in store.array_names():
            store.array_file(self.out, name).unlink(missing_ok=True)
        (self.out / FAILURES).unlink(missing_ok=True)
        for path in (self.journal, self.staged, self.rejected):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what an unfinished job has written, and the directory if nothing else is in it."""
        self.clear()
        self.finish()
        with suppress(OSError):
            self.out.rmdir()

    def finish(self) -> None:
        """Remove the state of the job."""
        shutil.rmtree(self.state)
        self.release()
        store.sync_directory(self.out)


class Ledger:
    """Labels on their way to the disk.

    done: finished chunks. failures, notes: by structure. blas: names of the BLAS libraries at work.

    Data is written at once and synchronised before its line enters the journal.
    """

    def __init__(self, work: Workspace, offsets: np.ndarray) -> None:
        self._offsets, self._out = offsets, work.out
        self.done: set[int] = set()
        self.failures: dict[int, str] = {}
        self.notes: dict[int, str] = {}
        self.blas: set[str] = set()
        self._files = {name: _allocate(work.out, name, offsets) for name in _label_arrays()}
        self._waiting: list[str] = []
        self._last = time.monotonic()
        self._replay(work.journal)
        self._journal = work.journal.open("a", encoding="utf-8")

    def _replay(self, journal: Path) -> None:
        """Take up what is in the journal, and cut off a line that a kill left half written."""
        if not journal.exists():
            return
        good = 0
        with journal.open("rb") as lines:
            for line in lines:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    break
                good += len(line)
                self._note(entry)
        os.truncate(journal, good)

    def _note(self, entry: dict[str, Any]) -> None:
        self.done.add(entry["chunk"])
        self.failures.update((i, reason) for i, reason in entry["failures"])
        self.notes.update((i, note) for i, note in entry["notes"])
        self.blas.update(entry["blas"])

    def record(self, chunk: int, members: np.ndarray, reply: Message) -> None:
        """Store the labels of one chunk; members: the structures in the order of the reply."""
        counts = np.diff(self._offsets)[members] if len(members) else np.zeros(0, int)
        ends = np.cumsum(counts)
        labelled = reply.arrays["labelled"]
        for row, (i, stop, n) in enumerate(
            zip(members.tolist(), ends.tolist(), counts.tolist(), strict=True)
        ):
            atoms = slice(stop - n, stop)
            self._write("onsite", int(self._offsets[i]), reply.arrays["onsite"][atoms])
            self._write("xtb_forces", int(self._offsets[i]), reply.arrays["xtb_forces"][atoms])
            self._write("xtb_energy", i, reply.arrays["xtb_energy"][row : row + 1])
            for name in LABELS:
                self._write(f"{name}_mask", i, labelled[row : row + 1])
        entry = {
            "chunk": chunk,
            "failures": [(int(members[i]), reason) for i, reason in reply.note["failures"]],
            "notes": [(int(members[i]), note) for i, note in reply.note["notes"]],
            "blas": reply.note["blas"],
        }
        self._note(entry)
        self._waiting.append(json.dumps(entry) + "\n")
        if time.monotonic() - self._last > COMMIT_EVERY:
            self.commit()

    def _write(self, name: str, row: int, values: np.ndarray) -> None:
        descriptor, start, row_bytes = self._files[name]
        data = values.tobytes()
        if os.pwrite(descriptor, data, start + row * row_bytes) != len(data):
            raise OSError(28, "no room left", str(store.array_file(self._out, name)))

    def commit(self) -> None:
        """Bring everything recorded so far to the disk, then into the journal."""
        if self._waiting:
            for descriptor, _, _ in self._files.values():
                os.fsync(descriptor)
            self._journal.write("".join(self._waiting))
            self._journal.flush()
            os.fsync(self._journal.fileno())
            self._waiting = []
        self._last = time.monotonic()

    def close(self) -> None:
        """Close the files; what is not committed is computed again by the next run."""
        for descriptor, _, _ in self._files.values():
            os.close(descriptor)
        self._journal.close()


def _label_arrays() -> Iterable[str]:
    return [name for field in LABELS for name in (field, f"{field}_mask")]


def _allocate(out: Path, name: str, offsets: np.ndarray) -> tuple[int, int, int]:
    """(descriptor, first byte of the data, bytes per row) of a label array of the final size.

    Its space is reserved, so that a disk that is too small is noticed before the work.
    """
    field = FIELDS[name.removesuffix("_mask")]
    mask = name.endswith("_mask")
    shape, dtype = ((), np.dtype(bool)) if mask else (field.shape, np.dtype(field.dtype))
    rows = int(offsets[-1]) if field.per == "atom" and not mask else len(offsets) - 1
    header = store.npy_header((rows, *shape), dtype)
    row_bytes = dtype.itemsize * int(np.prod(shape, dtype=int))
    descriptor = os.open(store.array_file(out, name), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, header, 0)
        size = len(header) + rows * row_bytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, len(header), row_bytes
