"""Checkpoints: what a kill within a save leaves, and how damage is told before Orbax sees it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orbq import checkpoint
from orbq.errors import OrbqError

TREE = {"a": np.arange(6, dtype=np.float32), "b": {"c": np.int32(3)}}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "step_000000001"
    checkpoint.save(path, TREE, {"step": 1})
    return path


@pytest.fixture
def saved(kept: Path, tmp_path: Path) -> Path:
    """A good checkpoint, the test's own."""
    return shutil.copytree(kept, tmp_path / kept.name)


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax must not be asked."""
    monkeypatch.setattr(checkpoint, "_checkpointer", lambda: pytest.fail("Orbax was let loose"))


def meta_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "orbq.json").read_text()))


def state(path: Path, meta: dict[str, Any]) -> None:
    """Write orbq.json with the checksum it should have: somebody else's, or a bug of ours."""
    meta.pop("own_sha256", None)
    meta["own_sha256"] = checkpoint._own_digest(meta)
    (path / "orbq.json").write_text(json.dumps(meta))


# --------------------------------------------------------------------------- saving


def test_a_save_stopped_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """The one before or the new one, under its name after ``recover``; and the next save works."""
    trees = [{"a": np.full(3, n, np.float32)} for n in range(3)]
    left = 0

    def counted(real):
        def operation(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return real(*args, **options)

        return operation

    class Operations:
        rmtree = staticmethod(counted(shutil.rmtree))

    monkeypatch.setattr(checkpoint, "shutil", Operations)
    monkeypatch.setattr(checkpoint, "write_atomically", counted(checkpoint.write_atomically))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    found = []
    for n in range(1, 10):
        path = tmp_path / str(n) / "best"
        checkpoint.save(path, trees[0], {"n": 0})
        left = n
        try:
            checkpoint.save(path, trees[1], {"n": 1})
        except KeyboardInterrupt:
            left = 0
        else:
            break
        tree, meta = checkpoint.restore(checkpoint.recover(path), trees[0])
        np.testing.assert_array_equal(tree["a"], trees[meta["n"]]["a"])
        found.append(meta["n"])
        checkpoint.save(path, trees[2], {"n": 2})
        assert checkpoint.restore(path, trees[0])[1] == {"n": 2}
    assert found == [0, 0, 0, 0, 1, 1]  # the fifth puts the new one in place of the old one


def test_a_save_keeps_what_can_be_gone_on_with_and_nothing_else(tmp_path):
    tree = {"a": np.zeros(2, np.float32)}
    for step in (1, 2, 3, 9):  # 9: refused, and the run gone on with from 3
        checkpoint.save_step(tmp_path, step, tree, {})
    (tmp_path / "step_000000004.new").mkdir()
    checkpoint.save_step(tmp_path, 4, tree, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000003", "step_000000004"]


def test_the_list_is_of_every_other_file(saved):
    found = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert set(meta_of(saved)["files"]) == found - {"orbq.json"}
    tree, meta = checkpoint.restore(saved, TREE)
    assert meta == {"step": 1}
    np.testing.assert_array_equal(tree["a"], TREE["a"])


# --------------------------------------------------------------------------- damage


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[-1] ^= 1
    path.write_bytes(data)


def replaced_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[Callable[[Path], None], str] = {
    Path.unlink: "is missing",
    replaced_by_a_pipe: "is missing",
    shortened: r"has \d+ bytes, \d+ were written",
    changed: "does not have the SHA-256 it had",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_whichever_file_is_damaged_is_named(saved, tmp_path, unopened, damage):
    sizes = {name: entry["bytes"] for name, entry in meta_of(saved)["files"].items()}
    assert len(sizes) > 5
    for number, (name, size) in enumerate(sizes.items()):
        copy = shutil.copytree(saved, tmp_path / f"{number}" / saved.name)
        if size or damage is not shortened:
            damage(copy / name)
            told = f"{re.escape(str(copy))} .* damaged: {re.escape(name)} {DAMAGES[damage]}; delete"
            with pytest.raises(OrbqError, match=told):
                checkpoint.restore(copy, TREE)


def test_the_best_parameters_have_another_remedy(saved, unopened):
    best = saved.rename(saved.with_name(checkpoint.BEST))
    shortened(best / "_METADATA")
    with pytest.raises(OrbqError, match=r"_METADATA has .*; copy the run again, or train again"):
        checkpoint.restore(best, TREE)


@pytest.mark.parametrize("key", ["step", "sha256", "files", "own_sha256"])
def test_orbq_json_is_named_when_it_was_changed(saved, unopened, key):
    meta = meta_of(saved)
    for changed in ({**meta, key: 2}, {k: v for k, v in meta.items() if k != key}):
        (saved / "orbq.json").write_text(json.dumps(changed))
        with pytest.raises(OrbqError, match=r"orbq\.json does not have the checksum"):
            checkpoint.restore(saved, TREE)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (None, "files must be a table"),
        (["d"], "files must be a table"),
        ({"a": 1}, "files.a must be a table"),
        ({"a": {"bytes": "1", "sha256": ""}}, "files.a.bytes must be a whole number"),
        ({"/dev/zero": {"bytes": 0, "sha256": ""}}, "/dev/zero lies outside of the checkpoint"),
        ({"d/../../a": {"bytes": 0, "sha256": ""}}, "a lies outside of the checkpoint"),
        ({"d": {"bytes": 0, "sha256": ""}}, "d is missing"),
        ({"n" * 999: {"bytes": 0, "sha256": ""}}, "too long"),
        ({"a\0": {"bytes": 0, "sha256": ""}}, "is missing"),
    ],
)
def test_a_list_that_makes_no_sense(saved, unopened, files, told):
    state(saved, {**meta_of(saved), "files": files})
    with pytest.raises(OrbqError, match=told):
        checkpoint.restore(saved, TREE)


# --------------------------------------------------------------------------- what is no damage


def test_without_a_list_it_is_read_as_before(saved):
    meta = meta_of(saved)
    del meta["files"], meta["own_sha256"]
    (saved / "orbq.json").write_text(json.dumps(meta))
    np.testing.assert_array_equal(checkpoint.restore(saved, TREE)[0]["a"], TREE["a"])


def test_files_of_others_are_left_alone(saved):
    (saved / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert checkpoint.restore(saved, TREE)[1] == {"step": 1}
    assert (saved / ".DS_Store").exists()
