"""A linear probe of a taught network: reference energies and the energy readout in closed form.

The energy of a structure s is linear in its reference energies and in the last weights w of the
energy readout,

    E(s) = sum over Z of n_Z(s) E_Z + Q(s) E_Q + sum over k of w_k f_k(s),    f_k = dE / dw_k,

so that both can be fitted together to the energies of the training structures, before anything is
trained: by ridge regression about the weights w0 that the network was taught,

    sum over s of r(s)^2 + strength * sum over k of (spread_k (w_k - w0_k))^2,

spread_k the deviation of f_k. The forces, where they are trained on, join in: with -df_k/dx instead
of f_k, a root mean square error of 1 eV/Å counts as one of 1 eV in every energy. The strength is
that with the smallest mean absolute leave-one-out error. What GFN1-xTB has taught of the structures
is then not taken for energies of atoms, and training begins where the frozen network ends: linear
probing, then fine-tuning (Kumar et al., ICLR 2022, arXiv:2202.10054).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orbq.data import to_batch
from orbq.errors import InputError
from orbq.inference import budget_of
from orbq.models.potential import (
    Params,
    Potential,
    last_weights,
    readout_features,
    readout_force_features,
)
from orbq.orbitals import MAX_Z
from orbq.preprocess.pack import Packer
from orbq.preprocess.pool import Pool
from orbq.preprocess.prefetch import prefetch
from orbq.preprocess.references import (
    References,
    composition,
    pool_chunks,
    warn_if_undetermined,
)

STRENGTHS = tuple(10.0 ** (n / 2) for n in range(9))  # in structures; below, readout and references
# grow large against each other, for a leave-one-out error hardly smaller
_BATCH = 16
_ALONE = 1e-6  # a structure that alone fixes a reference energy has no leave-one-out error
_RANK_TOLERANCE = 1e-10


class Ridge(NamedTuple):
    """A fit. free [F], tied [K]: coefficients. strength: of the penalty. error: mean absolute
    leave-one-out error, NaN where no structure has one."""

    free: np.ndarray
    tied: np.ndarray
    strength: float
    error: float


class Probe(NamedTuple):
    """references: of the energies. weights [K]: the last ones of the readout, leaf by leaf.
    strength: of the penalty, in structures. error: mean absolute leave-one-out error, eV (NaN:
    every structure alone fixes a reference energy)."""

    references: References
    weights: np.ndarray
    strength: float
    error: float

    def into(self, params: Params) -> Params:
        """``params`` with these weights."""
        leaves, tree = jax.tree.flatten(last_weights(params))
        if sum(leaf.size for leaf in leaves) != len(self.weights):
            raise InputError("the probe is of another network: start anew with --overwrite")
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = np.split(self.weights, ends)
        put = [jnp.asarray(w.reshape(x.shape), x.dtype) for w, x in zip(parts, leaves, strict=True)]
        return {**params, "energy": {**params["energy"], **jax.tree.unflatten(tree, put)}}

    def to_json(self) -> str:
        """A JSON object, exact to the last bit."""
        data = {
            "references": json.loads(self.references.to_json()),
            "weights": self.weights.tolist(),
            "strength": self.strength,
            "error_eV": None if np.isnan(self.error) else self.error,
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Probe:
        """The inverse of ``to_json``. Raises InputError for anything else."""
        try:
            data = json.loads(text)
            references = References.from_json(json.dumps(data["references"]))
            weights = np.array(data["weights"], np.float64)
            error = np.nan if data["error_eV"] is None else float(data["error_eV"])
            return cls(references, weights, float(data["strength"]), error)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"a probe cannot be read: {error}") from error


def fit_probe(
    potential: Potential,
    params: Params,
    pool: Pool,
    fit_charge: bool = True,
    forces: bool = True,
    dtype: str = "float32",
    strengths: tuple[float, ...] = STRENGTHS,
) -> Probe:
    """Fit reference energies and last weights to the energies of a (training) pool.

    fit_charge: whether the slope in the total charge is fitted, too; else it is 0. forces: whether
    those of the pool are fitted, too. dtype: of the network. strengths: of the penalty, among which
    one is chosen. The pool's features, [S, K] float64, are in memory. Raises InputError without
    energies.
    """
    labelled = np.flatnonzero(pool.labelled("energy"))
    if not len(labelled):
        raise InputError(
            "no training structure carries energy: reference energies cannot be fitted; add "
            "labelled structures, or leave energy out of the loss"
        )
    chunks = list(pool_chunks(pool, "energy"))
    elements = np.unique(np.concatenate([chunk.numbers for chunk in chunks]))
    charge = np.concatenate([chunk.total_charge for chunk in chunks]).astype(float)
    columns = [np.concatenate([composition(chunk, elements) for chunk in chunks])]
    warn_if_undetermined(np.asarray(np.linalg.qr(columns[0], mode="r")), elements)
    if fit_charge and charge.any():
        columns.append(charge[:, None])
    taught = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(last_weights(params))])
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    features = _features(potential, params, pool, dtype)[labelled]
    target = np.concatenate([chunk.energy for chunk in chunks]) - features @ taught
    more = _force_equations(potential, params, pool, dtype, taught) if forces else None
    if more is not None:
        more *= np.sqrt(len(labelled))
    found = ridge(np.concatenate(columns, axis=1), features, target, strengths, more)
    element, known = np.zeros(MAX_Z + 1), np.zeros(MAX_Z + 1, bool)
    element[elements], known[elements] = found.free[: len(elements)], True
    slope = float(found.free[len(elements) :].sum())
    references = References(element, slope, True, known)
    return Probe(references, taught + found.tied, found.strength, found.error)


def _features(potential: Potential, params: Params, pool: Pool, dtype: str) -> np.ndarray:
    """[S, K] float64 of every structure of the pool, in its order."""

    @jax.jit
    def program(params: Params, positions: jax.Array, graph: Any) -> jax.Array:
        return readout_features(potential, params, positions, graph)

    packer = Packer(pool, budget_of(pool, _BATCH), targets=(), dtype=np.dtype(dtype))
    out: np.ndarray | None = None
    for packed in prefetch(map(packer.batch, packer.plan(0))):
        batch = to_batch(packed)
        found = np.asarray(program(params, batch.positions, batch.graph), np.float64)
        out = np.zeros((len(pool), found.shape[1])) if out is None else out
        out[packed.index[packed.mask]] = found[packed.mask]
    assert out is not None, "a pool is never empty"
    return out


def _force_equations(
    potential: Potential, params: Params, pool: Pool, dtype: str, taught: np.ndarray
) -> np.ndarray:
    """[at most K + 1, K + 1]: what the forces of a pool say of a step from the weights ``taught``
    [K], the last column what is left to explain; of the norm of their root mean square, eV/Å."""

    @jax.jit
    def program(params: Params, positions: jax.Array, graph: Any) -> jax.Array:
        return readout_force_features(potential, params, positions, graph)

    packer = Packer(pool, budget_of(pool, _BATCH), targets=("forces",), dtype=np.dtype(dtype))
    triangle, n = np.zeros((0, len(taught) + 1)), 0
    for packed in prefetch(map(packer.batch, packer.plan(0))):
        batch = to_batch(packed)
        mask = np.asarray(batch.targets["forces/mask"], bool)
        found = np.asarray(program(params, batch.positions, batch.graph), np.float64)[mask]
        columns = found.reshape(-1, len(taught))
        rest = np.asarray(batch.targets["forces"], np.float64)[mask].ravel() - columns @ taught
        rows = np.vstack([triangle, np.column_stack([columns, rest])])
        triangle = np.asarray(np.linalg.qr(rows, mode="r"))
        n += len(rest)
    return triangle / np.sqrt(max(n, 1))


def ridge(
    free: np.ndarray,
    tied: np.ndarray,
    target: np.ndarray,
    strengths: tuple[float, ...] = STRENGTHS,
    more: np.ndarray | None = None,
) -> Ridge:
    """Least squares for target [S] in columns ``free`` [S, F] and ``tied`` [S, K]; coefficients of
    the latter are drawn to zero. more: [R, K + 1], further equations of the tied coefficients, with
    their right-hand sides; they are no structures that are left out.

    Directions that the columns leave open get the solution of least norm.
    """
    n_free = free.shape[1]
    spread = tied.std(0)
    used = np.flatnonzero(spread > 1e-9 * spread.max(initial=0.0))
    frame, triangle = np.linalg.qr(np.column_stack([free, tied[:, used] / spread[used]]))
    told = np.zeros((0, len(spread) + 1)) if more is None else more
    others = np.zeros((len(told), triangle.shape[1]))
    others[:, n_free:] = told[:, used] / spread[used]
    aim = np.concatenate([frame.T @ target, told[:, -1], np.zeros(len(used))])
    outside = target - frame @ (frame.T @ target)
    best: Ridge | None = None
    for strength in strengths:
        penalty = np.eye(triangle.shape[1])[n_free:] * np.sqrt(strength)
        left, singular, right = np.linalg.svd(np.concatenate([triangle, others, penalty]), False)
        kept = singular > _RANK_TOLERANCE * singular[0]
        left, singular, right = left[:, kept], singular[kept], right[kept]
        rows = frame @ left[: len(triangle)]
        solution = right.T @ ((left.T @ aim) / singular)
        rest = outside + frame @ (aim[: len(triangle)] - triangle @ solution)
        slack = 1.0 - (rows**2).sum(1)
        counted = slack > _ALONE
        error = float(np.abs(rest[counted] / slack[counted]).mean()) if counted.any() else np.nan
        if best is None or error <= best.error:
            moved = np.zeros(len(spread))
            moved[used] = solution[n_free:] / spread[used]
            best = Ridge(solution[:n_free], moved, strength, error)
    assert best is not None, "there is a strength"
    return best
