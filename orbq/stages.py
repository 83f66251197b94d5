"""The stages of a training run, and the traced settings of each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from orbq.config import Config
from orbq.data import TrainingData
from orbq.preprocess.pool import Pool
from orbq.train import Hyper


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
    auxiliary = tuple(n for n in data.spec.terms if n not in ("energy", "forces"))
    if training.pretrain_steps:
        hyper = _hyper(config, training.pretrain_steps, training.pretrain_learning_rate)
        n = len(teaching)
        stages.append(
            Stage("pretrain", training.pretrain_steps, teaching, n, 0.0, auxiliary, hyper)
        )
    share = training.unlabelled_share
    pool = teaching if share > 0 else train
    hyper = _hyper(config, training.n_steps, training.learning_rate)
    frozen, terms = training.frozen, data.spec.terms
    stages.append(Stage("train", training.n_steps, pool, len(train), share, terms, hyper, frozen))
    return stages


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
