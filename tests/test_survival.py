"""A training run survives: resumed equals uninterrupted, bit for bit, whatever stopped it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from training_runs import (
    Listener,
    assert_same_run,
    config_of,
    copy_of,
    final_state,
    label,
    structures,
)

import orbq
from orbq import checkpoint
from orbq.errors import InputError, OrbqError, PreemptedError
from orbq.fit import fit
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import Dataset

pytestmark = pytest.mark.usefixtures("own_settings_of_jax")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(tmp_path_factory.mktemp("fit"))


@pytest.fixture(scope="module")
def whole(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Listener]:
    """A run that nothing interrupted: its directory, its summary, what was told."""
    directory, listener = tmp_path_factory.mktemp("runs") / "whole", Listener()
    return directory, fit(config_of(data, directory), reporter=listener), listener


# --------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop_at", [1, 4])
def test_resumed_equals_uninterrupted(data, whole, tmp_path, stop_at):
    """Stopped in the first stage and in the second."""
    config = config_of(data, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        fit(config, reporter=Listener(stop_at))
    assert checkpoint.resumable(tmp_path / "run" / "checkpoints")
    summary = fit(config)
    assert max(summary["compilations"].values()) <= 1
    assert_same_run(tmp_path / "run", whole[0])


def test_stopped_before_the_first_checkpoint(data, whole, tmp_path):
    """Nothing to resume from but the description: the records of the lost steps go too."""
    run = copy_of(whole[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics[: len(metrics) // 4])  # ends within a line
    fit(config_of(data, run))
    assert_same_run(tmp_path / "run", whole[0])


def test_stopped_while_its_description_was_written(data, whole, tmp_path):
    """A directory that holds nothing yet but half a description is no other run's."""
    run = copy_of(whole[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    (run / "run.json").rename(run / "run.json.tmp")
    fit(config_of(data, run))
    assert_same_run(tmp_path / "run", whole[0])


def test_resuming_a_finished_run_changes_nothing(data, whole, tmp_path):
    summary = fit(config_of(data, whole[0]))
    assert summary == json.loads(json.dumps(whole[1]))
    run = copy_of(whole[0], tmp_path / "run")  # trained, but stopped before it could say so
    fit(config_of(data, run))
    assert_same_run(run, whole[0])


def test_killed_at_ten_moments(data, tmp_path):
    """SIGKILL again and again in one run: five times by the clock, five times within the writing of
    a checkpoint; then the command line to the end: the same parameters and records, bit for bit."""
    training = {"n_steps": 60, "checkpoint_every": 1}
    whole, run = (config_of(data, tmp_path / name, training=training) for name in ("whole", "run"))
    fit(whole)
    (tmp_path / "run.json").write_text(run.model_dump_json())
    (tmp_path / "run.toml").write_text(run.model_dump_toml())
    lives = subprocess.run(
        [sys.executable, Path(__file__).with_name("mortal_run.py"), tmp_path / "run.json", "0"],
        stdout=subprocess.PIPE,
        check=True,
    )
    told = [json.loads(line) for line in lives.stdout.splitlines()]
    assert [life["killed"] for life in told] == [True] * 10
    assert sum(bool(life["half"]) for life in told) >= 3  # killed within a write indeed
    assert len({str(life["whole"]) for life in told}) >= 4  # and at several places of the run
    command = [sys.executable, "-m", "orbq.cli", "train", tmp_path / "run.toml", "--resume"]
    subprocess.run(command, check=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def truncated(newest: Path) -> None:
    data = largest(newest).read_bytes()
    largest(newest).write_bytes(data[: len(data) // 2])


def flipped(newest: Path) -> None:
    """One bit of one file."""
    data = bytearray(largest(newest).read_bytes())
    data[len(data) // 2] ^= 1
    largest(newest).write_bytes(data)


def largest(newest: Path) -> Path:
    return max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def of_before_the_list(newest: Path) -> dict[str, Any]:
    """orbq.json as it was written before it listed the files."""
    meta = json.loads((newest / "orbq.json").read_text())
    del meta["files"], meta["own_sha256"]
    (newest / "orbq.json").write_text(json.dumps(meta))
    return dict(meta)


def truncated_without_a_list(newest: Path) -> None:
    of_before_the_list(newest)
    truncated(newest)


def changed_without_a_list(newest: Path) -> None:
    """One bit of the contents: the checksum of the arrays alone can tell."""
    meta = of_before_the_list(newest)
    template = checkpoint.ocp.StandardCheckpointer().restore(newest.absolute())
    changed = jax.tree.map(np.array, template)
    leaf = jax.tree.leaves(changed)[0]
    leaf.view(np.uint8).flat[0] ^= 1
    shutil.rmtree(newest)
    with checkpoint.ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(newest.absolute(), changed)
    (newest / "orbq.json").write_text(json.dumps(meta))


def emptied(newest: Path) -> None:
    for path in newest.rglob("*"):
        if path.is_file() and path.name != "orbq.json":
            path.unlink()


def of_another_architecture(newest: Path) -> None:
    """A checkpoint whose arrays have other shapes, whole in itself."""
    template = checkpoint.ocp.StandardCheckpointer().restore(newest.absolute())
    wider = jax.tree.map(lambda a: np.concatenate([a, a], -1) if np.ndim(a) else a, template)
    checkpoint.save(newest, wider, {})


def of_a_later_version(newest: Path) -> None:
    meta = json.loads((newest / "orbq.json").read_text())
    (newest / "orbq.json").write_text(json.dumps({**meta, "checkpoint_version": 2}))


DAMAGES = {
    truncated: r"cannot be restored, it is damaged: \S+ has \d+ bytes, \d+ were written",
    flipped: r"cannot be restored, it is damaged: \S+ does not have the SHA-256 it had",
    emptied: r"cannot be restored, it is damaged: \S+ is missing",
    truncated_without_a_list: "cannot be restored, it is damaged or",
    changed_without_a_list: "do not have the checksum",
    of_another_architecture: "is of another architecture: .* has shape",
    of_a_later_version: "checkpoint format 2, this orbq reads 1",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_serves(data, whole, tmp_path, damage):
    run, listener = copy_of(whole[0], tmp_path / "run"), Listener()
    newest, earlier = checkpoint.resumable(run / "checkpoints")
    damage(newest)
    fit(config_of(data, run), reporter=listener)
    assert len(listener.warnings) == 1 and str(newest) in listener.warnings[0]
    assert re.search(DAMAGES[damage], listener.warnings[0])
    assert f"Going on with {earlier}." in listener.warnings[0]
    assert_same_run(run, whole[0])
    for path in (newest, earlier):
        damage(path)
    (run / "summary.json").unlink()
    with pytest.raises(OrbqError, match=DAMAGES[damage]):
        fit(config_of(data, run))


OVERFLOW = 1e39  # eV: a float64 that float32 cannot hold


@pytest.mark.parametrize("bad", [1, 15])
@jax.debug_nans(False)
def test_a_loss_that_is_not_finite_is_left_out_and_recorded(data, tmp_path, bad):
    """One bad structure costs its batches; if every batch has one the run ends, with advice."""
    made, kept = structures("train", 20, 0), []
    made += structures("validation", 4, 1) + structures("test", 4, 2)
    preprocess(made, tmp_path / "set", resources=Resources(workers=1))
    energies = np.load(tmp_path / "set" / "energy.npy")  # a file of it would be refused
    with_energy = [row for row, atoms in enumerate(made) if "energy" in atoms.info]
    for k, row in enumerate(with_energy[:bad]):
        energies[row] = (-1) ** k * (1 + k) * OVERFLOW  # no fit to elements explains both signs
    np.save(tmp_path / "set" / "energy.npy", energies)
    config = config_of(
        data,
        tmp_path / "run",
        data={"dataset": str(tmp_path / "set"), "unlabelled": []},
        training={"pretrain_steps": 0, "unlabelled_share": 0.0, "n_steps": 20},
        loss={"kind": "mse"},
    )
    if bad == 15:
        with pytest.raises(OrbqError, match=r"5th time in a row: lower .*nonfinite\.jsonl") as told:
            fit(config)
        assert told.value.exit_status == 1
        kept = "keeps the last good state" in str(told.value)
        assert kept == any((tmp_path / "run" / "checkpoints").glob("step_*"))
        return
    fit(config)
    lines = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
    stored = Dataset.open(tmp_path / "set")
    wrong = int(np.argmax(np.asarray(stored["energy"])))
    kept = [json.loads(line) for line in lines]
    assert 2 <= len(kept) <= 8  # once an epoch of about four batches
    for record in kept:
        assert wrong in {structure["index"] for structure in record["structures"]}
        assert not np.isfinite(float(record["loss"]))
    state = final_state(tmp_path / "run")["last"]
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))
    assert int(state["step"]) == 20 - len(kept)


def test_sigterm_keeps_everything(data, whole, tmp_path):
    """The checkpoint is of the very step; the same command ends with the same parameters."""

    class Sender(Listener):
        def stepped(self, stage: str, step: int, *_: Any) -> None:
            if stage == "train" and step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    config = config_of(data, tmp_path / "run")
    with pytest.raises(PreemptedError, match=r"SIGTERM at step 4 .*same command") as told:
        fit(config, reporter=Sender())
    assert told.value.exit_status == 143
    assert checkpoint.resumable(tmp_path / "run" / "checkpoints")[0].name.endswith("10")
    fit(config)
    assert_same_run(tmp_path / "run", whole[0])


# --------------------------------------------------------------------------- what is refused


def test_a_directory_in_use_is_refused(data, whole, tmp_path):
    other = config_of(data, whole[0], training={"learning_rate": 1e-3})
    with pytest.raises(
        InputError, match=r"another configuration \(training\.learning_rate was 0\.002, is 0\.001\)"
    ):
        fit(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("42")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match="mine"):
            fit(config_of(data, tmp_path / "mine"), **options)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "42"


def test_overwrite_starts_anew(data, whole, tmp_path):
    run = copy_of(whole[0], tmp_path / "run")
    (run / "metrics.jsonl").write_text("of an older run\n")
    fit(config_of(data, run), overwrite=True)
    assert_same_run(run, whole[0])


def test_overwrite_keeps_the_old_run_until_the_new_one_stands(data, whole, tmp_path):
    run = copy_of(whole[0], tmp_path / "run")
    wrong = config_of(data, run, data={"dataset": str(data / "mistyped")})
    with pytest.raises(InputError, match="mistyped"):
        fit(wrong, overwrite=True)
    assert_same_run(run, whole[0])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_that_was_moved_names_its_place(data, whole, tmp_path):
    run = copy_of(whole[0], tmp_path / "moved")
    assert fit(config_of(data, run))["directory"] == str(run)


def test_other_data_under_the_same_name_is_refused(data, whole, tmp_path):
    """The data set was made again from other structures: the run cannot go on with it."""
    run, sets = copy_of(whole[0], tmp_path / "run"), tmp_path / "data"
    shutil.copytree(data / "unlabelled", sets / "unlabelled")
    shutil.copytree(data / "labelled", sets / "labelled")
    config = config_of(sets, run)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps({**info, "config": json.loads(config.model_dump_json())})
    )
    fit(config)  # a copy of the data set is the same data set
    shutil.rmtree(sets / "labelled")
    changed = structures("train", 20, 7) + structures("validation", 4, 1)
    changed += structures("test", 4, 2)
    preprocess(changed, sets / "labelled", resources=Resources(workers=1))
    with pytest.raises(InputError, match=r"labelled has changed since.*--overwrite"):
        fit(config)


# --------------------------------------------------------------------------- runs of other versions


def edited(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    info = json.loads((run / "run.json").read_text())
    change(info)
    (run / "run.json").write_text(json.dumps(info))


def test_a_run_of_an_older_orbq_is_gone_on_with(data, whole, tmp_path):
    """Keys that it did not have yet take their defaults; its checkpoints had neither a version nor
    a list of their files yet."""
    run = copy_of(whole[0], tmp_path / "run")

    def older(info: dict[str, Any]) -> None:
        del info["config"]["training"]["activations"], info["architecture"]["activations"]

    edited(run, older)
    newest = checkpoint.resumable(run / "checkpoints")[0]
    shutil.rmtree(newest)
    for path in run.glob("checkpoints/*/orbq.json"):
        meta = of_before_the_list(path.parent)
        del meta["checkpoint_version"]
        path.write_text(json.dumps(meta))
    assert orbq.load(run).potential.architecture.activations == "full"
    fit(config_of(data, run))
    assert_same_run(run, whole[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_version": 2}, r"run format 2 \(orbq 9\.9\), this orbq reads 1: .*train again"),
        ({"config": {"training": {"optimiser": "muon"}}}, r"run\.json.*training\.optimiser"),
    ],
    ids=["format", "key"],
)
def test_a_run_of_a_newer_orbq_is_refused_by_name(data, whole, tmp_path, change, message):
    run = copy_of(whole[0], tmp_path / "run")
    edited(run, lambda info: info.update(change, orbq_version="9.9"))
    for use in (lambda: fit(config_of(data, run)), lambda: orbq.load(run)):
        with pytest.raises(InputError, match=message):
            use()
