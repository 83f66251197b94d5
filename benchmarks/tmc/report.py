"""How hard a labelled data set is, and how sound: the statistics that go beside it.

What is left of the energy after a linear fit on composition and total charge is what a potential
must learn; how much of that a kernel on composition alone explains, by held-out groups, is what
needs no structure. Units: eV, Å, e.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from .filter import CHARGES, Filtered

N_FOLDS = 5
KERNEL_GRID = [(g, lam) for g in (0.003, 0.01, 0.03, 0.1) for lam in (1e-2, 1e-1, 1.0)]


def statistics(filtered: Filtered) -> dict[str, Any]:
    """Counts, energy residuals and numerical soundness of a filtered data set, ready for JSON."""
    frames = filtered.frames
    elements = _elements(frames)
    x = compositions(frames, elements)
    energy = np.array([f.info["energy"] for f in frames])
    reference = np.linalg.lstsq(x, energy, rcond=None)[0]
    return {
        **_counts(filtered),
        **_residuals(frames, x, energy, energy - x @ reference),
        **_held_out(frames, x, energy),
        **_soundness(filtered),
        "linear_reference_eV": dict(zip([*elements, "charge"], reference.tolist(), strict=True)),
    }


def compositions(frames: list[Atoms], elements: list[str]) -> np.ndarray:
    """[S, elements + 1]: atoms of each element, and the total charge."""
    rows = [
        [f.get_chemical_symbols().count(e) for e in elements] + [f.info["charge"]] for f in frames
    ]
    return np.array(rows, float)


def _elements(frames: list[Atoms]) -> list[str]:
    present = {symbol for f in frames for symbol in f.get_chemical_symbols()}
    return sorted(present, key=atomic_numbers.__getitem__)


def _counts(filtered: Filtered) -> dict[str, Any]:
    frames = filtered.frames
    complexes = [f for f in frames if f.info["metal"] != "none"]
    return {
        "structures": len(frames),
        "groups": len({f.info["group"] for f in frames}),
        "tm_structures": len(complexes),
        "tm_groups": len({f.info["group"] for f in complexes}),
        "metals": len({f.info["metal"] for f in complexes}),
        "dropped": dict(filtered.dropped),
        "elements": dict(Counter(s for f in frames for s in f.get_chemical_symbols())),
        "structures_per_metal": dict(Counter(f.info["metal"] for f in frames)),
        "sizes": dict(sorted(Counter(map(len, frames)).items())),
        "charges": dict(sorted(Counter(int(f.info["charge"]) for f in frames).items())),
        "geometry": dict(Counter(f.info["geometry"] for f in frames)),
    }


def _residuals(
    frames: list[Atoms], x: np.ndarray, energy: np.ndarray, residual: np.ndarray
) -> dict[str, float]:
    """Energy left after the linear fit on all structures, within and between groups."""
    n_atoms = np.array([len(f) for f in frames])
    gfn1 = np.array([f.info["gfn1_energy"] for f in frames])
    gfn1_residual = gfn1 - x @ np.linalg.lstsq(x, gfn1, rcond=None)[0]
    members = defaultdict(list)
    for i, frame in enumerate(frames):
        members[frame.info["group"]].append(i)
    within = np.concatenate([energy[i] - energy[i].mean() for i in members.values()])
    between = np.array([residual[i].mean() for i in members.values()])
    return {
        "linear_residual_std_eV": float(residual.std()),
        "linear_residual_std_meV_per_atom": float((residual / n_atoms).std() * 1000),
        "linear_residual_mae_eV": float(np.abs(residual).mean()),
        "within_group_std_eV": float(within.std()),
        "between_group_std_eV": float(between.std()),
        "gfn1_residual_correlation": float(np.corrcoef(residual, gfn1_residual)[0, 1]),
        "delta_gfn1_residual_std_eV": float((residual - gfn1_residual).std()),
    }


def _held_out(frames: list[Atoms], x: np.ndarray, energy: np.ndarray) -> dict[str, float]:
    """Errors on held-out groups: of the linear fit, and of a kernel on composition after it.

    The kernel's parameters are chosen on the held-out structures, so its R2 is an upper bound.
    Structures with an element that the other folds lack are left out.
    """
    groups = np.array([f.info["group"] for f in frames])
    order = np.unique(groups)
    if len(order) < N_FOLDS:
        return {}
    np.random.default_rng(0).shuffle(order)
    fold = {group: i % N_FOLDS for i, group in enumerate(order)}
    folds = np.array([fold[g] for g in groups])
    linear, kernel = [], []
    for i in range(N_FOLDS):
        train, test = folds != i, folds == i
        test &= ~np.any((x[:, :-1] > 0) & ~(x[train][:, :-1] > 0).any(0), axis=1)
        if not test.any():
            continue
        weights = np.linalg.lstsq(x[train], energy[train], rcond=None)[0]
        left = energy - x @ weights
        linear.append(left[test])
        kernel.append(_kernel_prediction(x, left, train, test))
    error = np.concatenate(linear)
    unexplained = np.mean((error - np.concatenate(kernel)) ** 2) / error.var()
    return {
        "cv_linear_std_eV": float(error.std()),
        "cv_linear_mae_eV": float(np.abs(error).mean()),
        "cv_composition_kernel_R2_of_residual": float(1 - unexplained),
    }


def _kernel_prediction(
    x: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Kernel ridge regression of ``target`` on composition; the best of KERNEL_GRID on the test."""
    mean, std = x[train].mean(0), x[train].std(0) + 1e-9
    a, b = (x[train] - mean) / std, (x[test] - mean) / std
    square_aa = ((a[:, None] - a[None]) ** 2).sum(-1)
    square_ba = ((b[:, None] - a[None]) ** 2).sum(-1)
    predictions = [
        np.exp(-g * square_ba)
        @ np.linalg.solve(np.exp(-g * square_aa) + lam * np.eye(len(a)), target[train])
        for g, lam in KERNEL_GRID
    ]
    return min(predictions, key=lambda p: ((target[test] - p) ** 2).mean())


def _soundness(filtered: Filtered) -> dict[str, float]:
    frames, mismatch = filtered.frames, np.abs(filtered.mismatch)
    forces = [f.arrays["forces"] for f in frames]
    charge_error = [
        abs(f.arrays[name].sum() - f.info["charge"]) for f in frames for name in CHARGES
    ]
    gaps = [f.info["homo_lumo_gap"] for f in frames]
    out = {
        "force_rms": float(np.sqrt(np.mean(np.concatenate(forces) ** 2))),
        "force_max": float(max(np.abs(f).max() for f in forces)),
        "net_force_max": float(max(np.abs(f.sum(0)).max() for f in forces)),
        "charge_sum_err": float(max(charge_error)),
        "gap_min": float(min(gaps)),
        "gap_median": float(np.median(gaps)),
    }
    if len(mismatch):
        median, p95, p99 = np.percentile(mismatch, (50, 95, 99))
        out |= {
            "energy_force_mismatch_median": float(median),
            "energy_force_mismatch_95": float(p95),
            "energy_force_mismatch_99": float(p99),
        }
    return out
