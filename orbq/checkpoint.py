"""Checkpoints: plain trees of arrays, written by Orbax, never pickled.

A run keeps ``checkpoints/step_<n>`` (everything needed to go on, the newest two) and
``checkpoints/best`` (the averaged parameters of the best validation). Orbax writes a checkpoint
under a temporary name and renames it when it is complete, so that a directory of the final name is
a whole checkpoint.

``orbq.json``, written last, holds what the caller wants to know again, the size and SHA-256 of
every other file, and its own SHA-256. All of them are compared before Orbax opens anything: its
threads do not take damaged files well. A checkpoint of an orbq that wrote no such list yet is read
without that comparison: what Orbax makes of it must do, and the checksum of its arrays. Files that
are not on the list are left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from orbq.errors import OrbqError
from orbq.preprocess.form import read_json, wrong
from orbq.preprocess.store import sha256_of, write_atomically

KEEP = 2  # newest resumable checkpoints kept
BEST = "best"
VERSION = 1  # raised when older checkpoints can no longer be read as they are
_META = "orbq.json"
_VERSION = "checkpoint_version"
_DIGEST = "sha256"  # of the arrays
_FILES = "files"  # path in the checkpoint -> bytes and SHA-256
_OWN = "own_sha256"  # of orbq.json without this entry
_FORM = {str: {"bytes": int, "sha256": str}}


def save(directory: Path, tree: Any, meta: dict[str, Any]) -> None:
    """Write ``tree`` (arrays in NamedTuples, dicts, tuples) and ``meta`` (JSON) to ``directory``.

    An existing checkpoint of that name is replaced only when the new one is complete.
    """
    partial = directory.with_name(directory.name + ".new")
    shutil.rmtree(partial, ignore_errors=True)
    state = jax.tree.map(np.asarray, serialization.to_state_dict(tree))
    with _system_errors(partial), _checkpointer() as checkpointer:
        checkpointer.save(partial.absolute(), state)
        checkpointer.wait_until_finished()
    described = {**meta, _VERSION: VERSION, _DIGEST: digest(state), _FILES: _files_of(partial)}
    described[_OWN] = _own_digest(described)
    write_atomically(partial / _META, json.dumps(described))  # last: it says that all is there
    if directory.exists():
        old = directory.with_name(directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        partial.rename(directory)


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raise what Orbax tells of the operating system, a full disk say, as an OSError; its threads
    have logged pages of it before, which are not shown."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except ValueError as error:
        if not (found := re.search(r"os_error_code='(\d+)'", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    finally:
        logger.setLevel(level)


def restore(directory: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """The tree of a checkpoint in the structure, shapes and types of ``template``, and its meta.

    Raises OrbqError naming the checkpoint when it is damaged (and the file, if its list of files
    tells), of another architecture, or of a format that this version does not read.
    """
    wanted = serialization.to_state_dict(template)
    meta = _compared(directory)
    try:
        with _checkpointer() as checkpointer:
            stored = checkpointer.metadata(directory.absolute()).item_metadata.tree
            as_stored = jax.tree.map(_place, wanted, stored)
            found = checkpointer.restore(directory.absolute(), as_stored)
        if meta.pop(_DIGEST, None) not in (None, digest(found)):
            raise ValueError("its contents do not have the checksum they were written with")
    except Exception as error:  # Orbax raises many kinds; all mean the same to the caller
        raise OrbqError(
            f"checkpoint {directory} cannot be restored, it is damaged or of another architecture: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            + _remedy(directory)
        ) from error
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(wanted)[0], jax.tree.leaves(found), strict=True
    ):
        if a.shape != b.shape:
            name = jax.tree_util.keystr(path)
            raise OrbqError(
                f"checkpoint {directory} is of another architecture: {name} has shape {b.shape}, "
                f"the configuration asks for {a.shape}; use its own configuration"
            )
    # arrays that are tied to a device make another program of every function they enter: through
    # the host they are as fresh ones, and a resumed run finds its compiled programs again
    found = jax.tree.map(lambda a, b: jnp.asarray(np.asarray(b), a.dtype), wanted, found)
    return serialization.from_state_dict(template, found), meta


def meta_of(directory: Path) -> dict[str, Any]:
    """What was saved with a checkpoint; raises OrbqError naming the first file that is damaged."""
    meta = _compared(directory)
    meta.pop(_DIGEST, None)
    return meta


def is_whole(directory: Path) -> bool:
    """Whether a checkpoint is there with every file as it was written."""
    try:
        _compared(recover(directory))
    except OrbqError:
        return False
    return True


def _compared(directory: Path) -> dict[str, Any]:
    """What ``orbq.json`` of a checkpoint holds, after its files were found to be as written.

    Raises OrbqError naming the first that is not.
    """
    try:
        meta = dict(read_json(directory / _META, dict))
        if (version := meta.pop(_VERSION, 1)) != VERSION:
            raise ValueError(f"it is of checkpoint format {version}, this orbq reads {VERSION}")
        if not {_OWN, _FILES} & meta.keys():  # of an orbq that wrote neither
            return meta
        if meta.pop(_OWN, None) != _own_digest({**meta, _VERSION: version}):
            raise ValueError(f"{_META} does not have the checksum it was written with")
        files: Any = meta.pop(_FILES, None)
        if reason := wrong(files, _FORM, _FILES):
            raise ValueError(f"in {_META}, {reason}")
        for name, written in files.items():
            if reason := _difference(directory, name, written):
                raise ValueError(f"{name} {reason}")
    except (OSError, ValueError, RecursionError) as error:
        raise OrbqError(
            f"checkpoint {directory} cannot be restored, it is damaged: {error}; "
            + _remedy(directory)
        ) from error
    return meta


def _remedy(directory: Path) -> str:
    if directory.name == BEST:
        return "copy the run again, or train again with --overwrite"
    return "delete it and resume from an earlier one, or start again with --overwrite"


def _difference(directory: Path, name: str, written: dict[str, Any]) -> str | None:
    """How a file of a checkpoint differs from what was written, None if it does not."""
    inside, path = PurePosixPath(name), directory / name
    if inside.is_absolute() or ".." in inside.parts:
        return "lies outside of the checkpoint"
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != written["bytes"]:
        return f"has {size} bytes, {written['bytes']} were written"
    return None if sha256_of(path) == written["sha256"] else "does not have the SHA-256 it had"


def relist(directory: Path) -> None:
    """List the files of a checkpoint anew, after a change to one that holds no arrays."""
    described = json.loads((directory / _META).read_text(encoding="utf-8"))
    described.pop(_OWN, None)
    (directory / _META).unlink()
    described[_FILES] = _files_of(directory)
    described[_OWN] = _own_digest(described)
    write_atomically(directory / _META, json.dumps(described))


def _files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint."""
    return {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _own_digest(described: dict[str, Any]) -> str:
    """SHA-256 of the contents of ``orbq.json``, hex; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _place(leaf: Any, stored: Any) -> np.ndarray:
    """What Orbax restores a leaf into: its shape, in the type it was written with."""
    return np.broadcast_to(np.zeros((), stored.dtype), leaf.shape)


def _checkpointer() -> ocp.StandardCheckpointer:
    """One that works alone, though there may be other processes: only one of them writes."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"orbq{me}"
    )
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def digest(tree: Any) -> str:
    """SHA-256 over the arrays of a tree, hex."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def recover(directory: Path) -> Path:
    """``directory``, put back in place if ``save`` was killed between its two renames."""
    for suffix in (".new", ".old"):
        other = directory.with_name(directory.name + suffix)
        if not directory.exists() and (other / _META).is_file():
            other.rename(directory)
    return directory


def resumable(checkpoints: Path) -> list[Path]:
    """Complete resumable checkpoints of a run, newest first."""
    found = []
    for path in checkpoints.glob("step_*"):
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and (path / _META).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def save_step(checkpoints: Path, step: int, tree: Any, meta: dict[str, Any]) -> None:
    """Write a resumable checkpoint; keep the newest ``KEEP`` up to it, and drop all others: older
    ones, later ones (refused when the run was gone on with), and what a killed save has left."""
    path = checkpoints / f"step_{step:09d}"
    save(path, tree, meta)
    found = resumable(checkpoints)
    kept = found[found.index(path) :][:KEEP]
    for other in checkpoints.glob("step_*"):
        if other not in kept:
            shutil.rmtree(other)
