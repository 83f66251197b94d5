"""``orbq plot``: what is drawn of several runs, the tables beside it, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import ELEMENTS, complexes, random_run, save_run

from orbq.cli import main
from orbq.datasets import open_dataset
from orbq.errors import InputError
from orbq.evaluate import evaluate
from orbq.inference import open_run
from orbq.preprocess.label import Resources, preprocess
from orbq.run_files import names_of
from orbq.run_plots import own_dataset, parity_comparison


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set and two runs that differ in their target; one of them has finished."""
    place = tmp_path_factory.mktemp("plot")
    preprocess(complexes(6, set(ELEMENTS)), place / "data", resources=Resources(workers=1))
    for name, target in {"a": "shell", "b": "onsite"}.items():
        run = save_run(random_run([target]), place / name / "run")
        curve = [
            {
                "stage": "train",
                "step": step,
                "validation/energy_mae_meV": 1e4 / step,
                "validation/energy_mae_meV_per_atom": 1e3 / step,
                "validation/forces_mae_meV_per_A": 2e4 / step,
            }
            for step in (10, 20, 30)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in curve))
    (place / "a" / "run" / "summary.json").write_text("{}")
    return place


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plot", *map(str, arguments)])
    return int(ended.value.code or 0)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_runs_side_by_side(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [place / "a" / "run", place / "b" / "run"]
    (tmp_path / "table.json").write_text("{}")
    beside = [place / "data", tmp_path / "table.json"]  # as the glob of a directory names them
    assert call(*runs, *beside, "--dataset", place / "data", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"left out, no runs: {beside[0]}, {beside[1]}" in out
    assert f"{runs[1]} is not finished: last validation at step 30 (train)" in out
    assert str(runs[0]) + " is not finished" not in out
    found = {p.stem for p in tmp_path.glob("*.png")}
    assert found == {p.stem for p in tmp_path.glob("*.csv")}
    assert {"learning-curves", "parity-energy", "parity-forces", "parity-shell"} <= found

    curves = table(tmp_path / "learning-curves.csv")
    assert [(r["run"], r["step"]) for r in curves][::3] == [("a/run", "10"), ("b/run", "10")]
    assert float(curves[1]["energy_mae_meV"]) == 500.0

    # the tables hold the very numbers whose errors `orbq evaluate` reports
    run = open_run(runs[0])
    scored = evaluate(run, open_dataset(str(place / "data")))
    for label in ("energy", "forces", "shell"):
        own = [r for r in table(tmp_path / f"parity-{label}.csv") if r["run"] == "a/run"]
        errors = np.array([float(r["predicted"]) - float(r["label"]) for r in own])
        # six decimals are written
        assert np.abs(errors).mean() == pytest.approx(scored.mae(label), abs=1e-6)
    energies = table(tmp_path / "parity-energy.csv")
    assert {r["structure"] for r in energies} == set("012345")
    assert all(float(r["reference"]) < -10 for r in energies)


def test_parity_panels_share_their_axes_and_say_what_was_derived(place: Path) -> None:
    data = open_dataset(str(place / "data"))
    found = {n: evaluate(open_run(place / n / "run"), data) for n in "ab"}
    figure = parity_comparison(found, "shell")
    first, second = figure.axes[:2]
    assert first.get_xlim() == second.get_xlim() == first.get_ylim()
    assert first.get_title().startswith("a\nMAE") and "(e)" in first.get_xlabel()
    assert figure.get_suptitle() == "Shell charges; Shell charges (from on-site components)"
    assert len(parity_comparison(found, "onsite").axes) == 1  # only one run predicts them


def test_curves_alone_need_no_data(place: Path, tmp_path: Path) -> None:
    assert call(place / "a" / "run", "--no-parity", "-o", tmp_path) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"learning-curves.png", "learning-curves.csv"}


def test_what_cannot_be_drawn_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "a" / "run"
    new = save_run(random_run(), tmp_path / "new")
    for arguments, told in {
        (run, run): "is named twice",
        (new,): "a run that has reached its first validation",
        (run, "--no-parity", "--split", "all"): "leave out --no-parity",
        (run,): "name one with --dataset",
        (run, "--dataset", place / "data", "--split", "test"): "use split 'all'",
    }.items():
        assert call(*arguments, "--out", tmp_path / "out") == 2
        assert told in capsys.readouterr().err.replace("\n", " ")


def test_own_dataset(place: Path) -> None:
    run = random_run()
    run.info = {"data": [{"path": str(place / "data")}]}
    assert own_dataset(run, "x") == str(place / "data")
    run.info = {"data": [{"path": str(place / "gone")}]}
    with pytest.raises(InputError, match=r"gone, which is not there: name one with --dataset"):
        own_dataset(run, "x")


def test_names_tell_runs_apart() -> None:
    assert names_of(["x/a", "y/b"]) == ["a", "b"]
    assert names_of(["x/a/run", "x/b/run"]) == ["a/run", "b/run"]


def test_pictures_of_earlier_runs_go(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands beside the new pictures is of the same runs; what is not orbq's stays."""
    for name in ("parity-dft.png", "parity-dft.csv", "parity-mine.png"):
        (tmp_path / name).write_text("of an earlier command")
    run = place / "b" / "run"
    assert call(run, "--dataset", place / "data", "--out", tmp_path) == 0
    assert "predicting 6 structures" in capsys.readouterr().err
    there = {p.name for p in tmp_path.iterdir()}
    assert "parity-onsite.png" in there and "parity-mine.png" in there
    assert not {"parity-dft.png", "parity-dft.csv"} & there
    assert call(run, "--no-parity", "--out", tmp_path) == 0
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"learning-curves.png", "learning-curves.csv", "parity-mine.png"}


def test_names_are_no_markup(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(place / "a" / "run", tmp_path / "w=3 [red]")
    assert call(run, "--no-parity", "--out", tmp_path / "plots [/x]") == 0
    assert str(tmp_path / "plots [/x]" / "learning-curves.png") in capsys.readouterr().out
