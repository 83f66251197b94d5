"""Loss terms: dimensionless, masked, one number per label kind.

Every error is divided by a stated scale of its label (the residual's deviation for energies, the
root mean square for forces, the element-and-shell scale for charges), so that weights compare like
with like and do not depend on units:

    total = sum over terms of weight[t] * term[t]

Weights are traced arguments; only their ratios matter to Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from orbq.models.potential import Prediction
from orbq.targets import TARGETS, Statistics


class Batch(NamedTuple):
    """What is differentiated, what is conditioned on, what is fitted.

    positions [N, 3] Å. graph: jraph.GraphsTuple as in models.potential. targets: label arrays in
    eV, eV/Å, e with their masks: "energy" [M] (references subtracted), "forces" [N, 3], "stress"
    [M, 3, 3] in eV/Å^3, "<target>" [N, k], each with "<name>/mask" ([M], [N], [M], [N, k]); 0 where
    the mask is False.
    """

    positions: Any
    graph: jraph.GraphsTuple
    targets: dict[str, Any]


class LossSpec(NamedTuple):
    """Structure of the loss (closed over, not traced).

    terms: names of the terms that are computed. kind: elementwise function of energy, force and
    stress errors. huber_delta: in units of the scale. energy_per: "structure", or "atom" to divide
    the energy error by the number of atoms. scales: eV (or eV/atom), eV/Å or eV/Å^3 for
    "energy", "forces", "stress", "xtb_energy", "xtb_forces". statistics: normalisation of the
    per-atom targets.
    """

    terms: tuple[str, ...]
    kind: str
    huber_delta: float
    energy_per: str
    scales: Mapping[str, float]
    statistics: Mapping[str, Statistics]


def _huber(x: Array, delta: float) -> Array:
    absolute = jnp.abs(x)
    return jnp.where(absolute < delta, 0.5 * x * x, delta * (absolute - 0.5 * delta))


ELEMENTWISE: dict[str, Callable[[Array, float], Array]] = {
    "huber": _huber,
    "mse": lambda x, delta: x * x,
    "mae": lambda x, delta: jnp.abs(x),
}


def masked_mean(values: Array, mask: Array, count: Array | None = None) -> Float[Array, ""]:
    """Mean of ``values`` where ``mask``; 0 if there are none. Masked values never enter.

    count: what the sum is divided by, if not by the number of these values.
    """
    kept = jnp.where(mask, values, 0.0)
    return kept.sum() / jnp.maximum(mask.sum() if count is None else count, 1)


def loss_terms(
    spec: LossSpec,
    prediction: Prediction,
    batch: Batch,
    counts: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Each term of the spec as a scalar.

    counts: ``term_counts`` of a larger batch of which this is a part; the terms of its parts then
    add up to the terms of the whole.
    """
    count = counts or {}
    return {name: _term(name, spec, prediction, batch, count.get(name)) for name in spec.terms}


def term_counts(spec: LossSpec, batch: Batch) -> dict[str, Array]:
    """How many structures (energies, stresses) or atoms each term of a batch is the mean over."""
    masks = {name: batch.targets[f"{name}/mask"] for name in spec.terms}
    return {name: (m if m.ndim == 1 else m.any(1)).sum() for name, m in masks.items()}


def _term(
    name: str, spec: LossSpec, prediction: Prediction, batch: Batch, count: Array | None
) -> Array:
    elementwise, value = ELEMENTWISE[spec.kind], value_of(name, prediction)
    label, mask = batch.targets[name], batch.targets[f"{name}/mask"]
    if name in ("energy", "xtb_energy"):
        error = jnp.where(mask, (value - label) / spec.scales[name], 0.0)
        if spec.energy_per == "atom":
            error = error / jnp.maximum(batch.graph.n_node, 1)
        return masked_mean(elementwise(error, spec.huber_delta), mask, count)
    if name in ("forces", "xtb_forces", "stress"):
        error = jnp.where(_spread(mask, label), (value - label) / spec.scales[name], 0.0)
        components = tuple(range(1, label.ndim))
        return masked_mean(elementwise(error, spec.huber_delta).mean(components), mask, count)
    scale = jnp.asarray(spec.statistics[name].scale, label.dtype)[batch.graph.nodes["numbers"]]
    error = jnp.where(mask, (value - label) / scale, 0.0)
    # an atom's slots are averaged first, else atoms with nine orbitals dominate
    per_atom = (error * error).sum(1) / jnp.maximum(mask.sum(1), 1)
    return masked_mean(per_atom, mask.any(1), count)


def value_of(name: str, prediction: Prediction) -> Any:
    """What is predicted of a label, an array of JAX or NumPy as ``prediction`` has them."""
    own = {"energy": prediction.energy, "forces": prediction.forces, "stress": prediction.stress}
    found = own.get(name)
    return prediction.charges[name] if found is None else found


def _spread(mask: Array, label: Array) -> Array:
    """A mask of rows as one that broadcasts over their components."""
    return mask.reshape(mask.shape + (1,) * (label.ndim - mask.ndim))


def total_loss(weights: Mapping[str, Array], terms: Mapping[str, Array]) -> Float[Array, ""]:
    """Weighted sum of the terms."""
    return sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))


def error_sums(names: tuple[str, ...], prediction: Prediction, batch: Batch) -> dict[str, Array]:
    """Sums of |error|, error^2 and counts [3] per label, in eV, eV/atom, eV/Å, eV/Å^3 and e.

    Keys: each name, and ``energy_per_atom``. Added up over batches and divided by the counts they
    give MAE and RMSE (``metrics.from_sums``).
    """
    out = {}
    for name in names:
        label, mask = batch.targets[name], batch.targets[f"{name}/mask"]
        mask = jnp.broadcast_to(_spread(mask, label), label.shape)
        error = jnp.where(mask, value_of(name, prediction) - label, 0.0)
        out[name] = _sums(error, mask)
        if name == "energy":
            out["energy_per_atom"] = _sums(error / jnp.maximum(batch.graph.n_node, 1), mask)
    return out


def _sums(error: Array, mask: Array) -> Array:
    return jnp.stack([jnp.abs(error).sum(), (error * error).sum(), mask.sum().astype(error.dtype)])


def needed_targets(terms: tuple[str, ...]) -> tuple[str, ...]:
    """Of the loss terms, those that ``predict`` must be asked for: of a head, and the stress."""
    return tuple(t for t in terms if t in TARGETS or t == "stress")


def batch_to_device(batch: Batch) -> Batch:
    """The batch as JAX arrays."""
    return jax.tree.map(jnp.asarray, batch)
