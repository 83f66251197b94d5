"""Errors in named units, from sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from orbq.targets import TARGETS

# name -> (unit shown, factor from the internal unit)
_DISPLAY = {
    "energy": ("meV", 1e3),
    "energy_per_atom": ("meV/atom", 1e3),
    "forces": ("meV/Å", 1e3),
    "stress": ("meV/Å^3", 1e3),
    "xtb_energy": ("meV", 1e3),
    "xtb_forces": ("meV/Å", 1e3),
}


def display_unit(name: str) -> tuple[str, float]:
    """Unit in which an error is shown, and the factor from eV, eV/Å, eV/Å^3 or e."""
    return _DISPLAY.get(name, ("e", 1.0))


def _spelt(unit: str) -> str:
    """A unit in the keys of records: ``meV_per_A``."""
    return unit.replace("/", "_per_").replace("Å^3", "A3").replace("Å", "A")


def unit_of(spelt: str) -> str:
    """The unit that stands so in the keys of records."""
    return {_spelt(unit): unit for unit, _ in _DISPLAY.values()}.get(spelt, spelt)


def add_sums(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sums of ``losses.error_sums`` over batches, in float64."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for name, sums in part.items():
            total[name] = total.get(name, np.zeros(3)) + np.asarray(sums, np.float64)
    return total


def from_sums(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """``{"energy_mae_meV": ..., "energy_rmse_meV": ...}``; labels without data are left out."""
    out = {}
    for name, (absolute, square, count) in sums.items():
        if count == 0:
            continue
        unit, factor = display_unit(name)
        suffix = _spelt(unit)
        key = name if not name.endswith("_per_atom") else name.removesuffix("_per_atom")
        out[f"{key}_mae_{suffix}"] = float(absolute / count * factor)
        out[f"{key}_rmse_{suffix}"] = float(np.sqrt(square / count) * factor)
    return out


def column_errors(
    target: str, errors: np.ndarray, mask: np.ndarray, numbers: np.ndarray
) -> dict[tuple[int, str], tuple[float, float, int]]:
    """MAE, RMSE and count per (element, shell) of a per-atom target; element 0 is all of them.

    errors, mask [n, k]; numbers [n].
    """
    spec = TARGETS[target]
    out = {}
    for z in [0, *np.unique(numbers).tolist()]:
        rows = slice(None) if z == 0 else numbers == z
        for shell, name in enumerate(spec.shell_names):
            columns = spec.shell == shell
            chosen = errors[rows][:, columns][mask[rows][:, columns]]
            if chosen.size:
                rmse = float(np.sqrt(np.mean(chosen**2)))
                out[z, name] = (float(np.abs(chosen).mean()), rmse, int(chosen.size))
    return out
