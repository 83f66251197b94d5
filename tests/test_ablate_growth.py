"""An ablation to which seeds, weights and targets are added later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orbq.errors import InputError
from orbq.study import run_ablation
from orbq.study.plan import Program
from orbq.study.run import PROGRAMS, Silent, read_results
from tests.test_ablate import config, dataset

__all__ = ["dataset"]  # the fixture


class _StopsAt(Silent):
    """Interrupts a training at a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def stepped(self, program: Program, step: int, n_steps: int) -> None:
        if step >= self.at:
            raise KeyboardInterrupt


def test_an_ablation_may_grow_and_ends_as_if_it_had_been_whole(
    dataset: Path, tmp_path: Path
) -> None:
    """Seeds, weights and targets are added to one that was stopped with a checkpoint: what had
    begun goes on from there, and every run is what it would have been."""
    small = {"targets": ["shell"], "weights": [0.0, 10.0], "seeds": [0, 1]}
    large = {"targets": ["shell", "atomic"], "weights": [0.0, 3.0, 10.0], "seeds": [0, 1, 2]}
    out = tmp_path / "grown"
    with pytest.raises(KeyboardInterrupt):
        run_ablation(config(dataset, out, ablation=small), reporter=_StopsAt(9))
    (begun,) = (out / PROGRAMS).iterdir()
    assert (begun / "checkpoints" / "step_000000008").is_dir()
    told = _Told()
    records = run_ablation(config(dataset, out, ablation=large), reporter=told)
    assert told.first[0][0] > 8 and [n for _, n in told.first] == [4, 5, 6]
    whole = run_ablation(config(dataset, tmp_path / "whole", ablation=large))
    found, expected = (
        {(r["arm"], r["weight"], r["seed"]): r["test"]["energy_mae_meV"] for r in some}
        for some in (records, whole)
    )
    assert len(records) == len(whole) == 15
    assert found == pytest.approx(expected, rel=1e-4)
    before = read_results(out)
    assert run_ablation(config(dataset, out, ablation=large)) == before
    # what would change the runs that are there: another first seed (the order of batches), another
    # first target (the heads beside the energy-only runs), another number of steps
    for wrong, key in (
        ({**large, "seeds": [2, 0, 1]}, "ablation.seeds"),
        ({**large, "targets": ["atomic", "shell"]}, "ablation.targets"),
        ({**large, "n_train": [0], "n_steps": [16]}, "ablation.n_steps"),
    ):
        with pytest.raises(InputError, match=rf"{key} was .*may be added to it"):
            run_ablation(config(dataset, out, ablation=wrong))
    assert read_results(out) == before


def test_what_is_no_ablation_is_not_deleted(dataset: Path, tmp_path: Path) -> None:
    for name, content in (("programs", None), ("results.jsonl", '{"a": 1}\n')):
        place = tmp_path / name / "mine"
        place.mkdir(parents=True)
        (place / "thesis.txt").write_text("42")
        if content:
            (place / name).write_text(content)
        else:
            (place / name).mkdir()
        before = sorted(p.name for p in place.iterdir())
        for overwrite in (False, True):
            with pytest.raises(InputError, match="is not empty and holds no ablation"):
                run_ablation(config(dataset, place, ablation={}), overwrite=overwrite)
        assert sorted(p.name for p in place.iterdir()) == before
    place = tmp_path / "lost"  # records without the description
    place.mkdir()
    (place / "results.jsonl").touch()
    with pytest.raises(InputError, match="--overwrite will not delete it"):
        run_ablation(config(dataset, place, ablation={}), overwrite=True)


def test_overwrite_keeps_an_ablation_until_the_new_one_stands(
    dataset: Path, tmp_path: Path
) -> None:
    small = {"targets": ["shell"], "weights": [0.0], "seeds": [0]}
    out = tmp_path / "grid"
    records = run_ablation(config(dataset, out, ablation=small))
    with pytest.raises(InputError, match="n_train"):
        run_ablation(config(dataset, out, ablation={**small, "n_train": [999]}), overwrite=True)
    assert read_results(out) == records and [p.name for p in tmp_path.iterdir()] == ["grid"]
    again = run_ablation(config(dataset, out, ablation=small), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["grid"] and len(again) == len(records)


def test_other_data_under_the_same_name_are_refused(dataset: Path, tmp_path: Path) -> None:
    """Test errors of other structures would enter the same means."""
    place, out = tmp_path / "data", tmp_path / "grid"
    shutil.copytree(dataset, place)
    small = {"targets": ["shell"], "weights": [0.0], "seeds": [0]}
    records = run_ablation(config(place, out, ablation=small))
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["arrays"]["positions"]["sha256"] = "0" * 64
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"data has changed since .*grid was begun \(positions is"):
        run_ablation(config(place, out, ablation={**small, "seeds": [0, 1]}))
    assert read_results(out) == records


class _Told(Silent):
    """The first step that is told of each program, and its number of runs."""

    def __init__(self) -> None:
        self.first: list[tuple[int, int]] = []
        self.last: Program | None = None

    def stepped(self, program: Program, step: int, n_steps: int) -> None:
        if program is not self.last:
            self.last = program
            self.first.append((step, len(program.runs)))
