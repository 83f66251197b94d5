"""Charge heads cost nothing at inference, and nothing in training where their weight is 0.

The energy-and-force program of a network that was trained on charges is that of an energy-only one:
the same operations, flops and bytes; the heads' parameters are not among its arguments.
"""

from __future__ import annotations

import re
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
    quick_jit,
    random_params,
    random_statistics,
    three,
)

from orbq.losses import Batch, LossSpec, loss_terms, total_loss
from orbq.models.potential import BACKBONES, Params, Potential, make_potential, predict
from orbq.targets import TARGETS
from orbq.train import ADAM, Hyper, TrainState, make_train_step

SIZE = Size(nodes=16, edges=110, structures=5)
AUXILIARY = ("onsite", "shell", "xtb_energy")
SCALES = {"energy": 3.0, "forces": 1.0, "xtb_energy": 2.0}


class Trained(NamedTuple):
    """A potential, and parameters after a few updates."""

    potential: Potential
    params: Params


@lru_cache
def batch() -> Batch:
    rng = np.random.default_rng(0)
    positions, graph = make_graph(three(), SIZE)
    numbers, mask = np.asarray(graph.nodes["numbers"]), np.asarray(graph.globals["mask"])
    shapes = {"energy": (len(mask),), "xtb_energy": (len(mask),), "forces": (len(numbers), 3)}
    masks = {"energy": mask, "xtb_energy": mask, "forces": numbers > 0}
    for name in ("onsite", "shell"):
        masks[name] = TARGETS[name].mask(numbers, True)
        shapes[name] = masks[name].shape
    targets = {name: jnp.asarray(rng.normal(size=shape), float) for name, shape in shapes.items()}
    targets |= {f"{name}/mask": jnp.asarray(m) for name, m in masks.items()}
    return Batch(positions, graph, targets)


def potential_of(backbone: str, targets: tuple[str, ...]) -> Potential:
    kind = "invariant" if backbone == "invariant" else "equivariant"
    architecture = TINY._replace(backbone=backbone, n_layers=1, heads=heads(kind, targets))
    return make_potential(architecture, constants(targets))


def hyper(weight: float, targets: tuple[str, ...]) -> Hyper:
    weights = {"energy": 1.0, "forces": 2.0} | dict.fromkeys(targets, weight)
    settings = Hyper(weights, 1e-2, 0.0, 10.0, 0.1, 1e6, 0.9, 0.01)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), settings)


@lru_cache
def trained(backbone: str, targets: tuple[str, ...], weight: float, n_steps: int = 3) -> Trained:
    """Trained on the batch; what is common to all potentials starts alike."""
    potential, everything = potential_of(backbone, targets), potential_of(backbone, AUXILIARY)
    params = jax.tree.map(jnp.asarray, random_params(everything, "float32"))
    mine = jax.eval_shape(potential.init, jax.random.key(0), *batch()[:2])
    params = {name: params[name] for name in mine}
    statistics = {n: random_statistics(n) for n in targets if n != "xtb_energy"}
    terms = ("energy", "forces", *targets)
    spec = LossSpec(terms, "huber", 1.0, "structure", SCALES, statistics)
    step = quick_jit(make_train_step(potential, spec))
    state = TrainState(params, params, ADAM.init(params), jnp.zeros((), jnp.int32))
    for _ in range(n_steps):
        state, _ = step(state, batch(), hyper(weight, targets))
    return Trained(potential, state.params)


def program(of: Trained, targets: tuple[str, ...] = ()) -> Any:
    """The lowered energies and forces, and targets if there are any, of the batch."""

    def energies_and_forces(params, positions, graph):
        return predict(of.potential, params, positions, graph, targets)

    return quick_jit(energies_and_forces).lower(of.params, *batch()[:2])


def operations(text: str) -> list[str]:
    """The instructions of a program, without the places in the source that they come from."""
    lines = [line for line in text.splitlines() if " = " in line]
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines]


def is_head(path: Any) -> bool:
    return path[0].key.startswith("head_") or path[0].key == "xtb_energy"


# --------------------------------------------------------------------------- inference


@pytest.mark.parametrize("backbone", BACKBONES)
def test_inference_is_that_of_an_energy_only_network(backbone):
    multitask = program(trained(backbone, AUXILIARY, 1.0))
    alone = Trained(potential_of(backbone, ()), {})
    params = trained(backbone, AUXILIARY, 1.0).params
    kept = {k: v for k, v in params.items() if k in ("backbone", "energy")}
    assert set(kept) < set(params)
    energy_only = program(alone._replace(params=kept))
    assert multitask.as_text() == energy_only.as_text()
    compiled = [lowered.compile() for lowered in (multitask, energy_only)]
    assert operations(compiled[0].as_text()) == operations(compiled[1].as_text())
    costs = [c.cost_analysis() for c in compiled]
    for name in ("flops", "bytes accessed", "transcendentals"):
        assert costs[0][name] == costs[1][name] > 0, name
    sizes = [c.memory_analysis() for c in compiled]
    assert sizes[0].argument_size_in_bytes == sizes[1].argument_size_in_bytes
    assert sizes[0].temp_size_in_bytes == sizes[1].temp_size_in_bytes


def test_inference_with_charges_is_another_program():
    """So that equality above means something."""
    of = trained("nequip", AUXILIARY, 1.0)
    without, with_charges = program(of), program(of, ("onsite",))
    flops = [lowered.compile().cost_analysis()["flops"] for lowered in (without, with_charges)]
    assert flops[1] > flops[0]


def test_parameters_of_heads_need_not_even_exist():
    """Their buffers are deleted; energies and forces come out, the charges do not."""
    of = trained("nequip", AUXILIARY, 1.0)
    function = quick_jit(lambda p, x, g: predict(of.potential, p, x, g))
    expected = function(of.params, *batch()[:2])
    spoilt = jax.tree.map(jnp.copy, of.params)
    deleted = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(spoilt):
        if is_head(path):
            leaf.delete()
            deleted += 1
    assert deleted > 10
    found = function(spoilt, *batch()[:2])
    np.testing.assert_array_equal(found.energy, expected.energy)
    np.testing.assert_array_equal(found.forces, expected.forces)
    with pytest.raises(RuntimeError, match="deleted"):
        quick_jit(lambda p, x, g: predict(of.potential, p, x, g, ("onsite",)))(spoilt, *batch()[:2])


# --------------------------------------------------------------------------- weights of 0
# A configuration's weight of 0 leaves the head and its term out: the same program, bit for bit
# (test_fit.py). In a grid of weights the head is there and its weight is a traced 0.


@pytest.mark.parametrize("backbone", ["nequip", "mace"])
def test_terms_of_traced_weight_zero_add_exact_zeros_to_every_gradient(backbone):
    potential, targets = potential_of(backbone, AUXILIARY), AUXILIARY
    statistics = {n: random_statistics(n) for n in targets if n != "xtb_energy"}
    spec = LossSpec(targets, "huber", 1.0, "structure", SCALES, statistics)

    def loss(params, weight):
        found = predict(potential, params, batch().positions, batch().graph, targets)
        return total_loss(dict.fromkeys(targets, weight), loss_terms(spec, found, batch()))

    params = random_params(potential, "float32")
    gradient = quick_jit(jax.grad(loss))
    zero, one = (gradient(params, jnp.float32(w)) for w in (0.0, 1.0))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zero))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(one["backbone"]))


@pytest.mark.parametrize("backbone", ["nequip", "mace"])
def test_a_traced_weight_of_zero_trains_the_same_network(backbone):
    """To the rounding of float32 after three updates, and no further: with the head it is another
    program, in which XLA adds the same numbers up in another order."""
    with_head, without = trained(backbone, AUXILIARY, 0.0), trained(backbone, (), 0.0)
    taught = trained(backbone, AUXILIARY, 1.0)
    changed = 0.0
    for name in without.params:
        rows = (jax.tree.leaves(t.params[name]) for t in (with_head, without, taught))
        for a, b, c in zip(*rows, strict=True):
            size = float(jnp.abs(b).max())
            assert float(jnp.abs(a - b).max()) <= 1e-5 * size
            changed = max(changed, float(jnp.abs(c - b).max()) / size)
    assert changed > 1e-2  # which another weight does not
