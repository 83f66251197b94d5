"""Frames of structure files, one at a time: constant memory, and one bad frame spoils no other.

(ext)xyz text is split here, because a frame whose atom count is wrong must not take its neighbours
with it, and because seeking in compressed files, as ASE does, is a hundred times slower. Every
other format goes through ``ase.io.iread``.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import lzma
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from orbq.errors import InputError
from orbq.preprocess import tmqm

EMBEDDED = ("tmc", "tmc_unlabelled")
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class Source(NamedTuple):
    """One input file. name: as the user gave it, for messages. sha256: of its bytes, hex.
    tables: files beside it that hold labels of its structures (see ``tmqm``)."""

    name: str
    path: Path
    sha256: str
    tables: tuple[Source, ...] = ()


class Frame(NamedTuple):
    """One frame of a file: ``atoms`` (ase.Atoms), or None and the ``reason`` it cannot be read."""

    number: int
    atoms: Any
    reason: str = ""


def embedded_path(name: str) -> Path:
    """The file of a data set that comes with the package: ``"tmc"`` or ``"tmc_unlabelled"``.

    Raises InputError for any other name.
    """
    if name not in EMBEDDED:
        raise InputError(f"no embedded data set {name!r}; there are: {', '.join(EMBEDDED)}")
    return Path(str(resources.files("orbq").joinpath("data", f"{name}.extxyz.gz")))


def find_sources(paths: Iterable[str | Path]) -> list[Source]:
    """The input files that ``paths`` stand for: files, globs, names of embedded data sets, or the
    directory of a tmQM release.

    Raises InputError for a missing, empty or unreadable file, a directory, or a glob without match.
    """
    found: list[Source] = []
    for given in paths:
        found += [_source_with_tables(name, path) for name, path in _expand(str(given))]
    if not found:
        raise InputError("no input files given")
    return found


def every_file(sources: Iterable[Source]) -> list[Source]:
    """The sources in order, then the tables beside them, each once."""
    sources = list(sources)
    return list(dict.fromkeys([*sources, *(table for s in sources for table in s.tables)]))


def _expand(given: str) -> list[tuple[str, Path]]:
    path = Path(given)
    if path.exists() and not path.is_dir():
        return [(given, path)]
    if given in EMBEDDED:
        return [(given, embedded_path(given))]
    if parts := tmqm.parts(path):
        return [(str(part), part) for part in parts]
    if path.is_dir():
        raise InputError(f"{given} is a directory; name its files, e.g. '{given}/*.xyz'")
    matches = sorted(m for m in glob.glob(given, recursive=True) if Path(m).is_file())
    if not matches:
        raise InputError(
            f"no such file: {given} (embedded data sets are known by the names "
            f"{', '.join(EMBEDDED)})"
        )
    return [(match, Path(match)) for match in matches]


def _source_with_tables(name: str, path: Path) -> Source:
    tables = tuple(_source(str(table), table) for table in tmqm.tables_beside(path))
    return _source(name, path)._replace(tables=tables)


def _source(name: str, path: Path) -> Source:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    if path.stat().st_size == 0:
        raise InputError(f"{name}: the file is empty; leave it out or make it again")
    return Source(name, path, digest.hexdigest())


def read_frames(source: Source) -> Iterator[Frame]:
    """All frames of one file, in order.

    Raises InputError when the file as a whole is at fault: unreadable, truncated, no frames.
    """
    suffixes = [s.lower() for s in source.path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    frames = _BY_SUFFIX.get(suffixes[-1] if suffixes else "", _read_any)
    reached, readable, reason = 0, 0, ""
    try:
        for frame in frames(source, packed):
            reached, readable = frame.number + 1, readable + (frame.atoms is not None)
            reason = reason or frame.reason
            yield frame
    except InputError:
        raise
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise InputError(
            f"{source.name}: truncated or corrupt after frame {reached}: {error}; "
            "copy or make the file again"
        ) from error
    if not readable:
        raise InputError(
            f"{source.name}: no frame could be read"
            + (f"; the first of {reached}: {reason}" if reached else "; the file holds none")
        )


# --------------------------------------------------------------------------- (ext)xyz


class _Lines:
    """Lines of a text stream with their number and one line of look-ahead."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.number = 0  # of the line that `peek` shows, counted from 1
        self._next = ""
        self.take()

    def peek(self) -> str:
        return self._next

    def take(self) -> str:
        line, self._next = self._next, self._stream.readline()
        self.number += 1
        return line


def _read_xyz(source: Source, packed: str) -> Iterator[Frame]:
    opener = _OPENERS.get(packed, open)
    with opener(source.path, "rt", encoding="utf-8") as stream:
        lines, index = _Lines(stream), 0
        while lines.peek():
            if not lines.peek().strip():
                lines.take()
                continue
            yield _xyz_frame(source, lines, index)
            index += 1


def _is_count(line: str) -> bool:
    return line.strip().isdigit()


def _xyz_frame(source: Source, lines: _Lines, index: int) -> Frame:
    start = lines.number
    if not _is_count(lines.peek()):
        found = lines.peek().strip()[:40]
        _skip_to_count(lines)
        if index == 0 and not lines.peek():
            raise InputError(f"{source.name}: line 1 is {found!r}, not an atom count: not xyz text")
        return Frame(index, None, f"line {start} is {found!r}, not an atom count")
    text = [lines.take()]
    n = int(text[0])
    text.append(lines.take())  # the comment line
    while len(text) < n + 2 and lines.peek() and not _is_count(lines.peek()):
        text.append(lines.take())
    n_found = len(text) - 2
    if n_found < n and not lines.peek():
        raise InputError(
            f"{source.name}: truncated in frame {index} (line {start}), which promises {n} atoms "
            f"and has {max(n_found, 0)}; copy or make the file again"
        )
    extra = _skip_to_count(lines)
    if n_found + extra != n:
        return Frame(index, None, f"line {start} promises {n} atoms, {n_found + extra} follow")
    return _parse_xyz("".join(text), index)


def _skip_to_count(lines: _Lines) -> int:
    """Go on to the next atom count; returns how many lines that were not blank were skipped."""
    skipped = 0
    while lines.peek() and not _is_count(lines.peek()):
        skipped += bool(lines.take().strip())
    return skipped


def _parse_xyz(text: str, index: int) -> Frame:
    from ase.io.extxyz import read_xyz

    try:
        return Frame(index, next(iter(read_xyz(io.StringIO(text), index=slice(0, 1)))))
    except Exception as error:  # ASE's parser raises many types; the frame is named and skipped
        return Frame(index, None, f"not understood: {_brief(error)}")


# --------------------------------------------------------------------------- other formats


def _read_any(source: Source, packed: str) -> Iterator[Frame]:
    from ase.io import iread

    return _guarded(source, lambda: iread(str(source.path), index=":"))


def _read_database(source: Source, packed: str) -> Iterator[Frame]:
    """Rows of an ASE database, whose key-value pairs ``ase.io`` would drop.

    They are taken from where the row keeps them: ASE answers 0 for a pair named ``charge``.
    """
    from ase.db import connect

    def rows() -> Iterator[Any]:
        for row in connect(str(source.path)).select():
            atoms = row.toatoms(add_additional_information=True)
            stored = vars(row)
            pairs = row.key_value_pairs
            atoms.info["key_value_pairs"] = {k: stored.get(k, v) for k, v in pairs.items()}
            yield atoms

    return _guarded(source, rows)


def _guarded(source: Source, read: Callable[[], Iterable[Any]]) -> Iterator[Frame]:
    index = 0
    try:
        for atoms in read():
            yield Frame(index, atoms)
            index += 1
    except GeneratorExit:
        raise
    except Exception as error:  # ASE's parsers raise many types; all mean: this file is at fault
        raise InputError(
            f"{source.name}: cannot be read after frame {index}: {_brief(error)}; the file is "
            "truncated, corrupt, or in a format that ASE does not read"
        ) from error


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


_BY_SUFFIX = {".xyz": _read_xyz, ".extxyz": _read_xyz, ".db": _read_database}
