"""An ablation end to end: its plan, one program against the runs alone, and a real kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, complexes

from orbq import checkpoint
from orbq.ablate import grid, keep_best, start_selection
from orbq.config import Config, parse_config
from orbq.errors import InputError, PreemptedError
from orbq.preprocess.label import Resources, preprocess
from orbq.study import program as at_work
from orbq.study import run_ablation
from orbq.study.plan import BASELINE, Program, fingerprint, make_plan, settings_of
from orbq.study.program import Training
from orbq.study.report import PAGE, rows_of, write_report
from orbq.study.run import PROGRAMS, RESULTS, Silent, read_results
from orbq.train import Hyper


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Organic complexes: few elements, so that small subsets hold them all."""
    place = tmp_path_factory.mktemp("ablate") / "data"
    preprocess(complexes(400, {1, 6, 7, 8}), place, resources=Resources(workers=1))
    return place


def config(dataset: str | Path = "tmc", directory: str | Path = "x", **sections: Any) -> Config:
    base: dict[str, Any] = {
        "data": {
            "dataset": str(dataset),
            "split": "within",
            "validation_fraction": 0.2,
            "test_fraction": 0.3,
        },
        "model": {**MODEL, "n_layers": 1},
        "loss": {"weights": {"forces": 0.0}},
        "training": {
            "n_steps": 12, "warmup_steps": 2, "validate_every": 4, "checkpoint_every": 4,
            "batch_size": 4,
        },
        "ablation": {"targets": ["shell"], "weights": [0.0, 10.0], "seeds": [0, 1]},
        "run": {"directory": str(directory)},
    }  # fmt: skip
    return parse_config({k: {**base.get(k, {}), **sections.get(k, {})} for k in {*base, *sections}})


# --------------------------------------------------------------------------- plan


def test_what_is_traced_shares_a_program_and_what_is_not_does_not() -> None:
    ablation = {
        "targets": ["onsite", "shell"], "weights": [3.0, 30.0], "seeds": [0, 1, 2, 3],
        "subset_seeds": [5, 5, 6, 6], "n_train": [50, 100], "n_steps": [100, 200],
    }  # fmt: skip
    programs = make_plan(config(ablation=ablation))
    assert len(programs) == 2 * 2 * 2  # targets x sizes x subsets
    runs = [run for program in programs for run in program.runs]
    assert len(runs) == len(set(runs)) == 2 * 4 * (1 + 2 + 2)  # sizes x seeds x weights
    for program in programs:
        assert len({(r.n_train, r.n_steps, r.subset_seed) for r in program.runs}) == 1
        first, own = program.runs[0], program.config
        assert own.training.seed == first.seed == (0 if first.subset_seed == 5 else 2)
        assert own.training.n_steps == first.n_steps == 2 * first.n_train
        assert list(own.loss.weights.auxiliary()) == [program.target]
    baselines = [p.target for p in programs for r in p.runs if r.arm == BASELINE]
    assert set(baselines) == {"onsite"}  # trained once, for both targets


def test_a_program_is_cut_evenly_and_keeps_its_order_of_batches() -> None:
    ablation = {"weights": [0.0, 1.0, 2.0], "seeds": [7, 8, 9]}
    parts = make_plan(config(ablation=ablation), max_runs=4)
    assert [len(part.runs) for part in parts] == [3, 3, 3]
    assert {part.config.training.seed for part in parts} == {7}
    assert len({part.name for part in parts}) == 3


def test_how_many_runs_train_at_once_makes_no_other_ablation() -> None:
    own = fingerprint(config())
    assert fingerprint(config(ablation={"max_runs_per_program": 2})) == own
    assert fingerprint(config(ablation={"seeds": [7]})) != own


def test_charge_only_structures_in_every_batch_set_the_baseline_apart() -> None:
    sections = {
        "data": {"unlabelled": ["tmc_unlabelled"]},
        "training": {"unlabelled_share": 0.5},
        "loss": {"weights": {"shell": 1.0}},
    }
    baseline, other = make_plan(config(**sections))
    assert {r.weight for r in baseline.runs} == {0.0}
    assert {r.weight for r in other.runs} == {10.0}
    assert (baseline.config.training.unlabelled_share, baseline.config.data.unlabelled) == (0, ())


def test_pretraining_is_not_of_the_baseline() -> None:
    """Without a weight there is nothing but the decay of its parameters in it."""
    training = {"pretrain_steps": 5, "weight_decay": 0.1}
    weights = {"forces": 0.0, "shell": 1.0}
    baseline, other = make_plan(config(training=training, loss={"weights": weights}))
    assert {r.weight for r in baseline.runs} == {0.0}
    assert baseline.config.training.pretrain_steps == 0
    assert other.config.training.pretrain_steps == 5


def test_a_combined_arm_keeps_its_fixed_weight_except_in_the_baseline() -> None:
    weights = {"energy": 1.0, "forces": 0.0, "xtb_energy": 2.0}
    (program,) = make_plan(
        config(loss={"weights": weights}, ablation={"targets": ["shell+xtb_energy"]})
    )
    assert program.config.loss.weights.auxiliary() == {"shell": 1.0, "xtb_energy": 2.0}
    found = [settings_of(program, r, pretraining=True) for r in (program.runs[0], program.runs[-1])]
    assert found == [{"weights.shell": 0.0, "weights.xtb_energy": 0.0}, {"weights.shell": 10.0}]


@pytest.mark.parametrize(
    ("ablation", "text"),
    [
        ({"targets": ["onsight"]}, "unknown target 'onsight'"),
        ({"targets": ["shell+xtb_energy"]}, "loss.weights.xtb_energy"),
        ({"subset_seeds": [1]}, "has 1 values for the 2 of ablation.seeds"),
        ({"seeds": [1, 1]}, "the same run twice"),
        ({"n_train": [50], "n_steps": [1, 2]}, "ablation.n_steps"),
        ({"weights": [0.0], "baseline": False}, "no run would be left"),
        ({"targets": ["shell+shell"]}, "holds a target twice"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(ablation: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        config(ablation=ablation)


def test_an_ablation_without_targets_is_refused() -> None:
    with pytest.raises(InputError, match=r"ablation\.targets is empty"):
        make_plan(config(ablation={"targets": []}))


# --------------------------------------------------------------------------- pure parts


def test_a_grid_changes_what_is_named_and_refuses_another_structure() -> None:
    base = Hyper({"energy": 1.0, "shell": 5.0}, *np.arange(len(Hyper._fields) - 1) + 0.5)
    base = jax.tree.map(jnp.float32, base)
    found = grid([{"weights.shell": 0.0}, {"learning_rate": 0.25}], base)
    np.testing.assert_array_equal(found.weights["shell"], [0.0, 5.0])
    np.testing.assert_array_equal(found.weights["energy"], [1.0, 1.0])
    np.testing.assert_array_equal(found.learning_rate, [0.5, 0.25])
    with pytest.raises(KeyError, match=r"weights\.onsite"):
        grid([{"weights.onsite": 1.0}], base)


def test_every_run_keeps_its_own_best_until_its_own_patience_ends() -> None:
    errors = np.array([[5.0, 4.0], [3.0, 6.0], [4.0, 7.0], [2.0, 1.0]])
    selection = start_selection({"w": jnp.zeros((2, 3))})
    for step, error in enumerate(errors, start=1):
        params = {"w": jnp.full((2, 3), float(step))}
        patience = jnp.asarray(2, jnp.int32)
        number = jnp.asarray(step, jnp.int32)
        selection = keep_best(selection, params, jnp.asarray(error), number, patience)
    # the second run stopped after two validations without improvement: its last 1.0 comes too late
    np.testing.assert_array_equal(selection.step, [4, 1])
    np.testing.assert_array_equal(selection.error, [2.0, 4.0])
    np.testing.assert_array_equal(selection.params["w"], [[4.0] * 3, [1.0] * 3])


# --------------------------------------------------------------------------- one program


def test_run_0_of_a_program_equals_the_run_alone(dataset: Path) -> None:
    """And so does the run of weight 10; the run alone is the same sequence of steps with R = 1."""
    (program,) = make_plan(config(dataset))
    together = Training(program)
    records = together.run()
    assert [(r["arm"], r["seed"]) for r in records] == [
        (BASELINE, 0), (BASELINE, 1), ("shell", 0), ("shell", 1),
    ]  # fmt: skip
    for r in (0, 2):
        alone = Training(program._replace(runs=program.runs[r : r + 1]), data=together.data)
        (record,) = alone.run()
        # sums in another order (6e-8), which Adam's division by the gradient's size amplifies
        for a, b in zip(*map(jax.tree.leaves, (together.state, alone.state)), strict=True):
            np.testing.assert_allclose(a[r], b[0], rtol=1e-3, atol=2e-5)
        assert record["test"]["energy_mae_meV"] == pytest.approx(
            records[r]["test"]["energy_mae_meV"], rel=1e-4
        )
    # two weights from one seed start alike and end apart
    assert records[0]["test"] != records[2]["test"]


# --------------------------------------------------------------------------- devices, chunks

_SHARDED = """
import json, sys; sys.path.insert(0, {tests!r})
import jax
from test_ablate import config
from orbq.study.plan import make_plan
from orbq.study.program import Training
assert len(jax.local_devices()) == 4
(program,) = make_plan(config({dataset!r}, **{sections!r}))
training = Training(program)
records = training.run()
devices = {{d for leaf in jax.tree.leaves(training.state) for d in leaf.devices()}}
print(json.dumps({{"records": records, "devices": len(devices)}}))
"""


def same_records(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same runs with the same errors: to float32 rounding, which Adam amplifies."""
    for a, b in zip(found, expected, strict=True):
        assert [a[k] for k in ("arm", "weight", "seed", "best_step", "diverged")] == [
            b[k] for k in ("arm", "weight", "seed", "best_step", "diverged")
        ]
        for part in ("validation", "test"):
            assert a[part] == pytest.approx(b[part], rel=1e-3)
        assert a["curve"]["validation"] == pytest.approx(b["curve"]["validation"], rel=1e-3)
        assert a["curve"]["loss"] == pytest.approx(b["curve"]["loss"], rel=1e-3)


def test_records_do_not_depend_on_devices_nor_on_chunks(dataset: Path) -> None:
    """Six runs on one device, on four (two more are made to fill them), and in three programs."""
    sections = {"ablation": {"seeds": [0, 1, 2]}}
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    code = _SHARDED.format(
        tests=str(Path(__file__).parent), dataset=str(dataset), sections=sections
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    (program,) = make_plan(config(dataset, **sections))
    whole = Training(program)
    records = whole.run()
    assert len(records) == 6
    chunks = make_plan(config(dataset, **sections), max_runs=2)
    assert len(chunks) == 3
    same_records([r for c in chunks for r in Training(c, data=whole.data).run()], records)
    out, _ = child.communicate(timeout=300)
    assert child.returncode == 0
    sharded = json.loads(out.splitlines()[-1])
    assert sharded["devices"] == 4
    same_records(sharded["records"], records)


# --------------------------------------------------------------------------- resumption

_CHILD = """
import sys; sys.path.insert(0, {tests!r})
from test_ablate import config
from orbq.study import run_ablation
run_ablation(config({dataset!r}, {out!r}, **{sections!r}))
"""


def test_a_killed_ablation_goes_on_and_ends_with_the_same_numbers(
    dataset: Path, tmp_path: Path
) -> None:
    sections = {"training": {"n_steps": 400, "checkpoint_every": 20, "validate_every": 100}}
    whole = run_ablation(config(dataset, tmp_path / "whole", **sections))
    out = tmp_path / "killed"
    code = _CHILD.format(
        tests=str(Path(__file__).parent), dataset=str(dataset), out=str(out), sections=sections
    )
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    deadline = time.monotonic() + 200
    while not list((out / PROGRAMS).glob("*/checkpoints/step_*/orbq.json")):
        assert child.poll() is None, "the ablation ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / RESULTS).exists()
    resumed = run_ablation(config(dataset, out, **sections))
    assert [r["test"] for r in resumed] == [r["test"] for r in whole]
    assert [r["curve"] for r in resumed] == [r["curve"] for r in whole]
    assert not (out / PROGRAMS).exists() or not list((out / PROGRAMS).iterdir())

    # nothing is left to do; a line cut off is made again; another configuration is refused
    assert run_ablation(config(dataset, out, **sections)) == read_results(out)
    with pytest.raises(
        InputError, match=r"another configuration \(ablation.seeds was \[0, 1\], is"
    ):
        run_ablation(config(dataset, out, ablation={"seeds": [0]}, **sections))

    summary = write_report(out, resumed, config(dataset, out, **sections))
    assert "All 4 runs finished; none diverged" in (out / PAGE).read_text(encoding="utf-8")
    assert (out / "results.csv").read_text().count("\n") == 1 + 4
    rows = {row.arm: row for row in rows_of(resumed)}
    errors = [r["test"]["energy_mae_meV"] for r in resumed if r["arm"] == "shell"]
    np.testing.assert_array_equal(rows["shell"].errors, errors)
    assert rows["shell"].reduction is not None
    assert BASELINE in summary


class _Stop(at_work.Unwatched):
    """Ends a program after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def stepped(self, program: Program, step: int, n_steps: int) -> None:
        if step >= self.steps:
            raise KeyboardInterrupt


def test_a_program_goes_on_on_another_number_of_devices(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs on two devices, then on three, which are filled up with a copy of the last."""
    (plan,) = make_plan(config(dataset, ablation={"seeds": [0]}))
    whole = Training(plan)
    with pytest.raises(KeyboardInterrupt):
        Training(plan, tmp_path, _Stop(8), whole.data).run()
    padded = at_work._padded
    monkeypatch.setattr(at_work, "_padded", lambda runs, n: padded(runs, 3))
    resumed = Training(plan, tmp_path, _Stop(99), whole.data)
    resumed._begin()
    assert (resumed.place.step, len(resumed.place.runs)) == (4, 3)
    for a, b in zip(resumed.run(), whole.run(), strict=True):
        assert (a["test"], a["curve"]) == (b["test"], b["curve"])


def test_a_damaged_checkpoint_of_a_program_is_told(dataset: Path, tmp_path: Path) -> None:
    (plan,) = make_plan(config(dataset, ablation={"seeds": [0]}))
    with pytest.raises(KeyboardInterrupt):
        Training(plan, tmp_path, _Stop(12)).run()
    newest, earlier = checkpoint.resumable(tmp_path / "checkpoints")
    (newest / "_METADATA").write_text("")
    with pytest.warns(
        UserWarning, match=rf"_METADATA has 0 bytes(.|\n)*goes on from .*{earlier.name}"
    ):
        Training(plan, tmp_path)._begin()
    (earlier / "_METADATA").write_text("")
    with pytest.warns(UserWarning, match=r"_METADATA has 0 bytes(.|\n)*it begins anew"):
        Training(plan, tmp_path)._begin()


def test_sigterm_keeps_everything_of_an_ablation(dataset: Path, tmp_path: Path) -> None:
    """The checkpoint is of the very step; the same command ends with the same numbers."""

    class Sender(Silent):
        def stepped(self, program: Program, step: int, n_steps: int) -> None:
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    sections = {"ablation": {"seeds": [0]}, "training": {"checkpoint_every": 100}}
    with pytest.raises(PreemptedError, match=r"SIGTERM at step 8 .*same command") as told:
        run_ablation(config(dataset, tmp_path / "a", **sections), reporter=Sender())
    assert told.value.exit_status == 143
    assert [p.name for p in (tmp_path / "a").glob("programs/*/*/*")] == ["step_000000008"]
    stopped = run_ablation(config(dataset, tmp_path / "a", **sections))
    whole = run_ablation(config(dataset, tmp_path / "b", **sections))
    for a, b in zip(stopped, whole, strict=True):
        assert (a["test"], a["curve"]) == (b["test"], b["curve"])
