"""A run's directory: append-only, so that it can be killed at any moment and continued.

    raw.extxyz        labelled structures, one appended as soon as it is done
    unlabelled.extxyz geometries without DFT, two per complex
    log.jsonl         every attempt, kept or rejected, with its reason and its time
    geoms/GROUP.json  geometries found with GFN2-xTB, before DFT

What a species' structures are depends on its group name alone, so a directory may hold species of
several seeds. A frame or a line that a kill cut short is dropped when the directory is opened.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.io import read, write

from orbq.errors import InputError

from .sampling import Geometry, Point

WHOLE_SPECIES = "failed"  # log entry after a failed first geometry: nothing more of this species


class Archive:
    """The directory of one run, locked against a second process while it is open.

    points: (group, geometry) -> its DFT result. settled: what was tried, and need not be again.
    repaired: what was dropped on opening, for the user.
    """

    def __init__(self, directory: Path) -> None:
        self.raw = directory / "raw.extxyz"
        self.unlabelled = directory / "unlabelled.extxyz"
        self.log = directory / "log.jsonl"
        self.geoms = directory / "geoms"
        self.repaired: list[str] = []
        self._lock = _lock(directory)
        self.geoms.mkdir(exist_ok=True)
        attempts = self._read_log()
        self.points = {_key(f): _point(f) for f in self._read_frames(self.raw)}
        self.geometry_groups = {_key(f)[0] for f in self._read_frames(self.unlabelled)}
        self.settled = attempts | set(self.points)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def keep(self, group: str, geometry: str, frame: Atoms, **facts: Any) -> None:
        """Append a labelled structure, then its log entry."""
        _append(self.raw, _extxyz([frame]))
        self.points[group, geometry] = _point(frame)
        self._note(group, geometry, ok=True, **facts)

    def keep_geometries(self, group: str, frames: list[Atoms]) -> None:
        """Append the structures without DFT of one species, in one write."""
        _append(self.unlabelled, _extxyz(frames))
        self.geometry_groups.add(group)

    def reject(self, group: str, geometry: str, why: str, **facts: Any) -> None:
        """Log an attempt that came to nothing; it is not tried again."""
        self._note(group, geometry, ok=False, why=why[:90], **facts)

    def load_geometries(self, group: str) -> dict[str, Geometry]:
        """The geometries of a species found so far."""
        path = self.geoms / f"{group}.json"
        if not path.exists():
            return {}
        try:
            entries = json.loads(path.read_text())
            return {
                name: Geometry(np.array(e["pos"], float), float(e["T"]), str(e["why"]))
                for name, e in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it and rerun") from error

    def save_geometries(self, group: str, geometries: dict[str, Geometry]) -> None:
        """Write the geometries of a species; the file is replaced whole or not at all."""
        entries = {
            name: {"T": g.temperature, "why": g.fault, "pos": g.positions.tolist()}
            for name, g in geometries.items()
        }
        path = self.geoms / f"{group}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(entries))
        os.replace(partial, path)

    def _note(self, group: str, geometry: str, **facts: Any) -> None:
        line = json.dumps({"group": group, "geom": geometry, **facts})
        _append(self.log, line + "\n")
        self.settled.add((group, geometry))

    def _read_log(self) -> set[tuple[str, str]]:
        if not self.log.exists():
            return set()
        data = self.log.read_bytes()
        whole = data.rfind(b"\n") + 1
        self._truncate(self.log, whole, len(data))
        attempts = set()
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                attempts.add((entry["group"], entry["geom"]))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.log}, line {number}: not a log entry ({error}); "
                    "delete the line: what it records is tried again"
                ) from error
        return attempts

    def _read_frames(self, path: Path) -> list[Atoms]:
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = _whole_frames(path, data)
        self._truncate(path, whole, len(data))
        return list(read(path, ":", format="extxyz")) if whole else []

    def _truncate(self, path: Path, whole: int, size: int) -> None:
        if whole < size:
            os.truncate(path, whole)
            self.repaired.append(
                f"{path.name}: dropped {size - whole} bytes of an unfinished entry"
            )


def _whole_frames(path: Path, data: bytes) -> int:
    """Bytes of the complete frames at the start of an extxyz file.

    Raises InputError, naming the line, when a frame does not begin with its number of atoms.
    """
    lines = data.splitlines(keepends=True)
    start, whole = 0, 0
    while start < len(lines):
        word = lines[start].strip()
        if not word.isdigit() and lines[start].endswith(b"\n"):
            raise InputError(
                f"{path}, line {start + 1}: expected a number of atoms, found {word[:40]!r}; "
                "the file was changed by hand or its disk is damaged: cut it before this line"
            )
        frame = lines[start : start + int(word or 0) + 2] if word.isdigit() else []
        if len(frame) < int(word or 0) + 2 or not frame[-1].endswith(b"\n"):
            break
        start += len(frame)
        whole += sum(map(len, frame))
    return whole


def _extxyz(frames: list[Atoms]) -> str:
    text = io.StringIO()
    write(text, frames, format="extxyz")
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _key(frame: Atoms) -> tuple[str, str]:
    return str(frame.info["group"]), str(frame.info["geometry"])


def _point(frame: Atoms) -> Point:
    """The DFT result of a frame, whether it was just made (arrays) or read (a calculator)."""
    if frame.calc is None:
        return Point(frame.positions, float(frame.info["energy"]), frame.arrays["forces"])
    return Point(frame.positions, frame.get_potential_energy(), frame.get_forces())


def _lock(directory: Path) -> IO[str]:
    """Hold the directory; raises InputError when another process does, or it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / "lock", "w")  # noqa: SIM115 (held while the archive is open)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{directory}: another process is writing here; wait for it or choose another --out"
        ) from error
    except OSError as error:
        raise InputError(f"{directory}: cannot be written to ({error.strerror})") from error
    return file
