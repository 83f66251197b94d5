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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from orbq.losses import (
    Batch,
    LossSpec,
    error_sums,
    loss_terms,
    needed_targets,
    term_counts,
    total_loss,
)
from orbq.models.potential import Params, Potential, predict
from orbq.targets import MAIN_TERMS

DEVICES = "devices"  # the mesh axis over which the batches of an update are spread


class Hyper(NamedTuple):
    """What may be swept without recompiling.

    weights: loss term -> weight. learning_rate: peak. warmup_steps, n_steps: linear warm-up, then
    cosine to final_fraction * learning_rate. clip_norm: of the gradient. ema_decay: of the averaged
    parameters. weight_decay: decoupled, per step and unit learning rate. auxiliary_final: share of
    their weights that the auxiliary terms (not those of MAIN_TERMS) have left at the last step.
    """

    weights: dict[str, Array]
    learning_rate: Array
    warmup_steps: Array
    n_steps: Array
    final_fraction: Array
    clip_norm: Array
    ema_decay: Array
    weight_decay: Array
    auxiliary_final: Array | float = 1.0


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


def next_stage(state: TrainState) -> TrainState:
    """Where a stage after another begins: its averaged parameters with fresh moments, and the
    energy readout that was taught. Leaves may be those of many runs, [R, ...].
    """
    params = taught_readout(state.ema)
    fresh = jax.tree.map(jnp.zeros_like, (state.optimizer, state.step))
    return TrainState(params, jax.tree.map(jnp.copy, params), *fresh)


def taught_readout(params: Params) -> Params:
    """Parameters after training without energies: if GFN1 energies were taught, the energy readout
    is a copy of theirs, since what the references leave of both energies is much alike."""
    if "xtb_energy" not in params:
        return dict(params)
    return {**params, "energy": jax.tree.map(jnp.copy, params["xtb_energy"])}


def scheduled_weights(step: Array, hyper: Hyper) -> dict[str, Array]:
    """The weights at a step: those of auxiliary terms fall linearly to ``auxiliary_final``."""
    progress = jnp.clip(step / jnp.maximum(hyper.n_steps, 1), 0.0, 1.0)
    left = 1 - (1 - hyper.auxiliary_final) * progress
    return {n: w if n in MAIN_TERMS else w * left for n, w in hyper.weights.items()}


def make_train_step(
    potential: Potential,
    spec: LossSpec,
    mesh: jax.sharding.Mesh | None = None,
    frozen: tuple[str, ...] = (),
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, Array]]]:
    """One Adam update on one batch; metrics: the loss, its terms, the gradient norm, the rate.

    mesh: if given, a batch is a stack of batches [A, D, ...] over the D devices of its axis
    ``DEVICES``, each of which takes A of them one after the other; the loss is that of all their
    structures together. frozen: prefixes (``"backbone/layer0"``) of parameters left as they are.

    A loss or gradient that is not finite leaves the state as it was; the metrics tell.
    """
    loss_fn = _make_loss(potential, spec)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def of_stack(params: Params, batch: Batch, weights: dict[str, Array]) -> Any:
        batches = jax.tree.map(lambda x: x[:, 0], batch)  # this device's, [A, ...]
        counts = jax.vmap(lambda one: term_counts(spec, one))(batches)
        counts = jax.lax.psum(jax.tree.map(lambda c: c.sum(0), counts), DEVICES)

        def add(total: Any, one: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, one, weights, counts)), None

        first = jax.tree.map(lambda x: x[0], batches)
        shapes = jax.eval_shape(grad_fn, params, first, weights, counts)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.psum(jax.lax.scan(add, zero, batches)[0], DEVICES)

    def gradient_of(params: Params, batch: Batch, weights: dict[str, Array]) -> Any:
        if mesh is None:
            return grad_fn(params, batch, weights, None)
        whole = PartitionSpec()
        # without the check of what varies over devices, which the tensor product has no rule for
        return jax.shard_map(
            of_stack,
            mesh=mesh,
            in_specs=(whole, PartitionSpec(None, DEVICES), whole),
            out_specs=whole,
            check_vma=False,
        )(params, batch, weights)

    def step(state: TrainState, batch: Batch, hyper: Hyper) -> Any:
        weights = scheduled_weights(state.step, hyper)
        (loss, terms), gradient = gradient_of(state.params, batch, weights)
        gradient = thawed(frozen, gradient, jax.tree.map(jnp.zeros_like, gradient))
        norm = optax.tree.norm(gradient)
        clip = jnp.minimum(1.0, hyper.clip_norm / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda g: g * clip, gradient)
        updates, optimizer = ADAM.update(gradient, state.optimizer, state.params)
        rate = learning_rate(state.step, hyper)
        params = jax.tree.map(
            lambda p, u: p - rate * (u + hyper.weight_decay * p), state.params, updates
        )
        params = thawed(frozen, params, state.params)
        # the average forgets its start: until 9 / (1 - decay) steps are seen it is over their last
        # tenth or so
        decay = jnp.minimum(hyper.ema_decay, (state.step + 1.0) / (state.step + 10.0))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
        ema = thawed(frozen, ema, state.ema)  # the mean of equal numbers is not exactly their value
        metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, **terms}
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = TrainState(params, ema, optimizer, state.step + 1)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics

    return step


def _make_loss(potential: Potential, spec: LossSpec) -> Callable[..., Any]:
    targets = needed_targets(spec.terms)

    def loss_fn(params: Params, batch: Batch, weights: Any, counts: Any) -> Any:
        prediction = predict(potential, params, batch.positions, batch.graph, targets)
        terms = loss_terms(spec, prediction, batch, counts)
        return total_loss(weights, terms), terms

    return loss_fn


def is_frozen(frozen: tuple[str, ...], path: Any) -> bool:
    """Whether a parameter's path in the tree begins with one of the prefixes, whole names only."""
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    return any(name == prefix or name.startswith(f"{prefix}/") for prefix in frozen)


def thawed(frozen: tuple[str, ...], tree: Any, instead: Any) -> Any:
    """``tree``, with the leaves of frozen parameters taken from ``instead``."""
    if not frozen:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, a, b: b if is_frozen(frozen, path) else a, tree, instead
    )


def make_gradient_report(
    potential: Potential, spec: LossSpec
) -> Callable[[Params, Batch, dict[str, Array]], dict[str, Array]]:
    """``(params, batch, weights) -> norms`` of each weighted term's gradient, and their conflict.

    Keys: ``gradient/<term>``, and ``gradient/cosine`` between the gradient of energy, forces and
    stress and that of all other terms, if there are both: below 0 the tasks pull apart.
    """
    loss_fn = _make_loss(potential, spec)

    def dot(a: Any, b: Any) -> Array:
        return sum(
            (
                jnp.vdot(x, y, precision="highest")
                for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
            ),
            jnp.zeros(()),
        )

    def report(params: Params, batch: Batch, weights: dict[str, Array]) -> dict[str, Array]:
        def terms(p: Params) -> dict[str, Array]:
            return {n: weights[n] * t for n, t in loss_fn(p, batch, weights, None)[1].items()}

        gradients = jax.jacrev(terms)(params)
        out = {f"gradient/{n}": optax.tree.norm(g) for n, g in gradients.items()}
        sums: list[Any] = [
            [g for n, g in gradients.items() if (n in MAIN_TERMS) == main] for main in (True, False)
        ]
        if all(sums):
            a, b = (jax.tree.map(lambda *leaves: sum(leaves), *group) for group in sums)
            out["gradient/cosine"] = dot(a, b) / jnp.maximum(jnp.sqrt(dot(a, a) * dot(b, b)), 1e-30)
        return out

    return report


def make_evaluate(
    potential: Potential, names: tuple[str, ...]
) -> Callable[[Params, Batch], dict[str, Array]]:
    """``(params, batch) -> error sums`` of the named labels (``losses.error_sums``)."""
    targets = needed_targets(names)

    def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
        prediction = predict(potential, params, batch.positions, batch.graph, targets)
        return error_sums(names, prediction, batch)

    return evaluate
