"""Histograms of a data set: sizes, elements, charges, energies, forces, edges."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orbq.errors import InputError
from orbq.preprocess.flat import release
from orbq.preprocess.store import Dataset
from orbq.preprocess.summary import Summary, atom_values

SAMPLE = 200_000  # rows that a histogram is made of, evenly spaced over the data set
BLOCK = 1024  # consecutive atoms read together


def plot_dataset(
    dataset: Dataset, summary: Summary, path: Path, cutoff: float | None = None
) -> None:
    """Write one figure with a panel for each kind of quantity that the data set has.

    Raises InputError for a file type that matplotlib does not write.
    """
    matplotlib.use("agg")
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise InputError(f"--plot {path}: file types are {', '.join('.' + k for k in known)}")
    axes = figure.subplots(2, 4).ravel()
    _histogram(axes[0], dataset.n_atoms[_rows(len(dataset))], "atoms per structure")
    _bars(axes[1], {s: a for s, (_, a) in summary.elements.items()}, "atoms of each element")
    _bars(axes[2], {f"{q:+d}": n for q, n in summary.charges.items()}, "total charge (e)")
    for axis, name, label in (
        (axes[3], "energy", "energy (eV/atom)"),
        (axes[5], "xtb_energy", "xTB energy (eV/atom)"),
    ):
        _histogram(axis, _per_atom(dataset, name), label)
    _histogram(axes[4], _of_atoms(dataset, "forces"), "force on an atom (eV/Å)")
    _histogram(axes[6], _of_atoms(dataset, "xtb_charges"), "xTB atomic charge (e)")
    if cutoff is not None:
        from orbq.preprocess.neighbor_cache import neighbors

        rows = _rows(len(dataset))
        found = np.diff(neighbors(dataset, cutoff).offsets)[rows] / dataset.n_atoms[rows]
        _histogram(axes[7], found, f"neighbours per atom within {cutoff:g} Å")
    else:
        axes[7].set_axis_off()
    figure.suptitle(f"{dataset.path.name}: {summary.structures:,} structures")
    figure.savefig(path, dpi=150)


def _rows(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(int))


def _per_atom(dataset: Dataset, name: str) -> np.ndarray:
    rows = _rows(len(dataset))
    rows = rows[dataset.mask(name)[rows]]
    return np.asarray(dataset[name][rows] / dataset.n_atoms[rows])


def _of_atoms(dataset: Dataset, name: str) -> np.ndarray:
    """Values of evenly spaced runs of atoms whose structures have the label."""
    atoms, offsets = len(dataset["numbers"]), np.asarray(dataset.offsets)
    field = "onsite" if name == "xtb_charges" else name
    mask = np.asarray(dataset.mask(field))
    starts = np.unique(np.linspace(0, max(atoms - BLOCK, 0), SAMPLE // BLOCK).astype(int))
    if atoms <= SAMPLE:
        starts = np.arange(0, atoms, BLOCK)
    out = []
    for start in starts.tolist():
        run = slice(start, min(start + BLOCK, atoms))
        structure = np.searchsorted(offsets, np.arange(run.start, run.stop), side="right") - 1
        out.append(atom_values(dataset, name, run)[mask[structure]])
        release(dataset[field])
    return np.concatenate(out)


def _histogram(axis: Axes, values: np.ndarray, label: str) -> None:
    if len(values):
        low, high = np.quantile(values, [0.001, 0.999])
        axis.hist(np.clip(values, low, high), bins=60, color="C0")
    else:
        axis.text(0.5, 0.5, "none in the data", ha="center", transform=axis.transAxes)
    axis.set_xlabel(label)
    axis.set_ylabel("count")


def _bars(axis: Axes, counts: dict[str, int], label: str) -> None:
    axis.bar(range(len(counts)), list(counts.values()), color="C1")
    few = len(counts) < 12
    size, rotation = (8.0, 0) if few else (max(3.0, 180 / len(counts)), 90)
    axis.set_xticks(range(len(counts)), list(counts), fontsize=size, rotation=rotation)
    axis.set_yscale("log")
    axis.set_xlabel(label)
