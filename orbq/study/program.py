"""One program of an ablation: many runs trained at once on the same batches.

The order of batches is a pure function of (seed, epoch), and a checkpoint holds every run's whole
state, so that a program that was killed goes on where it was.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from orbq import checkpoint
from orbq.ablate import Selection, grid, keep_best, over_params, over_runs, start_selection
from orbq.data import TrainingData, make_packer, to_batch
from orbq.errors import InputError, OrbqError, PreemptedError
from orbq.fit import MAX_NONFINITE
from orbq.initial import prepare_from, started_from
from orbq.losses import Batch
from orbq.metrics import add_sums, from_sums
from orbq.models.potential import Params, make_potential
from orbq.preprocess.pack import Packer
from orbq.preprocess.plan import epoch_plan
from orbq.preprocess.prefetch import prefetch
from orbq.run_files import CHECKPOINTS
from orbq.stages import Stage, make_stages
from orbq.study.plan import Program, RunSpec, settings_of
from orbq.train import Hyper, TrainState, make_evaluate, make_init, make_train_step, next_stage

CRITERION = "energy_mae_meV"  # of the validation split: what stops a run
CHECK_EVERY = 25  # steps between looks at the loss: each look waits for the device


class Watcher(Protocol):
    """What is told while a program trains."""

    def stepped(self, program: Program, step: int, n_steps: int) -> None: ...
    def validated(self, program: Program, step: int, errors: np.ndarray) -> None: ...


class Unwatched:
    """Tells nothing."""

    def stepped(self, program: Program, step: int, n_steps: int) -> None: ...
    def validated(self, program: Program, step: int, errors: np.ndarray) -> None: ...


@dataclass
class Place:
    """Where a program is, beside its arrays; JSON in every checkpoint.

    runs: what trains in it. stage: index. step: updates made in it. epoch, batch: the next batch.
    loss_sums [R], counted: training loss since the last validation; left_out [R]: of the counted
    steps, those whose loss or gradient was not finite; nonfinite [R]: so many of them in a row, up
    to here. curve: per validation, the step, its errors [R] in meV and mean training losses [R],
    None where all were left out. seconds, cpu_seconds: spent so far.
    """

    runs: list[list[Any]]
    stage: int = 0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    counted: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    loss_sums: list[float] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def count(self, losses: np.ndarray, norms: np.ndarray, stopped: np.ndarray) -> None:
        """Add a step's losses and gradient norms [R]. stopped [R]: runs that ended before it."""
        nothing, lost = [0] * len(self.runs), self.diverged()
        fine, row = np.isfinite(losses) & np.isfinite(norms), np.asarray(self.nonfinite or nothing)
        self.loss_sums = (np.where(fine, losses, 0) + (self.loss_sums or nothing)).tolist()
        self.left_out = (np.asarray(self.left_out or nothing) + ~fine).tolist()
        self.nonfinite = np.where(lost | stopped, row, np.where(fine, 0, row + 1)).tolist()
        self.counted += 1

    def diverged(self) -> np.ndarray:
        """Which runs [R] ``orbq train`` would have given up, once and for all."""
        return np.asarray(self.nonfinite or [0] * len(self.runs)) >= MAX_NONFINITE


def _require_energies(data: TrainingData) -> None:
    """Raise InputError where the energies are missing that choose the best step or are reported."""
    for name in ("validation", "test"):
        if name not in data.pools or not data.pools[name].labelled("energy").any():
            raise InputError(
                f"no {name} structure has an energy, by which the runs of an ablation are "
                f"compared: raise data.{name}_fraction, or change data.split or data.split_seed"
            )


class Training:
    """A program at work. ``run`` returns one record per run; state and selection stay."""

    state: TrainState
    selection: Selection

    def __init__(
        self,
        program: Program,
        directory: Path | None = None,
        watcher: Watcher | None = None,
        data: TrainingData | None = None,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """directory: for checkpoints; None for none. data: None to prepare it. asked: whether to
        stop before the next step."""
        self.program, self.watcher, self.asked = program, watcher or Unwatched(), asked
        self.checkpoints = directory / CHECKPOINTS if directory else None
        self.data = data or prepare_from(program.config)
        _require_energies(self.data)
        for note in self.data.initial.notes if self.data.initial else ():
            warnings.warn(note, stacklevel=2)
        self.runs = _padded(program.runs, len(jax.local_devices()))
        self.stages = make_stages(program.config, self.data)
        self.n_steps = sum(stage.n_steps for stage in self.stages)
        potential = make_potential(self.data.architecture, self.data.constants)
        spec = self.data.spec
        init = make_init(potential)
        vmapped = [
            over_runs(
                init, make_train_step(potential, spec._replace(terms=s.terms), None, s.frozen)
            )
            for s in self.stages
        ]
        self.init = vmapped[0][0]
        self.steps = [jax.jit(step, donate_argnums=(0,)) for _, step in vmapped]
        self.evaluate = jax.jit(over_params(make_evaluate(potential, spec.terms)))
        self.keep_best = jax.jit(keep_best)
        self.place = Place([list(run) for run in self.runs])
        self.clocks = time.monotonic(), time.process_time()

    # ------------------------------------------------------------------ training

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from the newest checkpoint if there is one.

        Returns a record of every run: its specification, the step and the errors of its best
        validation, the test errors of those parameters, and what was spent. Raises PreemptedError
        when asked to stop; a checkpoint is written.
        """
        self._begin()
        for index in range(self.place.stage, len(self.stages)):
            if index > self.place.stage:
                self.state = self._spread(next_stage(self.state))
                p = self.place
                p.stage, p.step, p.epoch, p.batch = index, 0, 0, 0
                p.counted, p.loss_sums, p.left_out = 0, [], []
                p.nonfinite = np.where(p.diverged(), p.nonfinite or 0, 0).tolist()
            self._run_stage(self.stages[index], self.steps[index])
        records = self._records()
        if self.checkpoints:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return records

    def _begin(self) -> None:
        keys = jnp.stack([jax.random.key(run.seed) for run in self.runs])
        first = to_batch(self._packer(self.stages[0].pool).batch(np.arange(1)))
        if self._restored(first):
            return
        # parameters are drawn run by run: one seed has one set of them, bit for bit, and all runs
        # have those of the initial run if there is one
        init = jax.jit(lambda key, batch: jax.tree.map(lambda x: x[0], self.init(key, batch)))
        initial = self.data.initial
        drawn = {
            r.seed: started_from(initial, init(k[None], first))
            for r, k in zip(self.runs, keys, strict=True)
        }
        states = [drawn[run.seed] for run in self.runs]
        self.state = self._spread(jax.tree.map(lambda *x: jnp.stack(x), *states))
        self.selection = self._spread(start_selection(jax.tree.map(jnp.copy, self.state.params)))

    def _restored(self, batch: Batch) -> bool:
        """Take up the newest good checkpoint; whether there is one. Warn where none is good."""
        reasons = []
        for found in checkpoint.resumable(self.checkpoints) if self.checkpoints else []:
            try:
                runs = checkpoint.meta_of(found)["runs"]
                rows = _rows(found, runs, self.runs)
                tree, meta = checkpoint.restore(found, self._template(len(runs), batch))
            except OrbqError as error:
                reasons.append(f"{self.program.name}: {error}")
                continue
            self.place = _of_rows(Place(**meta), rows)
            own = np.array(rows)
            tree = self._spread(jax.tree.map(lambda x, own=own: x[own], tree))
            self.state, self.selection = tree["state"], tree["selection"]
            self._told(reasons, f"it goes on from {found}")
            return True
        self._told(reasons, "it begins anew")
        return False

    def _told(self, reasons: list[str], instead: str) -> None:
        if reasons:
            warnings.warn("\n".join([*reasons, instead]), stacklevel=2)

    def _template(self, n_runs: int, batch: Batch) -> dict[str, Any]:
        """Shapes of what a checkpoint of so many runs holds."""
        keys = jnp.stack([jax.random.key(0)] * n_runs)
        state = jax.eval_shape(self.init, keys, batch)
        return {"state": state, "selection": jax.eval_shape(start_selection, state.params)}

    def _run_stage(self, stage: Stage, step: Any) -> None:
        training, p = self.program.config.training, self.place
        hyper = self._hyper(stage)
        choosing = stage is self.stages[-1]
        pending: list[tuple[jax.Array, jax.Array]] = []
        batches: Any = prefetch(self._batches(stage), 2)
        try:
            for epoch, number, batch in batches:
                if p.step >= stage.n_steps or self._stopped(training.patience):
                    break
                if self.asked():
                    self._settle(pending)
                    self._save()
                    raise PreemptedError(
                        f"stopped by SIGTERM at step {p.step} of stage {stage.name!r} of program "
                        f"{self.program.name}; everything is kept: run the same command again to "
                        "go on"
                    )
                self.state, metrics = step(self.state, batch, hyper)
                pending.append((metrics["loss"], metrics["gradient_norm"]))
                p.step, p.epoch, p.batch = p.step + 1, epoch, number + 1
                last = p.step == stage.n_steps
                validating = choosing and (last or p.step % training.validate_every == 0)
                saving = p.step % training.checkpoint_every == 0 and not last
                if validating or saving or last or p.step % CHECK_EVERY == 0:
                    self._settle(pending)
                if validating:
                    self._validate(training.patience)
                if saving:
                    self._save()
        finally:
            batches.close()

    def _batches(self, stage: Stage) -> Iterator[tuple[int, int, Batch]]:
        packer, seed = self._packer(stage.pool), self.program.config.training.seed
        epoch, start = self.place.epoch, self.place.batch
        while True:
            plan = epoch_plan(
                stage.pool, stage.n_labelled, stage.share, self.data.budget, seed, epoch
            )
            for number in range(start, len(plan)):
                yield epoch, number, to_batch(packer.batch(plan[number], epoch))
            epoch, start = epoch + 1, 0

    def _hyper(self, stage: Stage) -> Hyper:
        pretraining = stage is not self.stages[-1]
        settings = [settings_of(self.program, run, pretraining) for run in self.runs]
        hyper: Hyper = self._spread(grid(settings, stage.hyper))
        return hyper

    def _packer(self, pool: Any) -> Packer:
        return make_packer(self.data, pool, self.program.config)

    def _spread(self, tree: Any) -> Any:
        """Leaves [R, ...] over this process's devices, by runs."""
        devices = jax.local_devices()
        if len(devices) == 1:
            return tree
        mesh = jax.sharding.Mesh(np.array(devices), ("run",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("run"))
        return jax.device_put(tree, sharding)

    # ------------------------------------------------------------------ records

    def _settle(self, pending: list[tuple[jax.Array, jax.Array]]) -> None:
        """Take the waiting losses and gradient norms from the device."""
        p, patience = self.place, self.program.config.training.patience
        stopped = (np.asarray(self.selection.stale) >= patience) & (patience > 0)
        for losses, norms in jax.device_get(pending):
            p.count(losses, norms, stopped)
        pending.clear()
        before = sum(stage.n_steps for stage in self.stages[: p.stage])
        self.watcher.stepped(self.program, before + p.step, self.n_steps)

    def _validate(self, patience: int) -> None:
        p = self.place
        errors = self.errors(self.state.ema, "validation")
        found = np.array([e[CRITERION] for e in errors])
        steps = jnp.asarray(p.step, jnp.int32), jnp.asarray(patience, jnp.int32)
        self.selection = self.keep_best(
            self.selection, self.state.ema, jnp.asarray(found, self.selection.error.dtype), *steps
        )
        left = [p.counted - n for n in p.left_out]
        losses = [x / n if n else None for x, n in zip(p.loss_sums, left, strict=True)]
        p.curve.append({"step": p.step, "validation": found.tolist(), "loss": losses})
        p.loss_sums, p.left_out, p.counted = [], [], 0
        self.watcher.validated(self.program, p.step, found[: len(self.program.runs)])

    def _stopped(self, patience: int) -> bool:
        return bool(patience and (np.asarray(self.selection.stale) >= patience).all())

    def errors(self, params: Params, part: str) -> list[dict[str, float]]:
        """Errors of every run's parameters on a part of the data, keys as in metrics.jsonl."""
        packer = self._packer(self.data.pools[part])
        parts = [self.evaluate(params, to_batch(packer.batch(i))) for i in packer.plan(0)]
        sums = add_sums(jax.device_get(parts))
        return [
            from_sums({name: values[r] for name, values in sums.items()})
            for r in range(len(self.runs))
        ]

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        p = self.place
        meta = asdict(p) | dict(zip(("seconds", "cpu_seconds"), self._spent(), strict=True))
        step = sum(stage.n_steps for stage in self.stages[: p.stage]) + p.step
        tree = {"state": self.state, "selection": self.selection}
        checkpoint.save_step(self.checkpoints, step, tree, meta)

    def _spent(self) -> tuple[float, float]:
        """Wall and CPU seconds of this program, those before a resumption included."""
        wall, cpu = time.monotonic() - self.clocks[0], time.process_time() - self.clocks[1]
        return self.place.seconds + wall, self.place.cpu_seconds + cpu

    def _records(self) -> list[dict[str, Any]]:
        kept = self.selection
        steps, found = np.asarray(kept.step), np.asarray(kept.error)
        validation, test = (self.errors(kept.params, part) for part in ("validation", "test"))
        lost = self.place.diverged() | ~np.isfinite(found)
        for r in np.flatnonzero(lost).tolist():  # what is kept of them is no result
            validation[r], test[r] = (dict.fromkeys(part[r], np.nan) for part in (validation, test))
        seconds, cpu = self._spent()
        n_train, records = len(self.data.pools["train"]), []
        for r, run in enumerate(self.program.runs):
            curve = {
                "step": [point["step"] for point in self.place.curve],
                "validation": [round(point["validation"][r], 4) for point in self.place.curve],
                "loss": [_written(point["loss"][r]) for point in self.place.curve],
            }
            records.append(
                {
                    "program": self.program.name,
                    **run._asdict(),
                    "target": None if run.weight == 0 else run.arm,
                    "n_train": n_train,
                    "asked": run.n_train,
                    "diverged": bool(lost[r]),
                    "best_step": int(steps[r]),
                    "steps": sum(s.n_steps for s in self.stages[:-1]) + self.place.step,
                    "validation": validation[r],
                    "test": test[r],
                    "n_test": len(self.data.pools["test"]),
                    "program_seconds": round(seconds, 2),
                    "program_cpu_seconds": round(cpu, 2),
                    "program_runs": len(self.program.runs),
                    "curve": curve,
                }
            )
        return records


def _rows(found: Path, stored: list[list[Any]], runs: list[RunSpec]) -> list[int]:
    """Where the runs are in a checkpoint; raises OrbqError when one is not."""
    try:
        return [stored.index(list(run)) for run in runs]
    except ValueError as error:
        raise OrbqError(f"checkpoint {found} is of other runs") from error


def _written(loss: float | None) -> float | None:
    """A mean loss to five digits; None where it is not finite."""
    return None if loss is None or not np.isfinite(loss) else float(f"{loss:.5g}")


def _of_rows(place: Place, rows: list[int]) -> Place:
    """The place of some runs of a program: on other devices it is filled up with other copies."""

    def chosen(values: list[Any]) -> list[Any]:
        return [values[row] for row in rows] if values else []

    lists = ("validation", "loss")
    return replace(
        place,
        runs=chosen(place.runs),
        loss_sums=chosen(place.loss_sums),
        left_out=chosen(place.left_out),
        nonfinite=chosen(place.nonfinite),
        curve=[point | {name: chosen(point[name]) for name in lists} for point in place.curve],
    )


def _padded(runs: tuple[RunSpec, ...], n_devices: int) -> list[RunSpec]:
    """The runs, the last one repeated until every device has as many."""
    return [*runs, *[runs[-1]] * (-len(runs) % n_devices)]
