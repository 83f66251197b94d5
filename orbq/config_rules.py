"""What must hold between the keys of a configuration that are valid one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orbq.config_text import Problem
from orbq.orbitals import SYMBOLS
from orbq.targets import TARGETS

if TYPE_CHECKING:
    from orbq.config import Config

RESOLVED = ("orbital", "density", "onsite")  # targets that resolve m, so with parts of l > 0


def _split_rule(config: Config) -> list[Problem]:
    data = config.data
    held_out = data.validation_fraction + data.test_fraction
    if held_out < 1:
        return []
    limit = "validation_fraction + test_fraction must be below 1 (nothing is left to train on)"
    return [
        Problem("data.test_fraction", f"{limit}, is {held_out:g}", ("data.validation_fraction",))
    ]


def _references_rule(config: Config) -> list[Problem]:
    table = config.data.references
    unknown = [s for s in table if s not in SYMBOLS[1:]] if isinstance(table, dict) else []
    text = "not an element symbol of Z = 1..86, write it as in H = -13.6 (eV)"
    problems = [Problem(f"data.references.{symbol}", text) for symbol in unknown]
    if table != "taught":
        return problems
    if not config.training.initial:
        text = "is 'taught', by the run of training.initial: name one, or set 'fit' or 'guided'"
        problems.append(Problem("data.references", text, ("training.initial",)))
    if config.training.pretrain_steps:
        text = "is 'taught', so by the network that training begins with: set pretrain_steps = 0"
        problems.append(Problem("data.references", text, ("training.pretrain_steps",)))
    return problems


def _schedule_rule(config: Config) -> list[Problem]:
    warmup, total = config.training.warmup_steps, config.training.n_steps
    if warmup <= total:
        return []
    text = f"must be at most training.n_steps ({total}), is {warmup}"
    return [Problem("training.warmup_steps", text, ("training.n_steps",))]


def _precision_rule(config: Config) -> list[Problem]:
    training, problems = config.training, []
    if training.activations == "full":
        return []

    def wrong(key: str, value: str) -> None:
        text = f"is {training.activations!r}, which needs {key} = {value!r}"
        problems.append(Problem("training.activations", text, (key,)))

    if training.precision != "float32":
        wrong("training.precision", "float32")
    if training.kernels != "xla":  # their sums over neighbours would be of the features' type
        wrong("training.kernels", "xla")
    return problems


def _unlabelled_rule(config: Config) -> list[Problem]:
    training, named = config.training, bool(config.data.unlabelled)
    keys = ("data.unlabelled", "training.pretrain_steps", "training.unlabelled_share")
    problems = []
    if training.unlabelled_share > 0 and not named:
        text = f"is {training.unlabelled_share:g}, but data.unlabelled names no data set"
        problems.append(Problem("training.unlabelled_share", text, keys))
    if named and not training.pretrain_steps and not training.unlabelled_share:
        text = (
            "would teach nothing: set training.pretrain_steps or training.unlabelled_share above 0"
        )
        problems.append(Problem("data.unlabelled", text, keys))
    if (
        training.pretrain_steps or training.unlabelled_share
    ) and not config.loss.weights.auxiliary():
        key = "training.pretrain_steps" if training.pretrain_steps else "training.unlabelled_share"
        text = f"needs a target to teach: set one of loss.weights.{{{', '.join(TARGETS)}}} above 0"
        problems.append(Problem(key, text, (*keys, "loss.weights")))
    return problems


def _weights_rule(config: Config) -> list[Problem]:
    weights = config.loss.weights
    if weights.stress and not (weights.energy or weights.forces):
        text = f"is {weights.stress:g}, which needs a weight on energies, forces or both"
        keys = ("loss.weights.energy", "loss.weights.forces")
        return [Problem("loss.weights.stress", text, keys)]
    if weights.energy or weights.forces or weights.auxiliary():
        return []
    return [Problem("loss.weights", "all are 0: nothing would be learnt, set one above 0")]


def _head_rule(config: Config) -> list[Problem]:
    model, problems = config.model, []
    asked = {target.split("+")[0]: "ablation.targets" for target in config.ablation.targets}
    asked |= {name: f"loss.weights.{name}" for name in config.loss.weights.auxiliary()}
    for name in (name for name in RESOLVED if name in asked):
        key = asked[name]
        if model.head == "invariant" and name != "orbital":
            text = "has components of l > 0: it needs model.head = 'equivariant'"
            problems.append(Problem(key, text, ("model.head",)))
        if model.head == "equivariant" and model.backbone == "invariant":
            text = "its features have no degree above 0: an equivariant head needs another backbone"
            problems.append(Problem("model.backbone", text, ("model.head", key)))
        elif model.head == "equivariant" and model.lmax < 2:
            text = f"an equivariant head for {name!r} needs lmax >= 2, is {model.lmax}"
            problems.append(Problem("model.lmax", text, ("model.head", key)))
    return problems


def _ablation_rule(config: Config) -> list[Problem]:
    ablation, problems = config.ablation, []
    if not ablation.targets:
        return []

    def wrong(key: str, text: str, *others: str) -> None:
        problems.append(Problem(f"ablation.{key}", text, tuple(f"ablation.{o}" for o in others)))

    for name in ablation.targets:
        swept, *fixed = name.split("+")
        if len({swept, *fixed}) < 1 + len(fixed):
            wrong("targets", f"{name!r} holds a target twice")
        for part in (swept, *fixed):
            if part not in TARGETS:
                wrong("targets", f"unknown target {part!r}; known: {', '.join(TARGETS)}")
            elif part in fixed and not getattr(config.loss.weights, part):
                wrong(
                    "targets",
                    f"{name!r} sweeps {swept}; give {part} its fixed weight: loss.weights.{part}",
                )
    for key in ("targets", "weights", "seeds", "n_train", "learning_rates"):
        values = list(getattr(ablation, key))
        if key in ("weights", "seeds") and not values:
            wrong(key, "must not be empty")
        if key != "seeds" and len(set(values)) < len(values):
            wrong(key, f"holds a value twice: {values}")
    if not ablation.baseline and ablation.weights and not any(ablation.weights):
        text = "none is above 0, and ablation.baseline is false: no run would be left"
        wrong("weights", text, "baseline")
    for key, other in (("subset_seeds", "seeds"), ("n_steps", "n_train")):
        found, wanted = len(getattr(ablation, key)), len(getattr(ablation, other))
        if found and found != wanted:
            wrong(key, f"has {found} values for the {wanted} of ablation.{other}", other)
    pairs = list(zip(ablation.seeds, ablation.subset_seeds or ablation.seeds, strict=False))
    if len(set(pairs)) < len(pairs):
        wrong("seeds", "holds the same run twice", "subset_seeds")
    if not config.loss.weights.energy:
        wrong("targets", "runs are compared by their energy error: set loss.weights.energy above 0")
    if not config.data.test_fraction:
        wrong("targets", "runs are compared on the test split: set data.test_fraction above 0")
    return problems


RULES: tuple[Callable[[Config], list[Problem]], ...] = (
    _split_rule,
    _references_rule,
    _schedule_rule,
    _precision_rule,
    _unlabelled_rule,
    _weights_rule,
    _head_rule,
    _ablation_rule,
)
