"""Runs chunks of structures in a labelling process that may die.

A structure that ends its process (abort, segmentation fault, time limit, out of memory) is tried
once more, alone in a fresh process; if that dies too, the structure has no labels and the reason is
recorded. The other structures of the chunk are computed as if nothing had happened.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from orbq.errors import OrbqError
from orbq.orbitals import N_ONSITE
from orbq.preprocess import wire
from orbq.preprocess.blas import environment, find_blas
from orbq.preprocess.flat import ragged_rows
from orbq.preprocess.wire import IDLE, POSITION

# -P: no module of the working directory, such as a user's random.py, is taken for a library's
WORKER = (sys.executable, "-P", "-m", "orbq.preprocess.worker")
MAX_STARTS = 3  # of a process that dies without having begun a structure


class Spec(NamedTuple):
    """How labelling processes are started: their command line, and the BLAS mode (blas.py)."""

    command: tuple[str, ...] = WORKER
    blas: str = "auto"


class DiedError(RuntimeError):
    """The labelling process ended; position: the structure it was at, or IDLE."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


class Process:
    """One labelling process. about: what it says of itself (versions)."""

    def __init__(self, spec: Spec) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        with tempfile.TemporaryFile() as shared:
            shared.write(POSITION.pack(IDLE))
            shared.flush()
            self.position = mmap.mmap(shared.fileno(), POSITION.size)
            self.popen = subprocess.Popen(
                [*spec.command, str(shared.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=environment(find_blas(spec.blas)),
                pass_fds=(shared.fileno(),),
            )
        self.timeout: float | None = None
        hello = self._receive()
        self.about: dict[str, str] = wire.unpack(hello).note

    def call(self, request: bytes, timeout: float | None) -> bytes:
        """The packed reply to a packed chunk, which gives each of its structures ``timeout`` s.

        Raises DiedError when the process ends before the reply comes.
        """
        assert self.popen.stdin is not None
        self.timeout = timeout
        with suppress(BrokenPipeError):
            wire.send(self.popen.stdin, request)  # type: ignore[arg-type]
        return self._receive()

    def _receive(self) -> bytes:
        assert self.popen.stdout is not None
        data = wire.receive(self.popen.stdout)  # type: ignore[arg-type]
        if data is None:
            self.popen.wait()
            raise DiedError(POSITION.unpack(self.position[:])[0], self._why())
        return data

    def _why(self) -> str:
        code = self.popen.returncode
        if code == -signal.SIGALRM:
            return f"no result within {self.timeout:g} s"
        with suppress(ValueError):
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            how += " (out of memory?)" if code == -signal.SIGKILL else ""
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 2000))
        last = [line for line in self.errors.read().decode(errors="replace").splitlines() if line]
        return f"xTB process {how}" + (f": {last[-1][:200]}" if last else "")

    def close(self) -> None:
        """End the process at once."""
        self.popen.kill()
        self.popen.wait()
        self.position.close()
        for stream in (self.popen.stdin, self.popen.stdout, self.errors):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]


class Stable:
    """The labelling processes of this Python process, lent to one chunk at a time."""

    def __init__(self) -> None:
        self._lock, self._idle, self._busy = threading.Lock(), list[Process](), set[Process]()
        self._spec, self._closed = Spec(), False

    def borrow(self, spec: Spec, fresh: bool = False) -> Process:
        """An idle process, or a new one; always a new one if ``fresh``."""
        with self._lock:
            if self._closed:
                raise OrbqError("labelling was stopped")
            if spec != self._spec:
                stale, self._idle, self._spec = self._idle, [], spec
                for process in stale:
                    process.close()
            if self._idle and not fresh:
                process = self._idle.pop()
                self._busy.add(process)
                return process
        process = start(spec)
        with self._lock:
            self._busy.add(process)
        return process

    def give_back(self, process: Process, alive: bool = True) -> None:
        """Return a process after use; a dead one is buried."""
        with self._lock:
            self._busy.discard(process)
            if alive and not self._closed:
                self._idle.append(process)
                return
        process.close()

    def close(self) -> None:
        """End all processes, also those at work; what they were doing raises OrbqError."""
        with self._lock:
            self._closed = True
            for process in self._busy:
                process.popen.kill()  # whoever waits for it buries it
        self.empty()

    def empty(self) -> None:
        """End the processes that have nothing to do."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()

    def reopen(self) -> None:
        """Allow work again after ``close``."""
        with self._lock:
            self._closed = False


def start(spec: Spec) -> Process:
    """A new labelling process. Raises OrbqError with its last words when it does not start."""
    try:
        return Process(spec)
    except DiedError as error:
        raise OrbqError(
            f"the labelling process does not start: {error}; try `--blas off`, and `orbq doctor`"
        ) from error


STABLE = Stable()


def label_chunk(data: bytes, spec: Spec) -> bytes:
    """Labels of one chunk of structures, whatever single structures do to the process.

    data: packed request (arrays of wire.structures; note: method, settings, timeout). Returns the
    packed reply: onsite, xtb_energy, xtb_forces, labelled; note: failures [[i, reason]], notes.
    """
    request = wire.unpack(data)
    todo = list(range(len(request.arrays["offsets"]) - 1))
    parts: list[tuple[list[int], wire.Message]] = []
    failures: list[tuple[int, str]] = []
    idle_deaths = 0
    while todo:
        try:
            reply = _call(data, request.note["timeout"], spec)
            if not parts and not failures:
                return reply
            parts.append((todo, wire.unpack(reply)))
            break
        except DiedError as death:
            if not 0 <= death.position < len(todo):
                idle_deaths += 1
                if idle_deaths >= MAX_STARTS:
                    raise OrbqError(f"labelling processes keep dying: {death}") from death
                continue
            culprit = todo[death.position]
            todo = [i for i in todo if i != culprit]
            data, alone = _part(request, todo), _part(request, [culprit])
            try:
                reply = _call(alone, request.note["timeout"], spec, alone=True)
                parts.append(([culprit], wire.unpack(reply)))
            except DiedError as again:
                failures.append((culprit, f"{again} (twice)"))
    return wire.pack(_assemble(request, parts, failures))


def _part(request: wire.Message, chosen: list[int]) -> bytes:
    """The packed request for some of the structures of another."""
    arrays = wire.select(request.arrays, np.array(chosen, int))
    return wire.pack(wire.Message(arrays, request.note))


def _call(data: bytes, timeout: float | None, spec: Spec, alone: bool = False) -> bytes:
    process = STABLE.borrow(spec, fresh=alone)
    alive = False
    try:
        reply = process.call(data, timeout)
        alive = not alone  # what has just survived a dangerous structure is not used again
        return reply
    finally:
        STABLE.give_back(process, alive)


def _assemble(
    request: wire.Message,
    parts: list[tuple[list[int], wire.Message]],
    failures: list[tuple[int, str]],
) -> wire.Message:
    """One reply in the order of the request from the replies to parts of it."""
    offsets = request.arrays["offsets"]
    n_atoms, n = int(offsets[-1]), len(offsets) - 1
    shapes: dict[str, Any] = {"onsite": (n_atoms, N_ONSITE), "xtb_forces": (n_atoms, 3)}
    arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
    arrays |= {"xtb_energy": np.zeros(n), "labelled": np.zeros(n, bool)}
    notes: list[tuple[int, str]] = []
    for chosen, reply in parts:
        rows = ragged_rows(offsets[chosen], np.diff(offsets)[chosen])
        for name in shapes:
            arrays[name][rows] = reply.arrays[name]
        for name in ("xtb_energy", "labelled"):
            arrays[name][chosen] = reply.arrays[name]
        failures += [(chosen[i], reason) for i, reason in reply.note["failures"]]
        notes += [(chosen[i], note) for i, note in reply.note["notes"]]
    blas = sorted({name for _, reply in parts for name in reply.note["blas"]})
    note = {"failures": sorted(failures), "notes": sorted(notes), "blas": blas}
    return wire.Message(arrays, note)
