"""The edge tensor product as one multilinear form, differentiable to any order and fast everywhere.

A message couples the sender's features x, the edge's spherical harmonics Y and radial weights w:

    m[e, c; l3 k] = sum over paths p = (l1, l2, l3), over i, j of
                    w[e, p, c] Q^p_{ijk} x[e, c; l1 i] Y[e; l2 j]

with Q the coupling coefficients normalised per output component. Contracted with a cotangent g it
is one quadrilinear form F(x, Y, w, g). Every derivative of every order is F with one of its four
slots left open, so one primitive, parametrised by the open slot, is closed under forward and
reverse differentiation (forces, training on forces, Hessians).

Why a primitive and not plain jnp: differentiating the plain sum makes XLA fuse the sum over
channels in dF/dY with the expression under it, which is not vectorised on CPU; written out, each
slot is a plain fused loop over channels, and the reduction is a product with ones. Features are
laid out [edges, (lmax + 1)^2, channels], channels contiguous; no path is materialised.

Features have one parity per degree, (-1)^l; paths with odd l1 + l2 + l3 do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

SLOTS = ("x", "y", "w", "g")


class Path(NamedTuple):
    """One coupling l1 x l2 -> l3 of the sender's feature with the edge's harmonic."""

    l1: int
    l2: int
    l3: int


def paths(lmax_in: int, lmax_edge: int, l_out: Sequence[int]) -> tuple[Path, ...]:
    """All parity-conserving paths from degrees <= lmax_in and <= lmax_edge to the degrees l_out."""
    return tuple(
        Path(a, b, c)
        for c in l_out
        for a in range(lmax_in + 1)
        for b in range(abs(a - c), min(a + c, lmax_edge) + 1)
        if (a + b + c) % 2 == 0
    )


@cache
def coupling(path: Path) -> np.ndarray:
    """Q [2l1+1, 2l2+1, 2l3+1], sum_ij Q_ijk^2 = 1 for every k; e3nn's Clebsch-Gordan table."""
    with jax.ensure_compile_time_eval():
        q = np.asarray(e3nn.clebsch_gordan(*path), np.float64)
    return q * np.sqrt(2 * path.l3 + 1)


class Term(NamedTuple):
    """One non-zero coefficient: value * x[i] * y[j] * w[p] * g[k]."""

    i: int
    j: int
    p: int
    k: int
    value: float


@cache
def terms(path_table: tuple[Path, ...]) -> tuple[Term, ...]:
    """The non-zero coefficients of all paths, with output rows numbered in order of l_out."""
    degrees = sorted({path.l3 for path in path_table})
    starts = {l3: sum(2 * d + 1 for d in degrees[:n]) for n, l3 in enumerate(degrees)}
    out = []
    for p, path in enumerate(path_table):
        q = coupling(path)
        for i, j, k in np.argwhere(np.abs(q) > 1e-9).tolist():
            row = starts[path.l3] + k
            value = float(q[i, j, k])
            out.append(Term(path.l1**2 + i, path.l2**2 + j, p, row, value))
    return tuple(out)


def _sum_by(
    rows: dict[int, dict[int, list]], outer: list, n: int, inner: Callable[[list], Array]
) -> list:
    """sum over q of outer[q] * (sum of inner products), for each of n output rows."""
    out = []
    for row in range(n):
        total = None
        for q, products in rows.get(row, {}).items():
            part = inner(products) * outer[q]
            total = part if total is None else total + part
        out.append(jnp.zeros_like(outer[0]) if total is None else total)
    return out


def _one_by_one(products: list) -> Array:
    """sum of c a b."""
    return _add(c * a * b for c, a, b in products)


def _by_coefficient(products: list) -> Array:
    """sum of c a b with each |c| multiplied once: fewer operations to compile."""
    groups: dict[float, list] = {}
    for c, a, b in products:
        groups.setdefault(round(abs(c), 9), []).append((c, a * b))
    parts = []
    for (first, total), *others in groups.values():
        for c, value in others:
            total = total + value if c * first > 0 else total - value
        parts.append(first * total)
    return _add(parts)


def _add(values: Iterable[Array]) -> Any:
    total = None
    for v in values:
        total = v if total is None else total + v
    return total


def _form(
    *args: Array,
    table: tuple[Term, ...],
    open_slot: str,
    sizes: tuple[int, ...],
    dtypes: tuple[str, ...],
    shared: bool,
) -> Array:
    """F with ``open_slot`` left open; ``args`` fill the other slots in the order x, y, w, g.

    sizes, dtypes: of each slot. Computed in float32 at least.
    """
    dtype = dtypes[SLOTS.index(open_slot)]
    # barriers keep XLA from fusing gathers and other forms into this one (measured: 2 to 3 times)
    args = jax.lax.optimization_barrier(args)
    wide = jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)
    args = tuple(a.astype(wide) for a in args)
    given = dict(zip([s for s in SLOTS if s != open_slot], args, strict=True))
    lists = {
        s: [a[:, n, None] if a.ndim == 2 else a[:, n] for n in range(a.shape[1])]
        for s, a in given.items()
    }
    # the slot multiplied last, outside the inner sums: the weights, or g when w itself is open
    last = "g" if open_slot == "w" else "w"
    first, second = (s for s in SLOTS if s not in (open_slot, last))
    rows: dict[int, dict[int, list]] = {}
    for term in table:
        index = dict(zip(SLOTS, term[:4], strict=True))
        inner = rows.setdefault(index[open_slot], {}).setdefault(index[last], [])
        inner.append((term.value, lists[first][index[first]], lists[second][index[second]]))
    add = _one_by_one if shared else _by_coefficient
    out = _sum_by(rows, lists[last], sizes[SLOTS.index(open_slot)], add)
    if open_slot != "y" or not shared:
        return jax.lax.optimization_barrier(jnp.stack(out, axis=1).astype(dtype))
    out = jax.lax.optimization_barrier(out)
    ones = jnp.ones((out[0].shape[-1],), out[0].dtype)
    sums = [jnp.dot(h, ones, precision=jax.lax.Precision.HIGHEST) for h in out]
    return jnp.stack(sums, axis=1).astype(dtype)


form_p = Primitive("orbq_edge_form")


def _bind(open_slot: str, slots: dict[str, Array], params: dict[str, Any]) -> Array:
    args = [slots[s] for s in SLOTS if s != open_slot]
    return form_p.bind(*args, **{**params, "open_slot": open_slot})


def _abstract(*args: Any, **params: Any) -> jax.core.ShapedArray:
    edges, channels = args[0].shape[0], args[-1].shape[-1]  # the last is w or g
    open_slot, shared = params["open_slot"], params["shared"]
    n, dtype = (params[name][SLOTS.index(open_slot)] for name in ("sizes", "dtypes"))
    shape = (edges, n) if open_slot == "y" and shared else (edges, n, channels)
    return jax.core.ShapedArray(shape, jnp.dtype(dtype))


def _jvp_rule(position: int) -> Callable[..., Array]:
    def rule(tangent: Array, *primals: Array, **params: Any) -> Array:
        args = list(primals)
        args[position] = tangent
        return form_p.bind(*args, **params)

    return rule


def _transpose(cotangent: Any, *args: Any, **params: Any) -> list[Any]:
    open_slot = params["open_slot"]
    names = [s for s in SLOTS if s != open_slot]
    missing = [ad.is_undefined_primal(a) for a in args]
    if type(cotangent) is ad.Zero:
        return [ad.Zero(a.aval) if m else None for a, m in zip(args, missing, strict=True)]
    slots = {s: a for s, a, m in zip(names, args, missing, strict=True) if not m}
    slots[open_slot] = cotangent
    return [_bind(s, slots, params) if m else None for s, m in zip(names, missing, strict=True)]


def _batch(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    """A batch axis is folded into the edge axis."""
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    moved = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    out = form_p.bind(*(a.reshape(-1, *a.shape[2:]) for a in moved), **params)
    return out.reshape(size, -1, *out.shape[1:]), 0


_STATIC = ("table", "open_slot", "sizes", "dtypes", "shared")
_jitted = jax.jit(_form, static_argnames=_STATIC)


def _called(*args: Array, **params: Any) -> Array:
    """``_form`` as a function of the program that XLA calls and does not inline.

    The barriers do not keep XLA on CPU from fusing it with what surrounds it; calls do (a step of
    benchmarks/bench_step.py's MACE setting with an `onsite` head: 211 CPU ms instead of 240).
    """
    with set_xla_metadata(inlineable="false"):
        out: Array = _jitted(*args, **params)
    return out


form_p.def_impl(_jitted)
form_p.def_abstract_eval(_abstract)
ad.defjvp(form_p, *(_jvp_rule(n) for n in range(3)))
ad.primitive_transposes[form_p] = _transpose
batching.primitive_batchers[form_p] = _batch
mlir.register_lowering(form_p, mlir.lower_fun(_jitted, multiple_results=False))
mlir.register_lowering(form_p, mlir.lower_fun(_called, multiple_results=False), platform="cpu")


def edge_tensor_product(
    features: Float[Array, "E D1 C"],
    harmonics: Float[Array, "E D2"],
    weights: Float[Array, "E P C"],
    path_table: tuple[Path, ...],
) -> Float[Array, "E D3 C"]:
    """Messages of every edge: features x harmonics along ``path_table``, weighted per path.

    features: sender's features, degrees 0..lmax_in. harmonics: e3nn component normalisation,
    degrees 0..lmax_edge. Returns the degrees named by the paths, in ascending order.
    """
    degrees = sorted({p.l3 for p in path_table})
    n_out = sum(2 * l3 + 1 for l3 in degrees)
    return form(features, harmonics, weights, terms(path_table), n_out)


def form(
    x: Float[Array, "N I C"],
    y: Float[Array, "N J C"] | Float[Array, "N J"],
    w: Float[Array, "N P C"],
    table: tuple[Term, ...],
    n_out: int,
) -> Float[Array, "N K C"]:
    """out[n, k, c] = sum over ``table`` of value * x[n, i, c] * y[n, j, c] * w[n, p, c].

    y without channels is shared by all of them. The result has the type of x; what is multiplied
    and summed is float32 at least. Differentiable to any order.
    """
    sizes = (x.shape[1], y.shape[1], w.shape[1], n_out)
    dtypes = tuple(str(a.dtype) for a in (x, y, w, x))
    kind = {"table": table, "sizes": sizes, "dtypes": dtypes, "shared": y.ndim == 2}
    return form_p.bind(x, y, w, open_slot="g", **kind)
