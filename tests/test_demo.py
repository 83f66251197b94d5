"""A short real demonstration from the command line, and the arithmetic of its table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orbq.commands.demo import _delete
from orbq.demo import ARMS, Job, Result, config_of, make_jobs, spread, table


def result(arm: str, seed: int, energy: float, charge: float | None) -> Result:
    return Result(Job(arm, seed, Path("x"), ()), energy, energy / 8, 0.3, charge, {})


def test_ratios_pair_the_runs_of_one_seed() -> None:
    runs = [
        result("multitask", 1, 0.3, 0.02),
        result("energy-only", 0, 1.0, None),
        result("multitask", 0, 0.5, 0.01),
        result("energy-only", 1, 0.5, None),
    ]
    rows = {row.arm: row for row in table(runs)}
    assert rows["energy-only"].ratios == {}
    assert rows["energy-only"].values["charge_mae"] == []
    assert rows["multitask"].values["energy_mae"] == [500.0, 300.0]  # meV, by seed
    assert rows["multitask"].ratios["energy_mae"] == pytest.approx([0.5, 0.6])


def test_spread_is_the_sample_deviation() -> None:
    assert spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert spread([1.0], 1) == "1.0"
    assert spread([], 1) == "-"


@pytest.mark.parametrize("extra", [[], ["training.n_steps=30", "training.warmup_steps=10"]])
def test_arms_differ_in_what_teaches_and_in_nothing_else(tmp_path: Path, extra: list[str]) -> None:
    for name in ("tmc", "tmc_unlabelled"):
        (tmp_path / "data" / name).mkdir(parents=True)
    configs = [config_of(job) for job in make_jobs(tmp_path, 1, extra, ARMS)]
    same = {(c.model, c.data.dataset, c.data.split, c.training.n_steps) for c in configs}
    assert len(same) == 1
    auxiliary = [set(c.loss.weights.auxiliary()) for c in configs]
    assert auxiliary[0] == set() and "onsite" in auxiliary[1] <= auxiliary[2]
    assert [bool(c.data.unlabelled) for c in configs] == [False, False, True]
    assert [bool(c.training.initial) for c in configs] == [False, False, True]
    of_dft = [c.training.batch_size * (1 - c.training.unlabelled_share) for c in configs]
    assert len(set(of_dft)) == 1  # structures with DFT in a step


def test_a_short_demonstration_runs_and_prints_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orbq.cli", "demo", "--seeds", "1", "--steps", "30"]
    done = subprocess.run(
        [*command, "--no-unlabelled", "--out", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "COLUMNS": "150"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line}
    energies = {}
    for arm in ("energy-only", "multitask"):
        numbers = re.findall(r"\d+\.\d+", lines[arm])
        energies[arm] = float(numbers[0])
        assert 10 < energies[arm] < 1e4  # meV; a linear fit on composition leaves about 1,600
    ratio = float(re.findall(r"\d+\.\d+", lines["multitask"])[-1])
    assert ratio == pytest.approx(energies["multitask"] / energies["energy-only"], abs=2e-3)
    assert re.search(r"filled 9\d\.\d% \(edges\)", done.stdout)
    assert re.search(r"compilations per run:.*train 1", done.stdout)
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 5000
    document = json.loads((tmp_path / "demo" / "table.json").read_text())
    assert [row["arm"] for row in document] == ["energy-only", "multitask"]


def test_overwrite_deletes_nothing_but_a_demonstration(tmp_path: Path) -> None:
    for file in ("thesis.txt", "data/tmc/mine.txt", "data/tmc_unlabelled/manifest.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("42")
    for run in ("energy-only-seed0/run.json", "notes-seed0/a.txt"):
        (tmp_path / run).parent.mkdir()
        (tmp_path / run).write_text("{}")
    _delete(tmp_path)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"thesis.txt", "data/tmc/mine.txt", "notes-seed0/a.txt"}
