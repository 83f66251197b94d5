"""The training loop: what a run leaves, what it refuses, what its data are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from training_runs import (
    Listener,
    config_of,
    final_state,
    label,
    records,
    structures,
)

from orbq import checkpoint
from orbq.data import TrainingData, prepare, split_of
from orbq.errors import InputError
from orbq.fit import fit
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.plan import epoch_plan
from orbq.preprocess.store import Dataset
from orbq.stages import make_stages

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


# --------------------------------------------------------------------------- a run


def test_each_program_is_compiled_once(whole):
    assert whole[1]["compilations"] == {"pretrain": 1, "train": 1, "evaluate": 1}


def test_gradients_are_told_on_request_and_change_nothing(data, whole, tmp_path):
    config = config_of(data, tmp_path / "told")
    training = config.training.model_copy(update={"log_gradients": True})
    fit(config.model_copy(update={"training": training}))
    a, b = final_state(tmp_path / "told"), final_state(whole[0])
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    pretraining, *_, last = records(tmp_path / "told")
    told = {k: v for k, v in last.items() if k.startswith("gradient/")}
    assert set(told) == {f"gradient/{k}" for k in ("energy", "forces", "atomic", "cosine")}
    assert -1 <= told.pop("gradient/cosine") <= 1
    assert min(told.values()) > 0
    assert not any(k.startswith("gradient/") for k in pretraining)


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
    longer = {"n_steps": 200, "pretrain_steps": 0, "validate_every": 20, "checkpoint_every": 200}
    training = {**longer, "learning_rate": 1e-2, "unlabelled_share": 0.0}
    loss = {"weights": {"energy": 1.0, "forces": 0.1, "atomic": 2.0}}
    fit(config_of(data, tmp_path / "run", training=training, loss=loss, data={"unlabelled": []}))
    first, *_, last = records(tmp_path / "run")
    for term in ("loss", "energy", "atomic"):
        assert last[f"train/{term}"] < 0.9 * first[f"train/{term}"], term


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


def test_energies_per_atom_have_a_scale_of_their_own(data, prepared):
    """Root mean square of what is left per atom; the network is scaled as before."""
    stored = Dataset.open(data / "labelled")
    config = config_of(data, data / "unused", loss={"energy_per": "atom"})
    per_atom = prepare(config)
    train = split_of(config, stored)["train"]
    labelled = train[np.asarray(stored.mask("energy"))[train]]
    n = np.asarray(stored.n_atoms)[labelled]
    offsets, numbers = np.asarray(stored["offsets"]), np.asarray(stored["numbers"])
    rows = [numbers[offsets[i] : offsets[i + 1]] for i in labelled]
    references = prepared.references["energy"].element
    left = np.asarray(stored["energy"])[labelled] - [references[z].sum() for z in rows]
    expected = np.sqrt(np.mean((left / n) ** 2))
    assert per_atom.spec.scales["energy"] == pytest.approx(expected, rel=1e-9)
    assert per_atom.spec.scales["forces"] == prepared.spec.scales["forces"]
    assert per_atom.constants.energy_scale == prepared.constants.energy_scale


def test_an_element_that_no_training_structure_has_wants_structures(data, tmp_path):
    """And no reference energies, which would not make up for them."""
    training = {"unlabelled_share": 0.0, "pretrain_steps": 0}
    own: dict[str, Any] = {"n_train": 1, "unlabelled": []}
    for references in ({s: -1.0 for s in "HCNO"}, "fit"):
        config = config_of(
            data, tmp_path, data={**own, "references": references}, training=training
        )
        with pytest.raises(InputError, match="which no training structure does: add structures"):
            prepare(config)


def test_a_run_that_would_learn_nothing_is_refused(data, tmp_path, prepared):
    """Where no atom has a neighbour, as with a cutoff in nm, or all parameters are frozen."""
    with pytest.raises(InputError, match=r"cutoff = 0.5 Å: no atom of the \d+ training"):
        prepare(config_of(data, tmp_path, model={"cutoff": 0.5}))
    config = config_of(data, tmp_path, training={"frozen": ["backbone", "energy", "head_atomic"]})
    with pytest.raises(InputError, match="holds every parameter: nothing would be learnt"):
        make_stages(config, prepared)


def test_copies_of_a_structure_in_another_group_are_not_held_out(data, tmp_path):
    stored, config = Dataset.open(data / "labelled"), config_of(data, data / "unused")
    parts = split_of(config, stored)
    shutil.copytree(data / "labelled", tmp_path / "labelled")
    hashes = np.array(stored["content_hash"])
    hashes[parts["test"][0]] = hashes[parts["train"][0]]
    np.save(tmp_path / "labelled" / "content_hash.npy", hashes)
    own = {"dataset": str(tmp_path / "labelled")}
    with pytest.raises(InputError, match=r"the training split of .* holds 1 .* of one group"):
        prepare(config_of(data, tmp_path, data=own))


def test_geometries_of_a_held_out_group_among_those_without_energies_are_told(data, tmp_path):
    stored, config = Dataset.open(data / "labelled"), config_of(data, data / "unused")
    shutil.copytree(data / "unlabelled", tmp_path / "unlabelled")
    groups = np.array(Dataset.open(tmp_path / "unlabelled")["group"])
    groups[0] = stored["group"][split_of(config, stored)["test"][0]]
    np.save(tmp_path / "unlabelled" / "group.npy", groups)
    own = {"unlabelled": [str(tmp_path / "unlabelled")]}
    with pytest.warns(UserWarning, match="holds 1 structures of groups that are held out"):
        prepare(config_of(data, tmp_path, data=own))


def test_guided_references_leave_out_a_multiple_of_the_xtb_energies(data):
    """Those less their own references, which are fitted to the charge-only structures as well."""
    config = config_of(data, data / "unused", data={"references": "guided"})
    stored, extra = Dataset.open(data / "labelled"), Dataset.open(data / "unlabelled")
    train = split_of(config, stored)["train"]

    def counts(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
        atoms = [dataset["numbers"][slice(*dataset.offsets[row : row + 2])] for row in rows]
        return np.stack([np.bincount(z, minlength=9) for z in atoms])[:, [1, 6, 7, 8]]

    xtb = np.concatenate([np.asarray(stored["xtb_energy"])[train], np.asarray(extra["xtb_energy"])])
    many = np.concatenate([counts(stored, train), counts(extra, np.arange(len(extra)))])
    own = np.linalg.lstsq(many, xtb, rcond=None)[0]
    labelled = train[np.asarray(stored.mask("energy"))[train]]
    few = counts(stored, labelled)
    guide = np.asarray(stored["xtb_energy"])[labelled] - few @ own
    columns = np.column_stack([few, guide])
    expected = np.linalg.lstsq(columns, np.asarray(stored["energy"])[labelled], rcond=None)[0]
    found = prepare(config).references["energy"].element[[1, 6, 7, 8]]
    np.testing.assert_allclose(found, expected[:4], rtol=1e-7)
    plain = prepare(config_of(data, data / "unused")).references["energy"].element[[1, 6, 7, 8]]
    assert np.abs(found - plain).max() > 1e-3


@pytest.mark.parametrize("slope", [False, True])
def test_the_slope_in_the_charge_is_fitted_to_both_energies_or_neither(data, tmp_path, slope):
    shutil.copytree(data / "labelled", tmp_path / "labelled")
    charges = np.arange(len(Dataset.open(tmp_path / "labelled"))) % 3 - 1
    np.save(tmp_path / "labelled" / "total_charge.npy", charges.astype(np.int32))
    own = {"dataset": str(tmp_path / "labelled"), "unlabelled": [], "charge_reference": slope}
    weights = {"energy": 1.0, "forces": 1.0, "xtb_energy": 1.0}
    training = {"pretrain_steps": 0, "unlabelled_share": 0.0}
    config = config_of(data, tmp_path, data=own, loss={"weights": weights}, training=training)
    references = prepare(config).references
    for name in ("energy", "xtb_energy"):
        assert (abs(references[name].charge) > 1e-3) == slope


def fitting_charges(dataset: Dataset) -> np.ndarray:
    from orbq.orbitals import atomic_charges

    return atomic_charges(np.asarray(dataset["onsite"]))


def test_a_first_validation_that_is_nan_is_not_the_best_for_good(data, tmp_path, monkeypatch):
    found = iter([np.nan, 3.0, 5.0, 2.0])

    def errors(self, params, packer):
        return {"energy_mae_meV": next(found)}

    monkeypatch.setattr("orbq.fit.Validation.errors", errors)
    config = config_of(data, tmp_path / "run", training={"pretrain_steps": 0, "n_steps": 14})
    assert fit(config)["best_validation"] == 2.0
    assert [r["best"] for r in records(tmp_path / "run")] == [True, True, False, True]


def test_float64_compiles_once_too(data, tmp_path):
    training = {"precision": "float64", "pretrain_steps": 0, "n_steps": 4}
    summary = fit(config_of(data, tmp_path / "run", training=training))
    assert summary["compilations"] == {"train": 1, "evaluate": 1}
    leaves = jax.tree.leaves(final_state(tmp_path / "run")["best"])
    assert {np.asarray(leaf).dtype for leaf in leaves} == {np.dtype("float64")}
