"""Files of a run that are lost while it is stopped, or cannot be written: made again, or told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from training_runs import Listener, assert_same_run, config_of, copy_of, label

import orbq
from orbq import checkpoint
from orbq.errors import InputError, OrbqError
from orbq.fit import fit

pytestmark = pytest.mark.usefixtures("own_settings_of_jax")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(tmp_path_factory.mktemp("lost"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    fit(config_of(data, directory))
    return directory


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The run, stopped some steps before its end."""
    run = copy_of(whole, tmp_path / "run")
    shutil.rmtree(checkpoint.resumable(run / "checkpoints")[0])
    return run


@pytest.mark.parametrize("size", [None, 300])
def test_statistics_are_written_again(data, whole, stopped, size):
    path, listener = stopped / "statistics.npz", Listener()
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    fit(config_of(data, stopped), reporter=listener)
    assert any("statistics.npz was lost or damaged" in text for text in listener.warnings)
    assert_same_run(stopped, whole)
    with np.load(path) as now, np.load(whole / "statistics.npz") as before:
        assert {*now} == {*before}
        for name in before:
            np.testing.assert_array_equal(now[name], before[name])
    orbq.load(stopped)


def test_a_run_without_any_checkpoint_begins_anew_and_says_so(data, whole, stopped):
    shutil.rmtree(stopped / "checkpoints")
    listener = Listener()
    fit(config_of(data, stopped), reporter=listener)
    assert any("has no checkpoint left: it begins anew" in text for text in listener.warnings)
    assert_same_run(stopped, whole)


def test_statistics_of_other_labels_are_refused(data, stopped):
    path = stopped / "statistics.npz"
    with np.load(path) as arrays:
        changed = {name: values + 0.01 for name, values in arrays.items()}
    np.savez(path, **changed)
    with pytest.raises(InputError, match=r"not of the labels 'atomic' that are there now: bring"):
        fit(config_of(data, stopped))


def test_labels_of_another_method_are_refused(whole, tmp_path):
    """The structures are the same, and so is every array that is compared byte by byte."""
    run = copy_of(whole, tmp_path / "run")
    config = config_of(label(tmp_path / "data", "GFN2-xTB"), run)
    info = json.loads((run / "run.json").read_text())
    info["config"] = json.loads(config.model_dump_json())
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"labelled with GFN2-xTB, .*run was begun with GFN1-xTB"):
        fit(config)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_the_best_parameters_are_replaced(data, whole, stopped, damaged, finished):
    """Also where no validation would come any more."""
    run = shutil.copytree(whole, stopped.with_name("finished")) if finished else stopped
    best, listener = run / "checkpoints" / "best", Listener()
    if damaged:
        os.truncate(next(p for p in best.rglob("*") if p.is_file() and p.name != "orbq.json"), 1)
    else:
        shutil.rmtree(best)
    fit(config_of(data, run), reporter=listener)
    assert any("best was lost or damaged: the averaged" in text for text in listener.warnings)
    orbq.load(run)
    last = checkpoint.resumable(run / "checkpoints")[0]
    assert last.name == checkpoint.resumable(whole / "checkpoints")[0].name


def test_a_full_disk_is_told_and_the_run_goes_on(data, whole, stopped, monkeypatch):
    def full(self, *arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing [os_error_code='28']")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
        with pytest.raises(OrbqError, match=r"run: no room left on the disk \(No space left"):
            fit(config_of(data, stopped))
    fit(config_of(data, stopped))
    assert_same_run(stopped, whole)
