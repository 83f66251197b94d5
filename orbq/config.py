"""Configuration: every key, its type and its bounds; all errors of a file reported at once.

A configuration is a TOML file of the sections ``[data]``, ``[model]``, ``[loss]``,
``[loss.weights]``, ``[training]``, ``[ablation]`` and ``[run]``. Keys that are left out take the
defaults below, which ``configs/base.toml`` lists with their units and meaning. ``base =
"other.toml"`` at the top of a file starts from that file (relative to the one that names it).
Nothing is coerced, except that a whole number may stand for a real one. Units: eV, Å, e.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from orbq.config_rules import RULES
from orbq.config_text import (
    Document,
    Problem,
    overridden,
    problems_of,
    read_toml,
    report,
    to_toml,
    without_wrong_keys,
)
from orbq.errors import InputError
from orbq.targets import MAIN_TERMS, TARGETS

MAX_INT = 2**31 - 1  # counters are int32 in the compiled programs

Count = Annotated[int, Field(ge=1, le=MAX_INT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INT)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Widths = Annotated[tuple[Count, ...], Field(strict=False, max_length=8)]
Weights = Annotated[tuple[Weight, ...], Field(strict=False)]
Seeds = Annotated[tuple[CountOrZero, ...], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False)]
Rate = Annotated[float, Field(gt=0, le=10)]
Rates = Annotated[tuple[Rate, ...], Field(strict=False)]

# 'fit', 'guided' (by GFN1-xTB energies), 'taught' (with the energy readout of training.initial), or
# a table of element symbol -> energy of the isolated atom in eV
References = Annotated[
    Annotated[Literal["fit", "guided", "taught"], Tag("<word>")]
    | Annotated[dict[str, float], Tag("<table>")],
    Discriminator(lambda value: "<table>" if isinstance(value, dict) else "<word>"),
]

Backbone = Literal["nequip", "mace", "invariant"]
BACKBONES: tuple[str, ...] = get_args(Backbone)

RUN_NAME = "<name>"  # in run.directory: replaced by the configuration file's name

LABEL_WITH_XTB = "`orbq preprocess INPUT... --out DATASET`"
_FROM_INPUT = (
    "`orbq preprocess INPUT... --out DATASET --{0}-key KEY`, where KEY names them in INPUT"
)
LABELLING = {
    "energy": _FROM_INPUT.format("energy"),
    "forces": _FROM_INPUT.format("forces"),
    "stress": _FROM_INPUT.format("stress"),
    "dft_charges": _FROM_INPUT.format("dft-charges"),
}


class ConflictError(ValueError):
    """Keys that are valid one by one and contradict each other."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{p.key}: {p.text}" for p in problems))
        self.problems = tuple(problems)


class Section(BaseModel):
    """Strict, closed and immutable: no coercion, no unknown key, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which structures, and how they are divided into training, validation and test."""

    dataset: Text = "tmc"
    unlabelled: Names = ()
    split: Literal["group", "within"] = "group"
    split_seed: CountOrZero = 0
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    n_train: CountOrZero = 0
    subset_seed: CountOrZero = 0
    references: References = "fit"
    charge_reference: bool = False


class Model(Section):
    """The structure of the network: a change of any of these is another compiled program."""

    backbone: Backbone = "nequip"
    species: Literal["shells", "free"] = "shells"
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    n_layers: Annotated[int, Field(ge=1, le=16)] = 2
    n_channels: Annotated[int, Field(ge=1, le=4096)] = 32
    lmax: Annotated[int, Field(ge=0, le=3)] = 2
    lmax_hidden: Annotated[int, Field(ge=0, le=3)] = 1
    product_init: Annotated[float, Field(gt=0, le=1)] = 0.2
    n_radial: Annotated[int, Field(ge=1, le=256)] = 8
    radial_damping: Annotated[float, Field(ge=0, le=4)] = 0.0
    radial_hidden: Widths = (32,)
    readout_hidden: Annotated[int, Field(ge=1, le=4096)] = 16
    avg_num_neighbors: NonNegative = 0.0
    head: Literal["equivariant", "invariant"] = "equivariant"
    embed_charge: bool = True
    embed_spin: bool = True


class LossWeights(Section):
    """Weights of the loss terms: traced numbers, so that a change does not recompile."""

    energy: Weight = 1.0
    forces: Weight = 1.0
    stress: Weight = 0.0
    orbital: Weight = 0.0
    density: Weight = 0.0
    onsite: Weight = 0.0
    shell: Weight = 0.0
    atomic: Weight = 0.0
    dft: Weight = 0.0
    xtb_energy: Weight = 0.0
    xtb_forces: Weight = 0.0

    def auxiliary(self) -> dict[str, float]:
        """The positive weights on targets other than energy, forces and stress."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name) > 0}


class Loss(Section):
    """How residuals of energies, forces and stresses are scored."""

    kind: Literal["huber", "mse", "mae"] = "huber"
    huber_delta: Positive = 1.0
    energy_per: Literal["structure", "atom"] = "structure"
    auxiliary_final_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    weights: LossWeights = LossWeights()


class Training(Section):
    """Optimiser, schedule, validation and numerical precision."""

    seed: CountOrZero = 0
    batch_size: Count = 8
    batches_per_update: CountOrZero = 0
    rotate: Literal["none", "proper", "improper"] = "none"
    n_steps: Count = 5000
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-3
    warmup_steps: CountOrZero = 100
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    weight_decay: NonNegative = 0.0
    clip_norm: Positive = 10.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Count = 500
    checkpoint_every: Count = 500
    patience: CountOrZero = 0
    precision: Literal["float32", "float64"] = "float32"
    activations: Literal["full", "bfloat16"] = "full"
    kernels: Literal["xla", "cuequivariance"] = "xla"
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    compilation_cache: bool = True
    log_gradients: bool = False
    initial: str = ""
    frozen: Names = ()
    pretrain_steps: CountOrZero = 0
    pretrain_learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-3
    unlabelled_share: Annotated[float, Field(ge=0, le=1)] = 0.0


class Run(Section):
    """Where the run is kept."""

    directory: Text = f"runs/{RUN_NAME}"
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()


class Ablation(Section):
    """What `orbq ablate` varies; without targets there is nothing to ablate."""

    targets: Names = ()
    weights: Weights = (0.0, 1.0, 10.0, 30.0)
    seeds: Seeds = (0, 1, 2)
    subset_seeds: Seeds = ()
    n_train: Seeds = ()
    n_steps: Counts = ()
    learning_rates: Rates = ()
    baseline: bool = True
    max_runs_per_program: CountOrZero = 0


class Config(Section):
    """A whole configuration. Construct it with ``load_config`` or ``parse_config``."""

    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss()
    training: Training = Training()
    ablation: Ablation = Ablation()
    run: Run = Run()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = [p for rule in RULES for p in rule(self)]
        if problems:
            raise ConflictError(problems)
        return self

    def model_dump_toml(self) -> str:
        """The configuration as a TOML document that ``load_config`` reads back unchanged."""
        return to_toml(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML configuration and apply ``section.key=value`` overrides.

    overrides: values are TOML; text without quotes may stand for itself (``data.dataset=tmc``).
    ``<name>`` in ``run.directory`` becomes the file's name without its ending.
    Raises InputError that lists every wrong key of the file and of the overrides at once.
    """
    path = Path(path)
    document, problems = overridden(read_toml(path), overrides)
    config = _validated(document, str(path), problems)
    directory = config.run.directory.replace(RUN_NAME, path.stem)
    return _at_home(
        config.model_copy(update={"run": config.run.model_copy(update={"directory": directory})})
    )


def _at_home(config: Config) -> Config:
    """With ``~`` of its paths as the home directory: a shell expands it in no ``key=~/...``."""

    def changed(section: Any, **values: Any) -> Any:
        return section.model_copy(update=values)

    home, data = os.path.expanduser, config.data
    return changed(
        config,
        run=changed(config.run, directory=home(config.run.directory)),
        data=changed(
            data,
            dataset=home(data.dataset),
            unlabelled=type(data.unlabelled)(map(home, data.unlabelled)),
        ),
        training=changed(config.training, initial=home(config.training.initial)),
    )


def parse_config(document: Mapping[str, Any], source: str = "configuration") -> Config:
    """A configuration from nested mappings, e.g. from TOML or JSON; see ``load_config``."""
    return _validated(dict(document), source, [])


def config_from_json(text: str, source: str = "configuration") -> Config:
    """A configuration from the JSON that a run directory keeps. Raises InputError."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{source}: must be a JSON object of sections")
    model = document.get("model")
    if isinstance(model, dict) and model.get("backbone") == "mace":
        model.setdefault("product_init", 1.0)  # what they began with before there was the key
    return parse_config(document, source)


def _validated(document: Document, source: str, problems: list[Problem]) -> Config:
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        problems = problems + problems_of(error, Config)
        problems += _further_conflicts(document, error, [p.key for p in problems])
        raise report(source, problems) from None
    if problems:
        raise report(source, problems)
    return config


def _further_conflicts(
    document: Document, error: ValidationError, wrong: Sequence[str]
) -> list[Problem]:
    """Contradictions among the keys that are right, so that one run shows every error."""
    try:
        Config.model_validate(without_wrong_keys(document, error))
    except ValidationError as second:
        return [p for p in problems_of(second, Config) if not p.touches(wrong)]
    return []


def check_against(config: Config, coverage: Mapping[str, int], dataset_name: str) -> None:
    """Refuse a positive weight on a target, or a guide, of which the data set has no label.

    coverage: for each array of the data set (schema.FIELDS), how many structures have it.
    Raises InputError that names every such target, the data set and the command that makes it.
    """
    weights = config.loss.weights
    wanted: dict[str, tuple[str, ...]] = {
        name: (name,) for name in MAIN_TERMS if getattr(weights, name) > 0
    }
    wanted |= {name: TARGETS[name].fields for name in weights.auxiliary()}
    problems = []
    for name, fields in wanted.items():
        missing = [field for field in fields if coverage.get(field, 0) == 0]
        if missing:
            text = (
                f"is {getattr(weights, name):g}, but no structure of data set {dataset_name!r} has "
                f"{' and '.join(missing)}: set it to 0, or make the label with "
                f"{LABELLING.get(missing[0], LABEL_WITH_XTB)}"
            )
            problems.append(Problem(f"loss.weights.{name}", text))
    if config.data.references == "guided" and coverage.get("xtb_energy", 0) == 0:
        text = (
            f"is 'guided', but no structure of data set {dataset_name!r} has xtb_energy: set it to"
            f" 'fit', or make the label with {LABEL_WITH_XTB}"
        )
        problems.append(Problem("data.references", text))
    if problems:
        raise report("configuration", problems)
