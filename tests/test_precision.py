"""bfloat16 activations: how much is rounded, and what is not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import TINY, constants, heads, make_graph, quick_jit, random_params, three

import orbq
from orbq.config import BACKBONES, parse_config
from orbq.data import architecture_of
from orbq.errors import InputError
from orbq.models.potential import Potential, make_potential, predict
from orbq.models.tensor_product import edge_tensor_product, paths

BF16 = 2.0**-8  # relative rounding of bfloat16
FLOAT32 = 2.0**-23


def potential_of(backbone: str, activations: str) -> Potential:
    """With one charge head that every backbone can have."""
    targets = ("atomic",)
    architecture = TINY._replace(
        backbone=backbone, activations=activations, heads=heads("invariant", targets)
    )
    return make_potential(architecture, constants(targets))


def predicted(backbone: str, activations: str) -> tuple[Any, Any, Any]:
    """Prediction, parameters and graph."""
    potential = potential_of(backbone, activations)
    params = jax.tree.map(jnp.asarray, random_params(potential, "float32"))
    positions, graph = make_graph(three())
    out = quick_jit(lambda p, x: predict(potential, p, x, graph, ("atomic",)))(params, positions)
    return out, params, graph


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_rounds_features_and_nothing_else(backbone):
    """Energies and forces move by some roundings; their type, the parameters' and the sum of the
    charges are those of float32."""
    full, params, graph = predicted(backbone, "full")
    half, same, _ = predicted(backbone, "bfloat16")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, same)))
    assert {leaf.dtype for leaf in jax.tree.leaves((half, same))} == {jnp.dtype(jnp.float32)}
    for a, b in ((full.energy, half.energy), (full.forces, half.forces)):
        # a dozen roundings one after the other, of numbers that partly cancel
        difference = float(jnp.abs(a - b).max() / jnp.abs(a).max())
        assert 0.01 * BF16 < difference < 30 * BF16
    charges, sizes = np.asarray(half.charges["atomic"][:, 0]), np.asarray(graph.n_node)
    sums = np.add.reduceat(charges, np.cumsum([0, *sizes[:-1]]))
    limit = 10 * FLOAT32 * np.abs(charges).sum()
    np.testing.assert_allclose(sums, graph.globals["total_charge"], atol=limit)


def test_products_are_summed_in_float32_and_rounded_once():
    table = paths(2, 2, (0, 1, 2))
    rng = np.random.default_rng(0)
    shapes = [(50, 9, 4), (50, 9), (50, len(table), 4)]
    x, y, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    x, w = (a.astype(jnp.bfloat16) for a in (x, w))
    out = edge_tensor_product(x, y, w, table)
    assert out.dtype == jnp.bfloat16
    exact = edge_tensor_product(x.astype(jnp.float32), y, w.astype(jnp.float32), table)
    error = np.abs(np.asarray(out, np.float32) - np.asarray(exact))
    assert (error <= BF16 * np.abs(exact) + 1e-6).all()

    def of_harmonics(y: Any) -> Any:
        return jnp.sum(edge_tensor_product(x, y, w, table).astype(jnp.float32) ** 2)

    assert jax.grad(of_harmonics)(y).dtype == jnp.float32  # forces pass through here


def test_the_layers_matrix_products_are_bfloat16_and_the_readouts_are_not():
    potential = potential_of("nequip", "bfloat16")
    positions, graph = make_graph(three())
    shapes = jax.eval_shape(potential.init, jax.random.key(0), positions, graph)
    jaxpr = jax.make_jaxpr(lambda p: potential.apply(p, positions, graph))(shapes)
    found = {"bfloat16": 0, "float32": 0}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[str(equation.outvars[0].aval.dtype)] += 1
    assert found["bfloat16"] > 10  # radial networks and channel mixing of two layers
    # element table, hidden layer and two readouts
    assert found["float32"] == 4


def test_the_configuration_chooses_the_activations():
    config = parse_config({"training": {"activations": "bfloat16"}})
    assert architecture_of(config).activations == "bfloat16"
    with pytest.raises(InputError, match=r"activations: is 'bfloat16', which needs .*float32"):
        parse_config({"training": {"activations": "bfloat16", "precision": "float64"}})


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("precision", ["highest", "default"])
def test_matrix_products_have_the_precision_of_the_network(backbone, precision):
    """Those of forces, stress, charges and of training on forces, whatever JAX is set to: what a
    notebook computes with a run is what training did."""
    architecture = potential_of(backbone, "full").architecture
    potential = make_potential(
        architecture._replace(matmul_precision=precision), constants(("atomic",))
    )
    params = jax.tree.map(jnp.asarray, random_params(potential, "float32"))
    positions, graph = make_graph(three())
    cells = jnp.broadcast_to(9 * jnp.eye(3), (graph.n_node.shape[0], 3, 3))
    graph = graph._replace(globals={**graph.globals, "cell": cells})

    def everything(p: Any, x: Any) -> Any:
        return predict(potential, p, x, graph, ("atomic", "stress"))

    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(everything(p, x).forces ** 2)

    for function in (everything, jax.grad(loss)):
        text = jax.jit(function).lower(params, positions).as_text()
        dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        own = [line for line in dots if "HIGHEST" not in line]
        assert dots and (not own if precision == "highest" else own)


def test_a_loaded_run_keeps_its_precision_of_matrix_products():
    run = orbq.load("gfn1-metals")
    assert run.potential.architecture.matmul_precision == "highest"
    config = parse_config({"training": {"matmul_precision": "high"}})
    assert architecture_of(config).matmul_precision == "high"
