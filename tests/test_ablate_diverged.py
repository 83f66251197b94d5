"""Runs of an ablation whose losses are not finite: they have diverged, and are told as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orbq.fit import MAX_NONFINITE
from orbq.study import program as at_work
from orbq.study.plan import BASELINE, make_plan
from orbq.study.program import Place, Training
from orbq.study.report import PAGE, write_report
from orbq.train import make_train_step
from tests.test_ablate import _Stop, config, dataset

__all__ = ["dataset"]  # the fixture

HIGH = 10.0  # a learning rate
SWEPT = {"learning_rates": [2e-3, HIGH], "seeds": [0]}


def _without_losses(*args: Any) -> Any:
    """The training step, but without a finite loss where the learning rate is high."""
    step = make_train_step(*args)

    def broken(state: Any, batch: Any, hyper: Any) -> Any:
        new, metrics = step(state, batch, hyper)
        loss = jnp.where(hyper.learning_rate == HIGH, jnp.nan, metrics["loss"])
        return new, metrics | {"loss": loss}

    return broken


@pytest.mark.parametrize("stopped", [False, True])
@jax.debug_nans(False)
def test_a_run_without_finite_losses_has_diverged(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Its validation error may be as finite as at the start. A stop in between changes nothing."""
    monkeypatch.setattr(at_work, "make_train_step", _without_losses)
    own = config(dataset, ablation=SWEPT)
    (program,) = make_plan(own)
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            Training(program, tmp_path, _Stop(12)).run()
    records = Training(program, tmp_path).run()
    assert [(r["learning_rate"], r["diverged"]) for r in records] == [
        (2e-3, False), (HIGH, True), (2e-3, False), (HIGH, True),
    ]  # fmt: skip
    for r in records:
        for part in ("validation", "test"):
            assert np.isfinite(r[part]["energy_mae_meV"]) == (not r["diverged"])
        assert np.isfinite(r["curve"]["validation"]).all() and r["best_step"] in (4, 8, 12)
        json.dumps(r["curve"], allow_nan=False)
        assert (r["curve"]["loss"] == [None] * 3) == r["diverged"]
    assert "4 runs, 2 of them diverged" in write_report(tmp_path, records, own)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "2 of 4 runs diverged" in page and f"{MAX_NONFINITE} losses" in page


@jax.debug_nans(False)
def test_a_gradient_that_overflows_is_a_divergence(dataset: Path) -> None:
    """At a rate of 10 without clipping the losses stay finite, and nothing moves any more."""
    training = {"clip_norm": 1e9, "warmup_steps": 0}
    (program,) = make_plan(config(dataset, training=training, ablation=SWEPT))
    records = Training(program).run()
    lost = [(r["arm"], r["learning_rate"]) for r in records if r["diverged"]]
    assert ("shell", HIGH) in lost and not {(BASELINE, 2e-3), ("shell", 2e-3)} & {*lost}


def test_losses_that_are_not_finite_are_counted_run_by_run() -> None:
    place = Place([["a"], ["b"], ["c"]])
    norms, going = np.ones(3), np.zeros(3, bool)
    for step in range(MAX_NONFINITE):
        last = np.inf if step < MAX_NONFINITE - 1 else 2.0
        place.count(np.array([1.0, np.nan, last]), norms, going)
    assert place.diverged().tolist() == [False, True, False]
    assert place.loss_sums == [MAX_NONFINITE, 0.0, 2.0]
    assert place.left_out == [0, MAX_NONFINITE, MAX_NONFINITE - 1]
    place.count(np.ones(3), norms, going)  # a run that was given up stays so
    assert place.diverged().tolist() == [False, True, False]
    ended = np.array([True, False, False])  # by its patience: what comes after is not of it
    for _ in range(MAX_NONFINITE):
        place.count(np.ones(3), np.full(3, np.inf), ended)
    assert place.diverged().tolist() == [False, True, True]
