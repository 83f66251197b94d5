"""The stages of a training run, and the traced settings of each."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orbq.config import Config
from orbq.data import TrainingData
from orbq.errors import InputError
from orbq.models.potential import make_potential, smallest_graph
from orbq.preprocess.pool import Pool
from orbq.targets import MAIN_TERMS
from orbq.train import Hyper, is_frozen


class Stage(NamedTuple):
    """One part of a run. pool: its structures, the first n_labelled each once an epoch, so many of
    the others that they are ``share`` of them. terms: loss terms. hyper: traced settings. frozen:
    parameters that stay as they are."""

    name: str
    n_steps: int
    pool: Pool
    n_labelled: int
    share: float
    terms: tuple[str, ...]
    hyper: Hyper
    frozen: tuple[str, ...] = ()


def make_stages(config: Config, data: TrainingData) -> list[Stage]:
    """The stages of a run: pre-training on every structure's charges, then everything."""
    training = config.training
    train, teaching = data.pools["train"], data.pools.get("teaching", data.pools["train"])
    stages = []
    auxiliary = tuple(n for n in data.spec.terms if n not in MAIN_TERMS)
    if training.pretrain_steps:
        hyper = _hyper(config, training.pretrain_steps, training.pretrain_learning_rate)
        n = len(teaching)
        stages.append(
            Stage("pretrain", training.pretrain_steps, teaching, n, 0.0, auxiliary, hyper)
        )
    share = training.unlabelled_share
    pool = teaching if share > 0 else train
    hyper = _hyper(config, training.n_steps, training.learning_rate)
    frozen, terms = _checked_frozen(training.frozen, data), data.spec.terms
    stages.append(Stage("train", training.n_steps, pool, len(train), share, terms, hyper, frozen))
    return stages


def _checked_frozen(frozen: tuple[str, ...], data: TrainingData) -> tuple[str, ...]:
    """``training.frozen``; raises InputError for a prefix that no parameter's path begins with, and
    where nothing is left to train."""
    if not frozen:
        return frozen
    potential = make_potential(data.architecture, data.constants)
    template = jax.eval_shape(potential.init, jax.random.key(0), *smallest_graph(np.float32))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(template)]
    if all(is_frozen(frozen, path) for path in paths):
        raise InputError(
            f"training.frozen = {list(frozen)} holds every parameter: nothing would be learnt, "
            "take some out"
        )
    for prefix in frozen:
        if not any(is_frozen((prefix,), path) for path in paths):
            names = [[str(getattr(key, "key", key)) for key in path] for path in paths]
            known = sorted({"/".join(name[:n]) for name in names for n in (1, 2)})
            near = get_close_matches(prefix, known, 1) or known
            raise InputError(
                f"training.frozen: no parameter's path begins with {prefix!r}; did you mean "
                f"{' or '.join(map(repr, near))}?"
            )
    return frozen


def _hyper(config: Config, n_steps: int, rate: float) -> Hyper:
    training = config.training
    dtype = jnp.dtype(training.precision)

    def number(x: float) -> jax.Array:
        return jnp.asarray(x, dtype)

    return Hyper(
        weights={n: number(w) for n, w in config.loss.weights.model_dump().items() if w > 0},
        learning_rate=number(rate),
        warmup_steps=number(min(training.warmup_steps, n_steps)),
        n_steps=number(n_steps),
        final_fraction=number(training.final_learning_rate_fraction),
        clip_norm=number(training.clip_norm),
        ema_decay=number(training.ema_decay),
        weight_decay=number(training.weight_decay),
        auxiliary_final=number(config.loss.auxiliary_final_fraction),
    )
