"""A training step against NumPy: schedule, clipping, Adam, averaging; many runs as one program."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import (
    TINY,
    Size,
    constants,
    heads,
    make_graph,
    of_name,
    quick_jit,
    random_params,
    random_statistics,
    three,
)

from orbq.losses import Batch, LossSpec, error_sums
from orbq.models.potential import Potential, make_potential, predict
from orbq.targets import TARGETS
from orbq.train import (
    ADAM,
    Hyper,
    TrainState,
    learning_rate,
    make_evaluate,
    make_init,
    make_train_step,
    next_stage,
)

TERMS = ("energy", "forces", "density")
SIZE = Size(nodes=16, edges=110, structures=4)
FLOAT32 = 2e-6  # a few roundings (6e-8) of sums of some ten terms of order 1


class Setup(NamedTuple):
    """A potential with one head, its compiled step, and how often that was traced."""

    potential: Potential
    spec: LossSpec
    step: Any
    traced: list[int]


@lru_cache
def setup() -> Setup:
    targets = ("density",)
    architecture = TINY._replace(lmax=1, heads=heads("equivariant", targets))
    potential = make_potential(architecture, constants(targets))
    statistics = {"density": random_statistics("density")}
    spec = LossSpec(TERMS, "huber", 1.0, "structure", {"energy": 3.0, "forces": 1.0}, statistics)
    step, traced = make_train_step(potential, spec), []

    def counted(*args: Any) -> Any:
        traced.append(1)
        return step(*args)

    return Setup(potential, spec, quick_jit(counted), traced)


def hyper(**changes: Any) -> Hyper:
    base = {
        "weights": {"energy": 1.0, "forces": 2.0, "density": 3.0},
        "learning_rate": 1e-2,
        "warmup_steps": 0.0,
        "n_steps": 10.0,
        "final_fraction": 0.1,
        "clip_norm": 1e6,
        "ema_decay": 0.9,
        "weight_decay": 0.0,
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), Hyper(**{**base, **changes}))


@lru_cache
def batch() -> Batch:
    rng = np.random.default_rng(0)
    positions, graph = make_graph([of_name("CH3OH"), three()[1]], SIZE)
    numbers = np.asarray(graph.nodes["numbers"])
    real, mask = numbers > 0, TARGETS["density"].mask(numbers, True)
    targets = {
        "energy": rng.normal(size=SIZE.structures) * np.asarray(graph.globals["mask"]),
        "energy/mask": np.asarray(graph.globals["mask"]),
        "forces": rng.normal(size=(SIZE.nodes, 3)) * real[:, None],
        "forces/mask": real,
        "density": rng.normal(size=mask.shape) * mask,
        "density/mask": mask,
    }
    return Batch(positions, graph, {n: jnp.asarray(t) for n, t in targets.items()})


def start(seed: int = 0) -> TrainState:
    params = jax.tree.map(jnp.asarray, random_params(setup().potential, "float32", seed))
    return TrainState(params, params, ADAM.init(params), jnp.zeros((), jnp.int32))


def after(n: int, settings: Hyper, seed: int = 0) -> tuple[list[TrainState], list[dict]]:
    """States and metrics of ``n`` steps from ``start(seed)``."""
    states, metrics = [start(seed)], []
    for _ in range(n):
        state, found = setup().step(states[-1], batch(), settings)
        states.append(state)
        metrics.append(jax.device_get(found))
    return states, metrics


def close(a: Any, b: Any, rtol: float = FLOAT32, atol: float = FLOAT32) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# --------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_learning_rate_schedule(warmup):
    settings = hyper(warmup_steps=float(warmup), n_steps=100.0, learning_rate=3e-3)
    steps = np.arange(130)
    progress = np.clip((steps - warmup) / (100 - warmup), 0, 1)
    decayed = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))
    expected = 3e-3 * np.minimum((steps + 1) / max(warmup, 1), decayed)
    found = jax.vmap(lambda s: learning_rate(s, settings))(jnp.asarray(steps))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.max() == pytest.approx(3e-3, rel=1e-6)
    assert found[110] == pytest.approx(3e-4, rel=1e-5)
    assert (np.diff(found[: max(warmup, 1)]) > 0).all()
    assert (np.diff(found[max(warmup, 1) : 100]) < 0).all()


# --------------------------------------------------------------------------- one step


def numpy_adam(gradients: list[Any], params: Any, settings: Hyper) -> Any:
    """Adam with decoupled weight decay, b1 = 0.9, b2 = 0.99, in NumPy and float64."""
    leaves, tree = jax.tree.flatten(params)
    p = [np.asarray(x, np.float64) for x in leaves]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t, gradient in enumerate(gradients, start=1):
        rate = float(learning_rate(jnp.asarray(t - 1), settings))
        for k, g in enumerate(jax.tree.leaves(gradient)):
            g = np.asarray(g, np.float64)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.99 * v[k] + 0.01 * g * g
            update = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.99**t)) + 1e-8)
            p[k] = p[k] - rate * (update + float(settings.weight_decay) * p[k])
    return jax.tree.unflatten(tree, p)


def gradient_of(before: TrainState, now: TrainState) -> Any:
    """What Adam was given: its first moment is m' = 0.9 m + 0.1 g."""
    return jax.tree.map(lambda a, b: (b - 0.9 * a) / 0.1, before.optimizer.mu, now.optimizer.mu)


def test_updates_are_adam_s():
    settings = hyper(weight_decay=0.3, warmup_steps=2.0)
    states, _ = after(3, settings)
    gradients = [gradient_of(states[k], states[k + 1]) for k in range(3)]
    # 1e-3 of the step: gradients near zero are known to float32 rounding of the moments only
    close(states[3].params, numpy_adam(gradients, states[0].params, settings), atol=1e-5)
    assert int(states[3].step) == 3


def test_average_of_the_parameters():
    states, _ = after(4, hyper(ema_decay=0.25))
    expected = states[0].params
    for t, state in enumerate(states[1:]):
        decay = min(0.25, (t + 1) / (t + 10))  # a short memory at first
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, state.params)
    close(states[-1].ema, expected)
    assert not np.allclose(*(jax.tree.leaves(t)[0] for t in (states[-1].ema, states[-1].params)))


def test_gradients_are_clipped_to_the_norm():
    free, clipped = (after(1, hyper(clip_norm=c)) for c in (1e6, 1e-2))
    norm = float(free[1][0]["gradient_norm"])
    assert norm > 1e-2
    assert clipped[1][0]["gradient_norm"] == pytest.approx(norm)  # what is reported is unclipped
    gradients = [gradient_of(states[0], states[1]) for states, _ in (free, clipped)]
    sizes = [
        np.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(g)))
        for g in gradients
    ]
    assert sizes[0] == pytest.approx(norm, rel=1e-5)
    assert sizes[1] == pytest.approx(1e-2, rel=1e-5)
    close(gradients[1], jax.tree.map(lambda g: g * (1e-2 / norm), gradients[0]))


def test_reported_loss_is_the_weighted_sum_of_the_terms():
    (_, found), (_, doubled) = (
        after(1, hyper()),
        after(1, hyper(weights={"energy": 2.0, "forces": 4.0, "density": 6.0})),
    )
    metrics = found[0]
    expected = metrics["energy"] + 2 * metrics["forces"] + 3 * metrics["density"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert doubled[0]["loss"] == pytest.approx(2 * metrics["loss"], rel=1e-6)
    assert set(metrics) == {"loss", "gradient_norm", "learning_rate", *TERMS}


def test_steps_lower_the_loss():
    _, metrics = after(30, hyper(n_steps=30.0))
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]


def test_a_weight_of_zero_gives_the_head_no_gradient():
    """And the rest exactly what is left: the gradient is linear in the weight."""

    def gradient(weight: float) -> Any:
        weights = {"energy": 1.0, "forces": 1.0, "density": weight}
        states, _ = after(1, hyper(weights=weights))
        return gradient_of(*states)

    without, one, two = (gradient(w) for w in (0.0, 1.0, 2.0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(without["head_density"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(one["head_density"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(without["backbone"]))
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(two))
    for a, b, c in zip(*(jax.tree.leaves(g) for g in (without, one, two)), strict=True):
        np.testing.assert_allclose(c - b, b - a, atol=FLOAT32 * size)


def test_a_weight_of_zero_trains_what_a_potential_without_the_head_does():
    """The head adds exact zeros to every gradient and nothing to its norm, but it is another
    program, which rounds elsewhere. (A configuration's weight of 0 leaves the head out.)"""
    weights = {"energy": 1.0, "forces": 2.0}
    states, _ = after(4, hyper(weights={**weights, "density": 0.0}))
    alone = make_potential(setup().potential.architecture._replace(heads=()), constants(()))
    step = quick_jit(make_train_step(alone, setup().spec._replace(terms=("energy", "forces"))))
    params = {k: v for k, v in start().params.items() if k != "head_density"}
    state = TrainState(params, params, ADAM.init(params), jnp.zeros((), jnp.int32))
    for _ in range(4):
        state, _ = step(state, batch(), hyper(weights=weights))
    close(state.params, {name: states[-1].params[name] for name in params})
    heads_after, heads_before = (s.params["head_density"] for s in (states[-1], states[0]))
    jax.tree.map(np.testing.assert_array_equal, heads_after, heads_before)


# --------------------------------------------------------------------------- many runs as one


def test_a_grid_of_runs_equals_the_separate_runs():
    """Weights, learning rates and seeds as one vmapped program, traced once."""
    settings = [
        hyper(),
        hyper(weights={"energy": 1.0, "forces": 2.0, "density": 0.0}),
        hyper(learning_rate=3e-3, warmup_steps=2.0, clip_norm=0.5),
    ]
    seeds, (_, _, _, traced) = (0, 0, 1), setup()
    alone = [after(3, s, seed) for s, seed in zip(settings, seeds, strict=True)]
    assert len(traced) == 1  # nothing in Hyper is structure: one program served every test above

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    step, count = make_train_step(setup().potential, setup().spec), []

    def counted(*args: Any) -> Any:
        count.append(1)
        return jax.vmap(step, in_axes=(0, None, 0))(*args)

    grid, states = quick_jit(counted), stack([start(seed) for seed in seeds])
    for _ in range(3):
        states, metrics = grid(states, batch(), stack(settings))
    assert len(count) == 1
    for r, (single, found) in enumerate(alone):
        run = jax.tree.map(lambda leaf, r=r: leaf[r], (states.params, states.ema))
        # float32 sums in another order; Adam divides by the gradient's size
        close(run, (single[-1].params, single[-1].ema), rtol=1e-5, atol=1e-5)
        assert metrics["loss"][r] == pytest.approx(found[-1]["loss"], rel=1e-5)


# --------------------------------------------------------------------------- init, evaluate


def test_fresh_state():
    shapes = jax.eval_shape(make_init(setup().potential), jax.random.key(0), batch())
    wanted = start()
    assert jax.tree.structure(shapes) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_stage_goes_on_from_the_average_with_fresh_moments():
    """The energy readout goes on as that of GFN1 energies if there was one."""
    rng = np.random.default_rng(0)
    params = {
        n: {"w": jnp.asarray(rng.normal(size=3))} for n in ("backbone", "energy", "xtb_energy")
    }
    ema = jax.tree.map(lambda x: x + 1.0, params)
    moments = jax.tree.map(jnp.ones_like, ADAM.init(params))
    found = next_stage(TrainState(params, ema, moments, jnp.asarray(7, jnp.int32)))
    assert int(found.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.optimizer))
    for tree in (found.params, found.ema):
        np.testing.assert_array_equal(tree["backbone"]["w"], ema["backbone"]["w"])
        np.testing.assert_array_equal(tree["energy"]["w"], ema["xtb_energy"]["w"])
    arrays = jax.tree.leaves(found)  # a step takes them over: no two may share memory
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)
    without = {n: params[n] for n in ("backbone", "energy")}
    kept = next_stage(TrainState(without, without, ADAM.init(without), jnp.asarray(7, jnp.int32)))
    np.testing.assert_array_equal(kept.params["energy"]["w"], without["energy"]["w"])


def test_a_step_keeps_shapes_and_types():
    """Else the second step would be compiled again, and buffers could not be reused."""
    for double in (False, True):
        with jax.enable_x64(double):
            potential = setup().potential
            dtype = jnp.zeros(()).dtype
            example = jax.tree.map(
                lambda x, d=dtype: x.astype(d) if x.dtype.kind == "f" else x,
                jax.device_get(batch()),
            )
            example = jax.tree.map(jnp.asarray, example)
            settings = jax.tree.map(lambda x, d=dtype: jnp.asarray(x, d), jax.device_get(hyper()))
            state = jax.eval_shape(make_init(potential), jax.random.key(0), example)
            stepped, _ = jax.eval_shape(
                make_train_step(potential, setup().spec), state, example, settings
            )
        before, now = ([(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (state, stepped))
        assert before == now, f"x64 {double}"


def test_evaluate_sums_the_errors():
    potential, params, names = setup().potential, start().params, ("energy", "density")
    sums = quick_jit(make_evaluate(potential, names))(params, batch())

    @quick_jit
    def expected(params, b):
        return error_sums(names, predict(potential, params, *b[:2], ("density",)), b)

    close(sums, expected(params, batch()))
    assert float(sums["energy"][2]) == 2
