"""The edge tensor product against e3nn, and its own rules of differentiation and batching."""

from __future__ import annotations

import itertools

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import random_rotation, representation
from jax.test_util import check_grads

from orbq.models.layers import to_irreps_array
from orbq.models.tensor_product import coupling, edge_tensor_product, paths

# (highest degree of the features, of the harmonics, degrees of the messages)
TABLES = [(0, 0, (0,)), (0, 2, (0, 1, 2)), (2, 2, (0,)), (1, 1, (0, 1)), (2, 2, (0, 1, 2))]
ROUNDING = 1e-13  # float64 sums of at most 25 products of numbers of order 1


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def random_inputs(table, edges=3, channels=2, seed=0):
    lmax_in, lmax_edge, l_out = table
    found = paths(lmax_in, lmax_edge, l_out)
    rng = np.random.default_rng(seed)
    shapes = [(edges, (lmax_in + 1) ** 2, channels), (edges, (lmax_edge + 1) ** 2)]
    shapes.append((edges, len(found), channels))
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes], found


def by_e3nn(features, harmonics, weights, table):
    """The same messages from ``e3nn.tensor_product``, one path at a time, then weighted."""
    lmax = round(harmonics.shape[1] ** 0.5) - 1
    y = e3nn.IrrepsArray([(1, (d, (-1) ** d)) for d in range(lmax + 1)], harmonics)
    x = to_irreps_array(features)
    out = {}
    for p, path in enumerate(table):
        l1, l2, l3 = ((d, (-1) ** d) for d in path)
        message = e3nn.tensor_product(
            x.filter(keep=[l1]), y.filter(keep=[l2]), filter_ir_out=[l3],
            irrep_normalization="component",
        )  # fmt: skip
        part = weights[:, p, :, None] * message.chunks[0]  # [E, C, 2 l3 + 1]
        out[path.l3] = out.get(path.l3, 0) + jnp.swapaxes(part, 1, 2)
    return jnp.concatenate([out[d] for d in sorted(out)], axis=1)


@pytest.mark.parametrize("table", TABLES)
def test_equals_the_tensor_product_of_e3nn(table):
    inputs, found = random_inputs(table)
    expected = by_e3nn(*inputs, found)
    out = edge_tensor_product(*inputs, found)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, atol=ROUNDING * 10, rtol=0)


def test_equals_a_sum_over_clebsch_gordan_coefficients():
    (x, y, w), found = random_inputs((2, 2, (0, 1, 2)))
    rows = [slice(d * d, (d + 1) ** 2) for d in range(3)]
    expected = np.zeros((3, 9, 2))
    for p, (l1, l2, l3) in enumerate(found):
        q = np.asarray(e3nn.clebsch_gordan(l1, l2, l3)) * (2 * l3 + 1) ** 0.5
        expected[:, rows[l3]] += np.einsum(
            "ijk,eic,ej,ec->ekc", q, x[:, rows[l1]], y[:, rows[l2]], w[:, p]
        )
    out = edge_tensor_product(x, y, w, found)
    np.testing.assert_allclose(out, expected, atol=ROUNDING * 10, rtol=0)


def test_paths_conserve_parity_and_obey_the_triangle():
    found = paths(2, 2, (0, 1, 2))
    every = itertools.product(range(3), repeat=3)
    expected = {t for t in every if abs(t[0] - t[1]) <= t[2] <= t[0] + t[1] and sum(t) % 2 == 0}
    assert set(found) == expected
    assert len(set(found)) == len(found) == 11
    for path in found:
        norm = (coupling(path) ** 2).sum((0, 1))
        np.testing.assert_allclose(norm, 1.0, atol=1e-14)


@pytest.mark.parametrize("improper", [False, True])
def test_turns_with_its_inputs(improper):
    (x, y, w), found = random_inputs((2, 2, (0, 1, 2)))
    d = jnp.asarray(representation("1x0e+1x1o+1x2e", random_rotation(3, improper)))
    turned = edge_tensor_product(
        jnp.einsum("ij,ejc->eic", d, x), jnp.einsum("ij,ej->ei", d, y), w, found
    )
    expected = jnp.einsum("ij,ejc->eic", d, edge_tensor_product(x, y, w, found))
    np.testing.assert_allclose(turned, expected, atol=1e-12)  # D is a least-squares solution


@pytest.mark.parametrize("table", [(0, 1, (0, 1)), (2, 2, (0, 1, 2))])
def test_first_and_second_derivatives(table):
    inputs, found = random_inputs(table, edges=2)

    def form(*args):
        return edge_tensor_product(*(jnp.asarray(a) for a in args), found)

    # the form is multilinear: central differences are exact but for rounding
    check_grads(form, inputs, order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


def test_gradients_equal_those_of_e3nn():
    inputs, found = random_inputs((1, 1, (0, 1)))
    weights = jnp.asarray(np.random.default_rng(9).normal(size=(3, 4, 2)))

    def score(product):
        def of(args):  # a non-linear function, so that third derivatives do not vanish
            return jnp.sum(weights * jnp.tanh(product(*args, found)))

        def force_loss(args):
            return jnp.sum(jax.grad(of)(args)[1] ** 2)

        return jax.jit(lambda args: (jax.grad(of)(args), jax.grad(force_loss)(args)))

    ours, theirs = score(edge_tensor_product)(inputs), score(by_e3nn)(inputs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-10)  # sums of about 1e4 terms


BATCHED = [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, None, 0), (1, 0, 2)]


def stacked_runs(axes, table, n=4):
    """Inputs of ``n`` runs one by one, and stacked along ``axes`` (None: the first run's)."""
    runs = [random_inputs(table, seed=s)[0] for s in range(n)]
    stacked = [
        runs[0][k] if axis is None else jnp.stack([run[k] for run in runs], axis)
        for k, axis in enumerate(axes)
    ]
    singles = [[runs[0 if axis is None else r][k] for k, axis in enumerate(axes)] for r in range(n)]
    return stacked, singles


@pytest.mark.parametrize("axes", BATCHED)
def test_vmap_equals_a_loop(axes):
    table = (1, 1, (0, 1))
    stacked, singles = stacked_runs(axes, table)

    def product(x, y, w):
        return edge_tensor_product(x, y, w, paths(*table))

    batched = jax.vmap(product, in_axes=axes)(*stacked)
    for out, args in zip(batched, singles, strict=True):
        np.testing.assert_allclose(out, product(*args), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, None, 0)])
def test_vmap_of_gradients_equals_a_loop(axes):
    table = (1, 1, (0, 1))
    stacked, singles = stacked_runs(axes, table)

    def gradients(*args):
        def total(*inner):
            return jnp.sum(jnp.sin(edge_tensor_product(*inner, paths(*table))))

        return jax.grad(total, argnums=(0, 1, 2))(*args)

    batched = jax.jit(jax.vmap(gradients, in_axes=axes))(*stacked)
    one = jax.jit(gradients)
    for r, args in enumerate(singles):
        for a, b in zip(batched, one(*args), strict=True):
            np.testing.assert_allclose(a[r], b, atol=ROUNDING, rtol=0)


def test_jit_equals_no_jit():
    inputs, found = random_inputs((2, 2, (0, 1, 2)))
    direct = edge_tensor_product(*inputs, found)
    compiled = jax.jit(edge_tensor_product, static_argnums=3)(*inputs, found)
    np.testing.assert_allclose(direct, compiled, atol=ROUNDING, rtol=0)


def test_no_edges_give_no_messages():
    inputs, found = random_inputs((1, 1, (0, 1)), edges=0)
    out = jax.jit(edge_tensor_product, static_argnums=3)(*inputs, found)
    assert out.shape == (0, 4, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_keeps_the_precision_of_its_inputs(dtype):
    inputs, found = random_inputs((1, 1, (0, 1)))
    out = edge_tensor_product(*(a.astype(dtype) for a in inputs), found)
    assert out.dtype == dtype
