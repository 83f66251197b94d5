"""Whether a finished xTB calculation says something: without any error it may be nonsense."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from orbq import orbitals

# Bounds on a sane result. A charge-collapsed state (the La complex ABEVAG of tmQMg: charge -16.6 on
# La) converges without any error and is recognised by these alone.
CHARGE_SUM_TOLERANCE = 1e-6  # e; the sum is exact to 1e-13 in a finished calculation
POPULATION_RANGE = (-0.2, 2.1)  # electrons in one orbital; Mulliken populations may stray from 0..2
MAX_ATOMIC_CHARGE = 4.0  # e


class LabelError(RuntimeError):
    """xTB has no trustworthy result for this structure; the message says why."""


class Checked(NamedTuple):
    """What decides, per structure, whether a result is sane: it is finite, conserves charge, and
    its charges and populations have a possible size.

    surplus: e above the total charge. charge: largest |atomic charge|, e. lowest, highest:
    populations of an orbital. finite: energy and forces are.
    """

    surplus: np.ndarray
    charge: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    finite: np.ndarray

    def sane(self) -> np.ndarray:
        low, high = POPULATION_RANGE
        small = (np.abs(self.surplus) < CHARGE_SUM_TOLERANCE) & (self.charge < MAX_ATOMIC_CHARGE)
        return np.asarray(self.finite & small & (self.lowest > low) & (self.highest < high))

    def error(self, i: int, charges: np.ndarray, numbers: np.ndarray) -> LabelError:
        """Why structure ``i``, of these atomic charges, is not."""
        if not (self.finite[i] and np.isfinite(charges).all()):
            return LabelError("result is not finite")
        if self.charge[i] >= MAX_ATOMIC_CHARGE:
            atom = int(np.argmax(np.abs(charges)))
            return LabelError(
                f"charge collapse: {charges[atom]:+.1f} e on atom {atom} "
                f"({orbitals.SYMBOLS[numbers[atom]]}), less than {MAX_ATOMIC_CHARGE:g} is sane"
            )
        if abs(self.surplus[i]) >= CHARGE_SUM_TOLERANCE:
            return LabelError(f"charges sum to {self.surplus[i]:+.2e} e more than the total charge")
        low, high = POPULATION_RANGE
        return LabelError(
            f"orbital populations from {self.lowest[i]:.2f} to {self.highest[i]:.2f}: "
            f"{low:g} to {high:g} is sane"
        )
