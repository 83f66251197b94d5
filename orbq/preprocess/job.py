"""An unfinished data set: what is already there, and what a kill or a power cut cannot take away.

Inside the data set's directory, ``.job/`` holds

    lock           held by the running process
    rejected.jsonl structures that cannot be used, in the order of the input
    staged.json    written when all structures are read: what the job is, and how many they are
    journal.jsonl  one line per finished chunk, after its labels are on the disk

Labels are written in place into arrays of the final size; a chunk without a line in the journal is
computed again and gives the same bytes. What was lost since (files deleted from a scratch disk) is
made again. ``manifest.json``, written last, makes the set valid; then
``.job/`` is removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from orbq.errors import InputError
from orbq.preprocess import store
from orbq.preprocess.links import make_directory, refuse_links
from orbq.preprocess.schedule import Plan
from orbq.preprocess.wire import Message
from orbq.schema import FAILURES, FIELDS, MANIFEST

LABELS = ("onsite", "xtb_energy", "xtb_forces")
OF_ATOMS = ("onsite", "xtb_forces")  # written at once; energies are in the journal
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

        Raises InputError when it holds something else or a link out of it, or another process is at
        work in it.
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
        refuse_links(self.out, "--out")
        make_directory(self.state, "--out")
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


def lost_array(out: Path, names: Iterable[str], structures: int, atoms: int) -> str | None:
    """What is wrong with the first of these arrays that is not there in full length, if one is."""
    rows = {"offset": structures + 1, "structure": structures, "atom": atoms}
    for name in names:
        per, trailing, dtype = store.array_names()[name]
        path, shape = store.array_file(out, name), (rows[per], *trailing)
        if not path.is_file():
            return f"{path} is missing"
        header = len(store.npy_header(shape, np.dtype(dtype)))
        size = header + np.dtype(dtype).itemsize * math.prod(shape)
        if (found := path.stat().st_size) != size:
            return f"{path} has {found:,} bytes, {size:,} were written"
    return None


class Ledger:
    """Labels on their way to the disk.

    done: finished chunks. failures, notes: by structure. blas: names of the BLAS libraries at work.

    The labels of atoms are written at once and synchronised before the chunk's line, which holds
    the energies, enters the journal; ``finish`` writes what there is one number of per structure.
    """

    def __init__(self, work: Workspace, offsets: np.ndarray, plan: Plan) -> None:
        self._offsets, self._out, self._plan = offsets, work.out, plan
        self._energy = np.zeros(len(offsets) - 1)
        self._labelled = np.zeros(len(offsets) - 1, bool)
        self.done: set[int] = set()
        self.failures: dict[int, str] = {}
        self.notes: dict[int, str] = {}
        self.blas: set[str] = set()
        names = [name for field in LABELS for name in (field, f"{field}_mask")]
        self._forget_if_lost(work)
        self._files = {name: _allocate(work.out, name, offsets) for name in names}
        self._waiting: list[str] = []
        self._last = time.monotonic()
        self._journal = self._take_up(work.journal)

    def _forget_if_lost(self, work: Workspace) -> None:
        """Drop a journal whose labels of atoms are not on the disk any more, with a warning."""
        structures, atoms = len(self._offsets) - 1, int(self._offsets[-1])
        if work.journal.exists() and (lost := lost_array(work.out, OF_ATOMS, structures, atoms)):
            warnings.warn(f"{lost}: all structures are labelled again", stacklevel=2)
            work.journal.unlink()

    def _take_up(self, path: Path) -> IO[str]:
        """Read the journal, cut off a line that a kill left half written, and open it to go on.

        The first line identifies the division into chunks; the journal of another one is dropped.
        """
        head = json.dumps({"plan": self._plan.digest()}) + "\n"
        good = 0
        if path.exists():
            with path.open("rb") as lines:
                if lines.readline() == head.encode():
                    good = len(head)
                    for line in lines:
                        if (entry := _complete(line)) is None:
                            break
                        good += len(line)
                        self._note(entry)
            os.truncate(path, good)
        journal = path.open("a", encoding="utf-8")
        if not good:
            journal.write(head)
        return journal

    def _note(self, entry: dict[str, Any]) -> None:
        members = self._plan.members(entry["chunk"])
        self._energy[members] = entry["energy"]
        self._labelled[members] = True
        self._labelled[[i for i, _ in entry["failures"]]] = False
        self.done.add(entry["chunk"])
        for texts, said in ((self.failures, entry["failures"]), (self.notes, entry["notes"])):
            texts.update((i, sys.intern(text)) for i, text in said)  # equal ones are kept once
        self.blas.update(entry["blas"])

    def record(self, chunk: int, reply: Message) -> None:
        """Store the labels of one chunk."""
        members = self._plan.members(chunk)
        first = self._offsets[members].tolist()
        ends = np.cumsum(self._offsets[members + 1] - self._offsets[members]).tolist()
        for name in OF_ATOMS:
            rows, begin = reply.arrays[name], 0
            for row, end in zip(first, ends, strict=True):
                self._write(name, row, rows[begin:end])
                begin = end
        entry = {
            "chunk": chunk,
            "energy": reply.arrays["xtb_energy"].tolist(),
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
        if os.pwrite(descriptor, values.data, start + row * row_bytes) != values.nbytes:
            path = store.array_file(self._out, name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

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

    def finish(self) -> None:
        """Write energies and masks of all structures."""
        self._write("xtb_energy", 0, self._energy)
        for name in LABELS:
            self._write(f"{name}_mask", 0, self._labelled)
        for descriptor, _, _ in self._files.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Close the files; what is not committed is computed again by the next run."""
        for descriptor, _, _ in self._files.values():
            os.close(descriptor)
        self._journal.close()


def _complete(line: bytes) -> dict[str, Any] | None:
    """The entry of a line of the journal, None if it was not written to its end."""
    try:
        return dict(json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


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
