"""Which runs an ablation has, and which of them train as one program.

Runs that differ only in traced quantities (weight, learning rate, seed) share a program; another
target, train size or subset is another one: its heads, constants and batches differ. A program's
runs see the same batches, in the order of its first run's seed. The energy-only runs (weight 0) are
the baseline of every target, and part of the first target's programs unless these see structures
without energies or are trained without energies first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from orbq.config import Ablation, Config, LossWeights
from orbq.errors import InputError
from orbq.targets import MAIN_TERMS, TARGETS

BASELINE = "energy-only"


class RunSpec(NamedTuple):
    """One run. arm: a target, or BASELINE. weight: of the target. n_train: 0 for all structures."""

    arm: str
    weight: float
    learning_rate: float
    seed: int
    subset_seed: int
    n_train: int
    n_steps: int


class Program(NamedTuple):
    """Runs that train as one compiled program. target: the loss term whose weight is traced.
    config: that of its first run, except that the target's weight is above 0, so that its head is
    there."""

    name: str
    target: str
    config: Config
    runs: tuple[RunSpec, ...]


def make_plan(config: Config, max_runs: int | None = None) -> list[Program]:
    """The programs of a configuration's [ablation] table, small train sizes first.

    max_runs: at most so many runs in a program; None: no limit. Raises InputError without targets.
    """
    ablation = config.ablation
    if not ablation.targets:
        raise InputError(
            "ablation.targets is empty: name what to ablate, e.g. an [ablation] table with "
            f'targets = ["onsite"] (known: {", ".join(TARGETS)})'
        )
    return [part for group in _groups(config) for part in _cut(group, max_runs)]


def _groups(config: Config) -> Iterator[Program]:
    ablation, data = config.ablation, config.data
    sizes = ablation.n_train or (data.n_train,)
    steps = ablation.n_steps or (config.training.n_steps,) * len(sizes)
    subset_of = ablation.subset_seeds or (data.subset_seed,) * len(ablation.seeds)
    pairs = list(zip(ablation.seeds, subset_of, strict=True))
    for n_train, n_steps in zip(sizes, steps, strict=True):
        for subset in dict.fromkeys(subset_of):
            seeds = [seed for seed, own in pairs if own == subset]
            place = (subset, n_train, n_steps)
            # batches that hold charge-only structures would give the baseline fewer energies, and
            # pre-training without a target nothing but the decay of its weights
            apart = config.training.unlabelled_share > 0 or config.training.pretrain_steps > 0
            if apart and ablation.baseline:
                yield _program(config, None, [0.0], seeds, place)
            for number, arm in enumerate(ablation.targets):
                weights = _weights(
                    ablation, with_baseline=number == 0 and not apart and ablation.baseline
                )
                if weights:
                    yield _program(config, arm, weights, seeds, place)


def _weights(ablation: Ablation, with_baseline: bool) -> list[float]:
    positive = [weight for weight in ablation.weights if weight > 0]
    return [0.0, *positive] if with_baseline else positive


def _program(
    config: Config,
    arm: str | None,
    weights: Sequence[float],
    seeds: Sequence[int],
    place: tuple[int, int, int],
) -> Program:
    subset, n_train, n_steps = place
    rates = config.ablation.learning_rates or (config.training.learning_rate,)
    runs = tuple(
        RunSpec((weight and arm) or BASELINE, weight, rate, seed, subset, n_train, n_steps)
        for weight in weights
        for rate in rates
        for seed in seeds
    )
    name = f"{arm or BASELINE}-n{n_train or 'all'}-subset{subset}"
    return Program(name, (arm or "").split("+")[0], _config(config, arm, runs[0]), runs)


def _config(config: Config, arm: str | None, first: RunSpec) -> Config:
    """The configuration of a program, with heads for its arm and no other."""
    base, parts = config.loss.weights, arm.split("+") if arm else []
    weights = {name: getattr(base, name) for name in MAIN_TERMS}
    weights |= {part: getattr(base, part) for part in parts[1:]}
    weights |= {part: first.weight or 1.0 for part in parts[:1]}
    data: dict[str, Any] = {"n_train": first.n_train, "subset_seed": first.subset_seed}
    training = {
        "seed": first.seed,
        "n_steps": first.n_steps,
        "learning_rate": first.learning_rate,
        "warmup_steps": min(config.training.warmup_steps, first.n_steps),
    }
    if arm is None:
        data |= {"unlabelled": ()}
        training |= {"unlabelled_share": 0.0, "pretrain_steps": 0}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "loss": config.loss.model_copy(update={"weights": LossWeights(**weights)}),
            "training": config.training.model_copy(update=training),
            "ablation": Ablation(),
        }
    )


def _cut(program: Program, max_runs: int | None) -> list[Program]:
    """The program in parts of nearly equal size, each of at most ``max_runs`` runs.

    The order of batches stays that of the whole program's first seed.
    """
    runs = program.runs
    n_parts = -(-len(runs) // max_runs) if max_runs else 1
    if n_parts == 1:
        return [program]
    bounds = [len(runs) * i // n_parts for i in range(n_parts + 1)]
    return [
        program._replace(name=f"{program.name}-part{i + 1}of{n_parts}", runs=runs[a:b])
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def settings_of(program: Program, run: RunSpec, pretraining: bool) -> dict[str, float]:
    """What ``ablate.grid`` sets for a run: its learning rate, and the weights of its arm."""
    setting = {} if pretraining else {"learning_rate": run.learning_rate}
    auxiliary = program.config.loss.weights.auxiliary()
    if run.weight == 0:  # energy-only: the fixed weights of a combined arm vanish, too
        return setting | {f"weights.{name}": 0.0 for name in auxiliary}
    return setting | ({f"weights.{program.target}": run.weight} if program.target else {})


def fingerprint(config: Config) -> str:
    """Of all that decides what an ablation computes; the directory does not, nor how many of its
    runs train at once."""
    training = config.training
    ablation = config.ablation.model_copy(update={"max_runs_per_program": 0})
    config = config.model_copy(update={"ablation": ablation})
    # keys that came later: where they say nothing new, what was begun before is the same
    later = {"initial": training.initial == "", "kernels": training.kernels == "xla"}
    unused = {name for name, default in later.items() if default}
    model = config.model
    others = {"radial_damping": model.radial_damping == 0, "product_init": model.backbone != "mace"}
    left_out: Any = {"run": True, "training": unused}
    left_out["model"] = {name for name, default in others.items() if default}
    if config.loss.weights.stress == 0:
        left_out["loss"] = {"weights": {"stress"}}
    document = config.model_dump_json(exclude=left_out)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def grown(before: Config, now: Config) -> bool:
    """Whether an ablation holds every run of an earlier one as it was: what was added to the table
    (seeds, weights, rates, sizes, targets) leaves them their batches and heads."""
    then, own = _trained_as(before), _trained_as(now)
    return all(own.get(run) == how for run, how in then.items())


def _trained_as(config: Config) -> dict[RunSpec, str]:
    """For each run of an ablation what it depends on beside what is traced."""
    found: dict[RunSpec, str] = {}
    for program in make_plan(config):
        traced: Any = {"training": {"learning_rate"}, "loss": {"weights": {program.target}}}
        how = program.config.model_dump_json(exclude=traced | {"run": True, "ablation": True})
        found |= dict.fromkeys(program.runs, f"{program.target} {how}")
    return found
