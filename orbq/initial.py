"""A training run that begins from another: what it takes over from it, and what it may not.

The parameters are the averaged ones of the initial run's best validation. What gives them their
meaning comes with them: elements, neighbours, the scale of energies, the normalisation of charges,
the reference energies of xTB's. Reference energies of the energies themselves and the scales of the
loss are those of the new data: so is the level of theory.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orbq import checkpoint
from orbq.config import Config, Model
from orbq.data import TrainingData, prepare, split_of
from orbq.data_rules import refuse_taught
from orbq.devices import is_main
from orbq.errors import InputError, OrbqError
from orbq.evaluate import IDENTITY
from orbq.models.potential import Constants, Params, Potential
from orbq.orbitals import SYMBOLS
from orbq.preprocess.pool import Pool
from orbq.preprocess.references import References
from orbq.preprocess.store import Dataset, write_atomically
from orbq.probe import Probe, fit_probe
from orbq.run import Run, load
from orbq.run_files import (
    CHECKPOINTS,
    PROBE_FILE,
    RUN_FILE,
    STATISTICS_FILE,
    read_description,
    run_directory,
    stored_config,
    stored_constants,
)
from orbq.train import TrainState, taught_readout

INITIAL = "initial"  # what run.json and summary.json say of it
TAUGHT_FILE = "taught.npy"  # of a run that travels without its data: content hashes of these
TAUGHT_DIGITS = "S16"  # of each: 64 bits
_REMEDY = "or leave training.initial out"
_UNREADABLE = (InputError, OSError, KeyError, TypeError, ValueError, IndexError)


class Initial(NamedTuple):
    """What a run begins from.

    constants: what gives its parameters their meaning. params: None when the new run has them
    already. facts: the directory, and the SHA-256 of the parameters. notes: what could not be
    checked. references: that stay as they are, by their label. potential: of the parameters. probe:
    what was fitted before training, if anything was.
    """

    constants: Constants
    params: Params | None
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    references: Mapping[str, References] = MappingProxyType({})
    potential: Potential | None = None
    probe: Probe | None = None


def check_apart(config: Config) -> None:
    """Refuse a run, or an ablation, in a directory that holds the run it begins from."""
    if not config.training.initial:
        return
    initial, own = Path(config.training.initial).resolve(), Path(config.run.directory).resolve()
    if own == initial or own in initial.parents:
        raise InputError(
            f"training.initial = {config.training.initial!r} lies in run.directory itself: choose "
            "another run.directory"
        )


def check_initial(config: Config) -> None:
    """Refuse for an ablation what can be refused without the data: no trained run, or one of
    another network. Warn where runs of several seeds would hardly differ."""
    seeds, subsets = config.ablation.seeds, config.ablation.subset_seeds
    if _read(config, None) and len(set(subsets)) < len(seeds) > 1:
        warnings.warn(
            "all runs begin from the parameters of training.initial and see the same batches: "
            "seeds alone make no spread; give each a subset of its own, ablation.subset_seeds",
            stacklevel=2,
        )


def with_own_copy(config: Config, directory: Path) -> Config:
    """``config`` of which the initial run is a copy in ``directory``, made now if it is not there:
    what begins days later begins from the same parameters."""
    if not config.training.initial:
        return config
    source, copy = run_directory(config.training.initial), directory / INITIAL
    if not copy.is_dir():
        partial = directory / f"{INITIAL}.new"
        shutil.rmtree(partial, ignore_errors=True)
        place = Path(CHECKPOINTS) / checkpoint.BEST
        shutil.copytree(source / place, partial / place)
        for name in (RUN_FILE, STATISTICS_FILE):
            shutil.copy(source / name, partial / name)
        if (source / TAUGHT_FILE).exists():
            shutil.copy(source / TAUGHT_FILE, partial / TAUGHT_FILE)
        partial.rename(copy)
    training = config.training.model_copy(update={"initial": str(copy)})
    return config.model_copy(update={"training": training})


def prepare_from(
    config: Config, n_batches: int = 1, own: Path | None = None, keep: Path | None = None
) -> TrainingData:
    """``data.prepare``, with the constants and parameters of the run that training begins from.

    own: the directory of this very run if it is gone on with; once it has a checkpoint, the initial
    run is not looked at again. keep: where the main process writes what it fits by the initial run
    (data.references = "taught"), and where it is read by the others and later.

    Raises InputError as ``prepare`` does, when training.initial names no trained run, or one of
    another network, another xTB method or fewer elements, or one that was trained on structures
    that are held out here.
    """
    found = _read(config, own)
    if found is None:
        return prepare(config, n_batches, known=_own_references(own) if own else None)
    initial: Initial = found
    probes: list[Probe] = []

    def taught(train: Pool) -> References:
        probes.append(_probe(config, initial, train, keep))
        return probes[0].references

    data = prepare(config, n_batches, taught, initial.references)
    name = config.training.initial
    constants = _inherited(name, initial.constants, data)
    if initial.params is not None:
        initial = initial._replace(notes=tuple(_check_no_leak(name, data)))
    if probes:
        params = initial.params and probes[0].into(initial.params)
        initial = initial._replace(params=params, probe=probes[0])
    return data._replace(constants=constants, initial=initial)


def _probe(config: Config, initial: Initial, train: Pool, keep: Path | None) -> Probe:
    path = keep / PROBE_FILE if keep else None
    if path and (initial.params is None or not is_main()):
        try:
            return Probe.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise OrbqError(f"{path} is damaged ({error}): start anew with --overwrite") from error
    assert initial.params is not None and initial.potential is not None
    charge, dtype = config.data.charge_reference, config.training.precision
    forces = config.loss.weights.forces > 0
    probe = fit_probe(initial.potential, initial.params, train, charge, forces, dtype)
    if path:
        write_atomically(path, probe.to_json())
    return probe


def started_from(initial: Initial | None, state: TrainState) -> TrainState:
    """A state of drawn parameters, with those of the initial run where it has them.

    Leaves of ``state`` may be those of several runs, [R, ...].
    """
    if initial is None or initial.params is None:
        return state

    def put(drawn: Any, found: Any) -> Any:
        return jnp.array(jnp.broadcast_to(jnp.asarray(found, drawn.dtype), drawn.shape), copy=True)

    params = {
        name: jax.tree.map(put, drawn, initial.params[name]) if name in initial.params else drawn
        for name, drawn in state.params.items()
    }
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params))


# --------------------------------------------------------------------------- the initial run


def _read(config: Config, own: Path | None) -> Initial | None:
    name = config.training.initial
    if not name:
        return None
    stored = read_description(own) if own else None
    if own and stored and checkpoint.resumable(own / CHECKPOINTS):
        try:
            constants, facts = stored_constants(own, stored), dict(stored[INITIAL])
        except (KeyError, TypeError, ValueError) as error:
            raise OrbqError(
                f"{own} is damaged ({type(error).__name__}: {error}): start anew with --overwrite"
            ) from error
        references = _own_references(own)
        if config.data.references == "taught":
            references.pop("energy", None)  # they are read with the readout that goes with them
        return Initial(constants, None, facts, references=references)
    run = _load(name)
    _check_same_network(config, run)
    facts = {"directory": name, "sha256": checkpoint.digest(run.params)}
    if stored and stored.get(INITIAL) != facts:
        raise InputError(
            f"training.initial: {name} has changed since {own} was begun, which has no checkpoint "
            "yet: start anew with --overwrite"
        )
    params = run.params if run.taught_energy else taught_readout(run.params)
    references = {n: table for n, table in run.references.items() if n == "xtb_energy"}
    return Initial(run.potential.constants, params, facts, (), references, run.potential)


def _own_references(own: Path) -> dict[str, References]:
    """Reference energies of a run that is gone on with: what it was begun with."""
    try:
        stored = read_description(own)["references"]
        return {n: References.from_json(json.dumps(table)) for n, table in stored.items()}
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise OrbqError(f"{own} is damaged ({error}): start anew with --overwrite") from error


def _load(name: str) -> Run:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parameters are cast to the new run's precision
            return load(name)
    except InputError as error:
        raise InputError(f"training.initial: {error}") from error


def _check_same_network(config: Config, run: Run) -> None:
    """Refuse another [model], but for the kind of heads that only one of the two runs has."""
    heads = {name for name, kind in run.potential.architecture.heads if kind != "energy"}
    for key in Model.model_fields:
        if key == "product_init":  # only how parameters are drawn
            continue
        before, now = getattr(run.config.model, key), getattr(config.model, key)
        if key == "avg_num_neighbors":  # what was measured then is taken over, not measured again
            before = run.potential.constants.avg_num_neighbors
            now = now or before
        if before == now or (key == "head" and not heads & set(config.loss.weights.auxiliary())):
            continue
        raise InputError(
            f"model.{key} is {json.dumps(now)}, that of training.initial = "
            f"{config.training.initial!r} is {json.dumps(before)}: set model.{key} = "
            f"{json.dumps(before)}, {_REMEDY}"
        )


def _inherited(name: str, constants: Constants, data: TrainingData) -> Constants:
    """``constants`` with the statistics of further heads. Raises InputError as ``prepare_from``."""
    measured = data.constants
    if constants.method != measured.method:
        raise InputError(
            f"{data.datasets[0].path} is labelled with {measured.method}, training.initial = "
            f"{name!r} was trained on {constants.method}: label the structures with it (`orbq "
            f"preprocess --method {constants.method}`), {_REMEDY}"
        )
    if missing := sorted(set(measured.elements) - set(constants.elements)):
        raise InputError(
            f"training.initial = {name!r} was not trained on "
            f"{', '.join(SYMBOLS[z] for z in missing)}, which the training structures hold: leave "
            f"structures with {'it' if len(missing) == 1 else 'them'} out, {_REMEDY}"
        )
    kept = {n: constants.statistics.get(n, own) for n, own in measured.statistics.items()}
    return constants._replace(statistics=kept)


# --------------------------------------------------------------------------- what it was taught


def _check_no_leak(name: str, data: TrainingData) -> Iterator[str]:
    """Refuse held-out structures that the initial run, or one before it, was trained on.

    Yields what could not be checked, a line each. Raises InputError.
    """
    held_out = np.concatenate(
        [data.pools[p].rows[0] for p in ("validation", "test") if p in data.pools]
    )
    remedy = (
        "divide the structures as they were divided for it, or take them out of either data set"
    )
    for directory, stored in _lineage(name):
        try:
            taught = taught_hashes(directory, stored)
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0]
            yield (
                f"whether {directory} was trained on structures that are held out here could not "
                f"be checked: {reason}"
            )
            continue
        for path, hashes in taught:
            holder = f"the training data of {directory} ({path})"
            refuse_taught(data.datasets[0], held_out, hashes, (holder, remedy))


def taught_among(name: str | Path, dataset: Dataset, rows: np.ndarray) -> str:
    """A line that says how many of these structures of a data set a run, or one before it, was
    trained on, or that this could not be checked; empty if it was trained on none."""
    own, found = dataset["content_hash"][rows], np.zeros(len(rows), bool)
    for directory, stored in _lineage(str(name)):
        try:
            taught = taught_hashes(directory, stored)
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0]
            return f"whether {directory} was trained on any of them could not be checked: {reason}"
        for _, hashes in taught:
            found |= np.isin(own.astype(hashes.dtype), hashes)
    if not found.any():
        return ""
    return (
        f"{name} was trained on {found.sum():,} of these {len(rows):,} structures: their errors "
        "say nothing of others"
    )


def _lineage(name: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Directory and run.json of a run, of the one that it was begun from, and so on; an empty
    run.json for one that is gone."""
    seen: set[Path] = set()
    while name and (directory := run_directory(name)).resolve() not in seen:
        seen.add(directory.resolve())
        try:
            stored = read_description(directory)
            name = stored_config(directory, stored).training.initial
        except InputError:
            name, stored = "", {}
        yield directory, stored


def taught_hashes(directory: Path, stored: Mapping[str, Any]) -> list[tuple[Path, np.ndarray]]:
    """Path and content hashes of everything that a run was trained on, as it was then.

    directory: of the run; stored: its run.json. Where the run has a list of its own, that is it.
    Raises InputError when a data set is gone or has changed; KeyError, TypeError, ValueError or
    OSError when a file is damaged.
    """
    if not stored:
        raise InputError("it is not there any more")
    if (listed := directory / TAUGHT_FILE).exists():
        return [(listed, np.load(listed, allow_pickle=False).astype(TAUGHT_DIGITS, "K", "no"))]
    dataset, *unlabelled = (_unchanged(entry) for entry in stored["data"])
    rows = split_of(stored_config(directory, stored), dataset)["train"]
    taught = [(dataset.path, dataset["content_hash"][rows])]
    return taught + [(extra.path, extra["content_hash"]) for extra in unlabelled]


def _unchanged(entry: Mapping[str, Any]) -> Dataset:
    dataset = Dataset.open(entry["path"])
    for array in IDENTITY:
        if dataset.manifest["arrays"][array] != entry["arrays"][array]:
            raise InputError(f"{dataset.path} has changed since")
    return dataset
