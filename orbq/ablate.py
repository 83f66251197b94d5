"""Many training runs as one program: what differs is traced and mapped over; no files, no printing.

    hyper = grid(settings, base)                 # leaves [R]
    init, step = over_runs(init, step)           # of state [R], one batch, hyper [R]
    selection = keep_best(selection, ema, ...)   # early stopping, run by run

All runs of a program see the same batches. A loss weight of 0 gives its head no gradient, and a
head never enters the energy: a run of weight 0 is the energy-only model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from orbq.losses import Batch
from orbq.models.potential import Params
from orbq.train import Hyper, TrainState

WEIGHTS = "weights."  # of a setting's name: weights.onsite


class Selection(NamedTuple):
    """Early stopping of R runs. params: the averaged parameters of the best validation so far.
    error [R]: theirs; infinite before the first. step [R]: theirs. stale [R]: validations since."""

    params: Params
    error: Float[Array, " R"]
    step: Int[Array, " R"]
    stale: Int[Array, " R"]


def grid(settings: Sequence[Mapping[str, float]], base: Hyper) -> Hyper:
    """``base`` for every run, with what the run sets otherwise; leaves [R].

    settings: per run, a field of ``Hyper`` or ``weights.<term>`` -> value. Raises KeyError for a
    name that ``base`` lacks: it would be another program.
    """
    known = {*Hyper._fields[1:], *(WEIGHTS + term for term in base.weights)}
    for setting in settings:
        if unknown := set(setting) - known:
            raise KeyError(f"{sorted(unknown)} cannot be swept; known: {', '.join(sorted(known))}")

    dtype = jnp.asarray(base.learning_rate).dtype

    def values(name: str, default: Array | float) -> Array:
        return jnp.stack([jnp.asarray(s.get(name, default), dtype) for s in settings])

    weights = {term: values(WEIGHTS + term, w) for term, w in base.weights.items()}
    others = {name: values(name, getattr(base, name)) for name in Hyper._fields[1:]}
    return Hyper(weights=weights, **others)


def each_run(function: Callable[..., Any], of_runs: Sequence[bool]) -> Callable[..., Any]:
    """``function`` of every run at once. of_runs: which of its arguments have a leading axis [R].

    Vectorised, so that an accelerator is filled; on a single CPU one run after the other within the
    program, since one run fills a core and R of them its cache (benchmarks/results/speed.md).
    """
    if jax.default_backend() != "cpu" or jax.local_device_count() > 1:
        return jax.vmap(function, in_axes=tuple(0 if own else None for own in of_runs))

    def one_by_one(*args: Any) -> Any:
        def call(own: tuple[Any, ...]) -> Any:
            rest = iter(own)
            given = zip(args, of_runs, strict=True)
            return function(*(next(rest) if mapped else arg for arg, mapped in given))

        return jax.lax.map(call, tuple(a for a, m in zip(args, of_runs, strict=True) if m))

    return one_by_one


def over_runs(
    init: Callable[[Array, Batch], TrainState],
    step: Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, Array]]],
) -> tuple[Callable[..., TrainState], Callable[..., tuple[TrainState, dict[str, Array]]]]:
    """``init`` of keys [R] and ``step`` of states and settings [R], each on one batch."""
    return each_run(init, (True, False)), each_run(step, (True, False, True))


def over_params(evaluate: Callable[[Params, Batch], Any]) -> Callable[[Params, Batch], Any]:
    """``evaluate`` of parameters [R] on one batch."""
    return each_run(evaluate, (True, False))


def start_selection(params: Params) -> Selection:
    """Nothing validated yet; params: leaves [R, ...]."""
    n_runs = jax.tree.leaves(params)[0].shape[0]
    zero = jnp.zeros(n_runs, jnp.int32)
    return Selection(params, jnp.full(n_runs, jnp.inf), zero, zero)


def keep_best(
    selection: Selection,
    params: Params,
    error: Float[Array, " R"],
    step: Int[Array, ""],
    patience: Int[Array, ""],
) -> Selection:
    """Take over the parameters of the runs whose error is the lowest so far; NaN never is.

    patience: a run with so many validations without improvement has stopped and changes no more
    (0: never stops), as if it had been trained alone.
    """
    stopped = (patience > 0) & (selection.stale >= patience)
    better = (error < selection.error) & ~stopped

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return Selection(
        jax.tree.map(choose, params, selection.params),
        jnp.where(better, error, selection.error),
        jnp.where(better, step, selection.step),
        jnp.where(better, 0, selection.stale + ~stopped),
    )
