"""Training as pure functions of state, batch and hyper-parameters; no files, no printing.

    init(hyper, key, batch)         -> TrainState
    step(state, batch, hyper)       -> (TrainState, metrics)
    evaluate(params, batch)         -> sums of errors

Everything in ``Hyper`` is traced: loss weights, learning rate and schedule can be swept under
``vmap`` without another compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from orbq.losses import Batch, LossSpec, error_sums, loss_terms, needed_targets, total_loss
from orbq.models.potential import Params, Potential, predict


class Hyper(NamedTuple):
    """What may be swept without recompiling.

    weights: loss term -> weight. learning_rate: peak. warmup_steps, n_steps: linear warm-up, then
    cosine to final_fraction * learning_rate. clip_norm: of the gradient. ema_decay: of the averaged
    parameters. weight_decay: decoupled, per step and unit learning rate.
    """

    weights: dict[str, Array]
    learning_rate: Array
    warmup_steps: Array
    n_steps: Array
    final_fraction: Array
    clip_norm: Array
    ema_decay: Array
    weight_decay: Array


class TrainState(NamedTuple):
    """params: trained. ema: their exponential moving average, used for evaluation.
    optimizer: Adam's moments. step: updates made, int32."""

    params: Params
    ema: Params
    optimizer: Any
    step: Array


ADAM = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-8)


def learning_rate(step: Array, hyper: Hyper) -> Float[Array, ""]:
    """Linear warm-up to the peak over ``warmup_steps``, cosine down to the final fraction."""
    warm = (step + 1) / jnp.maximum(hyper.warmup_steps, 1)
    span = jnp.maximum(hyper.n_steps - hyper.warmup_steps, 1)
    progress = jnp.clip((step - hyper.warmup_steps) / span, 0.0, 1.0)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    decayed = hyper.final_fraction + (1 - hyper.final_fraction) * cosine
    return hyper.learning_rate * jnp.minimum(warm, decayed)


def make_init(potential: Potential) -> Callable[[Array, Batch], TrainState]:
    """``(key, batch) -> TrainState``: fresh parameters and moments."""

    def init(key: Array, batch: Batch) -> TrainState:
        params = potential.init(key, batch.positions, batch.graph)
        return TrainState(params, params, ADAM.init(params), jnp.zeros((), jnp.int32))

    return init


def make_train_step(
    potential: Potential, spec: LossSpec
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, Array]]]:
    """One Adam update on one batch; metrics: the loss, its terms, the gradient norm, the rate."""
    targets = needed_targets(spec.terms)

    def loss_fn(params: Params, batch: Batch, weights: dict[str, Array]) -> Any:
        prediction = predict(potential, params, batch.positions, batch.graph, targets)
        terms = loss_terms(spec, prediction, batch)
        return total_loss(weights, terms), terms

    def step(state: TrainState, batch: Batch, hyper: Hyper) -> Any:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, terms), gradient = grad_fn(state.params, batch, hyper.weights)
        norm = optax.tree.norm(gradient)
        clip = jnp.minimum(1.0, hyper.clip_norm / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda g: g * clip, gradient)
        updates, optimizer = ADAM.update(gradient, state.optimizer, state.params)
        rate = learning_rate(state.step, hyper)
        params = jax.tree.map(
            lambda p, u: p - rate * (u + hyper.weight_decay * p), state.params, updates
        )
        # the average forgets its start: it is a plain mean until 1 / (1 - decay) steps are seen
        decay = jnp.minimum(hyper.ema_decay, (state.step + 1.0) / (state.step + 10.0))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
        metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, **terms}
        return TrainState(params, ema, optimizer, state.step + 1), metrics

    return step


def make_evaluate(
    potential: Potential, names: tuple[str, ...]
) -> Callable[[Params, Batch], dict[str, Array]]:
    """``(params, batch) -> error sums`` of the named labels (``losses.error_sums``)."""
    targets = needed_targets(names)

    def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
        prediction = predict(potential, params, batch.positions, batch.graph, targets)
        return error_sums(names, prediction, batch)

    return evaluate
