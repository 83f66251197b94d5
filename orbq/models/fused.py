"""The forms of ``tensor_product`` by CUDA kernels of cuequivariance, one for each.

Of messages, the kernel also gathers the sender's features and sums over neighbours: neither the
gathered features [E, D, C] nor the messages [E, D, C] are stored. Derivatives of every order are
the library's, each again one such kernel. Parameters and results are those of ``tensor_product``.
On a CPU the library's plain JAX implementation is used, which is what the tests compare.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from orbq.models.tensor_product import Path, Term, terms

_PACKAGES = ("cuequivariance_jax", "cuequivariance_ops_jax")


def unavailable() -> str | None:
    """Why these kernels cannot be used here; None if they can."""
    if (backend := jax.default_backend()) != "gpu":
        return f"JAX runs on {backend}"
    if not all(map(find_spec, _PACKAGES)):
        return "it is not installed: pip install 'orbq[cuequivariance]'"
    return None


@cache
def polynomial(table: tuple[Term, ...], sizes: tuple[int, int, int, int], shared: bool) -> Any:
    """The terms as cuequivariance knows them: x, y, w -> out. sizes: rows of x, y, w; channels."""
    import cuequivariance as cue

    product = cue.SegmentedTensorProduct.from_subscripts("u,,u,u" if shared else "u,u,u,u")
    *rows, channels = sizes
    n_out = 1 + max(term.k for term in table)
    for operand, n in enumerate((*rows, n_out)):
        for _ in range(n):
            product.add_segment(operand, () if shared and operand == 1 else (channels,))
    for term in table:
        product.add_path(*term[:4], c=term.value)
    return cue.SegmentedPolynomial.eval_last_operand(product)


def _call(
    table: tuple[Term, ...],
    x: Array,
    y: Array,
    w: Array,
    n: int,
    places: tuple[Array, Array] | None = None,
) -> Array:
    """[n, K, C] of x [N, I, C], y [E, J] or [E, J, C], w [E, P, C]. places: the row of x that is
    taken for each of w, and the row of the result that it is added to."""
    import cuequivariance_jax as cuex

    sizes = (x.shape[1], y.shape[1], w.shape[1], x.shape[2])
    form = polynomial(table, sizes, y.ndim == 2)
    inputs = [a.reshape(len(a), -1) for a in (x, y, w)]
    out = jax.ShapeDtypeStruct((n, form.outputs[0].size), x.dtype)
    indices = None if places is None else [places[0], None, None, places[1]]
    method = "naive" if jax.default_backend() == "cpu" else "uniform_1d"
    (found,) = cuex.segmented_polynomial(form, inputs, [out], indices, method=method)
    result: Array = found.reshape(n, -1, x.shape[2])
    return result


def product(
    x: Float[Array, "N I C"],
    y: Float[Array, "N J C"],
    w: Float[Array, "N P C"],
    table: tuple[Term, ...],
) -> Float[Array, "N K C"]:
    """``tensor_product.form``; the table's highest row is the result's last."""
    return _call(table, x, y, w, len(x))


def summed_messages(
    features: Float[Array, "N D1 C"],
    harmonics: Float[Array, "E D2"],
    weights: Float[Array, "E P C"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    path_table: tuple[Path, ...],
) -> Float[Array, "N D3 C"]:
    """``edge_tensor_product`` of the senders' features, summed over each receiver's edges."""
    table, n = terms(path_table), len(features)
    return _call(table, features, harmonics, weights, n, (senders, receivers))
