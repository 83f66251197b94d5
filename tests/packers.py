"""A pool of two data sets in memory, packers of it, and whether two batches are the same."""

from __future__ import annotations

import ase
import ase.build
import numpy as np
from memory_dataset import MemoryDataset, random_molecules

from orbq.preprocess.pack import Packer, Part, Pool, measure_budget
from orbq.preprocess.references import References
from orbq.targets import TARGETS

CUTOFF = 4.0
EVERY_TARGET = ("energy", "forces", "stress", *TARGETS)
ZERO = {"energy": References.zero(), "xtb_energy": References.zero()}


def crystals() -> list[ase.Atoms]:
    return [ase.build.bulk("Cu"), ase.build.bulk("NaCl", "rocksalt", a=5.6)]


def molecules_and_crystals() -> MemoryDataset:
    sizes = np.random.default_rng(1).integers(1, 20, 60)
    return MemoryDataset([*random_molecules(sizes), *crystals()])


def pool_with(dataset: MemoryDataset) -> Pool:
    """The data set and two structures of another one."""
    other = MemoryDataset(random_molecules([4, 9, 12]), seed=5)
    return Pool([Part(dataset), Part(other, np.array([2, 0]))], CUTOFF)


def make_packer(pool, batch_size=6.0, targets=EVERY_TARGET, **options) -> Packer:
    return Packer(pool, measure_budget(pool, batch_size), targets, ZERO, **options)


def assert_same(a, b):
    for name, left, right in zip(a._fields, a, b, strict=True):
        if name == "targets":
            assert left.keys() == right.keys()
            assert all(np.array_equal(left[key], right[key]) for key in left)
        else:
            assert np.array_equal(left, right), name
