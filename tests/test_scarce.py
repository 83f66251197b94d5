"""Training on data that are scarce or lopsided: what is refused, warned of, or made good."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import pytest
from memory_dataset import MemoryDataset, random_molecules
from training_runs import config_of, label, settings_put_back, structures

from orbq import load
from orbq.config import Config, Training
from orbq.data import _budget, prepare
from orbq.errors import InputError
from orbq.fit import fit
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.plan import epoch_plan
from orbq.preprocess.pool import Part, Pool
from orbq.stages import make_stages
from orbq.study.program import Program
from orbq.study.program import Training as StudyTraining


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = label(tmp_path_factory.mktemp("scarce"))
    parts = structures("train", 6, 0) + structures("validation", 2, 1, labelled=False)
    preprocess(parts, place / "bare", resources=Resources(workers=1))
    return place


def bare(data: Path, directory: Path, **weights: float) -> Config:
    """Of a data set whose validation structures have charges alone, and which has no test part."""
    changes: dict[str, Any] = {"dataset": str(data / "bare"), "unlabelled": []}
    share = {"unlabelled_share": 0.0, "pretrain_steps": 0}
    return config_of(data, directory, data=changes, loss={"weights": weights}, training=share)


def test_a_validation_part_without_any_label_is_refused_before_training(data, tmp_path) -> None:
    config = bare(data, tmp_path / "run", energy=1.0, forces=1.0)
    with pytest.raises(InputError, match=r"none of the 2 validation structures.*split_seed"):
        fit(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_validation_part_without_energies_is_told(data, tmp_path) -> None:
    with pytest.warns(UserWarning, match="best step is chosen by atomic"):
        prepare(bare(data, tmp_path, energy=1.0, atomic=1.0))


def test_an_ablation_without_test_energies_is_refused_before_training(data, tmp_path) -> None:
    config = config_of(data, tmp_path, training={"unlabelled_share": 0.0})
    prepared = prepare(config)
    program = Program("name", "atomic", config, ())
    for gone in ("test", "validation"):
        pools = {n: pool for n, pool in prepared.pools.items() if n != gone}
        with pytest.raises(InputError, match=rf"no {gone} structure.*data\.{gone}_fraction"):
            StudyTraining(program, data=prepared._replace(pools=pools))


@pytest.mark.parametrize(("share", "told"), [(0.3, False), (0.9, True), (1.0, False)])
def test_a_share_that_cannot_be_reached_is_told(data, tmp_path, share, told) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prepared = prepare(config_of(data, tmp_path, training={"unlabelled_share": share}))
    texts = [str(w.message) for w in found if "unlabelled_share" in str(w.message)]
    assert bool(texts) == told
    if told:
        n, others = len(prepared.pools["train"]), len(prepared.pools["unlabelled"])
        assert f"there are {others}: their share is {others / (n + others):.2g}" in texts[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("sizes", [(40, 8), (6, 40), (15, 15)])
def test_batches_hold_what_was_asked_for_whatever_the_size_of_the_unlabelled(sizes, share) -> None:
    """Few labelled structures of one size beside many without labels of another."""
    rng, numbers = np.random.default_rng(0), (60, 600)
    pools = {}
    for name, size, n in zip(("train", "unlabelled"), sizes, numbers, strict=True):
        atoms = random_molecules(rng.integers(size - 2, size + 3, n).tolist())
        pools[name] = Pool([Part(MemoryDataset(atoms))], 4.0)
    pools["teaching"] = Pool([*pools["train"].parts, *pools["unlabelled"].parts], 4.0)
    budget = _budget(pools, Training(batch_size=8, unlabelled_share=share), 1)
    plan = epoch_plan(pools["teaching"], numbers[0], share, budget, 0, 0)
    # 8 were asked for; a budget is whole structures, and what is tolerated is a third
    assert 8 * 0.7 < np.mean([len(items) for items in plan]) < 8 * 1.4


@pytest.mark.parametrize("prefix", ["backbone/layr0", "nope", "backbone/"])
def test_a_frozen_prefix_that_freezes_nothing_is_refused(data, tmp_path, prefix) -> None:
    config = config_of(data, tmp_path, training={"frozen": ["backbone/layer0"]})
    prepared = prepare(config)
    assert make_stages(config, prepared)[-1].frozen == ("backbone/layer0",)
    wrong = config_of(data, tmp_path, training={"frozen": [prefix]})
    with pytest.raises(InputError, match=rf"no parameter's path begins with '{prefix}'"):
        make_stages(wrong, prepared)


def test_charges_and_spins_never_trained_are_told_once(data, tmp_path) -> None:
    with settings_put_back():
        fit(config_of(data, tmp_path / "run", training={"n_steps": 4, "pretrain_steps": 0}))
    run = load(tmp_path / "run")
    assert run.info["states"] == {"total_charge": [0], "spin_multiplicity": [1]}
    assert run.info["stages"] == {"train": 4}
    atoms = ase.build.molecule("H2O")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neutral = run.predict(atoms)["energy"]
    atoms.info["charge"] = 1
    with pytest.warns(UserWarning) as found:
        charged = [run.predict(atoms)["energy"] for _ in range(2)]
    texts = [str(w.message) for w in found if "no training structure had" in str(w.message)]
    assert [text.split(" (")[0] for text in texts] == [
        "no training structure had a total charge of 1",
        "no training structure had a spin multiplicity of 2",
    ]
    assert charged[0] == charged[1] != neutral
