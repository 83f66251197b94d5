"""Auxiliary targets: what the labelling stage knows about an atom, and how a head is scored on it.

A target is data: the stored arrays it needs, how its columns follow from them, which columns an
element has, which shell's scale each column shares, and how the columns add up to a charge.
Adding one is an entry in ``TARGETS``.

Normalisation, per element and shell (``Statistics``): columns of l = 0 have their mean removed, and
all columns of a shell are divided by one root-mean-square deviation, floored. One scale per shell
keeps the normalised target equivariant: rotating a molecule rotates it and leaves its norm alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from orbq import orbitals as orb

MAIN_TERMS = ("energy", "forces", "stress")  # of the reference method; all others are auxiliary
SCALE_FLOOR = 0.02  # e; below it a column is noise of the SCF and the geometry, not chemistry

Arrays = Mapping[str, np.ndarray]


class Target(NamedTuple):
    """One auxiliary target of k columns.

    irreps: what an equivariant head predicts for it, e3nn notation.
    k: number of columns. unit: physical unit of the columns.
    per: "atom" or "structure".
    fields: arrays of the data set it needs (schema.FIELDS); unlabelled where any of them is masked.
    extract: (arrays, rows) -> [n, k] float64, values of the rows of these fields.
    elements: xTB method -> [87, k] bool, columns an element has; read-only.
    shell: [k] int, the normalisation group of each column. shell_names: their names.
    has_mean: [k] bool, columns whose mean may be removed (l = 0).
    charge: [k] weights with which the columns add up to the atom's charge, or None.
    """

    irreps: str
    k: int
    unit: str
    per: str
    fields: tuple[str, ...]
    extract: Callable[[Arrays, Any], np.ndarray]
    elements: Callable[[str], np.ndarray]
    shell: np.ndarray
    shell_names: tuple[str, ...]
    has_mean: np.ndarray
    charge: np.ndarray | None

    def mask(
        self, numbers: np.ndarray, labelled: np.ndarray | bool, method: str = orb.GFN1
    ) -> np.ndarray:
        """[n, k] bool: columns that exist for these elements in labelled structures."""
        return self.elements(method)[numbers] & np.asarray(labelled, bool).reshape(-1, 1)


def _onsite(arrays: Arrays, rows: Any) -> np.ndarray:
    return np.asarray(arrays["onsite"][rows], np.float64)


_IS_CHARGE = (orb.COLUMN_L == 0) & (orb.COLUMN_SHELL < 4)
_ONSITE_CHARGE = np.where(_IS_CHARGE, np.sqrt(2 * orb.SHELL_L + 1)[orb.COLUMN_SHELL % 4], 0.0)


@cache
def _columns(method: str, k: int) -> np.ndarray:
    return orb.onsite_mask(method)[:, :k]


@cache
def _every_element(k: int) -> np.ndarray:
    return np.tile(np.arange(orb.MAX_Z + 1)[:, None] > 0, (1, k))


def _irreps_target(k: int, irreps: str) -> Target:
    return Target(
        irreps=irreps,
        k=k,
        unit="e",
        per="atom",
        fields=("onsite",),
        extract=lambda arrays, rows: _onsite(arrays, rows)[:, :k],
        elements=lambda method: _columns(method, k),
        shell=orb.COLUMN_SHELL[:k],
        shell_names=orb.STATISTICS_SHELLS[: orb.COLUMN_SHELL[:k].max() + 1],
        has_mean=(orb.COLUMN_L == 0)[:k],
        charge=_ONSITE_CHARGE[:k],
    )


def _scalar_target(field: str, unit: str, charge: bool, extract: Any = None) -> Target:
    return Target(
        irreps="1x0e",
        k=1,
        unit=unit,
        per="atom",
        fields=(field,),
        extract=extract or (lambda arrays, rows: np.asarray(arrays[field][rows], float)[:, None]),
        elements=lambda method: _every_element(1),
        shell=np.zeros(1, int),
        shell_names=("atom",),
        has_mean=np.ones(1, bool),
        charge=np.ones(1) if charge else None,
    )


def _xtb_target(field: str, k: int, irreps: str, unit: str, per: str) -> Target:
    return Target(
        irreps=irreps,
        k=k,
        unit=unit,
        per=per,
        fields=(field,),
        extract=lambda arrays, rows: np.asarray(arrays[field][rows], float).reshape(-1, k),
        elements=lambda method: _every_element(k),
        shell=np.zeros(k, int),
        shell_names=("all",),
        has_mean=np.zeros(k, bool),
        charge=None,
    )


TARGETS: dict[str, Target] = {
    # the paper's target: ten Mulliken orbital charges; they depend on the laboratory frame
    "orbital": Target(
        irreps=orb.DENSITY_IRREPS,
        k=orb.N_SLOTS,
        unit="e",
        per="atom",
        fields=("onsite",),
        extract=lambda arrays, rows: orb.orbital_charges(_onsite(arrays, rows)),
        elements=lambda method: orb.shells(method).slot_mask,
        shell=orb.SLOT_SHELL,
        shell_names=orb.SHELL_NAMES,
        has_mean=np.ones(orb.N_SLOTS, bool),
        charge=np.ones(orb.N_SLOTS),
    ),
    # the 23 same-shell irreps behind them: independent of the frame
    "density": _irreps_target(orb.N_DENSITY, orb.DENSITY_IRREPS),
    # the whole on-site block
    "onsite": _irreps_target(orb.N_ONSITE, orb.ONSITE_IRREPS),
    # shell charges s, s', p, d: how much m-resolution buys
    "shell": Target(
        irreps="4x0e",
        k=4,
        unit="e",
        per="atom",
        fields=("onsite",),
        extract=lambda arrays, rows: orb.shell_charges(_onsite(arrays, rows)),
        elements=lambda method: orb.shells(method).shell_mask,
        shell=np.arange(4),
        shell_names=orb.SHELL_NAMES,
        has_mean=np.ones(4, bool),
        charge=np.ones(4),
    ),
    # one Mulliken charge of the same calculation: how much orbital resolution buys
    "atomic": _scalar_target(
        "onsite", "e", True, lambda a, rows: orb.atomic_charges(_onsite(a, rows))[:, None]
    ),
    # atomic charges of the reference method: the paper's expensive competitor
    "dft": _scalar_target("dft_charges", "e", True),
    # a second fidelity from the same calculation
    "xtb_energy": _xtb_target("xtb_energy", 1, "1x0e", "eV", "structure"),
    "xtb_forces": _xtb_target("xtb_forces", 3, "1x1o", "eV/Å", "atom"),
}
CHARGE_TARGETS = tuple(name for name, t in TARGETS.items() if t.charge is not None)


class Statistics(NamedTuple):
    """Normalisation of a target: ``value = mean[Z] + scale[Z] * normalised``.

    mean, scale: [87, k] float64 in the target's unit. Elements absent from the data have the scale
    of the present ones (root mean square over elements) and mean 0.
    """

    mean: np.ndarray
    scale: np.ndarray


class Moments(NamedTuple):
    """Sums behind ``Statistics``, added up chunk by chunk: number, first and second [87, k]."""

    number: np.ndarray
    first: np.ndarray
    second: np.ndarray


def moments(target: Target, numbers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Moments:
    """Per-element sums of the masked columns. numbers [n], values [n, k], mask [n, k] bool."""
    shape = (orb.MAX_Z + 1, target.k)
    out = Moments(np.zeros(shape), np.zeros(shape), np.zeros(shape))
    kept = np.where(mask, values, 0.0)
    for total, part in zip(out, (mask.astype(float), kept, kept**2), strict=True):
        np.add.at(total, numbers, part)
    return out


def statistics(target: Target, sums: Moments) -> Statistics:
    """Means on l = 0 columns and one floored scale per element and shell.

    A shell's mean is pooled over its l = 0 columns (the m components of an orbital charge share
    one), so that the normalised target transforms as the target does.
    """
    mean, scale = np.zeros_like(sums.first), np.ones_like(sums.first)
    known = np.zeros(sums.first.shape, bool)
    for shell in range(len(target.shell_names)):
        columns = np.flatnonzero(target.shell == shell)
        means = columns[target.has_mean[columns]]
        n_mean, n_all = sums.number[:, means].sum(1), sums.number[:, columns].sum(1)
        mu = sums.first[:, means].sum(1) / np.maximum(n_mean, 1)
        mean[:, means] = mu[:, None]
        total = sums.second[:, columns].sum(1) - n_mean * mu**2
        rms = np.sqrt(np.maximum(total, 0.0) / np.maximum(n_all, 1))
        present = n_all > 0
        pooled = np.sqrt(total[present].sum() / max(n_all[present].sum(), 1.0))
        rms = np.maximum(np.where(present, rms, max(pooled, SCALE_FLOOR)), SCALE_FLOOR)
        scale[:, columns] = rms[:, None]
        known[:, columns] = present[:, None]
    return Statistics(np.where(known, mean, 0.0), scale)
