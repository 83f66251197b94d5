"""Files that ASE's own readers read, as if they came from a stranger.

Nothing but the named file is opened, nothing beside it is written, no program is started and no
server asked. ASE 3.29 by itself takes a file named ``postgres.traj`` for a server and ``a@2.traj``
for frame 2 of another file, makes a database out of any SQLite file that is none, starts
``castep`` for a ``.cell`` file, and fills an array of any claimed shape from a single number.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from orbq.preprocess.text import OPENERS

MAX_UNPACKED = 1 << 31  # bytes; ASE's readers may hold a whole file
MAX_CELL = 1 << 28  # bytes of one value in a database
# readers that start a program, ask a server, or read what is not in the file
_REFUSED = ("castep-cell", "postgresql", "mysql", "eon", "bundletrajectory", "aselmdb")
_DATABASE, _JSON, _SQLITE = "db", "json", b"SQLite format 3\0"


def read(path: Path, packed: bool) -> Iterator[Any]:
    """The ``ase.Atoms`` of a file in any other format than xyz, in order.

    packed: whether its name says that it is compressed. Raises what ASE's reader raises, ValueError
    for a format that is not read.
    """
    from ase.io import iread
    from ase.io.formats import filetype

    if not packed and _begins(path, _SQLITE):
        yield from _database(path)
        return
    if packed:
        _check_unpacked(path)
    _bound_arrays()
    place = str(path.absolute())
    kind = filetype(place)
    if kind == _JSON:
        from ase.db.jsondb import JSONDatabase

        yield from _rows(JSONDatabase(place, use_lock_file=False))
        return
    if kind == _DATABASE:
        raise ValueError("not an SQLite database" + packed * ": unpack it before")
    if kind in _REFUSED:
        raise ValueError(f"files of ASE's format {kind!r} are not read: convert it to extxyz")
    yield from iread(place, index=":", format=kind, do_not_split_by_at_sign=True)


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _check_unpacked(path: Path) -> None:
    """Raise ValueError when the file unpacks to more than ASE's readers should hold."""
    size = 0
    with OPENERS[path.suffix.lower()](path, "rb") as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            if size > MAX_UNPACKED:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED:,} bytes: unpack it first")


# --------------------------------------------------------------------------- databases


def _database(path: Path) -> Iterator[Any]:
    """Rows of an ASE database in SQLite's format."""
    from ase.db.sqlite import SQLite3Database

    class ReadOnly(SQLite3Database):
        """ASE's database on a connection that cannot write, not even a lock or a journal."""

        def _connect(self) -> sqlite3.Connection:
            return _connect(path)

    with closing(_connect(path)) as connection:
        _check_tables(connection)
    _bound_arrays()
    yield from _rows(ReadOnly(str(path)))


def _rows(database: Any) -> Iterator[Any]:
    """Rows with their key-value pairs, which ``ase.io`` would drop.

    They are taken from where the row keeps them: ASE answers 0 for a pair named ``charge``.
    """
    for row in database.select():
        atoms = row.toatoms(add_additional_information=True)
        stored = vars(row)
        pairs = row.key_value_pairs
        atoms.info["key_value_pairs"] = {k: stored.get(k, v) for k, v in pairs.items()}
        yield atoms


def _connect(path: Path) -> sqlite3.Connection:
    # immutable: no journal is made beside the file; but one that is there holds newer rows
    journal = any(path.with_name(path.name + end).exists() for end in ("-wal", "-journal"))
    options = "mode=ro" if journal else "mode=ro&immutable=1"
    connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{options}", uri=True)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL)
    return connection


def _check_tables(connection: sqlite3.Connection) -> None:
    """Raise ValueError unless the tables are ASE's, and tables: a view may run for ever."""
    query = "SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view')"
    found = {name: (kind, str(sql).upper()) for name, kind, sql in connection.execute(query)}
    computed = [k == "view" or "VIRTUAL" in sql or " AS (" in sql for k, sql in found.values()]
    if "systems" not in found or any(computed):
        raise ValueError("an SQLite file, but not a database that ASE made")


# --------------------------------------------------------------------------- arrays in JSON


def _bound_arrays() -> None:
    """Let ASE's JSON (in .json, .traj and .db) make arrays only of as many numbers as it holds."""
    from ase.io import jsonio

    if getattr(jsonio.create_ndarray, "bounded", False):
        return
    create = jsonio.create_ndarray

    def bounded(shape: Sequence[int], dtype: str, data: Any) -> np.ndarray:
        n_numbers = math.prod(shape) * (2 if np.dtype(dtype).kind == "c" else 1)
        if n_numbers != np.size(data):
            raise ValueError(f"an array of shape {shape} with {np.size(data)} numbers")
        array: np.ndarray = create(shape, dtype, data)
        return array

    bounded.bounded = True  # type: ignore[attr-defined]
    jsonio.create_ndarray = bounded
