"""Predictions beside their labels, and the errors in named units.

``Evaluation`` is what ``evaluate`` returns; ``report`` turns it into JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from orbq.metrics import column_errors, display_unit, from_sums
from orbq.orbitals import SYMBOLS

ENERGIES = ("energy", "xtb_energy")
FORCES = ("forces", "xtb_forces")
PER_STRUCTURE = (*ENERGIES, "stress")


class Values(NamedTuple):
    """One label of every structure or atom: what was predicted, what is true.

    predicted, label: [S] (energies, total), [S, 9] (stresses, row by row), [A, 3] (forces) or
    [A, k], float64, in eV, eV/Å^3, eV/Å, e.
    mask: the same shape, bool; the label is 0 where False. source: target it was computed from, ""
    if it was predicted as such.
    """

    predicted: np.ndarray
    label: np.ndarray
    mask: np.ndarray
    source: str = ""

    @property
    def errors(self) -> np.ndarray:
        """Predicted minus label, 0 where there is no label."""
        return np.where(self.mask, self.predicted - self.label, 0.0)


class Cost(NamedTuple):
    """seconds: wall time, compilation included. compilations: of the program. edge_fill: real over
    padded edges."""

    seconds: float
    compilations: int
    edge_fill: float


class Evaluation(NamedTuple):
    """Predictions and labels of S structures with A atoms, one after another.

    rows: [S] structures of the data set. n_node: [S] atoms of each. numbers: [A]. references: by
    energy, [S] reference energies that are part of the predicted ones, eV. values: by label.
    left_out: structures with elements that the run does not know, {symbol: number of structures};
    n_left_out: how many they are. cost: what it took.
    """

    rows: np.ndarray
    n_node: np.ndarray
    numbers: np.ndarray
    references: dict[str, np.ndarray]
    values: dict[str, Values]
    left_out: dict[str, int]
    n_left_out: int
    cost: Cost

    def errors(self) -> dict[str, float]:
        """MAE and RMSE of every label: ``{"energy_mae_meV": ..., "energy_rmse_meV": ..., ...}``."""
        names = [*self.values] + ["energy_per_atom"] * ("energy" in self.values)
        return from_sums({name: self._sums(name) for name in names})

    def mae(self, name: str) -> float:
        """Mean absolute error of a label, or of "energy_per_atom": eV, eV/atom, eV/Å, eV/Å^3 or e.

        NaN without labels. Raises KeyError for a label that was not evaluated.
        """
        absolute, _, count = self._sums(name)
        return float(absolute / count) if count else float("nan")

    def rmse(self, name: str) -> float:
        """Root mean square error, as ``mae``."""
        _, square, count = self._sums(name)
        return float(np.sqrt(square / count)) if count else float("nan")

    def _sums(self, name: str) -> np.ndarray:
        """Sums of |error| and error^2, and the count of labels."""
        values = self.values["energy" if name == "energy_per_atom" else name]
        errors = values.errors / (self.n_node if name == "energy_per_atom" else 1)
        return np.array([np.abs(errors).sum(), np.square(errors).sum(), values.mask.sum()])

    def by_element(self, name: str) -> dict[tuple[str, str], dict[str, float]]:
        """Errors of a per-atom label by (element symbol, shell), in the unit of ``errors``.

        The symbol is "" for all elements together; the shell of forces is "". Each value has
        "mae", "rmse" and "count".
        """
        values, factor = self.values[name], display_unit(name)[1]
        if name in FORCES:
            found = _force_errors(values, self.numbers)
        else:
            found = column_errors(name, values.errors, values.mask, self.numbers)
        return {
            (SYMBOLS[z] if z else "", shell): {
                "mae": mae * factor,
                "rmse": rmse * factor,
                "count": count,
            }
            for (z, shell), (mae, rmse, count) in found.items()
        }

    def atoms_of(self) -> dict[str, int]:
        """Number of atoms of every element by symbol, of all of them under ""."""
        z, count = np.unique(self.numbers, return_counts=True)
        each = {SYMBOLS[i]: int(n) for i, n in zip(z, count, strict=True)}
        return {"": len(self.numbers), **each}

    @property
    def per_atom(self) -> tuple[str, ...]:
        """The labels that ``by_element`` takes."""
        return tuple(name for name in self.values if name not in PER_STRUCTURE)


def _force_errors(
    values: Values, numbers: np.ndarray
) -> dict[tuple[int, str], tuple[float, float, int]]:
    out = {}
    for z in [0, *np.unique(numbers).tolist()]:
        atoms = values.mask[:, 0] if z == 0 else values.mask[:, 0] & (numbers == z)
        if atoms.any():
            e = values.errors[atoms]
            out[z, ""] = (float(np.abs(e).mean()), float(np.sqrt(np.mean(e**2))), e.size)
    return out


def report(evaluation: Evaluation, facts: Iterable[tuple[str, Any]] = ()) -> dict[str, Any]:
    """The evaluation as a JSON object: errors, errors by element and shell, counts, cost.

    facts: what stands before them, such as the names of the run and the data set.
    """
    by_element: dict[str, Any] = {}
    for name in evaluation.per_atom:
        unit = display_unit(name)[0]
        table: dict[str, Any] = {}
        for (symbol, shell), errors in evaluation.by_element(name).items():
            table.setdefault(symbol or "all", {})[shell or "all"] = errors
        by_element[name] = {"unit": unit, "errors": table}
    return {
        **dict(facts),
        "structures": len(evaluation.rows),
        "atoms": int(evaluation.n_node.sum()),
        "left_out": {"structures": evaluation.n_left_out, "elements": evaluation.left_out},
        "labels": {
            name: int(v.mask.any(-1).sum() if v.mask.ndim > 1 else v.mask.sum())
            for name, v in evaluation.values.items()
        },
        "derived": {name: v.source for name, v in evaluation.values.items() if v.source},
        "errors": evaluation.errors(),
        "by_element": by_element,
        "cost": evaluation.cost._asdict(),
    }
