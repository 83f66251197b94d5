"""References in other units or of the wrong sign are told by their size beside xTB's."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from orbq.commands.preprocess import summarise
from orbq.datasets import open_dataset
from orbq.preprocess.plausible import strange_units
from orbq.preprocess.store import Dataset

HARTREE_PER_BOHR, HARTREE, KCAL_PER_MOL = 51.422, 27.2114, 0.043364


@pytest.fixture(scope="module")
def tmc() -> Dataset:
    return open_dataset("tmc")


def changed(data: Dataset, **factors: float) -> Dataset:
    arrays = {name: np.asarray(data[name]) * factor for name, factor in factors.items()}
    return Dataset(data.path, data.manifest, {**data.arrays, **arrays})


def test_what_is_right_is_not_doubted(tmc: Dataset) -> None:
    assert strange_units(tmc) == []
    for factor in (0.5, 1.9):  # as between levels of theory
        assert strange_units(changed(tmc, energy=factor, forces=factor)) == []


@pytest.mark.parametrize(
    ("name", "factor", "guess"),
    [
        ("forces", 1 / HARTREE_PER_BOHR, "are they in Hartree/bohr?"),
        ("forces", 1 / KCAL_PER_MOL, "are they in kcal/mol/Å?"),
        ("forces", 1e3, "are they in meV/Å?"),
        ("forces", 1e6, "are they in another unit?"),
        ("forces", -1, "are they gradients?"),
        ("energy", 1 / HARTREE, "are they in Hartree?"),
        ("energy", 1 / KCAL_PER_MOL, "are they in kcal/mol?"),
        ("energy", -1, "are they of the other sign?"),
    ],
)
def test_other_units_and_signs_are_told(tmc: Dataset, name: str, factor: float, guess: str) -> None:
    wrong = changed(tmc, **{name: factor})
    (told,) = strange_units(wrong)
    assert told.startswith(name) and guess in told
    shown = io.StringIO()
    summarise(wrong, Console(file=shown, soft_wrap=True))
    assert told in shown.getvalue()


def test_without_labels_or_likeness_nothing_is_told(tmc: Dataset) -> None:
    nothing = {f"{name}_mask": np.zeros(len(tmc), bool) for name in ("energy", "forces")}
    assert strange_units(Dataset(tmc.path, tmc.manifest, {**tmc.arrays, **nothing})) == []
    noise = np.random.default_rng(0).normal(scale=1e-3, size=tmc["forces"].shape)
    relaxed = Dataset(tmc.path, tmc.manifest, {**tmc.arrays, "forces": noise})
    assert strange_units(relaxed) == []
    few = changed(tmc, forces=1e3)
    few.arrays["forces_mask"] = np.arange(len(tmc)) < 1
    assert strange_units(few) == []
