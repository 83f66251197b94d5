"""Training that begins from a trained run: what it takes over, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from initial_runs import TUNED, Tuned, charges_config, edited, tuned_config
from tiny_run import random_run, save_run
from training_runs import MODEL, assert_same_run, label, settings_put_back

import orbq
from orbq.config import Config
from orbq.data import TrainingData, prepare, to_batch
from orbq.errors import InputError
from orbq.fit import fit
from orbq.initial import (
    check_apart,
    check_initial,
    prepare_from,
    started_from,
    with_own_copy,
)
from orbq.losses import Batch, batch_to_device
from orbq.models.potential import Params, make_potential, predict
from orbq.preprocess.pack import Packer
from orbq.run import load
from orbq.study.plan import fingerprint, make_plan
from orbq.study.program import Training
from orbq.train import TrainState, make_init
from orbq.validation import criterion_of

pytestmark = pytest.mark.usefixtures("own_settings_of_jax")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(tmp_path_factory.mktemp("initial"))


@pytest.fixture(scope="module")
def charges(sets: Path) -> Path:
    """A run that was taught charges and xTB energies alone."""
    with settings_put_back():
        fit(charges_config(sets, sets / "charges"))
    return sets / "charges"


@pytest.fixture(scope="module")
def tuned(sets: Path, charges: Path) -> Tuned:
    with settings_put_back():
        return Tuned(sets, charges)


# --------------------------------------------------------------------------- what is taken over


def begun(config: Config) -> tuple[TrainingData, TrainState]:
    """What a run of this configuration has before its first step."""
    data = prepare_from(config)
    potential = make_potential(data.architecture, data.constants)
    state = jax.jit(make_init(potential))(jax.random.key(0), example(data, 1))
    state = started_from(data.initial, state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.optimizer, state.step)))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()  # the step takes both over
    return data, state


def example(data: TrainingData, n: int) -> Batch:
    """The first test structures without labels."""
    packer = Packer(data.pools["test"], data.budget, (), dtype=np.dtype(np.float32))
    return batch_to_device(to_batch(packer.batch(np.arange(n))))


def outputs(data: TrainingData, params: Params, targets: tuple[str, ...]) -> Any:
    """Energies (less references), forces and charges of two test structures."""
    potential = make_potential(data.architecture, data.constants)
    found = jax.jit(lambda *x: predict(potential, *x, targets))
    return found(params, *example(data, 2)[:2])


def test_the_network_before_training_is_that_of_the_initial_run(
    sets: Path, charges: Path, tmp_path: Path
) -> None:
    """Which had no energies: the energy readout is that of its xTB energies. References and the
    scales of the loss are those of the new data."""
    config = edited(tuned_config(sets, tmp_path / "run", charges), "data", n_train=17)
    data, state = begun(config)
    run = load(charges)
    own = prepare(config)
    theirs = data._replace(
        architecture=run.potential.architecture, constants=run.potential.constants
    )
    found, expected = (
        outputs(data, state.params, ("atomic",)),
        outputs(theirs, run.params, ("atomic", "xtb_energy")),
    )
    exactly = {"rtol": 1e-5, "atol": 1e-6}  # the same float32 operations, fused otherwise
    np.testing.assert_allclose(found.energy, expected.charges["xtb_energy"], **exactly)
    np.testing.assert_allclose(found.charges["atomic"], expected.charges["atomic"], **exactly)
    assert np.ptp(np.asarray(found.energy)) > 1e-3
    assert "xtb_energy" not in state.params  # it has no such head

    for name in ("elements", "energy_scale", "avg_num_neighbors"):
        assert getattr(data.constants, name) == getattr(run.potential.constants, name), name
    for name in ("energy_scale", "avg_num_neighbors"):  # else the test would show nothing
        assert getattr(data.constants, name) != getattr(own.constants, name), name
    kept, fresh = data.constants.statistics, own.constants.statistics
    assert not np.array_equal(kept["atomic"].mean, fresh["atomic"].mean)
    np.testing.assert_array_equal(kept["shell"].mean, fresh["shell"].mean)
    assert data.spec.scales == own.spec.scales
    np.testing.assert_array_equal(data.spec.statistics["atomic"].mean, fresh["atomic"].mean)
    np.testing.assert_array_equal(
        data.references["energy"].element, own.references["energy"].element
    )


def test_reference_energies_of_xtb_come_with_the_network_that_was_taught_them(
    sets: Path, charges: Path, tmp_path: Path
) -> None:
    """Also when the run is gone on with; other structures would give others."""
    config = edited(tuned_config(sets, tmp_path / "run", charges), "data", n_train=17)
    weights = config.loss.weights.model_copy(update={"xtb_energy": 1.0})
    config = edited(config, "loss", weights=weights)
    theirs = load(charges).references["xtb_energy"]
    own = prepare(config).references["xtb_energy"]
    assert np.abs(own.element - theirs.element).max() > 1e-3
    data = prepare_from(config)
    np.testing.assert_array_equal(data.references["xtb_energy"].element, theirs.element)
    assert data.spec.scales["xtb_energy"] != prepare(config).spec.scales["xtb_energy"]
    fit(config)
    again = prepare_from(config, 1, tmp_path / "run")
    np.testing.assert_array_equal(again.references["xtb_energy"].element, theirs.element)


def test_a_trained_energy_readout_is_taken_over_as_it_is(sets: Path, tmp_path: Path) -> None:
    """Though the run had xTB energies as well; its precision may be another."""
    rich = {**TUNED, "xtb_energy": 1.0}
    run = random_run(list(rich)[2:], (1, 6, 7, 8), **MODEL)
    assert run.config.loss.weights.energy > 0
    initial = save_run(run, tmp_path / "rich")
    config = tuned_config(sets, tmp_path / "run", initial)
    data, state = begun(config)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)
        double = started_from(data.initial, double)
    for begins, dtype in ((state, np.float32), (double, np.float64)):
        both = (begins.params["energy"], run.params["energy"])
        for a, b in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == dtype


@pytest.mark.parametrize(
    ("errors", "weights", "chosen"),
    [
        (["xtb_energy", "onsite"], {"onsite": 20.0, "xtb_energy": 1.0}, "onsite"),
        (["onsite", "xtb_energy"], {"onsite": 1.0, "xtb_energy": 5.0}, "xtb_energy"),
        (["xtb_energy", "forces", "onsite"], {"onsite": 20.0, "xtb_energy": 1.0}, "forces"),
        (["forces", "xtb_energy", "energy"], {"xtb_energy": 1.0}, "energy"),
    ],
)
def test_the_best_step_is_that_of_what_is_taught_most(
    errors: list[str], weights: dict[str, float], chosen: str
) -> None:
    named = {f"{name}_mae_{unit}": 1.0 for name in errors for unit in ("e", "meV_per_atom")}
    assert criterion_of(named, weights) == f"{chosen}_mae_e"


def test_a_run_without_energies_has_the_energy_scale_of_its_xtb_energies(
    sets: Path, tmp_path: Path
) -> None:
    data = prepare(charges_config(sets, tmp_path / "run"))
    n_atoms = data.pools["train"].n_nodes.mean()
    expected = data.spec.scales["xtb_energy"] / np.sqrt(n_atoms)
    assert data.constants.energy_scale == pytest.approx(expected, rel=1e-12)


# --------------------------------------------------------------------------- runs


def test_frozen_parameters_stay_those_of_the_initial_run(charges: Path, tuned: Tuned) -> None:
    """And the summary and run.json say where the run began."""
    before, after = load(charges).params, load(tuned.directory).params
    for a, b in zip(*(jax.tree.leaves(p["backbone"]) for p in (before, after)), strict=True):
        np.testing.assert_array_equal(a, b)
    moved = zip(*(jax.tree.leaves(p["head_atomic"]) for p in (before, after)), strict=True)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in moved)
    assert tuned.summary["initial"]["directory"] == str(tuned.initial)
    stored = json.loads((tuned.directory / "run.json").read_text())
    assert stored["initial"] == tuned.summary["initial"]
    assert tuned.summary["compilations"]["train"] == 1


def test_a_run_goes_on_when_its_initial_run_is_gone(tuned: Tuned) -> None:
    """Bit for bit, also from before its first checkpoint by number of steps."""
    assert not tuned.initial.exists()
    fit(tuned.config(tuned.stopped))
    assert_same_run(tuned.stopped, tuned.directory)


def test_a_run_without_any_checkpoint_needs_its_initial_run_again(
    sets: Path, charges: Path, tuned: Tuned, tmp_path: Path
) -> None:
    """Stopped right after run.json was written; another run in its place will not do."""
    shutil.copytree(tuned.directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"training\.initial: .*start is not a run directory"):
        prepare_from(tuned.config(tmp_path / "run"), 2, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    stored["initial"] = {"directory": str(charges), "sha256": "0" * 64}
    (tmp_path / "run" / "run.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="has changed since"):
        prepare_from(tuned_config(sets, tmp_path / "run", charges), 1, tmp_path / "run")


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("n_channels", 8, r"model\.n_channels is 8, .* is 4: set model\.n_channels = 4, or leave"),
        ("avg_num_neighbors", 50.0, r"model\.avg_num_neighbors is 50"),
        ("head", "invariant", r'model\.head is "invariant".* = "equivariant"'),
    ],
)
def test_another_network_is_refused_by_its_first_key(
    sets: Path, charges: Path, tmp_path: Path, key: str, value: Any, text: str
) -> None:
    config = edited(tuned_config(sets, tmp_path / "run", charges), "model", **{key: value})
    with pytest.raises(InputError, match=text):
        prepare_from(config)


def test_another_kind_of_head_is_no_other_network_where_no_head_is_shared(
    sets: Path, charges: Path, tmp_path: Path
) -> None:
    config = edited(tuned_config(sets, tmp_path / "run", charges), "model", head="invariant")
    weights = config.loss.weights.model_copy(update={"atomic": 0.0})
    data = prepare_from(edited(config, "loss", weights=weights))
    assert data.architecture.heads == (("shell", "invariant"),)


def test_an_element_or_a_method_that_the_initial_run_lacks_is_refused(
    sets: Path, tmp_path: Path
) -> None:
    initial = save_run(random_run(["atomic"], (1, 6, 7), **MODEL), tmp_path / "poor")
    config = tuned_config(sets, tmp_path / "run", initial)
    with pytest.raises(InputError, match=r"poor' was not trained on O, which"):
        prepare_from(config)
    info = json.loads((initial / "run.json").read_text())
    info["constants"]["method"] = "GFN2-xTB"
    (initial / "run.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"labelled with GFN1-xTB, .* on GFN2-xTB: label"):
        prepare_from(config)


@pytest.mark.parametrize("name", ["nowhere", "charges"])
def test_what_cannot_be_begun_from_is_refused(sets: Path, tmp_path: Path, name: str) -> None:
    """No run at all, and a run in its own directory (which --overwrite would delete)."""
    directory = sets / "charges"
    config = tuned_config(sets, directory, sets / name)
    text = "is not a run directory" if name == "nowhere" else "lies in run.directory itself"
    with pytest.raises(InputError, match=text):
        check_apart(config)
        prepare_from(config)


# --------------------------------------------------------------------------- leaks


def test_structures_that_an_initial_run_was_taught_are_not_held_out(
    sets: Path, charges: Path, tuned: Tuned, tmp_path: Path
) -> None:
    """Also by the run before it: ``tuned`` began from a copy of ``charges``."""
    same = charges_config(sets, tmp_path / "run")
    leaky = charges_config(sets, tmp_path / "run", split_seed=1)
    shutil.copytree(charges, tuned.initial)
    try:
        for initial in (charges, tuned.directory):
            told = (
                r"the training data of \S+ \(\S+unlabelled\) holds \d structures of the validation"
            )
            with pytest.raises(InputError, match=told):
                prepare_from(edited(leaky, "training", initial=str(initial)))
            data = prepare_from(edited(same, "training", initial=str(initial)))
            assert data.initial is not None
            assert data.initial.notes == ()
    finally:
        shutil.rmtree(tuned.initial)


def test_what_cannot_be_checked_is_told(sets: Path, tuned: Tuned, tmp_path: Path) -> None:
    """A data set that is gone or has changed, and an initial run that is gone."""
    moved = tmp_path / "moved"
    shutil.copytree(tuned.directory, moved)
    info = json.loads((moved / "run.json").read_text())
    config = charges_config(sets, tmp_path / "run")
    config = edited(config, "training", initial=str(moved))
    there = info["data"][0]["path"]
    hashes = info["data"][0]["arrays"]["content_hash"]
    for path, sha256, reason in (
        (there, "0" * 64, "has changed since"),
        (str(tmp_path / "gone"), hashes["sha256"], "gone"),
    ):
        info["data"][0]["path"] = path
        hashes["sha256"] = sha256
        (moved / "run.json").write_text(json.dumps(info))
        initial = prepare_from(config).initial
        assert initial is not None
        first, second = initial.notes
        assert f"whether {moved} was trained on" in first
        assert reason in first
        assert f"whether {tuned.initial} was trained on" in second
        assert "\n" not in first + second


# --------------------------------------------------------------------------- ablation


def test_all_runs_of_an_ablation_begin_from_it(sets: Path, charges: Path, tmp_path: Path) -> None:
    """One step with a frozen backbone: only the head that was missing depends on the seed. What the
    runs begin from is a copy, which stays when the run itself is gone."""
    shutil.copytree(charges, tmp_path / "start")
    config = tuned_config(
        sets, tmp_path / "ablation", tmp_path / "start", n_steps=1, warmup_steps=0,
        frozen=["backbone"], learning_rate=1e-9,
    )  # fmt: skip
    weights = config.loss.weights.model_copy(update={"forces": 0.0})
    config = edited(edited(config, "loss", weights=weights), "ablation")
    config = edited(config, "ablation", targets=("shell",), weights=(0.0, 3.0), seeds=(0, 1))
    (tmp_path / "ablation").mkdir()
    copied = with_own_copy(config, tmp_path / "ablation")
    shutil.rmtree(tmp_path / "start")
    assert with_own_copy(config, tmp_path / "ablation") == copied
    (program,) = make_plan(copied)
    training = Training(program)
    training.run()
    params, before = training.state.params, orbq.load(charges).params
    for a, b in zip(*(jax.tree.leaves(p["backbone"]) for p in (params, before)), strict=True):
        np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape))
    for a, b in zip(
        jax.tree.leaves(params["energy"]), jax.tree.leaves(before["xtb_energy"]), strict=True
    ):
        np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), atol=1e-8)  # one step of 1e-9
    (first, *_) = (leaf for leaf in jax.tree.leaves(params["head_shell"]) if leaf.ndim > 2)
    assert [(r.weight, r.seed) for r in training.runs] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    np.testing.assert_allclose(first[0], first[2], atol=1e-8)
    assert np.abs(np.asarray(first[0] - first[1])).max() > 1e-2


def test_seeds_that_would_make_no_spread_are_told(
    sets: Path, charges: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = tuned_config(sets, tmp_path, charges)
    check_initial(edited(config, "ablation", seeds=(0, 1), subset_seeds=(5, 6)))
    check_initial(edited(config, "ablation", seeds=(0,)))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"ablation\.subset_seeds"):
        check_initial(edited(config, "ablation", seeds=(0, 1)))


def test_an_ablation_is_another_one_with_another_initial_run(sets: Path, tmp_path: Path) -> None:
    config = tuned_config(sets, tmp_path, Path("somewhere"))
    without = edited(config, "training", initial="")
    assert fingerprint(config) != fingerprint(without)
