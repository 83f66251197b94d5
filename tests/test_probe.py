"""The linear probe: its algebra against brute force, and what a run begins from by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from initial_runs import ALONE, charges_config
from memory_dataset import MemoryDataset, random_molecules
from tiny_run import random_run
from training_runs import config_of, label, settings_put_back

from orbq.config import Config, parse_config
from orbq.data import to_batch
from orbq.errors import InputError, OrbqError
from orbq.fit import fit
from orbq.initial import prepare_from
from orbq.losses import Batch, batch_to_device
from orbq.models.potential import (
    Params,
    Potential,
    last_weights,
    make_potential,
    predict,
    readout_features,
    readout_force_features,
)
from orbq.orbitals import MAX_Z
from orbq.preprocess.pack import PackedBatch, Packer, measure_budget
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.references import References
from orbq.probe import STRENGTHS, Probe, fit_probe, ridge

pytestmark = pytest.mark.usefixtures("own_settings_of_jax")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def charges(sets: Path) -> Path:
    """A run that was taught charges and xTB energies alone."""
    with settings_put_back():
        fit(charges_config(sets, sets / "charges"))
    return sets / "charges"


def columns(n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of four elements, seven features of which one is constant, and a noisy target."""
    rng = np.random.default_rng(0)
    free = rng.integers(0, 6, (n, 4)).astype(float)
    tied = rng.normal(size=(n, 7)) * [1, 2, 3, 10, 0.1, 1, 0]
    target = free @ [-10.0, 5, 7, 1e4] + tied @ [1, 0, 0, 0.1, 3, 0, 9] + rng.normal(0, 0.5, n)
    return free, tied, target


def solved(free: np.ndarray, tied: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    """Coefficients by the normal equations."""
    both = np.concatenate([free, tied], axis=1)
    penalty = np.concatenate([np.zeros(free.shape[1]), strength * tied.std(0) ** 2])
    return np.linalg.solve(both.T @ both + np.diag(np.maximum(penalty, 1e-12)), both.T @ target)


def left_out(free: np.ndarray, tied: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    """Absolute error of each structure by a fit to the others, with the same penalty."""
    both, errors = np.concatenate([free, tied], axis=1), []
    penalty = np.concatenate([np.zeros(free.shape[1]), strength * tied.std(0) ** 2])
    for i in range(len(target)):
        rest = np.arange(len(target)) != i
        a, y = both[rest], target[rest]
        w = np.linalg.solve(a.T @ a + np.diag(np.maximum(penalty, 1e-12)), a.T @ y)
        errors.append(abs(target[i] - both[i] @ w))
    return np.array(errors)


def test_further_equations_join_in_and_are_not_left_out() -> None:
    free, tied, target = columns()
    rng = np.random.default_rng(3)
    more = rng.normal(size=(5, 8))
    found = ridge(free, tied, target, (2.0,), more)
    penalty = np.diag(np.sqrt(2.0) * tied[:, :-1].std(0))
    rows = [
        np.column_stack([free, tied[:, :-1]]),
        np.column_stack([np.zeros((5, 4)), more[:, :6]]),
        np.column_stack([np.zeros((6, 4)), penalty]),
    ]
    aims = [target, more[:, -1], np.zeros(6)]

    def solve(left: np.ndarray) -> np.ndarray:
        a = np.concatenate([rows[0][left], *rows[1:]])
        y = np.concatenate([aims[0][left], *aims[1:]])
        solution: np.ndarray = np.linalg.lstsq(a, y, rcond=None)[0]
        return solution

    every = np.ones(len(target), bool)
    np.testing.assert_allclose(np.append(found.free, found.tied[:-1]), solve(every), rtol=1e-6)
    errors = []
    for i in range(len(target)):
        left = every.copy()
        left[i] = False
        errors.append(abs(target[i] - rows[0][i] @ solve(left)))
    assert found.error == pytest.approx(np.mean(errors), rel=1e-6)


@pytest.mark.parametrize("strength", [0.1, 3.0, 1e3])
def test_ridge_and_its_leave_one_out_error_are_those_of_brute_force(strength: float) -> None:
    free, tied, target = columns()
    found = ridge(free, tied, target, (strength,))
    expected = solved(free, tied[:, :-1], target, strength)
    np.testing.assert_allclose(np.append(found.free, found.tied[:-1]), expected, rtol=1e-6)
    assert found.tied[-1] == 0.0  # it never changes, so it says nothing
    expected = left_out(free, tied[:, :-1], target, strength).mean()
    assert found.error == pytest.approx(expected, rel=1e-6)


def test_the_strength_is_that_of_the_least_leave_one_out_error() -> None:
    free, tied, target = columns()
    target += np.random.default_rng(2).normal(0, 4.0, len(target))
    each = {s: ridge(free, tied, target, (s,)).error for s in STRENGTHS}
    found = ridge(free, tied, target)
    assert found.strength == min(each, key=each.__getitem__)
    assert found.error == min(each.values())
    assert STRENGTHS[0] < found.strength < STRENGTHS[-1]
    noise = np.random.default_rng(1).normal(size=tied.shape)
    assert ridge(free, noise, target).strength > 10 * found.strength


def test_a_structure_that_alone_has_an_element_says_nothing_of_the_strength() -> None:
    free, tied, target = columns()
    alone = np.zeros((len(target), 1))
    alone[3], target[3] = 1.0, target[3] + 1e3
    both = np.column_stack([free, alone])
    found = ridge(both, tied, target, (1.0,))
    each = left_out(both, tied[:, :-1], target, 1.0)
    assert each[3] > 900.0
    assert found.error == pytest.approx(np.delete(each, 3).mean(), rel=1e-6)
    every = ridge(np.eye(5), np.ones((5, 2)), np.arange(5.0))
    assert np.isnan(every.error)
    np.testing.assert_allclose(every.free, np.arange(5.0), atol=1e-9)


def test_elements_in_fixed_ratios_get_the_solution_of_least_norm() -> None:
    free, tied, target = columns()
    twice = np.column_stack([free, free[:, :1]])
    found, plain = ridge(twice, tied, target, (3.0,)), ridge(free, tied, target, (3.0,))
    np.testing.assert_allclose(found.free[[0, 4]], plain.free[0] / 2, rtol=1e-6)
    np.testing.assert_allclose(found.tied, plain.tied, rtol=1e-6, atol=1e-9)


def molecules(n: int = 40) -> tuple[MemoryDataset, Pool]:
    """Structures with charges of -2 to 2."""
    data = MemoryDataset(random_molecules(np.full(n, 9)))
    return data, Pool([Part(data, None)], 4.0)


def packed_batches(pool: Pool, size: int = 8) -> Iterator[tuple[PackedBatch, Batch]]:
    packer = Packer(pool, measure_budget(pool, size), ())
    for packed in map(packer.batch, packer.plan(0)):
        yield packed, batch_to_device(to_batch(packed))


def compiled(potential: Potential) -> Callable[..., jax.Array]:
    """Energies of every structure."""
    return jax.jit(lambda *inputs: potential.apply(*inputs)[0])


def weights_of(params: Params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(last_weights(params))])


def test_energies_are_linear_in_the_last_weights() -> None:
    run = random_run((), (1, 6, 7, 8))
    energies_of = compiled(run.potential)
    features_of = jax.jit(lambda *x: readout_features(run.potential, *x))
    for packed, batch in packed_batches(molecules()[1]):
        inputs = run.params, batch.positions, batch.graph
        features, energies = features_of(*inputs), energies_of(*inputs)
        assert features.shape[1] == 4 + 8  # channels of the first layer, and hidden ones
        found = np.asarray(features) @ weights_of(run.params)
        np.testing.assert_allclose(found, energies, rtol=1e-4, atol=1e-5)
        assert np.ptp(np.asarray(energies)[packed.mask]) > 1e-3
        assert not np.any(np.asarray(features)[~packed.mask])


def test_forces_are_linear_in_the_last_weights_too() -> None:
    run = random_run((), (1, 6, 7, 8))
    pool = molecules(6)[1]
    ((_, batch),) = list(packed_batches(pool, 20))
    inputs = run.params, batch.positions, batch.graph
    features = jax.jit(lambda *x: readout_force_features(run.potential, *x))(*inputs)
    forces = jax.jit(lambda *x: predict(run.potential, *x))(*inputs).forces
    found = np.asarray(features) @ weights_of(run.params)
    atoms = np.asarray(batch.graph.nodes["numbers"]) > 0
    np.testing.assert_allclose(found[atoms], np.asarray(forces)[atoms], rtol=1e-3, atol=1e-5)
    assert np.abs(found).max() > 1e-3


def test_forces_choose_among_weights_that_energies_leave_open() -> None:
    """Few energies, the forces of the network with other weights: the fit finds these."""
    run = random_run((), (1, 6, 7, 8))
    data, pool = molecules(8)
    wanted = weights_of(run.params) + np.linspace(-3.0, 3.0, 12)
    moved = Probe(References.zero(), wanted, 1.0, 0.0).into(run.params)
    predicted = jax.jit(lambda *x: predict(run.potential, *x))
    for packed, batch in packed_batches(pool):
        out = predicted(moved, batch.positions, batch.graph)
        ends = np.cumsum(packed.n_node)
        for place, item in enumerate(packed.index[packed.mask].tolist()):
            own = slice(ends[place] - packed.n_node[place], ends[place])
            data.arrays["forces"][data.rows(item)] = np.asarray(out.forces)[own]
            data.arrays["energy"][item] = float(out.energy[place])
    weak = (1e-8,)
    without = fit_probe(run.potential, run.params, pool, forces=False, strengths=weak)
    found = fit_probe(run.potential, run.params, pool, strengths=weak)
    assert np.abs(without.weights - wanted).max() > 0.5
    np.testing.assert_allclose(found.weights, wanted, atol=0.1)


def test_a_probe_finds_what_the_energies_were_made_of() -> None:
    """The network with other last weights, reference energies, and a slope in the charge."""
    run = random_run((), (1, 6, 7, 8))
    data, pool = molecules(120)
    element = np.zeros(MAX_Z + 1)
    element[[1, 6, 7, 8]] = -13.6, -1030.0, -1485.0, -2042.0
    table = References(element, 2.5, True, element != 0)
    wanted = weights_of(run.params) + np.linspace(-3.0, 3.0, 12)
    moved = Probe(table, wanted, 1.0, 0.0).into(run.params)
    np.testing.assert_allclose(weights_of(moved), wanted, rtol=1e-6)
    numbers = [data.arrays["numbers"][data.rows(i)] for i in range(120)]
    charge = data.arrays["total_charge"]
    energy = np.array([table.of(n, q) for n, q in zip(numbers, charge, strict=True)])
    energies_of = compiled(run.potential)
    for packed, batch in packed_batches(pool):
        network = energies_of(moved, batch.positions, batch.graph)
        energy[packed.index[packed.mask]] += np.asarray(network)[packed.mask]
    data.arrays["energy"] = energy
    weak = (1e-6, 1e-4)
    found = fit_probe(run.potential, run.params, pool, forces=False, strengths=weak)
    assert found.strength == 1e-6
    assert found.references.charge == pytest.approx(2.5, abs=0.1)
    np.testing.assert_allclose(found.references.element, element, atol=0.1)
    assert found.error < 0.05 < np.std(energy - table.of_many(*flat(numbers), charge))
    without = fit_probe(run.potential, run.params, pool, False, False, strengths=weak)
    assert without.references.charge == 0.0 and without.error > 10 * found.error
    data.arrays["energy_mask"][10:] = False
    energy[10:] = np.nan  # of structures that are not labelled
    few = fit_probe(run.potential, run.params, pool, forces=False)
    assert np.isfinite(few.weights).all() and few.references.known[[1, 6, 7, 8]].all()
    data.arrays["energy_mask"][:] = False
    with pytest.raises(InputError, match="no training structure carries energy"):
        fit_probe(run.potential, run.params, pool)


def flat(numbers: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(numbers), np.array([len(n) for n in numbers])


def test_json_round_trip_is_exact() -> None:
    element = np.zeros(MAX_Z + 1)
    element[[1, 26]] = -13.123456789, 0.1 + 0.2
    table = References(element, 1 / 3, True, element != 0)
    for error in (0.1, np.nan):
        probe = Probe(table, np.random.default_rng(0).normal(size=5), 10**0.5, error)
        back = Probe.from_json(probe.to_json())
        np.testing.assert_array_equal(back.references.element, element)
        np.testing.assert_array_equal(back.weights, probe.weights)
        np.testing.assert_equal(back[2:], probe[2:])
    for text in ("", "[]", "{}", '{"references": {}, "weights": []}'):
        with pytest.raises(InputError, match=r"a probe cannot be read|reference energies cannot"):
            Probe.from_json(text)
    with pytest.raises(InputError, match="the probe is of another network"):
        probe.into(random_run((), (1, 6)).params)


# --------------------------------------------------------------------------- runs


def taught_config(sets: Path, directory: Path, initial: Path, **data: Any) -> Config:
    chosen = {"unlabelled": [], "references": "taught", **data}
    return config_of(
        sets,
        directory,
        data=chosen,
        loss={"weights": {"energy": 1.0, "atomic": 2.0, "forces": 0.0}},
        training={**ALONE, "initial": str(initial)},
    )


def test_a_run_begins_where_the_frozen_network_ends(
    sets: Path, charges: Path, tmp_path: Path
) -> None:
    """Its first energies of the training structures are those of the fit, so that they are closer
    than those of references without the network; what is fitted is kept for later."""
    errors, kept = {}, tmp_path / "kept"
    kept.mkdir()
    for kind in ("taught", "fit"):
        config = taught_config(sets, tmp_path / kind, charges, references=kind)
        data = prepare_from(config, keep=kept)
        assert data.initial is not None and data.initial.params is not None
        energies_of = compiled(make_potential(data.architecture, data.constants))
        pool = data.pools["train"]
        packer = Packer(pool, data.budget, ("energy",), data.references)
        rest = []
        for packed in map(packer.batch, packer.plan(0)):
            batch = batch_to_device(to_batch(packed))
            found = energies_of(data.initial.params, batch.positions, batch.graph)
            labelled = np.asarray(batch.targets["energy/mask"])
            rest.append((np.asarray(found) - np.asarray(batch.targets["energy"]))[labelled])
        errors[kind] = np.abs(np.concatenate(rest)).mean()
        assert (data.initial.probe is None) == (kind == "fit")
    assert errors["taught"] < 0.9 * errors["fit"], errors
    probe = Probe.from_json((kept / "probe.json").read_text())
    data = prepare_from(taught_config(sets, tmp_path / "taught", charges))
    assert data.initial is not None and data.initial.probe is not None
    np.testing.assert_array_equal(probe.weights, data.initial.probe.weights)
    assert data.energy_fit is not None
    np.testing.assert_array_equal(probe.references.element, data.energy_fit.references.element)


def test_what_was_fitted_is_told_and_needed_later(
    sets: Path, charges: Path, tmp_path: Path
) -> None:
    config = taught_config(sets, tmp_path / "run", charges)
    summary = fit(config)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    probe = Probe.from_json((tmp_path / "run" / "probe.json").read_text())
    assert stored["probe"] == summary["probe"]
    assert summary["probe"] == {
        "strength": probe.strength,
        "leave_one_out_meV": 1e3 * probe.error,
    }
    assert stored["references"]["energy"] == json.loads(probe.references.to_json())
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "probe.json").write_text("{")
    with pytest.raises(OrbqError, match=r"probe\.json is damaged .*start anew with --overwrite"):
        fit(config)


def test_a_configuration_without_a_network_to_fit_by_is_refused() -> None:
    for training, text in (
        ({}, "is 'taught', by the run of training.initial: name one"),
        ({"initial": "x", "pretrain_steps": 5}, "set pretrain_steps = 0"),
    ):
        with pytest.raises(InputError, match=text):
            parse_config({"data": {"references": "taught"}, "training": training})
