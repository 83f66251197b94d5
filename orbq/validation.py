"""Errors on held-out structures while a run trains, and the conflict of its tasks' gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from orbq import devices
from orbq.compiled import Counted
from orbq.data import TrainingData, to_batch
from orbq.devices import Layout
from orbq.losses import Batch
from orbq.metrics import add_sums, from_sums
from orbq.models.potential import Params, Potential
from orbq.preprocess.pack import Packer
from orbq.train import make_evaluate, make_gradient_report


class Validation:
    """The compiled programs of validation, shared by all stages of a run."""

    def __init__(self, potential: Potential, data: TrainingData, layout: Layout) -> None:
        self.layout = layout
        self.evaluate = Counted(make_evaluate(potential, data.spec.terms))
        self.report = Counted(make_gradient_report(potential, data.spec))

    def errors(self, params: Params, packer: Packer) -> dict[str, float]:
        """Errors of ``params`` on every structure of a packer's pool; the processes share them."""
        plan = packer.plan(0)
        mine = plan[jax.process_index() :: jax.process_count()] or [np.zeros(0, np.int64)]
        parts = [self.evaluate(params, to_batch(packer.batch(items))) for items in mine]
        return from_sums(devices.total(add_sums(jax.device_get(parts))))

    def gradients(
        self, params: Params, batch: Batch, weights: Mapping[str, Array]
    ) -> dict[str, float]:
        """Norms and conflict of the tasks' gradients on the first part of an update."""
        if self.layout.mesh is not None:
            batch = jax.tree.map(lambda x: x.addressable_data(0)[0, 0], batch)
        found: Any = jax.device_get(self.report(params, batch, weights))
        return {name: float(value) for name, value in found.items()}


def criterion_of(errors: Mapping[str, float], weights: Mapping[str, float] | None = None) -> str:
    """What the best parameters are chosen by: the energy error, else that of the forces, else that
    of the target with the largest weight.

    weights: of the targets other than energy and forces; of equal ones the first counts.
    """
    auxiliary = sorted(weights or {}, key=lambda name: -(weights or {})[name])
    for label in ("energy", "forces", *auxiliary):
        for name in errors:
            if name.startswith(f"{label}_mae") and "per_atom" not in name:
                return name
    return next(name for name in errors if "_mae" in name)
