"""The product basis of the MACE-like backbone against e3nn's reduced symmetric products."""

from __future__ import annotations

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orbq.models.mace import products
from orbq.models.tensor_product import form

LMAX = 2


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def basis(features: np.ndarray) -> np.ndarray:
    """Every product on its own, [n, (LMAX + 1)^2, number of weights]: one channel per weight."""
    table = products(LMAX, LMAX)
    n, count = len(features), len(table.scale)
    a = np.repeat(features[:, :, None], count, axis=2)
    one = np.ones((n, 1, count))
    a, one = jnp.asarray(a), jnp.asarray(one)
    pairs = form(a, a, one, table.pairs, table.n_pairs)
    weights = jnp.tile(jnp.eye(count), (n, 1, 1))
    first = jnp.concatenate([one, a, pairs], axis=1)
    return np.asarray(form(first, a, weights, table.terms, (LMAX + 1) ** 2))


@pytest.mark.parametrize("l", range(LMAX + 1))
def test_products_span_all_symmetric_products_of_e3nn(l):
    features = np.random.default_rng(l).normal(size=(60, (LMAX + 1) ** 2))
    irreps = e3nn.Irreps("0e + 1o + 2e")
    wanted = e3nn.Irrep(l, (-1) ** l)
    known = []
    for degree in (1, 2, 3):
        q = e3nn.reduced_symmetric_tensor_product_basis(irreps, degree, keep_ir=[wanted])
        letters = "abc"[:degree]
        operands = ",".join(f"n{x}" for x in letters)
        factors = [features] * degree
        known.append(np.einsum(f"{letters}k,{operands}->nk", np.asarray(q.array), *factors))
    reference = np.concatenate(known, axis=1).reshape(60, -1, 2 * l + 1)
    reference = reference.transpose(0, 2, 1).reshape(60 * (2 * l + 1), -1)
    mine = basis(features)[:, l * l : (l + 1) ** 2]
    mine = mine.reshape(60 * (2 * l + 1), -1)
    mine = mine[:, np.abs(mine).max(0) > 0]
    assert mine.shape[1] == reference.shape[1]
    assert np.linalg.matrix_rank(mine) == mine.shape[1]
    fitted = reference @ np.linalg.lstsq(reference, mine, rcond=None)[0]
    np.testing.assert_allclose(fitted, mine, atol=1e-10)


def test_products_keep_the_variance_of_their_features():
    found = basis(np.random.default_rng(9).normal(size=(4000, (LMAX + 1) ** 2)))
    for l in range(LMAX + 1):
        part = found[:, l * l : (l + 1) ** 2]
        part = part[:, :, np.abs(part).max((0, 1)) > 0]
        sizes = np.sqrt((part**2).mean((0, 1)))
        np.testing.assert_allclose(sizes, 1.0, rtol=0.3)
