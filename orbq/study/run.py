"""An ablation from a configuration to records on disk; it goes on where it was stopped, and grows.

The directory holds ``ablation.json`` (configuration and fingerprint), ``results.jsonl`` (one line
per finished run, with its provenance), ``programs/`` (checkpoints of unfinished programs), the
report, and ``initial/``, a copy of the run that all runs begin from if there is one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from orbq import __version__
from orbq.aside import put_aside, replaced
from orbq.checkpoint import meta_of, resumable
from orbq.compiled import configure_jax
from orbq.config import Config
from orbq.config_text import differences
from orbq.data import TrainingData, make_packer, prepare, to_batch
from orbq.datasets import open_dataset
from orbq.devices import term_signal
from orbq.errors import InputError, OrbqError, told_when_full
from orbq.initial import INITIAL, check_apart, check_initial, with_own_copy
from orbq.lock import alone_in
from orbq.models.heads import n_parameters
from orbq.models.potential import make_potential
from orbq.preprocess.links import make_directory, refuse_brackets, refuse_links
from orbq.preprocess.store import write_atomically
from orbq.records import changed_array
from orbq.run_files import CHECKPOINTS
from orbq.study.plan import Program, RunSpec, fingerprint, grown, make_plan
from orbq.study.program import Training, Unwatched, Watcher
from orbq.study.report import DESCRIPTION, recorded_config

RESULTS, PROGRAMS = "results.jsonl", "programs"
_COPIES = 8  # arrays of the parameters' size a run keeps: state, moments, best, gradient, update
_SHARE = 0.5  # of the device's memory that the estimate may fill


class Reporter(Watcher, Protocol):
    """What is told about a whole ablation."""

    def planned(self, pending: list[Program], n_done: int) -> None: ...
    def finished(self, program: Program, records: list[dict[str, Any]]) -> None: ...


class Silent(Unwatched):
    """Tells nothing."""

    def planned(self, pending: list[Program], n_done: int) -> None: ...
    def finished(self, program: Program, records: list[dict[str, Any]]) -> None: ...


def run_ablation(
    config: Config, overwrite: bool = False, reporter: Reporter | None = None
) -> list[dict[str, Any]]:
    """Train every run of the [ablation] table that has no record yet; all records.

    overwrite: delete the records, once the first program is made, and start anew. Raises InputError
    when the directory holds something else, a link out of it, or an ablation of another
    configuration, and for a training.initial that the runs cannot begin from; PreemptedError after
    SIGTERM (a checkpoint is written).
    """
    configure_jax(config)
    reporter, directory = reporter or Silent(), Path(config.run.directory)
    make_plan(config)  # refuse an empty table before the directory is made
    check_apart(config)
    if overwrite or not (directory / INITIAL).is_dir():
        check_initial(config)
    with told_when_full(directory), ExitStack() as held, term_signal() as asked:
        _claim(directory, config, overwrite, held)
        _check_data(directory, config)
        return _train(with_own_copy(config, directory), directory, reporter, asked)


def _train(
    config: Config, directory: Path, reporter: Reporter, asked: Callable[[], bool]
) -> list[dict[str, Any]]:
    """All records, those of the runs that had none yet added."""
    done = read_results(directory)
    pending = list(_as_begun(pending_programs(config, done), directory))
    reporter.planned(pending, len(done))
    for program in pending:
        place = directory / PROGRAMS / program.name
        training = Training(program, place, reporter, asked=asked)
        replaced(directory)
        records = training.run()
        where = provenance()
        records = [record | {"provenance": where} for record in records]
        _append(directory / RESULTS, records)
        shutil.rmtree(place, ignore_errors=True)
        done += records
        reporter.finished(program, records)
    return done


def pending_programs(config: Config, done: Iterable[dict[str, Any]]) -> list[Program]:
    """The programs that are left, each with the runs that have no record."""
    finished = {spec_of(record) for record in done}
    programs = make_plan(config, config.ablation.max_runs_per_program or None)
    if not config.ablation.max_runs_per_program and programs:
        largest = max(programs, key=lambda p: p.config.data.n_train or np.inf)
        programs = make_plan(config, runs_that_fit(largest.config))
    left = [p._replace(runs=tuple(r for r in p.runs if r not in finished)) for p in programs]
    return [program for program in left if program.runs]


def _as_begun(pending: Iterable[Program], directory: Path) -> Iterator[Program]:
    """The programs, those first that have a checkpoint of a part of their runs: of these it is
    taken up, the others train after them."""
    for program in pending:
        begun = _runs_of_checkpoint(directory / PROGRAMS / program.name / CHECKPOINTS)
        parts = [tuple(r for r in program.runs if (r in begun) is there) for there in (True, False)]
        yield from (program._replace(runs=part) for part in parts if part)


def _runs_of_checkpoint(checkpoints: Path) -> list[RunSpec]:
    """The runs of the newest good checkpoint, none without one."""
    for found in resumable(checkpoints):
        with suppress(OrbqError):
            return [RunSpec(*run) for run in meta_of(found)["runs"]]
    return []


# --------------------------------------------------------------------------- memory


def runs_that_fit(config: Config) -> int:
    """How many runs of a configuration should fit the device's memory at once, by an estimate."""
    data = prepare(config)
    potential = make_potential(data.architecture, data.constants)
    dtype = jax.dtypes.canonicalize_dtype(config.training.precision)
    example = to_batch(make_packer(data, data.pools["validation"], config).batch(np.arange(1)))
    shapes = jax.eval_shape(potential.init, jax.random.key(0), *example[:2])
    n = n_parameters(shapes)
    each = dtype.itemsize * (_COPIES * n + activations(config, data))
    return max(1, int(_SHARE * device_memory() / each)) * len(jax.local_devices())


def activations(config: Config, data: TrainingData) -> int:
    """Numbers that one run keeps for the backward pass, from above: per layer, some arrays of
    [edges, (lmax + 1)^2, channels]; twice as many when forces are trained on."""
    model = config.model
    per_edge = model.n_channels * (model.lmax + 1) ** 2
    copies = 12 if "forces" in data.spec.terms or "xtb_forces" in data.spec.terms else 6
    return data.budget.n_edge * per_edge * model.n_layers * copies


def device_memory() -> int:
    """Bytes of one device; on a CPU, of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())


# --------------------------------------------------------------------------- records


def _claim(directory: Path, config: Config, overwrite: bool, held_by: ExitStack) -> None:
    """Make sure that ``directory`` is free, or holds this very ablation, and no link out of it. It
    is then ours alone until ``held_by`` is closed."""
    place = directory.resolve()  # it may be a link, which stays
    if not overwrite:
        refuse_links(directory, "run.directory")
    held = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    if held and DESCRIPTION not in held and not _holds_records(directory):
        raise InputError(f"{directory} is not empty and holds no ablation: choose another one")
    if held:
        held_by.enter_context(alone_in(place))
    if overwrite and held:
        if DESCRIPTION not in held:
            raise InputError(f"{directory} holds no {DESCRIPTION}: --overwrite will not delete it")
        put_aside(place, held_by)
        held = set()
    if held:
        check_continues(directory, config)
    else:
        refuse_brackets(directory, "run.directory")
        make_directory(place, "run.directory")
        held_by.enter_context(alone_in(place))
    document = {
        **_description(directory),
        "orbq_version": __version__,
        "fingerprint": fingerprint(config),
        "config": json.loads(config.model_dump_json()),
    }
    write_atomically(directory / DESCRIPTION, json.dumps(document, indent=1))


def check_continues(directory: Path, config: Config) -> None:
    """Refuse a directory with an ablation of another configuration, as ``run_ablation`` does;
    nothing is changed."""
    described = _description(directory)
    if described and described.get("fingerprint") != fingerprint(config):
        _check_grown(directory, config)


def _description(directory: Path) -> dict[str, Any]:
    """What an ablation wrote of itself; nothing where there is none."""
    try:
        return dict(json.loads((directory / DESCRIPTION).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{directory / DESCRIPTION} is damaged: {error}") from error


def _holds_records(directory: Path) -> bool:
    """Whether a directory without a description is that of an ablation that lost it."""
    try:
        return (directory / RESULTS).is_file() and all(map(spec_of, read_results(directory)))
    except (InputError, KeyError, TypeError):
        return False


def _check_grown(directory: Path, config: Config) -> None:
    """Refuse to go on with an ablation as another one, unless its table has only grown."""
    before, told = recorded_config(directory), ""
    if before is not None:
        if grown(before, config):
            return
        documents = (c.model_dump(mode="json", exclude={"run"}) for c in (before, config))
        told = f" ({'; '.join(differences(*documents))})"
    raise InputError(
        f"{directory} holds an ablation of another configuration{told}: choose another "
        "run.directory, or start anew with --overwrite (which deletes it). Seeds, weights, sizes "
        "and targets may be added to it, after those that are there"
    )


def _check_data(directory: Path, config: Config) -> None:
    """Refuse to go on with other structures or labels than the ablation was begun with."""
    datasets = [open_dataset(name) for name in (config.data.dataset, *config.data.unlabelled)]
    described = _description(directory)
    for dataset, before in zip(datasets, described.get("data", ()), strict=False):
        if name := changed_array(dataset, before):
            raise InputError(
                f"{dataset.path} has changed since {directory} was begun ({name} is another): "
                "bring the data set back, or start anew with --overwrite"
            )
    if "data" not in described:
        described["data"] = [dataset.manifest["arrays"] for dataset in datasets]
        write_atomically(directory / DESCRIPTION, json.dumps(described, indent=1))


def read_results(directory: Path) -> list[dict[str, Any]]:
    """The finished runs of an ablation; a last line cut off by a power failure is skipped."""
    try:
        lines = (directory / RESULTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(
                    f"{directory / RESULTS}, line {number} is damaged: delete it"
                ) from None
    return records


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add lines to ``path`` and put them on disk; what was cut off before is taken away."""
    lines = [json.dumps(r) for r in [*read_results(path.parent), *records]]
    write_atomically(path, "".join(line + "\n" for line in lines))


def spec_of(record: dict[str, Any]) -> RunSpec:
    """The run that a record is of."""
    fields = {name: record[name] for name in RunSpec._fields if name != "n_train"}
    return RunSpec(n_train=record["asked"], **fields)


def provenance() -> dict[str, Any]:
    """Versions, commit, machine and time of a result."""
    device = jax.local_devices()[0]
    return {
        "orbq": __version__,
        "commit": _commit(),
        **{name: version(name) for name in ("jax", "flax", "e3nn-jax", "optax", "numpy")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": f"{len(jax.local_devices())} x {device.device_kind}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    """Of the checkout that orbq is imported from, with a + if changed; None outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
