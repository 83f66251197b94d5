"""Pictures: what is on them, in which unit; and that they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from orbq import plots
from orbq.errors import InputError
from orbq.scores import Cost, Evaluation, Values


def values(rng: np.random.Generator, shape: tuple[int, ...], error: float, at: float = 0.0):
    label = at + rng.normal(size=shape)
    return Values(label + error * rng.normal(size=shape), label, np.ones(shape, bool))


@pytest.fixture
def evaluation() -> Evaluation:
    rng = np.random.default_rng(0)
    n_node = np.full(50, 30)
    found = {
        "energy": values(rng, (50,), 0.1, at=-5000.0),
        "forces": values(rng, (1500, 3), 0.1),
        "atomic": values(rng, (1500, 1), 0.01)._replace(source="onsite"),
        "dft": values(rng, (1500, 1), 0.01)._replace(mask=np.zeros((1500, 1), bool)),
    }
    references = {"energy": np.full(50, -5000.0)}
    numbers = np.full(1500, 8)
    return Evaluation(np.arange(50), n_node, numbers, references, found, {}, 0, Cost(1, 1, 1))


def test_parity(evaluation, tmp_path):
    figure = plots.parity_figure(evaluation, tmp_path / "new" / "parity.png")
    assert (tmp_path / "new" / "parity.png").read_bytes().startswith(b"\x89PNG")
    energy, forces, atomic = figure.axes[:3]
    assert "meV/atom" in energy.get_title() and "relative to references, eV" in energy.get_xlabel()
    assert np.abs(energy.get_xlim()).max() < 10  # not the total energy
    assert f"{evaluation.mae('forces') * 1e3:.1f}" in forces.get_title()
    assert "eV/Å" in forces.get_ylabel() and forces.collections[0].get_array() is not None
    assert "from on-site components" in atomic.get_title()
    assert len(figure.axes) == 3  # no panel without labels
    assert forces.child_axes[0].get_ylabel() == "values per cell"  # many points: their density


def write_metrics(directory: Path, stages: dict[str, int]) -> Path:
    directory.mkdir()
    records = [
        {
            "stage": stage,
            "step": step,
            "validation/energy_mae_meV": 900.0 / step,
            "validation/energy_mae_meV_per_atom": 100.0 / step,
            "validation/forces_mae_meV_per_A": 50.0 / step,
        }
        for stage, n in stages.items()
        for step in range(10, n + 1, 10)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text + '{"stage": "tr')  # cut off by a power failure
    return directory


def test_learning_curves(tmp_path):
    runs = {
        "plain": write_metrics(tmp_path / "a", {"train": 50}),
        "taught": write_metrics(tmp_path / "b", {"pretrain": 30, "train": 50}),
    }
    figure = plots.learning_curve_figure(runs, tmp_path / "curves.png")
    energy, forces = figure.axes
    assert energy.get_ylabel() == "validation MAE (meV)"  # per structure: what is minimised
    assert forces.get_ylabel() == "validation MAE (meV/Å)"
    assert [text.get_text() for text in energy.get_legend().get_texts()] == ["plain", "taught"]
    assert max(line.get_xdata()[-1] for line in energy.lines) == 80  # after the pre-training
    with pytest.raises(InputError, match="a run that has reached"):
        plots.learning_curve_figure([tmp_path / "none"])


class Row(NamedTuple):
    arm: str
    values: dict[str, list[float]]


def test_arms(tmp_path):
    rows = [
        Row("energy-only", {"energy_mae_per_atom": [100.0, 120.0], "charge_mae": []}),
        Row("multitask", {"energy_mae_per_atom": [50.0, 60.0], "charge_mae": [0.02, 0.03]}),
    ]
    figure = plots.arms_figure(rows, tmp_path / "arms.png")
    energy, charges = figure.axes
    assert energy.get_ylabel() == "MAE (meV/atom)" and charges.get_ylabel() == "MAE (e)"
    assert energy.get_ylim()[0] == 0
    assert [text.get_text() for text in energy.texts] == ["110.0", "55.0\n−50%"]
    assert "not" in charges.texts[0].get_text()
    assert (tmp_path / "arms.png").stat().st_size > 1000
