"""Loss terms and error sums against plain NumPy loops; independence of their masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import Size, make_graph, quick_jit, random_statistics, three

from orbq.losses import (
    Batch,
    LossSpec,
    batch_to_device,
    error_sums,
    loss_terms,
    needed_targets,
    total_loss,
)
from orbq.metrics import add_sums, from_sums
from orbq.models.potential import Prediction
from orbq.targets import TARGETS

SIZE = Size(nodes=16, edges=160, structures=5)
PER_ATOM = tuple(n for n in TARGETS if not n.startswith("xtb_"))
EVERY = ("energy", "forces", *TARGETS)
SCALES = {"energy": 3.0, "forces": 0.7, "xtb_energy": 2.0, "xtb_forces": 0.4}
EXACT = 1e-13  # float64 rounding of means over a few hundred terms of order 1


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def shape_of(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a label and of its mask."""
    if name in ("energy", "xtb_energy"):
        return (SIZE.structures,), (SIZE.structures,)
    if name in ("forces", "xtb_forces"):
        return (SIZE.nodes, 3), (SIZE.nodes,)
    return (SIZE.nodes, TARGETS[name].k), (SIZE.nodes, TARGETS[name].k)


def random_batch(seed: int = 0) -> Batch:
    """Labels of every kind; some structures lack some, the padding has none."""
    rng = np.random.default_rng(seed)
    positions, graph = make_graph(three(), SIZE)
    numbers = np.asarray(graph.nodes["numbers"])
    structure = np.repeat(np.arange(SIZE.structures), graph.n_node)
    targets = {}
    for n, name in enumerate(EVERY):
        labelled = np.asarray(graph.globals["mask"]).copy()
        labelled[(n + 1) % 3] = False  # each kind lacks one structure
        shape, mask_shape = shape_of(name)
        if name in PER_ATOM:
            mask = TARGETS[name].mask(numbers, labelled[structure])
        else:
            mask = labelled if mask_shape == (SIZE.structures,) else labelled[structure]
        value = rng.normal(size=shape)
        kept = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        targets[name], targets[f"{name}/mask"] = np.where(kept, value, 0.0), mask
    return batch_to_device(Batch(positions, graph, targets))


def random_prediction(seed: int = 1) -> Prediction:
    rng = np.random.default_rng(seed)
    values = {n: jnp.asarray(2 * rng.normal(size=shape_of(n)[0])) for n in EVERY}
    return Prediction(values.pop("energy"), values.pop("forces"), values)


def spec_of(kind: str = "huber", energy_per: str = "structure", terms=EVERY) -> LossSpec:
    statistics = {n: random_statistics(n) for n in PER_ATOM}
    return LossSpec(tuple(terms), kind, 0.8, energy_per, SCALES, statistics)


def value_of(name: str, prediction: Prediction) -> np.ndarray:
    found = {"energy": prediction.energy, "forces": prediction.forces, **prediction.charges}[name]
    return np.asarray(found)


def scored(kind: str, x: float) -> float:
    if kind == "mse":
        return x * x
    if kind == "mae":
        return abs(x)
    return 0.5 * x * x if abs(x) < 0.8 else 0.8 * (abs(x) - 0.4)


def expected_term(name: str, kind: str, energy_per: str) -> float:
    """The definition, with loops over structures, atoms and components."""
    batch, prediction = random_batch(), random_prediction()
    label, mask = (np.asarray(batch.targets[k]) for k in (name, f"{name}/mask"))
    value, found = value_of(name, prediction), []
    if name in ("energy", "xtb_energy"):
        for m in np.flatnonzero(mask):
            per = float(batch.graph.n_node[m]) if energy_per == "atom" else 1.0
            found.append(scored(kind, (value[m] - label[m]) / SCALES[name] / per))
    elif name in ("forces", "xtb_forces"):
        for n in np.flatnonzero(mask):
            error = (value[n] - label[n]) / SCALES[name]
            found.append(np.mean([scored(kind, x) for x in error]))
    else:
        scale = random_statistics(name).scale[np.asarray(batch.graph.nodes["numbers"])]
        for n in np.flatnonzero(mask.any(1)):
            slots = np.flatnonzero(mask[n])
            found.append(np.mean([((value[n, k] - label[n, k]) / scale[n, k]) ** 2 for k in slots]))
    return float(np.mean(found))


@pytest.mark.parametrize("energy_per", ["structure", "atom"])
@pytest.mark.parametrize("kind", ["huber", "mse", "mae"])
def test_every_term_against_its_definition(kind, energy_per):
    spec = spec_of(kind, energy_per)
    terms = quick_jit(lambda p, b: loss_terms(spec, p, b))(random_prediction(), random_batch())
    assert set(terms) == set(EVERY)
    for name, term in terms.items():
        expected = expected_term(name, kind, energy_per)
        np.testing.assert_allclose(term, expected, rtol=EXACT, err_msg=name)


def test_slots_are_averaged_before_atoms():
    """A hydrogen with one slot wrong by one scale weighs as much as a metal with nine."""
    positions, graph = make_graph(three(), SIZE)
    numbers, target = np.asarray(graph.nodes["numbers"]), TARGETS["orbital"]
    mask = target.mask(numbers, True)
    hydrogen, palladium = (int(np.flatnonzero(numbers == z)[0]) for z in (1, 46))
    assert (mask[hydrogen].sum(), mask[palladium].sum()) == (2, 9)
    spec, labels = spec_of(terms=("orbital",)), jnp.zeros((SIZE.nodes, 10))
    scale = random_statistics("orbital").scale[numbers]
    found = []
    for atom in (hydrogen, palladium):
        wrong = np.zeros((SIZE.nodes, 10))
        wrong[atom] = scale[atom] * mask[atom]
        prediction = Prediction(jnp.zeros(5), positions, {"orbital": jnp.asarray(wrong)})
        batch = Batch(positions, graph, {"orbital": labels, "orbital/mask": jnp.asarray(mask)})
        found.append(float(loss_terms(spec, prediction, batch)["orbital"]))
    assert found[0] == pytest.approx(1 / mask.any(1).sum(), rel=1e-12)
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_masked_labels_have_no_influence():
    """Not even NaN: neither on the value nor on the gradient."""
    spec, prediction, batch = spec_of(), random_prediction(), random_batch()

    @quick_jit
    def value_and_gradient(prediction, batch):
        def total(p):
            terms = loss_terms(spec, p, batch)
            return total_loss(dict.fromkeys(EVERY, jnp.ones(())), terms)

        return jax.value_and_grad(total)(prediction)

    spoilt = {}
    for name in EVERY:
        label, mask = batch.targets[name], np.asarray(batch.targets[f"{name}/mask"])
        kept = mask.reshape(mask.shape + (1,) * (label.ndim - mask.ndim))
        assert not kept.all()
        spoilt[name], spoilt[f"{name}/mask"] = np.where(kept, label, np.nan), mask
    clean = value_and_gradient(prediction, batch)
    jax.tree.map(
        np.testing.assert_array_equal,
        clean,
        value_and_gradient(prediction, Batch(*batch[:2], spoilt)),
    )
    for name in EVERY:  # a masked prediction gets no gradient, an unmasked one does
        mask = np.asarray(batch.targets[f"{name}/mask"])
        gradient = value_of(name, clean[1])
        assert not gradient[~mask].any()
        assert gradient[mask].any()


@pytest.mark.parametrize("name", EVERY)
def test_masks_are_independent(name):
    """Hiding every label of one kind makes its term 0 and changes no other."""
    spec, prediction, batch = spec_of(), random_prediction(), random_batch()
    targets = dict(batch.targets)
    targets[f"{name}/mask"] = jnp.zeros_like(targets[f"{name}/mask"])
    before = COMPILED_TERMS(prediction, batch)
    after = COMPILED_TERMS(prediction, Batch(*batch[:2], targets))
    assert after[name] == 0.0 < before[name]
    for other in spec.terms:
        if other != name:
            assert after[other] == before[other]


COMPILED_TERMS = quick_jit(lambda p, b: loss_terms(spec_of(), p, b))


def test_total_is_the_weighted_sum():
    rng = np.random.default_rng(0)
    terms = {n: jnp.asarray(rng.normal()) for n in EVERY}
    weights = {n: jnp.asarray(rng.uniform()) for n in EVERY}
    expected = sum(float(weights[n]) * float(terms[n]) for n in EVERY)
    assert float(total_loss(weights, terms)) == pytest.approx(expected, rel=EXACT)


def test_huber_joins_smoothly():
    """Value and slope are continuous at the delta; linear beyond."""
    spec = spec_of("huber", terms=("energy",))
    positions, graph = make_graph(three(), SIZE)
    label = {"energy": jnp.zeros(5), "energy/mask": jnp.arange(5) < 1}

    @quick_jit
    def both(x):
        def term(x):
            energy = jnp.zeros(5).at[0].set(x * SCALES["energy"])
            return loss_terms(
                spec, Prediction(energy, positions, {}), Batch(positions, graph, label)
            )["energy"]

        return jax.value_and_grad(term)(x)

    below, above = both(0.8 - 1e-9), both(0.8 + 1e-9)
    assert float(below[0]) == pytest.approx(float(above[0]), abs=1e-8)
    assert float(below[1]) == pytest.approx(float(above[1]), abs=1e-8)
    assert float(both(50.0)[1]) == pytest.approx(0.8)
    assert float(both(-0.3)[0]) == pytest.approx(0.045)


# --------------------------------------------------------------------------- error sums


def test_errors_against_their_definition():
    batch, prediction = random_batch(), random_prediction()
    sums = quick_jit(lambda p, b: error_sums(EVERY, p, b))(prediction, batch)
    metrics = from_sums(jax.device_get(sums))
    for name in EVERY:
        label, mask = (np.asarray(batch.targets[k]) for k in (name, f"{name}/mask"))
        error = (value_of(name, prediction) - label)[mask]
        unit, factor = "e", 1.0
        if "energy" in name:
            unit, factor = "meV", 1e3
        elif "forces" in name:
            unit, factor = "meV_per_A", 1e3
        mae, rmse = np.abs(error).mean() * factor, np.sqrt((error**2).mean()) * factor
        assert metrics[f"{name}_mae_{unit}"] == pytest.approx(mae, rel=1e-12)
        assert metrics[f"{name}_rmse_{unit}"] == pytest.approx(rmse, rel=1e-12)
    mask, n_atoms = np.asarray(batch.targets["energy/mask"]), np.asarray(batch.graph.n_node)
    error = np.asarray(prediction.energy - batch.targets["energy"])[mask] / n_atoms[mask]
    assert metrics["energy_mae_meV_per_atom"] == pytest.approx(1e3 * np.abs(error).mean())
    assert metrics["energy_rmse_meV_per_atom"] == pytest.approx(1e3 * np.sqrt((error**2).mean()))


def test_errors_add_up_over_batches():
    batches, prediction = [random_batch(0), random_batch(5)], random_prediction()
    parts = [error_sums(("energy", "onsite"), prediction, b) for b in batches]
    total = add_sums(jax.device_get(parts))
    errors = []
    for b in batches:
        mask = np.asarray(b.targets["onsite/mask"])
        errors.append(np.asarray(prediction.charges["onsite"] - b.targets["onsite"])[mask])
    expected = np.abs(np.concatenate(errors)).mean()
    assert from_sums(total)["onsite_mae_e"] == pytest.approx(expected, rel=1e-12)


def test_labels_without_data_are_left_out():
    sums = {"energy": np.array([1.0, 1.0, 2.0]), "forces": np.zeros(3)}
    assert set(from_sums(sums)) == {"energy_mae_meV", "energy_rmse_meV"}


def test_small_things():
    assert needed_targets(("energy", "forces", "onsite", "xtb_forces")) == ("onsite", "xtb_forces")
