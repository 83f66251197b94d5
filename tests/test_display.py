"""What one sees of a run in training: the live terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orbq.commands import ablate
from orbq.commands.train import Display
from orbq.config import Config, parse_config
from orbq.errors import InputError
from orbq.reporter import Reporter, Speed
from orbq.study.plan import make_plan
from orbq.trackers import with_trackers

FACTS: dict[str, Any] = {
    "directory": "runs/x",
    "stages": {"pretrain": 50, "train": 2000},
    "structures": {"train": 590, "validation": 72},
    "labels": {"energy": 590, "forces": 580, "stress": 1},
    "n_parameters": 12345,
    "devices": "1 x cpu",
    "parts": 1,
    "budget": {"n_node": 81, "n_edge": 565, "n_graph": 15},
    "fill": {"edge": 0.958, "node": 0.828},
}


def record(stage: str, step: int) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "train/loss": 0.42,
        "train/energy": 0.07,
        "train/forces": 0.11,
        "train/gradient_norm": 1.5,
        "train/learning_rate": 1e-3,
        "validation/energy_mae_meV": 1483.32,
        "validation/forces_mae_meV_per_A": 415.76,
        "validation/onsite_mae_e": 0.02367,
        "gradient/cosine": -0.1,
        "best": True,
    }


def train(told: Reporter) -> None:
    """The calls of a run with two stages."""
    told.started(FACTS)
    told.stepped("pretrain", 25, 50, 0.9, Speed(900.0, 0.5, 1))
    told.validated(record("pretrain", 50))
    told.stepped("train", 25, 2000, 0.4232, Speed(14813.2, 0.84, 2))
    told.validated(record("train", 100))
    told.warned("a batch was left out [x]")


def test_live_display() -> None:
    """On a terminal of 80 columns nothing of it is cut."""
    console = Console(force_terminal=True, record=True, width=80, highlight=False)
    with Display(console) as display:
        train(display)
        display.progress.refresh()
    seen = console.export_text()
    bars = [line for line in seen.splitlines() if "ETA" in line]
    assert "step" in bars[-1] and "25/2000" in bars[-1] and "…" not in seen
    assert "loss 0.4232, 14,813 atoms/s, filled 84%, compiled 2x" in seen
    assert "energy 1483.3 meV, forces 415.8 meV/Å, onsite 0.0237 e" in seen.replace("\n", " ")
    assert "losses: total 0.42, energy 0.07, forces 0.11" in seen
    assert "best" in seen and "learning_rate" not in seen
    assert "filled 95.8% (edges)" in seen and "12,345" in seen and "stress" not in seen
    assert "warning: a batch was left out [x]" in seen


# --------------------------------------------------------------------------- trackers


def config(directory: Path, log: str) -> Config:
    return parse_config({"run": {"directory": str(directory), "log": [log]}})


def events(directory: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in TensorBoard's event files: records of length, checksum,
    protocol buffer, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (n,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + n])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + n :]
    return found


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    silent = Display(Console(quiet=True))
    with with_trackers(config(tmp_path, "tensorboard"), silent) as told:
        train(told)
    found = {(tag, step): value for tag, step, value in events(tmp_path / "tensorboard")}
    assert found["loss", 25] == pytest.approx(0.9)  # float32
    assert found["loss", 75] == pytest.approx(0.4232)  # after the 50 steps of pre-training
    assert found["atoms_per_second", 75] == pytest.approx(14813.2)
    assert found["validation/forces_mae_meV_per_A", 150] == pytest.approx(415.76)
    assert found["gradient/cosine", 150] == pytest.approx(-0.1)


def test_steps_go_on_where_a_run_is_resumed(tmp_path: Path) -> None:
    """Another process, which does not see the stage that is over."""
    pytest.importorskip("tensorboardX")
    with with_trackers(config(tmp_path, "tensorboard"), Display(Console(quiet=True))) as told:
        told.started(FACTS)
        told.validated(record("train", 100))
    assert {step for _, step, _ in events(tmp_path / "tensorboard")} == {150}


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with with_trackers(config(tmp_path, "wandb"), Display(Console(quiet=True))) as told:
        train(told)
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    text = log.read_bytes()
    assert b"validation/forces_mae_meV_per_A" in text and b"gradient/cosine" in text


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    place = tmp_path / "run"
    with (
        pytest.raises(InputError, match=rf"pip install 'orbq\[{name}\]'"),
        with_trackers(config(place, name), Display(Console(quiet=True))) as told,
    ):
        told.started(FACTS)
    assert not place.exists()


def test_an_ablation_fits_a_terminal_of_80_columns() -> None:
    """Names, counts, time left and validation errors, none of them cut."""
    ablation = {"targets": ["onsite+xtb_energy"], "n_train": [100], "subset_seeds": [2, 2, 2]}
    weights = {"xtb_energy": 1.0}
    settings = parse_config(
        {"ablation": ablation, "loss": {"weights": weights}, "training": {"n_steps": 4000}}
    )
    (program,) = make_plan(settings)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    display = ablate.Display(console, settings)
    display.planned([program], 0)
    for step in (25, 1200):
        display.stepped(program, step, 4000)
    display.validated(program, 1200, np.array([1213.4, 87.25]))
    console.print(display.progress.get_renderable())
    text = console.export_text()
    for told in (f"{program.name} ", " 1200/4000 ", "val 87.25-1213 meV", "ETA 0:"):
        assert told in text, text
    assert "…" not in text
