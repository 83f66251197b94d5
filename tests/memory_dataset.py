"""A data set in memory with the arrays of a stored one, for tests of what is built on data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ase
import numpy as np

from orbq.orbitals import GFN1
from orbq.schema import FIELDS, MANIFEST


class MemoryDataset:
    """Arrays of ``schema.FIELDS`` with masks and offsets, all labels random and present."""

    method = GFN1

    def __init__(self, structures: Sequence[ase.Atoms], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        sizes = np.array([len(atoms) for atoms in structures])
        n, total = len(sizes), int(sizes.sum())
        self.path: Path | None = None
        self.arrays: dict[str, np.ndarray] = {
            "offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        }
        for name, field in FIELDS.items():
            shape = (total if field.per == "atom" else n, *field.shape)
            values = rng.normal(size=shape) if field.dtype == "float64" else np.zeros(shape)
            self.arrays[name] = values.astype(field.dtype)
            if field.maskable:
                self.arrays[f"{name}_mask"] = np.ones(n, bool)
        self.arrays["numbers"] = np.concatenate([a.numbers for a in structures]).astype(np.int32)
        self.arrays["positions"] = np.concatenate([a.positions for a in structures])
        self.arrays["cell"] = np.array([np.asarray(a.cell) for a in structures])
        self.arrays["pbc"] = np.array([a.pbc for a in structures])
        self.arrays["total_charge"] = rng.integers(-2, 3, n).astype(np.int32)
        self.arrays["spin_multiplicity"] = rng.integers(1, 4, n).astype(np.int32)

    def __len__(self) -> int:
        return len(self.arrays["offsets"]) - 1

    def rows(self, i: int) -> slice:
        """Rows of structure ``i`` in the per-atom arrays."""
        return slice(*self.arrays["offsets"][i : i + 2].tolist())

    def save(self, directory: Path) -> MemoryDataset:
        """Write the arrays as ``.npy`` files and open them memory-mapped from there."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, array in self.arrays.items():
            np.save(directory / f"{name}.npy", array)
            mode = "r" if array.size else None
            self.arrays[name] = np.load(directory / f"{name}.npy", mmap_mode=mode)
        (directory / MANIFEST).write_text("{}")
        self.path = directory
        return self


def random_molecules(sizes: Sequence[int], seed: int = 0, density: float = 0.08) -> list[ase.Atoms]:
    """Molecules of H, C, N, O at random places; density in atoms/Å^3 sets their neighbours."""
    rng = np.random.default_rng(seed)
    return [
        ase.Atoms(
            numbers=rng.choice([1, 6, 7, 8], n),
            positions=rng.random((n, 3)) * (n / density) ** (1 / 3),
        )
        for n in sizes
    ]
