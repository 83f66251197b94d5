"""Frames of structure files, one at a time: constant memory, and one bad frame spoils no other.

(ext)xyz text is split here, because a frame whose atom count is wrong must not take its neighbours
with it, and because seeking in compressed files, as ASE does, is a hundred times slower. Every
other format goes through ``ase.io.iread``. Nothing a file says is believed before it is seen: not
the number of atoms, not the shape of an array.
"""

from __future__ import annotations

import glob
import hashlib
import io
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from orbq.errors import InputError
from orbq.preprocess import ase_formats, tmqm
from orbq.preprocess.text import DAMAGED, OPENERS, open_text, read_line

EMBEDDED = ("tmc", "tmc_unlabelled")
MAX_ATOMS = 1_000_000  # of one structure
MAX_FRAME = 1 << 28  # characters of one structure
MAX_COLUMNS = 1_000  # of one atom; Hessians and the like are no property of one atom
_COUNT_DIGITS = 18
_UNPACK = f"unpack it first, or pack it as {', '.join(OPENERS)}"
_ARRAYS = "their arrays have no fixed names: write the structures as extxyz, by ase.io.write"
# endings of what people keep structures in, and what to do with it
_UNREAD = dict.fromkeys((".zst", ".zip", ".7z", ".tar", ".tgz", ".lz4"), _UNPACK)
_UNREAD |= dict.fromkeys((".npz", ".npy", ".h5", ".hdf5", ".pt", ".pkl"), _ARRAYS)


class Source(NamedTuple):
    """One input file. name: as the user gave it, for messages. sha256: of its bytes, hex.
    tables: files beside it that hold labels of its structures (see ``tmqm``)."""

    name: str
    path: Path
    sha256: str
    tables: tuple[Source, ...] = ()


class Frame(NamedTuple):
    """One frame of a file: ``atoms`` (ase.Atoms), or None and the ``reason`` it cannot be read.
    comment: its comment line in (ext)xyz text."""

    number: int
    atoms: Any
    reason: str = ""
    comment: str = ""


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
    if path.is_file():
        return [(given, path)]
    if path.exists() and not path.is_dir():  # a device has no end, a pipe cannot be read twice
        raise InputError(f"{given} is not a file: write the structures to one")
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
    ending = [s for s in path.suffixes if s.lower() not in OPENERS][-1:]
    if ending and (remedy := _UNREAD.get(ending[0].lower())):
        raise InputError(f"{name}: files that end in {ending[0]} are not read: {remedy}")
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
    packed = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else ""
    frames = _BY_SUFFIX.get(suffixes[-1] if suffixes else "", _read_any)
    reached, readable, reason = 0, 0, ""
    try:
        for frame in frames(source, packed):
            reached, readable = frame.number + 1, readable + (frame.atoms is not None)
            reason = reason or frame.reason
            yield frame
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(
            f"{source.name}: truncated or corrupt after frame {reached}: {_brief(error)}; "
            + (
                "if it is text of another encoding, save it as UTF-8"
                if isinstance(error, UnicodeDecodeError)
                else "copy or make the file again"
            )
        ) from error
    if not readable:
        raise InputError(
            f"{source.name}: no frame could be read"
            + (f"; the first of {reached}: {reason}" if reached else "; the file holds none")
        )


# --------------------------------------------------------------------------- (ext)xyz


class _Lines:
    """Lines of a text stream with their number and one line of look-ahead."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.number = 0  # of the line that `peek` shows, counted from 1
        self._next = ""
        self.take()

    def peek(self) -> str:
        return self._next

    def take(self) -> str:
        line, self._next = self._next, read_line(self._stream, self._name)
        self.number += 1
        return line


def _read_xyz(source: Source, packed: str) -> Iterator[Frame]:
    with open_text(source.path) as stream:
        lines, index = _Lines(stream, source.name), 0
        while lines.peek():
            if not lines.peek().strip():
                lines.take()
                continue
            yield _xyz_frame(source, lines, index)
            index += 1


def _is_count(line: str) -> bool:
    text = line.strip()
    return text.isascii() and text.isdigit() and len(text) <= _COUNT_DIGITS


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
    size = len(text[1])
    while len(text) < n + 2 and lines.peek() and not _is_count(lines.peek()):
        text.append(lines.take())
        size += len(text[-1])
        if len(text) > MAX_ATOMS + 2 or size > MAX_FRAME:
            _skip_to_count(lines)
            limit = f"{MAX_ATOMS:,} atoms or {MAX_FRAME:,} characters"
            return Frame(index, None, f"line {start} promises {n} atoms: {limit} are the most")
    n_found = len(text) - 2
    if n_found < n and not lines.peek():
        raise InputError(
            f"{source.name}: truncated in frame {index} (line {start}), which promises {n} atoms "
            f"and has {max(n_found, 0)}; copy or make the file again"
        )
    extra = _skip_to_count(lines)
    if n_found + extra != n:
        return Frame(index, None, f"line {start} promises {n} atoms, {n_found + extra} follow")
    return _parse_xyz("".join(text), index)._replace(comment=text[1])


def _skip_to_count(lines: _Lines) -> int:
    """Go on to the next atom count; returns how many lines that were not blank were skipped."""
    skipped = 0
    while lines.peek() and not _is_count(lines.peek()):
        skipped += bool(lines.take().strip())
    return skipped


def _parse_xyz(text: str, index: int) -> Frame:
    from ase.io.extxyz import read_xyz

    try:
        frames = read_xyz(io.StringIO(text), slice(0, 1), properties_parser=_comment)
        return Frame(index, next(iter(frames)))
    except Exception as error:  # ASE's parser raises many types; the frame is named and skipped
        return Frame(index, None, f"not understood: {_brief(error)}")


def _comment(line: str) -> dict[str, Any]:
    """The values of a comment line. Raises ValueError for more columns than any file has: ASE
    makes a list of as many as are claimed."""
    from ase.io.extxyz import key_val_str_to_dict

    values: dict[str, Any] = key_val_str_to_dict(line)
    given = values.get("Properties", "species:S:1:pos:R:3")
    fields = given.split(":") if isinstance(given, str) else []
    if len(fields) % 3 or "pos" not in fields[::3]:
        raise ValueError("Properties must be NAME:TYPE:COLUMNS:... and name pos")
    claimed = fields[2::3]
    n_columns = sum(int(n) for n in claimed if _is_count(n))
    if n_columns > MAX_COLUMNS or any(len(n) > _COUNT_DIGITS for n in claimed):
        raise ValueError(f"Properties is {given[:40]!r} ...: {MAX_COLUMNS} columns are the most")
    return values


# --------------------------------------------------------------------------- other formats


def _read_any(source: Source, packed: str) -> Iterator[Frame]:
    index = 0
    try:
        for atoms in ase_formats.read(source.path, bool(packed)):
            yield Frame(index, atoms)
            index += 1
    except (GeneratorExit, InputError):
        raise
    except Exception as error:  # ASE's parsers raise many types; all mean: this file is at fault
        raise InputError(
            f"{source.name}: cannot be read after frame {index}: {_brief(error)}; the file is "
            "truncated, corrupt, or in a format that ASE does not read"
        ) from error


def _brief(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # no escapes to terminals


_BY_SUFFIX = {".xyz": _read_xyz, ".extxyz": _read_xyz}
