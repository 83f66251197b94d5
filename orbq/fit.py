"""The training loop: batches in, a run directory out; it can be stopped and continued anywhere.

A run is one or two stages: pre-training on charge labels (if ``training.pretrain_steps``), then the
main stage. The order of batches is a pure function of (seed, epoch), and a checkpoint holds the
whole state, so that a resumed run ends with the same parameters, bit for bit, on the same devices.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from orbq import checkpoint, devices, records
from orbq.aside import replaced
from orbq.compiled import Counted, configure_jax
from orbq.config import Config
from orbq.data import TrainingData, make_packer, to_batch
from orbq.devices import Layout
from orbq.errors import OrbqError, PreemptedError, told_when_full
from orbq.initial import check_apart, prepare_from, started_from
from orbq.losses import Batch
from orbq.models.potential import Params, make_potential
from orbq.preprocess.pack import Packer
from orbq.preprocess.plan import epoch_plan
from orbq.preprocess.prefetch import prefetch
from orbq.preprocess.store import write_atomically
from orbq.reporter import Reporter, Silent, Speed
from orbq.run_files import CHECKPOINTS, METRICS, STATISTICS_FILE, read_description
from orbq.stages import Stage, make_stages
from orbq.train import TrainState, make_init, make_train_step, next_stage
from orbq.validation import Validation, criterion_of

SUMMARY = "summary.json"  # written last: a run that has it is finished
CHECK_EVERY = 25  # steps between looks at the loss: each look waits for the device
MAX_NONFINITE = 5  # batches in a row whose loss is not finite


@dataclass
class Progress:
    """Where a run is, beside its arrays; JSON in every checkpoint.

    stage: index. step: batches taken in it. epoch, batch: the next batch. best: lowest validation
    criterion. stale: validations since then. sums: of the training metrics since ``counted`` steps.
    nonfinite: batches in a row, up to here, whose loss was not finite.
    """

    stage: int = 0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    stale: int = 0
    counted: int = 0
    nonfinite: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


class Update(NamedTuple):
    """The batches of one update. epoch, number: its place. items: places in the pool."""

    epoch: int
    number: int
    items: np.ndarray
    batch: Batch


def fit(
    config: Config, overwrite: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Train a configuration into its run directory; returns a summary.

    A directory that holds this very run is gone on with, from the newest good checkpoint.
    overwrite: start anew, deleting the old run. In a job of several processes (``devices.join``)
    all of them call this, with a directory that all of them see.
    JAX's jax_enable_x64 is then, in the whole process, as the configuration's precision needs it.

    Raises InputError when the directory holds another run or a link out of it, or training.initial
    names none to begin from, PreemptedError after SIGTERM (a checkpoint is written), OrbqError when
    the loss is not finite again and again, or the disk is full.
    """
    configure_jax(config)
    directory = Path(config.run.directory)
    check_apart(config)
    told = devices.told_when_a_process_is_lost()
    with told_when_full(directory), told, ExitStack() as held:
        begun = devices.main_decides(lambda: records.claim(directory, config, overwrite, held))
        return _fit(config, directory, begun, reporter)


def _fit(config: Config, directory: Path, begun: bool, reporter: Reporter | None) -> dict[str, Any]:
    parts = config.training.batches_per_update
    if begun:
        parts = read_description(directory).get("parts", 1)
    layout = devices.choose(parts, begun)
    own = directory if begun else None
    # in the main process first: caches are written once
    data = devices.main_first(lambda: prepare_from(config, layout.parts, own, directory))
    told = reporter if reporter and devices.is_main() else Silent()
    for note in data.initial.notes if data.initial else ():
        told.warned(note)
    if layout.n_idle:
        told.warned(
            f"{layout.n_idle} devices stay idle: an update of {layout.parts} batches is shared by "
            f"{layout.n_devices}; training.batches_per_update is fixed when a run is begun"
        )
    with devices.term_signal() as asked, devices.told_when_memory_is_short(layout, data.budget):
        return _Loop(config, directory, data, layout, told, devices.make_stop(asked)).run()


class _Loop:
    """The state of one call of ``fit``."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        data: TrainingData,
        layout: Layout,
        reporter: Reporter,
        stop: Callable[[int], bool],
    ) -> None:
        self.config, self.directory, self.data, self.reporter = config, directory, data, reporter
        self.layout, self.stop = layout, stop
        self.checkpoints = directory / CHECKPOINTS
        self.potential = make_potential(data.architecture, data.constants)
        self.stages = make_stages(config, data)
        self.progress = Progress()
        self.validation = Validation(self.potential, data, layout)
        self.steps = [Counted(self._step_of(stage), **self._jit_options()) for stage in self.stages]
        self.held_out = make_packer(data, data.pools["validation"], config)
        self.started = time.monotonic()
        self.looked = (self.started, 0, 0)  # time, real atoms, padded atoms at the last look

    def _step_of(self, stage: Stage) -> Callable[..., Any]:
        spec = self.data.spec._replace(terms=stage.terms)
        return make_train_step(self.potential, spec, self.layout.mesh, stage.frozen)

    def _jit_options(self) -> dict[str, Any]:
        sharding = devices.replicated(self.layout)
        placed = {} if sharding is None else {"out_shardings": sharding}
        return {"donate_argnums": (0,), **placed}

    # ------------------------------------------------------------------ stages

    def run(self) -> dict[str, Any]:
        packer = make_packer(self.data, self.stages[-1].pool, self.config)
        shapes = {"parts": self.layout.parts, "devices": devices.named(self.layout)}
        facts = (
            records.facts_of(self.directory, self.data, self.potential, packer, self.stages)
            | shapes
        )
        if devices.main_decides(
            lambda: records.describe(self.directory, self.config, self.data, facts)
        ):
            self.reporter.warned(
                f"{self.directory / STATISTICS_FILE} was lost or damaged: written again"
            )
        if devices.is_main():
            replaced(self.directory)
        self.reporter.started(facts)
        if (finished := self._finished()) is not None:
            return finished
        state = self._initial_state()
        for index in range(self.progress.stage, len(self.stages)):
            if index > self.progress.stage:
                state = self._next_stage(state)
            state = self._run_stage(self.stages[index], self.steps[index], state)
        self._save(state)
        compiled = {s.name: c.compilations for s, c in zip(self.stages, self.steps, strict=True)}
        summary = {
            **facts,
            "best_validation": self.progress.best,
            "compilations": {**compiled, "evaluate": self.validation.evaluate.compilations},
            "seconds": self._seconds(),
        }
        if devices.is_main():
            write_atomically(self.directory / SUMMARY, json.dumps(summary, indent=1))
        devices.wait_for_all("finished")
        return summary

    def _finished(self) -> dict[str, Any] | None:
        """The summary of a run that has nothing left to do."""
        try:
            summary = dict(json.loads((self.directory / SUMMARY).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        best = self.checkpoints / checkpoint.BEST
        whole = devices.main_decides(lambda: checkpoint.is_whole(best))
        return {**summary, "directory": str(self.directory)} if whole else None

    def _initial_state(self) -> TrainState:
        packer = make_packer(self.data, self.stages[0].pool, self.config)
        first = to_batch(packer.batch(np.arange(1)))
        init = make_init(self.potential)
        key = jax.random.key(self.config.training.seed)
        state = self._restored(jax.eval_shape(init, key, first))
        drawn = state is None
        if state is None:
            state = started_from(self.data.initial, jax.jit(init)(key, first))
        if devices.is_main():
            p, names = self.progress, [stage.name for stage in self.stages]
            if drawn and (self.directory / METRICS).is_file():
                self.reporter.warned(f"{self.directory} has no checkpoint left: it begins anew")
            records.truncate(self.directory, names, p.stage, p.step)
        placed: TrainState = devices.replicate(self.layout, state)
        if drawn and self.data.initial:
            self._save(placed)  # from here on the initial run may go
        self._replace_lost_best(placed)
        return placed

    def _replace_lost_best(self, state: TrainState) -> None:
        """Where the best parameters are gone, let those of now be the best until others are."""
        best = self.checkpoints / checkpoint.BEST
        if self.progress.best is None or devices.main_decides(lambda: checkpoint.is_whole(best)):
            return
        self.reporter.warned(
            f"{best} was lost or damaged: the averaged parameters of step {self.progress.step} "
            "take its place until better ones are found"
        )
        params = devices.local(self.layout, state.ema)
        self._keep_best(params, self._criterion(self.validation.errors(params, self.held_out)))

    def _restored(self, template: TrainState) -> TrainState | None:
        """The newest good checkpoint; None if there is none. Raises OrbqError if all are bad."""
        failure: OrbqError | None = None
        found = checkpoint.resumable(self.checkpoints)
        for path, earlier in zip(found, [*found[1:], None], strict=False):
            try:
                state: TrainState
                state, meta = checkpoint.restore(path, template)
            except OrbqError as error:
                failure = error
                instead = f"Going on with {earlier}." if earlier else "There is no earlier one."
                self.reporter.warned(f"{error}\n{instead}")
                continue
            self.progress = Progress(**meta)
            return state
        if failure:
            raise failure
        return None

    def _next_stage(self, state: TrainState) -> TrainState:
        p = self.progress
        self.progress = Progress(stage=p.stage + 1, seconds=p.seconds)
        return next_stage(state)

    def _run_stage(self, stage: Stage, step: Counted, state: TrainState) -> TrainState:
        training, p = self.config.training, self.progress
        packer = make_packer(self.data, stage.pool, self.config)
        hyper = devices.replicate(self.layout, stage.hyper)
        pending: list[tuple[Update, dict[str, jax.Array]]] = []
        updates: Any = prefetch(self._updates(stage, packer), 2)
        self.looked = (time.monotonic(), 0, 0)
        try:
            for update in updates:
                if p.step >= stage.n_steps or 0 < training.patience <= p.stale:
                    break
                stopping = self.stop(p.step)
                if stopping:
                    break
                state, metrics = step(state, update.batch, hyper)
                pending.append((update, metrics))
                p.step, p.epoch, p.batch = p.step + 1, update.epoch, update.number + 1
                last = p.step == stage.n_steps
                validating = last or p.step % training.validate_every == 0
                saving = p.step % training.checkpoint_every == 0 and not last
                if validating or saving or p.step % CHECK_EVERY == 0:
                    self._settle(stage, pending, step)  # a saved state has been looked at
                if validating:
                    self._validate(stage, state, update)
                if saving:
                    self._save(state)
            else:
                stopping = False
        finally:
            updates.close()
        if p.step < stage.n_steps and not 0 < training.patience <= p.stale:
            self._settle(stage, pending, step)
            self._save(state)
            raise PreemptedError(
                f"stopped by SIGTERM at step {p.step} of stage {stage.name!r}; everything is kept "
                f"in {self.checkpoints}: run the same command again to go on"
            )
        return state

    def _updates(self, stage: Stage, packer: Packer) -> Iterator[Update]:
        epoch, start = self.progress.epoch, self.progress.batch
        seed, parts = self.config.training.seed, self.layout.parts
        nothing = np.zeros(0, np.int64)
        while True:
            plan = epoch_plan(
                stage.pool, stage.n_labelled, stage.share, self.data.budget, seed, epoch
            )
            for number in range(start, -(-len(plan) // parts)):
                items = plan[number * parts : (number + 1) * parts]
                items += [nothing] * (parts - len(items))
                packed = [to_batch(packer.batch(items[part], epoch)) for part in self.layout.mine]
                batch = devices.spread(self.layout, packed)
                yield Update(epoch, number, np.concatenate(items), batch)
            epoch, start = epoch + 1, 0

    # ------------------------------------------------------------------ records

    def _settle(
        self, stage: Stage, pending: list[tuple[Update, dict[str, jax.Array]]], step: Counted
    ) -> None:
        """Take the waiting metrics from the device; count and record losses that are not finite."""
        p, n = self.progress, len(pending)
        real = sum(int(stage.pool.n_nodes[update.items].sum()) for update, _ in pending)
        loss = np.nan
        for place, (update, waiting) in enumerate(pending):
            metrics = jax.device_get(waiting)
            if np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"]):
                loss, p.nonfinite = float(metrics["loss"]), 0
                for name, value in metrics.items():
                    p.sums[name] = p.sums.get(name, 0.0) + float(value)
                p.counted += 1
            else:
                self._nonfinite(stage, p.step - n + place + 1, update, metrics)
        if pending:
            now, padded = time.monotonic(), n * self.layout.parts * self.data.budget.n_node
            rate = real / max(now - self.looked[0], 1e-9)
            speed = Speed(rate, real / padded, step.compilations)
            self.looked = (now, real, padded)
            self.reporter.stepped(stage.name, p.step, stage.n_steps, loss, speed)
        pending.clear()

    def _nonfinite(self, stage: Stage, step: int, update: Update, metrics: dict[str, Any]) -> None:
        """Record a batch that changed nothing; give up after MAX_NONFINITE of them in a row."""
        p, path = self.progress, self.directory / records.NONFINITE
        p.nonfinite += 1
        found = {name: float(metrics[name]) for name in ("loss", "gradient_norm")}
        place = {"stage": stage.name, "step": step, "epoch": update.epoch, "batch": update.number}
        structures = records.structures_of(stage.pool, update.items)
        if devices.is_main():
            told = {name: repr(value) for name, value in found.items()}
            records.append(path, {**place, **told, "structures": structures})
        what = (
            f"the loss is not finite at step {step} of stage {stage.name!r} (loss {found['loss']}, "
            f"gradient norm {found['gradient_norm']})"
        )
        if p.nonfinite < MAX_NONFINITE:
            self.reporter.warned(f"{what}: the batch was left out; its structures are in {path}")
            return
        good = any(checkpoint.resumable(self.checkpoints))
        kept = f"; {self.checkpoints} keeps the last good state" if good else ""
        raise OrbqError(
            f"{what}, for the {p.nonfinite}th time in a row: lower training.learning_rate or "
            "training.clip_norm (another configuration: with --overwrite or in another "
            f"run.directory), or look at the structures in {path}{kept}"
        )

    def _validate(self, stage: Stage, state: TrainState, update: Update) -> None:
        p = self.progress
        params = devices.local(self.layout, state.ema)
        errors = self.validation.errors(params, self.held_out)
        means = {f"train/{n}": v / max(p.counted, 1) for n, v in p.sums.items()}
        p.sums, p.counted = {}, 0
        record = {
            "stage": stage.name,
            "step": p.step,
            "epoch": p.epoch,
            "seconds": round(self._seconds(), 2),
            **means,
            **{f"validation/{n}": v for n, v in errors.items()},
        }
        if stage.name == "train" and self.config.training.log_gradients:
            now = devices.local(self.layout, state.params)
            record |= self.validation.gradients(now, update.batch, stage.hyper.weights)
        if stage.name == "train":
            criterion = self._criterion(errors)
            # the first error may be NaN, and none is below that
            record["best"] = p.best is None or isnan(p.best) or criterion < p.best
            p.stale = 0 if record["best"] else p.stale + 1
            if record["best"]:
                self._keep_best(params, criterion)
        if devices.is_main():
            records.append(self.directory / METRICS, record)
        self.reporter.validated(record)

    def _criterion(self, errors: Mapping[str, float]) -> float:
        return errors[criterion_of(errors, self.config.loss.weights.auxiliary())]

    def _keep_best(self, params: Params, criterion: float) -> None:
        self.progress.best = criterion
        meta = {"step": self.progress.step, "criterion": criterion}
        if devices.is_main():
            checkpoint.save(self.checkpoints / checkpoint.BEST, {"params": params}, meta)

    def _save(self, state: TrainState) -> None:
        if not devices.is_main():
            return
        p = self.progress
        step = sum(s.n_steps for s in self.stages[: p.stage]) + p.step
        meta = asdict(p)
        meta["seconds"] = self._seconds()
        checkpoint.save_step(self.checkpoints, step, devices.local(self.layout, state), meta)

    def _seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self.started
