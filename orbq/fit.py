"""The training loop: batches in, a run directory out; it can be stopped and continued anywhere.

A run is one or two stages: pre-training on charge labels (if ``training.pretrain_steps``), then the
main stage. The order of batches is a pure function of (seed, epoch), and a checkpoint holds the
whole state, so that a resumed run ends with the same parameters, bit for bit, on the same device.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from orbq import __version__, checkpoint
from orbq.cache import use_compilation_cache
from orbq.config import Config
from orbq.data import TrainingData, epoch_plan, make_packer, prepare, to_batch
from orbq.errors import InputError, OrbqError
from orbq.losses import Batch
from orbq.metrics import add_sums, from_sums
from orbq.models.heads import n_parameters
from orbq.models.potential import Params, make_potential
from orbq.preprocess.pack import Packer
from orbq.preprocess.prefetch import prefetch
from orbq.preprocess.store import Dataset, write_atomically
from orbq.run import (
    CHECKPOINTS,
    METRICS,
    RUN_FILE,
    STATISTICS_FILE,
    read_description,
    save_description,
)
from orbq.stages import Stage, make_stages
from orbq.train import TrainState, make_evaluate, make_init, make_train_step

SUMMARY = "summary.json"  # written last: a run that has it is finished
CHECK_EVERY = 25  # steps between looks at the loss: each look waits for the device
_BEGUN = {STATISTICS_FILE, f"{RUN_FILE}.tmp"}  # all there is of a run stopped before its run.json
_RECOMPUTED = {"onsite", "xtb_energy", "xtb_forces"}  # their last bits depend on the machine


class Reporter(Protocol):
    """What is told while training; the terminal display is one, a test's list another."""

    def started(self, facts: dict[str, Any]) -> None: ...
    def stepped(self, stage: str, step: int, n_steps: int, loss: float) -> None: ...
    def validated(self, record: dict[str, Any]) -> None: ...


class Silent:
    """Tells nothing."""

    def started(self, facts: dict[str, Any]) -> None: ...
    def stepped(self, stage: str, step: int, n_steps: int, loss: float) -> None: ...
    def validated(self, record: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """Where a run is, beside its arrays; JSON in every checkpoint.

    stage: index. step: updates made in it. epoch, batch: the next batch. best: lowest validation
    criterion. stale: validations since then. sums: of the training metrics since ``counted`` steps.
    """

    stage: int = 0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    stale: int = 0
    counted: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


class Counted:
    """A jitted function that counts how often it was compiled."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.compilations = 0

        def traced(*args: Any) -> Any:
            self.compilations += 1
            return function(*args)

        self._jitted = jax.jit(traced, **options)

    def __call__(self, *args: Any) -> Any:
        return self._jitted(*args)


def configure_jax(config: Config) -> None:
    """Precision and compilation cache of this process."""
    jax.config.update("jax_enable_x64", config.training.precision == "float64")
    jax.config.update("jax_default_matmul_precision", config.training.matmul_precision)
    if config.training.compilation_cache:
        use_compilation_cache()


def fit(
    config: Config, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Train a configuration into its run directory; returns a summary.

    resume: go on from the newest complete checkpoint. overwrite: start anew, deleting the old run.
    Raises InputError when the directory holds another run, OrbqError when the loss is not finite.
    """
    configure_jax(config)
    directory = Path(config.run.directory)
    _claim(directory, config, resume, overwrite)
    return _Loop(config, directory, prepare(config), reporter or Silent()).run()


def _claim(directory: Path, config: Config, resume: bool, overwrite: bool) -> None:
    """Make sure that ``directory`` is free, or holds this very run."""
    held = {path.name for path in directory.iterdir()} - _BEGUN if directory.exists() else set()
    if overwrite and held:
        if RUN_FILE not in held:
            raise InputError(f"{directory} is not a run directory: --overwrite will not delete it")
        shutil.rmtree(directory)
    elif held:
        if RUN_FILE not in held:
            raise InputError(f"{directory} is not empty and holds no run: choose another directory")
        before = read_description(directory).get("config")
        if before != json.loads(config.model_dump_json()):
            raise InputError(
                f"{directory} holds a run of another configuration; choose another run.directory, "
                "or start anew with --overwrite (which deletes it)"
            )
        if not resume:
            raise InputError(
                f"{directory} holds this run already: go on with --resume, or start anew with "
                "--overwrite (which deletes it)"
            )
    directory.mkdir(parents=True, exist_ok=True)


class _Loop:
    """The state of one call of ``fit``."""

    def __init__(
        self, config: Config, directory: Path, data: TrainingData, reporter: Reporter
    ) -> None:
        self.config, self.directory, self.data, self.reporter = config, directory, data, reporter
        self.checkpoints = directory / CHECKPOINTS
        self.potential = make_potential(data.architecture, data.constants)
        self.stages = make_stages(config, data)
        self.progress = Progress()
        self.evaluate = Counted(make_evaluate(self.potential, data.spec.terms))
        self.steps = [
            Counted(
                make_train_step(self.potential, data.spec._replace(terms=stage.terms)),
                donate_argnums=(0,),
            )
            for stage in self.stages
        ]
        self.validation = make_packer(data, data.pools["validation"], config)
        self.started = time.monotonic()

    # ------------------------------------------------------------------ stages

    def run(self) -> dict[str, Any]:
        facts = self._describe()
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
            "compilations": {**compiled, "evaluate": self.evaluate.compilations},
            "seconds": self._seconds(),
        }
        write_atomically(self.directory / SUMMARY, json.dumps(summary, indent=1))
        return summary

    def _finished(self) -> dict[str, Any] | None:
        """The summary of a run that has nothing left to do."""
        try:
            return dict(json.loads((self.directory / SUMMARY).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def _initial_state(self) -> TrainState:
        packer = make_packer(self.data, self.stages[0].pool, self.config)
        first = to_batch(packer.batch(np.arange(1)))
        init = make_init(self.potential)
        key = jax.random.key(self.config.training.seed)
        found = checkpoint.resumable(self.checkpoints)
        if found:
            state, meta = checkpoint.restore(found[0], jax.eval_shape(init, key, first))
            self.progress = Progress(**meta)
        else:
            state = jax.jit(init)(key, first)
        self._truncate_metrics()
        return state

    def _next_stage(self, state: TrainState) -> TrainState:
        """Fresh moments on the averaged parameters of the stage before."""
        p = self.progress
        self.progress = Progress(stage=p.stage + 1, seconds=p.seconds)
        fresh = jax.tree.map(jnp.zeros_like, state.optimizer)
        return TrainState(
            state.ema, jax.tree.map(jnp.copy, state.ema), fresh, jnp.zeros_like(state.step)
        )

    def _run_stage(self, stage: Stage, step: Counted, state: TrainState) -> TrainState:
        training, p = self.config.training, self.progress
        packer = make_packer(self.data, stage.pool, self.config)
        pending: list[dict[str, jax.Array]] = []
        batches: Any = prefetch(self._batches(stage, packer), 2)
        try:
            for epoch, number, batch in batches:
                if p.step >= stage.n_steps or 0 < training.patience <= p.stale:
                    break
                state, metrics = step(state, batch, stage.hyper)
                pending.append(metrics)
                p.step, p.epoch, p.batch = p.step + 1, epoch, number + 1
                last = p.step == stage.n_steps
                validating = last or p.step % training.validate_every == 0
                saving = p.step % training.checkpoint_every == 0 and not last
                if validating or saving or p.step % CHECK_EVERY == 0:
                    self._settle(stage, pending)  # a state that is saved has been looked at
                if validating:
                    self._validate(stage, state)
                if saving:
                    self._save(state)
        finally:
            batches.close()
        return state

    def _batches(self, stage: Stage, packer: Packer) -> Iterator[tuple[int, int, Batch]]:
        epoch, start = self.progress.epoch, self.progress.batch
        while True:
            plan = epoch_plan(
                stage.pool,
                stage.n_labelled,
                stage.share,
                self.data.budget,
                self.config.training.seed,
                epoch,
            )
            for number in range(start, len(plan)):
                yield epoch, number, to_batch(packer.batch(plan[number]))
            epoch, start = epoch + 1, 0

    # ------------------------------------------------------------------ records

    def _settle(self, stage: Stage, pending: list[dict[str, jax.Array]]) -> None:
        """Take the waiting metrics from the device; stop on a loss that is not finite."""
        p = self.progress
        for metrics in jax.device_get(pending):
            if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["gradient_norm"]):
                raise OrbqError(
                    f"the loss is not finite near step {p.step} of stage {stage.name!r} "
                    f"(loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}): lower "
                    "training.learning_rate or training.clip_norm, or look at the data with "
                    f"`orbq inspect`; {self.checkpoints} keeps the last good state (--resume)"
                )
            for name, value in metrics.items():
                p.sums[name] = p.sums.get(name, 0.0) + float(value)
            p.counted += 1
        if pending:
            self.reporter.stepped(stage.name, p.step, stage.n_steps, float(pending[-1]["loss"]))
        pending.clear()

    def _validate(self, stage: Stage, state: TrainState) -> None:
        p = self.progress
        errors = self.errors(state.ema, self.validation)
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
        if stage.name == "train":
            criterion = errors[_criterion(errors)]
            record["best"] = p.best is None or criterion < p.best
            p.stale = 0 if record["best"] else p.stale + 1
            if record["best"]:
                p.best = criterion
                meta = {"step": p.step, "criterion": criterion}
                checkpoint.save(self.checkpoints / checkpoint.BEST, {"params": state.ema}, meta)
        with (self.directory / METRICS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
        self.reporter.validated(record)

    def errors(self, params: Params, packer: Packer) -> dict[str, float]:
        """Errors of ``params`` on every structure of a packer's pool."""
        plan = packer.plan(0)
        parts = [self.evaluate(params, to_batch(packer.batch(items))) for items in plan]
        return from_sums(add_sums(jax.device_get(parts)))

    def _save(self, state: TrainState) -> None:
        p = self.progress
        step = sum(s.n_steps for s in self.stages[: p.stage]) + p.step
        meta = asdict(p)
        meta["seconds"] = self._seconds()
        checkpoint.save_step(self.checkpoints, step, state, meta)

    def _truncate_metrics(self) -> None:
        """Drop records of steps that will be made again."""
        path, p = self.directory / METRICS, self.progress
        if not path.is_file():
            return
        names = [stage.name for stage in self.stages]
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                place = (names.index(record["stage"]), record["step"])
            except (ValueError, KeyError):
                continue  # a line cut off by a power failure
            if place <= (p.stage, p.step):
                kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")

    def _seconds(self) -> float:
        return self.progress.seconds + time.monotonic() - self.started

    def _describe(self) -> dict[str, Any]:
        data = self.data
        template = jax.eval_shape(
            self.potential.init,
            jax.random.key(0),
            *to_batch(self.validation.batch(np.arange(1)))[:2],
        )
        plan_fill = make_packer(data, self.stages[-1].pool, self.config).fill(0)
        facts = {
            "orbq_version": __version__,
            "directory": str(self.directory),
            "structures": {name: len(pool) for name, pool in data.pools.items()},
            "labels": {name: n for name, n in data.labels.items() if n},
            "n_parameters": n_parameters(template),
            "budget": data.budget._asdict(),
            "fill": {k: round(v, 4) for k, v in plan_fill._asdict().items()},
            "scales": {
                n: [s, "eV/Å" if "forces" in n else "eV"] for n, s in data.spec.scales.items()
            },
            "data": [{"path": str(d.path), "arrays": d.manifest["arrays"]} for d in data.datasets],
        }
        if (self.directory / RUN_FILE).exists():
            _check_same_data(self.directory, data.datasets)
        else:
            save_description(
                self.directory,
                self.config,
                data.architecture,
                data.constants,
                data.references,
                facts,
            )
        return facts


def _check_same_data(directory: Path, datasets: tuple[Dataset, ...]) -> None:
    """Refuse to go on with other structures or labels than the run was begun with."""
    before = read_description(directory)["data"]
    for dataset, stored in zip(datasets, before, strict=True):
        for name, now in dataset.manifest["arrays"].items():
            if name not in _RECOMPUTED and now != stored["arrays"].get(name):
                raise InputError(
                    f"{dataset.path} has changed since {directory} was begun ({name} is another): "
                    "bring the data set back, or start anew with --overwrite"
                )


def _criterion(errors: dict[str, float]) -> str:
    """What the best parameters are chosen by: the energy error, else the first error there is."""
    for prefix in ("energy_mae", "forces_mae"):
        for name in errors:
            if name.startswith(prefix) and "atom" not in name:
                return name
    return next(name for name in errors if "_mae" in name)
