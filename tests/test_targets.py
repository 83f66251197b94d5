"""The table of targets and their normalisation, against plain NumPy and under rotation."""

from __future__ import annotations

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import make_graph, moved, of_name, quick_jit, random_rotation, representation

from orbq import orbitals as orb
from orbq.losses import Batch, LossSpec, loss_terms
from orbq.models.potential import Prediction
from orbq.targets import (
    CHARGE_TARGETS,
    SCALE_FLOOR,
    TARGETS,
    Moments,
    Statistics,
    Target,
    moments,
    statistics,
)

PER_ATOM = tuple(n for n, t in TARGETS.items() if not n.startswith("xtb_"))
NUMBERS = np.array([1, 1, 1, 6, 6, 8, 26, 26, 26, 26])
EXACT = 1e-12  # float64 rounding of sums over ten atoms

every_target = pytest.mark.parametrize("name", PER_ATOM)


def random_onsite(numbers: np.ndarray, seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).normal(size=(len(numbers), 10, 10))
    return orb.onsite_from_blocks((blocks + blocks.transpose(0, 2, 1)) / 2, numbers)


def random_arrays(numbers: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The per-atom label arrays of a data set."""
    rng = np.random.default_rng(seed)
    return {"onsite": random_onsite(numbers, seed), "dft_charges": rng.normal(size=len(numbers))}


def values_of(name: str, numbers: np.ndarray = NUMBERS, seed: int = 0) -> np.ndarray:
    return TARGETS[name].extract(random_arrays(numbers, seed), slice(None))


def expected_statistics(target: Target, numbers, values, mask) -> Statistics:
    """Straight from the definition, with loops."""
    mean, scale = np.zeros((87, target.k)), np.zeros((87, target.k))
    for shell in range(len(target.shell_names)):
        columns = np.flatnonzero(target.shell == shell)
        deviations, where = [], {}
        for z in np.unique(numbers):
            found = [(i, c) for i in np.flatnonzero(numbers == z) for c in columns if mask[i, c]]
            if not found:
                continue
            with_mean = [values[i, c] for i, c in found if target.has_mean[c]]
            mu = np.mean(with_mean) if with_mean else 0.0
            mean[z, [c for c in columns if target.has_mean[c]]] = mu
            where[z] = [values[i, c] - mu * target.has_mean[c] for i, c in found]
            deviations += where[z]
        pooled = np.sqrt(np.mean(np.square(deviations))) if deviations else 0.0
        for z in range(87):
            rms = np.sqrt(np.mean(np.square(where[z]))) if z in where else pooled
            scale[z, columns] = max(rms, SCALE_FLOOR)
    return Statistics(mean, scale)


# --------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", TARGETS)
def test_columns_agree_with_the_irreps(name):
    target = TARGETS[name]
    irreps = e3nn.Irreps(target.irreps)
    if name == "orbital":  # predicted as 23 irreps, scored as ten charges
        assert irreps == e3nn.Irreps(orb.DENSITY_IRREPS)
        assert target.k == 10
    else:
        assert irreps.dim == target.k
        degrees = np.concatenate([np.full(mul * ir.dim, ir.l) for mul, ir in irreps])
        assert not target.has_mean[degrees > 0].any()  # a mean of l > 0 would choose a direction
    for method in orb.METHODS:
        assert target.elements(method).shape == (87, target.k)
        assert not target.elements(method)[0].any()
    assert target.shell.shape == target.has_mean.shape == (target.k,)
    assert set(target.shell) == set(range(len(target.shell_names)))


@pytest.mark.parametrize("name", CHARGE_TARGETS)
def test_columns_add_up_to_the_atomic_charge(name):
    if name == "dft":
        assert TARGETS[name].charge.tolist() == [1.0]
        return
    expected = orb.atomic_charges(random_onsite(NUMBERS))
    np.testing.assert_allclose(values_of(name) @ TARGETS[name].charge, expected, atol=EXACT)


@every_target
def test_columns_outside_the_mask_are_zero(name):
    mask = TARGETS[name].mask(NUMBERS, True)
    np.testing.assert_array_equal(values_of(name)[~mask], 0.0)
    assert values_of(name)[mask].all()


def test_masks_need_a_label():
    labelled = np.arange(10) < 4
    mask = TARGETS["shell"].mask(NUMBERS, labelled)
    np.testing.assert_array_equal(mask[:4], TARGETS["shell"].elements(orb.GFN1)[NUMBERS[:4]])
    assert not mask[4:].any()


def test_xtb_targets_keep_their_shapes():
    arrays = {"xtb_energy": np.arange(4.0), "xtb_forces": np.arange(12.0).reshape(4, 3)}
    rows = np.array([1, 3])
    assert TARGETS["xtb_energy"].extract(arrays, rows).tolist() == [[1.0], [3.0]]
    assert TARGETS["xtb_forces"].extract(arrays, rows).tolist() == [[3, 4, 5], [9, 10, 11]]


# --------------------------------------------------------------------------- statistics


@every_target
def test_statistics_against_their_definition(name):
    target, values = TARGETS[name], values_of(name)
    mask = target.mask(NUMBERS, np.arange(10) != 2)  # one atom of an unlabelled structure
    found = statistics(target, moments(target, NUMBERS, values, mask))
    expected = expected_statistics(target, NUMBERS, values, mask)
    np.testing.assert_allclose(found.mean, expected.mean, atol=EXACT)
    np.testing.assert_allclose(found.scale, expected.scale, atol=EXACT)


@every_target
def test_normalised_columns_have_mean_zero_and_unit_size(name):
    target, values = TARGETS[name], values_of(name)
    mask = target.mask(NUMBERS, True)
    mean, scale = statistics(target, moments(target, NUMBERS, values, mask))
    u = (values - mean[NUMBERS]) / scale[NUMBERS]
    for z in (1, 6, 26):
        rows = z == NUMBERS
        for shell in range(len(target.shell_names)):
            columns = target.shell == shell
            some = u[rows][:, columns][mask[rows][:, columns]]
            if some.size:
                assert np.mean(some**2) == pytest.approx(1.0, abs=1e-10)
            central = columns & target.has_mean
            some = u[rows][:, central][mask[rows][:, central]]
            if some.size:
                assert np.mean(some) == pytest.approx(0.0, abs=1e-10)


def test_moments_add_up_over_chunks():
    target, values = TARGETS["onsite"], values_of("onsite")
    mask = target.mask(NUMBERS, True)
    whole = moments(target, NUMBERS, values, mask)
    parts = [moments(target, NUMBERS[s], values[s], mask[s]) for s in (slice(0, 4), slice(4, None))]
    added = Moments(*(a + b for a, b in zip(*parts, strict=True)))
    for a, b in zip(whole, added, strict=True):
        np.testing.assert_allclose(a, b, atol=EXACT)


def test_masked_values_never_enter():
    target, values = TARGETS["onsite"], values_of("onsite")
    mask = target.mask(NUMBERS, True)
    spoilt = np.where(mask, values, np.nan)
    for a, b in zip(
        moments(target, NUMBERS, values, mask), moments(target, NUMBERS, spoilt, mask), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@every_target
def test_absent_elements_take_the_common_scale(name):
    target, values = TARGETS[name], values_of(name)
    mask = target.mask(NUMBERS, True)
    mean, scale = statistics(target, moments(target, NUMBERS, values, mask))
    assert not mean[79].any()
    assert not mean[0].any()
    everywhere = scale[NUMBERS]
    assert (scale[79] >= everywhere.min(0) - EXACT).all()
    assert (scale[79] <= everywhere.max(0) + EXACT).all()
    assert (scale >= SCALE_FLOOR).all()


def test_scales_are_floored():
    """Constant columns: their spread is rounding noise, not chemistry."""
    target = TARGETS["atomic"]
    values = np.full((10, 1), 0.3) + 1e-9 * np.arange(10)[:, None]
    found = statistics(target, moments(target, NUMBERS, values, target.mask(NUMBERS, True)))
    np.testing.assert_array_equal(found.scale, SCALE_FLOOR)
    np.testing.assert_allclose(found.mean[[1, 6, 8, 26]], 0.3, atol=1e-8)


def test_no_label_at_all_gives_the_floor():
    target = TARGETS["onsite"]
    nothing = moments(target, NUMBERS, values_of("onsite"), target.mask(NUMBERS, False))
    found = statistics(target, nothing)
    assert not found.mean.any()
    np.testing.assert_array_equal(found.scale, SCALE_FLOOR)


# --------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("name", ["density", "onsite"])
@pytest.mark.parametrize("improper", [False, True])
def test_normalised_targets_turn_with_the_molecule(name, improper):
    target, values = TARGETS[name], values_of(name)
    mean, scale = statistics(target, moments(target, NUMBERS, values, target.mask(NUMBERS, True)))
    d = representation(target.irreps, random_rotation(3, improper))

    def normalised(x):
        return (x - mean[NUMBERS]) / scale[NUMBERS]

    before, after = normalised(values), normalised(values @ d.T)
    np.testing.assert_allclose(after, before @ d.T, atol=EXACT)
    np.testing.assert_allclose((after**2).sum(1), (before**2).sum(1), atol=1e-10)


@pytest.mark.parametrize("name", ["density", "onsite"])
def test_statistics_do_not_depend_on_the_frame(name):
    target, values = TARGETS[name], values_of(name)
    mask = target.mask(NUMBERS, True)
    d = representation(target.irreps, random_rotation(3))
    before = statistics(target, moments(target, NUMBERS, values, mask))
    after = statistics(target, moments(target, NUMBERS, values @ d.T, mask))
    np.testing.assert_allclose(after.scale, before.scale, atol=EXACT)
    np.testing.assert_allclose(after.mean, before.mean, atol=EXACT)


@pytest.mark.parametrize("name", ["density", "onsite", "orbital"])
def test_loss_is_unchanged_by_turning_molecules_and_labels(name):
    """Exactly so for the irreps; the ten orbital charges' loss sees the frame (so that the two
    targets are worth telling apart)."""
    molecule, d = of_name("CH3OH"), representation(orb.ONSITE_IRREPS, random_rotation(8))
    label, guess = (random_onsite(molecule.numbers, seed) for seed in (1, 2))
    target = TARGETS[name]
    extract = {"orbital": orb.orbital_charges}.get(name, lambda x: x[:, : target.k])
    mask = target.mask(molecule.numbers, True)
    scale = statistics(target, moments(target, molecule.numbers, extract(label), mask))

    def loss(turn):
        with jax.enable_x64(True):
            turned = moved(molecule, random_rotation(8)) if turn is d else molecule
            positions, graph = make_graph([turned])
            values = {name: jnp.asarray(extract(guess @ turn.T))}
            prediction = Prediction(jnp.zeros(1), jnp.zeros_like(positions), values)
            targets = {
                name: jnp.asarray(extract(label @ turn.T)),
                f"{name}/mask": jnp.asarray(mask),
            }
            spec = LossSpec((name,), "mse", 1.0, "structure", {}, {name: scale})
            batch = Batch(positions, graph, targets)
            return float(quick_jit(lambda p, b: loss_terms(spec, p, b)[name])(prediction, batch))

    before, after = loss(np.eye(47)), loss(d)
    if name == "orbital":
        assert abs(after - before) > 1e-3 * before
    else:
        assert after == pytest.approx(before, rel=1e-12)
