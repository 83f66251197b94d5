"""The training loop: resumed equals uninterrupted, bit for bit, whatever stopped it; refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.build
import jax
import numpy as np
import pytest

from orbq import checkpoint
from orbq.config import Config, parse_config
from orbq.data import TrainingData, epoch_plan, prepare, split_of
from orbq.errors import InputError, OrbqError, PreemptedError
from orbq.fit import Silent, fit
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import Dataset
from orbq.splits import fraction_of
from orbq.stages import make_stages

MODEL = {
    "n_channels": 4,
    "n_layers": 1,
    "lmax": 1,
    "n_radial": 4,
    "radial_hidden": [8],
    "readout_hidden": 4,
    "cutoff": 3.0,
}
NAMES = ("H2O", "NH3", "CH4", "HCN", "CO2", "CH3OH", "H2CO", "N2O", "C2H2", "HCOOH")
N_STEPS, PRETRAIN = 14, 6


@pytest.fixture(autouse=True)
def own_settings_of_jax() -> Iterator[None]:
    """``fit`` sets the precision and the cache of its process: put them back."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


# --------------------------------------------------------------------------- data and configuration


def group_in(part: str, number: int) -> str:
    """The name of a group that the split with shares 0.2 and 0.2 puts into ``part``."""
    low, high = {"test": (0, 0.2), "validation": (0.2, 0.4), "train": (0.4, 1)}[part]
    names = (f"{part} {number} {k}" for k in range(1000))
    return next(n for n in names if low <= fraction_of(n.encode(), "orbq split") < high)


def structures(part: str, n: int, seed: int, labelled: bool = True) -> list[ase.Atoms]:
    """Rattled molecules with made-up energies and forces; every fourth has no energy, every third
    no forces, if ``labelled``."""
    rng, out = np.random.default_rng(seed), []
    for k in range(n):
        atoms = ase.build.molecule(NAMES[k % len(NAMES)])
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
        atoms.info["group"] = group_in(part, k)
        if labelled and (k % 4 or part != "train"):
            atoms.info["energy"] = -10.0 * len(atoms) + rng.normal()
        if labelled and k % 3:
            atoms.arrays["forces"] = rng.normal(size=(len(atoms), 3))
        out.append(atoms)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the data sets "labelled" and "unlabelled" (geometries of other molecules)."""
    place = tmp_path_factory.mktemp("fit")
    resources = Resources(workers=1)
    labelled = structures("train", 20, 0) + structures("validation", 4, 1)
    labelled += structures("test", 4, 2)
    preprocess(labelled, place / "labelled", resources=resources)
    preprocess(structures("train", 10, 3, False), place / "unlabelled", resources=resources)
    return place


def config_of(sets: Path, directory: Path, **changes: dict[str, Any]) -> Config:
    """Both stages, charge-only structures in both, and checkpoints out of step with validation."""
    document: dict[str, dict[str, Any]] = {
        "data": {
            "dataset": str(sets / "labelled"),
            "unlabelled": [str(sets / "unlabelled")],
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
        },
        "model": MODEL,
        "loss": {"weights": {"energy": 1.0, "forces": 1.0, "atomic": 2.0}},
        "training": {
            "n_steps": N_STEPS,
            "pretrain_steps": PRETRAIN,
            "unlabelled_share": 0.3,
            "warmup_steps": 2,
            "validate_every": 4,
            "checkpoint_every": 3,
            "batch_size": 5,
        },
        "run": {"directory": str(directory)},
    }
    for section, values in changes.items():
        document[section] = {**document[section], **values}
    return parse_config(document)


def final_state(directory: Path) -> dict[str, Any]:
    """Every array of the newest checkpoint and of the best parameters."""
    checkpoints = directory / "checkpoints"
    return {
        name: checkpoint.ocp.StandardCheckpointer().restore(path.absolute())
        for name, path in (
            ("last", checkpoint.resumable(checkpoints)[0]),
            ("best", checkpoints / "best"),
        )
    }


def records(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_run(directory: Path, whole: Path) -> None:
    """Bit for bit: parameters, averages, moments, step, and what was recorded on the way."""
    a, b = final_state(directory), final_state(whole)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert records(directory) == records(whole)


class Listener(Silent):
    """Remembers what it is told, and may stop the run there."""

    def __init__(self, stop_at: int = -1) -> None:
        self.facts: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.stop_at = stop_at

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def started(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def validated(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if len(self.records) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Listener]:
    """A run that nothing interrupted: its directory, its summary, what was told."""
    directory, listener = tmp_path_factory.mktemp("runs") / "whole", Listener()
    return directory, fit(config_of(data, directory), reporter=listener), listener


def copy_of(whole: Path, directory: Path) -> Path:
    """The run as if it had been made in ``directory`` and stopped at the very end; what a test then
    takes away is what a stopped run had not written yet."""
    shutil.copytree(whole, directory)
    (directory / "summary.json").unlink()
    info = json.loads((directory / "run.json").read_text())
    info["config"]["run"]["directory"] = str(directory)
    (directory / "run.json").write_text(json.dumps(info))
    return directory


# --------------------------------------------------------------------------- a run


def test_each_program_is_compiled_once(whole):
    assert whole[1]["compilations"] == {"pretrain": 1, "train": 1, "evaluate": 1}


def test_a_run_leaves_what_is_needed(whole):
    directory, summary, listener = whole
    found = [(r["stage"], r["step"]) for r in records(directory)]
    assert found[:2] == [("pretrain", 4), ("pretrain", 6)]
    assert found[2:] == [("train", 4), ("train", 8), ("train", 12), ("train", 14)]
    assert [r["step"] for r in listener.records] == [r["step"] for r in records(directory)]
    for record in records(directory):
        assert all(np.isfinite(v) for k, v in record.items() if "/" in k)
    main = records(directory)[-1]
    assert {"validation/energy_mae_meV", "validation/forces_rmse_meV_per_A"} < set(main)
    assert {"validation/atomic_mae_e", "train/energy", "train/gradient_norm"} < set(main)
    assert "train/energy" not in records(directory)[0]  # pre-training sees charges alone
    names = [p.name for p in checkpoint.resumable(directory / "checkpoints")]
    assert names == ["step_000000020", "step_000000018"]
    assert summary["best_validation"] == min(
        r["validation/energy_mae_meV"] for r in records(directory) if r["stage"] == "train"
    )
    assert listener.facts["labels"]["onsite"] == 30
    assert listener.facts["labels"]["energy"] == 15
    assert listener.facts["structures"] == {
        "train": 20, "validation": 4, "test": 4, "unlabelled": 10, "teaching": 30,
    }  # fmt: skip


def test_training_lowers_the_loss(data, tmp_path):
    """Also of charges and with masked energies among the structures of every batch."""
    longer = {"n_steps": 60, "pretrain_steps": 0, "validate_every": 20, "checkpoint_every": 60}
    fit(config_of(data, tmp_path / "run", training={**longer, "learning_rate": 1e-2}))
    first, *_, last = records(tmp_path / "run")
    for term in ("loss", "energy", "atomic"):
        assert last[f"train/{term}"] < 0.9 * first[f"train/{term}"], term


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


RUN_IN_A_PROCESS = """
import sys
from orbq.config import config_from_json
from orbq.fit import fit
fit(config_from_json(sys.stdin.read()))
"""


KILLED_IN_A_WRITE = """
import os, signal, sys
from orbax.checkpoint import StandardCheckpointer
from orbq import checkpoint
left, real = int(sys.argv[1]), checkpoint.save
def save(directory, tree, meta):
    global left
    left -= 1
    if left == 0:  # half of the files are there, under the temporary name
        partial = directory.with_name(directory.name + ".new")
        real(partial, tree, meta)
        for path in sorted(p for p in partial.rglob("*") if p.is_file())[::2]:
            path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    real(directory, tree, meta)
checkpoint.save = save
"""


def test_killed_at_ten_moments(data, whole, tmp_path):
    """SIGKILL again and again in one run: five times by the clock, five times within the writing of
    a checkpoint; then to the end: the same parameters and records, bit for bit."""
    config, rng, ended = config_of(data, tmp_path / "run"), random.Random(0), 0
    for kill in range(10):
        writing = kill % 2 == 1
        code = (KILLED_IN_A_WRITE if writing else "") + RUN_IN_A_PROCESS
        with subprocess.Popen(
            [sys.executable, "-c", code, str(rng.choice([1, 2, 3]))], stdin=subprocess.PIPE
        ) as process:
            process.stdin.write(config.model_dump_json().encode())
            process.stdin.close()
            if not writing:
                metrics = tmp_path / "run" / "metrics.jsonl"
                seen = metrics.read_text() if metrics.exists() else ""
                while process.poll() is None:
                    now = metrics.read_text() if metrics.exists() else ""
                    if now != seen or rng.random() < 0.0005:
                        time.sleep(rng.uniform(0, 0.2))
                        process.send_signal(signal.SIGKILL)
                        break
                    time.sleep(0.005)
            ended += process.wait() == 0
    fit(config)
    assert_same_run(tmp_path / "run", whole[0])
    assert ended < 10


def truncated(newest: Path) -> None:
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flipped(newest: Path) -> None:
    """One bit of the contents: the checksum alone can tell."""
    template = checkpoint.ocp.StandardCheckpointer().restore(newest.absolute())
    changed = jax.tree.map(np.array, template)
    leaf = jax.tree.leaves(changed)[0]
    leaf.view(np.uint8).flat[0] ^= 1
    meta = (newest / "orbq.json").read_text()
    shutil.rmtree(newest)
    with checkpoint.ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(newest.absolute(), changed)
    (newest / "orbq.json").write_text(meta)


def emptied(newest: Path) -> None:
    for path in newest.rglob("*"):
        if path.is_file() and path.name != "orbq.json":
            path.unlink()


@pytest.mark.parametrize("damage", [truncated, flipped, emptied], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_serves(data, whole, tmp_path, damage):
    run, listener = copy_of(whole[0], tmp_path / "run"), Listener()
    newest, earlier = checkpoint.resumable(run / "checkpoints")
    damage(newest)
    fit(config_of(data, run), reporter=listener)
    assert len(listener.warnings) == 1 and str(newest) in listener.warnings[0]
    assert_same_run(run, whole[0])
    for path in (newest, earlier):
        damage(path)
    (run / "summary.json").unlink()
    with pytest.raises(OrbqError, match="cannot be restored, it is damaged"):
        fit(config_of(data, run))


def test_patience_stops_and_a_resumed_run_stays_stopped(data, tmp_path):
    """No validation is better than the first when the rate is next to nothing."""
    training = {"learning_rate": 1e-12, "pretrain_steps": 0, "patience": 1, "n_steps": 40}
    config = config_of(data, tmp_path / "run", training=training)
    fit(config)
    steps = [r["step"] for r in records(tmp_path / "run")]
    assert steps[-1] < 40
    (tmp_path / "run" / "summary.json").unlink()  # stopped before it could say that it was done
    fit(config)
    assert [r["step"] for r in records(tmp_path / "run")] == steps


# --------------------------------------------------------------------------- what is refused


def test_a_directory_in_use_is_refused(data, whole, tmp_path):
    other = config_of(data, whole[0], training={"learning_rate": 1e-3})
    with pytest.raises(InputError, match="another configuration"):
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


def test_a_weight_without_labels_is_refused_by_name(data, tmp_path):
    config = config_of(data, tmp_path / "run", loss={"weights": {"dft": 1.0, "atomic": 1.0}})
    with pytest.raises(InputError, match=r"loss\.weights\.dft.*--dft-charges-key"):
        fit(config)


def test_held_out_structures_among_the_unlabelled_are_refused(data, tmp_path):
    leak = structures("validation", 4, 1)[2]
    del leak.info["energy"]
    del leak.arrays["forces"]
    others = structures("train", 3, 9, False)
    preprocess([*others, leak], tmp_path / "leaky", resources=Resources(workers=1))
    changes = {"unlabelled": [str(data / "unlabelled"), str(tmp_path / "leaky")]}
    with pytest.raises(InputError, match=r"leaky holds 1 structures of the validation or test"):
        fit(config_of(data, tmp_path / "run", data=changes))


OVERFLOW = 1e39  # eV: a float64 that float32 cannot hold


@pytest.mark.parametrize("bad", [1, 15])
@jax.debug_nans(False)
def test_a_loss_that_is_not_finite_is_left_out_and_recorded(data, tmp_path, bad):
    """One bad structure costs its batches; if every batch has one the run ends, with advice."""
    made, kept = structures("train", 20, 0), []
    with_energy = [atoms for atoms in made if "energy" in atoms.info]
    for k, atoms in enumerate(with_energy[:bad]):  # of both signs: no fit to elements explains them
        atoms.info["energy"] = (-1) ** k * (1 + k) * OVERFLOW
    made += structures("validation", 4, 1) + structures("test", 4, 2)
    preprocess(made, tmp_path / "set", resources=Resources(workers=1))
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


# --------------------------------------------------------------------------- data of a run


def test_a_weight_of_zero_is_no_head_and_no_term(data, tmp_path):
    """So that such a run is the energy-only one, bit for bit."""
    runs = []
    for weights in ({}, {"atomic": 0.0, "onsite": 0.0}):
        training = {"pretrain_steps": 0, "unlabelled_share": 0.0}
        config = config_of(
            data, tmp_path, loss={"weights": weights}, training=training, data={"unlabelled": []}
        )
        prepared = prepare(config)
        runs.append((prepared.architecture, prepared.spec, make_stages(config, prepared)[0].hyper))
    assert runs[0] == runs[1]
    assert runs[0][0].heads == ()
    assert runs[0][1].terms == ("energy", "forces")


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return prepare(config_of(data, tmp_path_factory.mktemp("unused")))


def test_epochs_hold_each_labelled_structure_once_and_the_share_of_others(prepared):
    pool, n = prepared.pools["teaching"], len(prepared.pools["train"])
    chosen = []
    for epoch in range(4):
        plan = epoch_plan(pool, n, 0.3, prepared.budget, 0, epoch)
        items = np.concatenate(plan)
        assert sorted(items[items < n]) == list(range(n))
        others = items[items >= n]
        assert len(set(others)) == len(others) == round(0.3 / 0.7 * n)
        chosen.append(frozenset(others.tolist()))
        again = epoch_plan(pool, n, 0.3, prepared.budget, 0, epoch)
        for a, b in zip(plan, again, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(set(chosen)) > 1
    everything = np.concatenate(epoch_plan(pool, n, 1.0, prepared.budget, 0, 0))
    assert sorted(everything) == list(range(len(pool)))


def test_statistics_and_references_see_training_structures_alone(data, prepared):
    """References: the labelled ones; statistics of charges: the charge-only ones as well."""
    stored, config = Dataset.open(data / "labelled"), config_of(data, data / "unused")
    train = split_of(config, stored)["train"]
    offsets, numbers = stored.offsets, np.asarray(stored["numbers"])
    rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in train])
    extra = Dataset.open(data / "unlabelled")
    charges = np.concatenate([fitting_charges(stored)[rows], fitting_charges(extra)])
    elements = np.concatenate([numbers[rows], extra["numbers"]])
    mean, scale = prepared.spec.statistics["atomic"]
    for z in (1, 6, 7, 8):
        some = charges[elements == z]
        assert mean[z, 0] == pytest.approx(some.mean(), abs=1e-12)
        assert scale[z, 0] == pytest.approx(max(some.std(), 0.02), abs=1e-12)
    labelled = train[np.asarray(stored.mask("energy"))[train]]
    counts = np.stack(
        [np.bincount(numbers[offsets[i] : offsets[i + 1]], minlength=9) for i in labelled]
    )[:, [1, 6, 7, 8]]
    energy = np.asarray(stored["energy"])[labelled]
    expected = np.linalg.lstsq(counts, energy, rcond=None)[0]
    np.testing.assert_allclose(
        prepared.references["energy"].element[[1, 6, 7, 8]], expected, rtol=1e-9
    )
    residual = energy - counts @ expected
    assert prepared.spec.scales["energy"] == pytest.approx(residual.std(), rel=1e-9)


def fitting_charges(dataset: Dataset) -> np.ndarray:
    from orbq.orbitals import atomic_charges

    return atomic_charges(np.asarray(dataset["onsite"]))


def test_float64_compiles_once_too(data, tmp_path):
    training = {"precision": "float64", "pretrain_steps": 0, "n_steps": 4}
    summary = fit(config_of(data, tmp_path / "run", training=training))
    assert summary["compilations"] == {"train": 1, "evaluate": 1}
    leaves = jax.tree.leaves(final_state(tmp_path / "run")["best"])
    assert {np.asarray(leaf).dtype for leaf in leaves} == {np.dtype("float64")}
