"""An ablation's report: what is compared with what, what is said and drawn; it stands alone."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orbq.cli import main
from orbq.config import Config, parse_config
from orbq.errors import InputError
from orbq.study.page import choice_text, finding
from orbq.study.pictures import _styles, gain_figure, size_figure, weight_figure
from orbq.study.plan import BASELINE, fingerprint, make_plan
from orbq.study.report import (
    by_weight,
    options_of,
    rows_of,
    sharpness,
    table_of_runs,
    write_report,
)
from orbq.study.run import DESCRIPTION, RESULTS

SIZES, WEIGHTS, SEEDS = (100, 200, 400), (0.0, 1.0, 10.0, 100.0), (0, 1, 2, 3, 4)
GAIN = {0.0: 1.0, 1.0: 0.98, 10.0: 0.7, 100.0: 0.72}  # of the error, by weight


def config() -> Config:
    table = {"targets": ["onsite"], "weights": WEIGHTS, "seeds": SEEDS, "n_train": SIZES}
    return parse_config({"ablation": table})


def record(run: Any, program: str, noise: np.ndarray) -> dict[str, Any]:
    """What a program would write of a run whose error falls as 1 / sqrt(N)."""
    error = 400.0 * (100 / run.n_train) ** 0.5 * GAIN[run.weight] * (1 + 0.03 * noise[run.seed])
    errors = {"energy_mae_meV": error, "energy_mae_meV_per_atom": error / 20}
    return {
        "program": program,
        **run._asdict(),
        "target": run.arm if run.weight else None,
        "asked": run.n_train,
        "diverged": False,
        "best_step": 90,
        "steps": 100,
        "validation": {k: 1.1 * v for k, v in errors.items()},
        "test": errors | {"forces_mae_meV_per_A": error / 2},
        "n_test": 50,
        "program_seconds": 30.0,
        "program_cpu_seconds": 20.0,
        "program_runs": 20,
        "curve": {"step": [50, 100], "validation": [2 * error, 1.1 * error], "loss": [2.0, 1.0]},
        "provenance": {"orbq": "1", "time": "2026-01-01T00:00:00Z"},
    }


@pytest.fixture
def records() -> list[dict[str, Any]]:
    noise = np.random.default_rng(1).normal(size=len(SEEDS))  # of a seed: paired between the arms
    return [record(r, p.name, noise) for p in make_plan(config()) for r in p.runs]


def write(directory: Path, records: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    document = {
        "fingerprint": fingerprint(config()),
        "config": json.loads(config().model_dump_json()),
    }
    (directory / DESCRIPTION).write_text(json.dumps(document))
    (directory / RESULTS).write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


class Seen(HTMLParser):
    """Text, tags and what is loaded from where."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


# --------------------------------------------------------------------------- numbers


def test_rows_hold_the_gain_that_is_in_the_records(records: list[dict[str, Any]]) -> None:
    rows = {(row.arm, row.n_train): row for row in rows_of(records)}
    for n in SIZES:
        row = rows["onsite", n]
        assert (row.weight, len(row.errors)) == (10.0, 5)
        # the seeds' noise is the same in both arms: it leaves the ratio of the means
        assert row.reduction.value == pytest.approx(0.3)
        assert row.reduction.low == pytest.approx(0.3) == row.reduction.high
        assert rows[BASELINE, n].reduction is None
    # 1 / 0.7^2 = 2.04 times the data: within the curve at 100, beyond it at 400
    assert rows["onsite", 100].factor.value == pytest.approx(2.04, abs=0.02)
    assert np.isinf(rows["onsite", 400].factor.value)


def test_the_table_of_runs_has_no_error_of_a_head_that_was_not_taught(
    records: list[dict[str, Any]],
) -> None:
    for r in records:
        r["test"] |= {"onsite_mae_e": 0.05, "onsite_rmse_e": 0.1}
    for line in csv.DictReader(table_of_runs(records).splitlines()):
        taught = line["arm"] != BASELINE
        assert line["test/onsite_mae_e"] == ("0.05" if taught else "")
        assert line["test/onsite_rmse_e"] == ("0.1" if taught else "")
        assert float(line["test/forces_mae_meV_per_A"]) > 0


def test_an_unfinished_size_does_not_hide_the_others(records: list[dict[str, Any]]) -> None:
    lacking = [r for r in records if not (r["n_train"] == 400 and r["seed"] > 2 and r["weight"])]
    rows = {row.n_train: row for row in rows_of(lacking) if row.arm == "onsite"}
    assert rows[100].reduction and rows[200].factor
    assert rows[400].reduction is None and rows[400].factor is None


def test_a_weight_at_which_a_run_diverged_is_not_chosen(records: list[dict[str, Any]]) -> None:
    for r in records:
        r["diverged"] = r["weight"] == 10.0 and r["seed"] == 3
    assert {row.weight for row in rows_of(records)} == {0.0, 100.0}
    found = sharpness(by_weight(options_of(records), "onsite", 100))
    assert found.weight == 100.0 and "runs diverged" in choice_text(found)


def test_sharpness() -> None:
    noise = np.array([1.0, -1.0, 0.5, -0.5, 0.0])
    records = [record(r, "p", noise) for r in make_plan(config())[0].runs]
    sharp = sharpness(by_weight(options_of(records), "onsite", 100))
    assert (sharp.weight, sharp.low, sharp.high) == (10.0, 10.0, 10.0)
    assert sharp.rise == pytest.approx(0.98 / 0.7 - 1)
    # seed by seed the difference to weight 100 changes its sign: its standard error covers it
    for r in records:
        if r["weight"] == 100.0:
            r["validation"]["energy_mae_meV"] *= 1 + 0.2 * noise[r["seed"]]
    blunt = sharpness(by_weight(options_of(records), "onsite", 100))
    assert (blunt.weight, blunt.low, blunt.high) == (10.0, 10.0, 100.0)
    edge = [r for r in records if r["weight"] <= 10.0]
    assert "widen ablation.weights" in choice_text(
        sharpness(by_weight(options_of(edge), "onsite", 100))
    )
    alone = [r for r in records if r["seed"] == 0]
    assert "single seed" in choice_text(sharpness(by_weight(options_of(alone), "onsite", 100)))


# --------------------------------------------------------------------------- page and pictures


def test_the_page_stands_alone_and_says_what_was_found(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    lost = [r for r in records if r["weight"] == 100.0 and r["seed"] == 4]
    for r in lost:
        r["diverged"] = True
    summary = write_report(write(tmp_path / "<b>", records[:-1]), records[:-1], config())
    seen = Seen((tmp_path / "<b>" / "report.html").read_text(encoding="utf-8"))
    assert "script" not in seen.tags and "link" not in seen.tags
    assert seen.tags.count("img") == 4
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in seen.sources)
    assert "Ablation <b>" in seen.text and "b" not in seen.tags
    assert "1 of 60 runs have not finished" in seen.text
    assert "onsite weight 100 seed 4 N=100" in seen.text and "3 of 59 runs diverged" not in summary
    said = finding([row for row in rows_of(records) if row.arm == "onsite"])
    assert said.startswith("onsite (weight 10) at 400 structures: energy error 30% lower")
    assert "excludes zero; data-equivalence factor at 100 structures 2" in said
    assert "400.0" not in seen.text  # of the baseline's mean, with its noise
    for name in ("weights", "sizes", "gains", "training"):
        assert (tmp_path / "<b>" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "<b>" / "summary.csv").open() as handle:
        (line,) = [
            r for r in csv.DictReader(handle) if (r["arm"], r["n_train"]) == ("onsite", "200")
        ]
    assert float(line["reduction_low"]) == pytest.approx(0.3)


def test_two_seeds_prove_little(records: list[dict[str, Any]]) -> None:
    """The spread of two seeds is hardly known: what excludes zero with five includes it."""
    noise = (1.0, -1.0, 1.0, -1.0, 0.5)
    for r in records:
        r["test"]["energy_mae_meV"] *= 1 + 0.1 * noise[r["seed"]] * (r["arm"] == "onsite")
    for seeds, word in ((5, "excludes zero"), (2, "includes zero: no conclusion")):
        rows = rows_of([r for r in records if r["seed"] < seeds])
        assert word in finding([row for row in rows if row.arm == "onsite"])


def test_pictures_have_units_and_every_arm(records: list[dict[str, Any]]) -> None:
    rows, options = rows_of(records), options_of(records)
    styles = _styles([row.arm for row in rows])
    figure = weight_figure(options, styles)
    assert len(figure.axes) == len(SIZES)
    axis = figure.axes[0]
    assert axis.get_ylabel() == "test energy MAE (meV)" and axis.get_xscale() == "log"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "10", "100"]
    band = np.mean([r["test"]["energy_mae_meV"] for r in records if r["n_train"] == 100][:5])
    assert axis.lines[0].get_ydata()[0] == pytest.approx(band)  # energy-only, dashed
    (axis,) = size_figure(rows, styles).axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [t.get_text() for t in axis.get_legend().get_texts()] == [BASELINE, "onsite"]
    left, right = gain_figure(rows, styles).axes
    assert "reduction" in left.get_ylabel() and "factor" in right.get_ylabel()
    arrows = [line for line in right.lines if line.get_marker() == "^"]
    # at 200 and 400 more is needed than the baseline's curve has: 400 structures
    assert [line.get_ydata()[0] for line in arrows] == [2.0, 1.0]


def test_the_legend_of_gains_shows_an_arm_and_no_arrow(records: list[dict[str, Any]]) -> None:
    rows = rows_of([r for r in records if r["n_train"] > 100])  # every factor is beyond the curve
    figure = gain_figure(rows, _styles([row.arm for row in rows]))
    (handle,) = figure.legends[0].legend_handles
    assert handle.get_marker() == "s" and handle.get_markerfacecolor() != "none"


# --------------------------------------------------------------------------- command


def test_report_alone_trains_nothing(
    records: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", records[:20])
    (tmp_path / "c.toml").write_text(config().model_dump_toml())
    command = ["ablate", str(tmp_path / "c.toml"), f"run.directory={tmp_path / 'run'}", "--report"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    header = out.splitlines()[0]  # a line of the table is a line of the terminal
    assert header.startswith("arm ") and header.endswith("data factor")
    assert "report.html" in out and "onsite" in out
    assert (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(SystemExit) as ended:
        main([*command, "--overwrite"])
    assert ended.value.code == 2 and "leave one out" in capsys.readouterr().err


def test_a_plan_for_the_directory_of_another_ablation_is_refused(
    records: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the training is; one that has grown, or is to be deleted, has a plan. Nothing changes."""
    run = write(tmp_path / "run", records[:20])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    (tmp_path / "c.toml").write_text(config().model_dump_toml())
    command = ["ablate", str(tmp_path / "c.toml"), f"run.directory={run}", "--plan"]
    command.append("ablation.max_runs_per_program=20")
    for more, status, told in (
        ([], 0, "2 programs, 40 runs, 200,000 steps in all; 20 runs are finished"),
        (["ablation.seeds=[0,1,2,3,4,5]"], 0, "20 runs are finished"),
        (["ablation.seeds=[0]"], 2, "ablation.seeds was [0, 1, 2, 3, 4], is [0]): choose another"),
        (["ablation.seeds=[0]", "--overwrite"], 0, "12 runs, 60,000 steps in all"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        out, err = capsys.readouterr()
        assert ended.value.code == status and told in " ".join((err or out).split()), out + err
        assert "finished" not in out or "--overwrite" not in more
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    (run / DESCRIPTION).write_text("{")
    with pytest.raises(SystemExit):
        main(command)
    assert "ablation.json is damaged" in capsys.readouterr().err


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished program yet"):
        write_report(tmp_path, [])
