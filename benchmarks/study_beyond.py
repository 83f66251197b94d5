"""Beyond the training structures: larger molecules, and ligands and metals held out whole.

    python benchmarks/study_beyond.py --work DIRECTORY [--tasks NAME ...] [--replicates 0 1]

``larger-molecules``: 400 QM7 molecules of up to six heavy atoms teach, those of seven in the test
split of study_qm7.py (split 1) are the test; labels are of those of seven in its training split. On
the complexes of tmc_data.py: ``larger-complexes``, up to nine atoms teach, twelve and more are the
test; ``ligands`` and ``metals``, no complex with one of LIGANDS, or of UNSEEN_METALS, teaches.
Arms: energies (and forces) alone, complexes for three times the steps; with molecules, charges of
the same; and GFN1-xTB labels of structures without DFT first, among which are the larger ones, and
the ligands and metals held out (complexes: the embedded network, and such labels in each batch).
A network that has no energy of a metal cannot know it up to a constant: there the error is told
after each metal's median error is taken off, too. Changes against the first arm have a 95 %
interval over the structures held out (bootstrap of whole groups, the replicates' errors together).
Writes results/beyond.jsonl; training goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
import qm7_data
import tmc_data
from ase import Atoms
from ase.data import atomic_numbers
from study import record, trained

import orbq
from orbq.preprocess.label import preprocess
from orbq.preprocess.references import fit_references
from orbq.preprocess.store import Dataset
from orbq.splits import split

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "beyond.jsonl"
DFT = ("energy_mae", "forces_mae")
LIGANDS = ("NCS", "OMe", "CNH")
UNSEEN_METALS = ("Fe", "Pd", "Re")

_QM7 = (
    "data.test_fraction=0.0",
    "data.validation_fraction=0.15",
    "data.n_train=400",
    "model.product_init=1.0",
)
_DEEP = ("model.backbone=mace", "model.n_layers=3", "training.n_steps=4000")
_TMC = ("data.test_fraction=0.0", "data.charge_reference=false", "training.pretrain_steps=0")
QM7_ARMS = {  # as study_qm7.py chose them at N = 400
    "energy-only": ("model.backbone=mace", "model.cutoff=3.0", "training.n_steps=4000"),
    "onsite": (*_DEEP, "model.cutoff=4.0", "loss.weights.onsite=8"),
    "gfn1-first": (
        *_DEEP,
        "model.cutoff=5.0",
        "loss.weights.onsite=20",
        "loss.weights.xtb_energy=1",
        "training.learning_rate=1e-3",
        "training.initial='@taught'",
    ),
}
TMC_ARMS = {
    "energy-only": (
        "data.unlabelled=[]",
        "loss.weights.onsite=0",
        "loss.weights.xtb_energy=0",
        "training.n_steps=12000",
    ),
    "gfn1-metals": (*tmc_data.FROM_METALS, "loss.weights.xtb_forces=1"),
}


class Task(NamedTuple):
    """What teaches and what is the test, as data sets; arms; network and further settings."""

    seen: str
    held_out: str
    arms: dict[str, tuple[str, ...]]
    config: Path
    common: tuple[str, ...]
    words: dict[str, str]
    taught: Callable[[int], str] | None = None  # directory of the network that an arm begins with
    unseen_metals: bool = False


def molecules(place: Path) -> Task:
    """QM7 by size."""
    words = qm7_data.make_data(place, 1)
    dataset = Dataset.open(words["@data"])
    config = orbq.load_config(qm7_data.CONFIG)
    fractions = config.data.validation_fraction, config.data.test_fraction
    hashes = dataset["content_hash"]
    parts = split(dataset["group"], hashes, "within", fractions, seed=1)
    heavy = np.add.reduceat(np.asarray(dataset["numbers"]) > 1, np.asarray(dataset["offsets"][:-1]))
    frames = ase.io.read(qm7_data.SOURCE, ":")
    assert len(frames) == len(dataset), "QM7 has rows that were not labelled"
    small = [frame for frame, size in zip(frames, heavy, strict=True) if size <= 6]
    large = [frames[row] for row in parts["test"] if heavy[row] == 7]
    others = [qm7_data.molecule(dataset, row) for row in parts["train"] if heavy[row] == 7]
    rest = _made(others, place / "seven" / "rest")
    return Task(
        _made(small, place / "small"),
        _made(large, place / "large"),
        QM7_ARMS,
        qm7_data.CONFIG,
        _QM7,
        words,
        lambda seed: qm7_data.pretrained(place / "seven", rest, "both", seed),
    )


def complexes(place: Path, task: str) -> Task:
    """Metal complexes by size, by ligand or by metal."""
    words = tmc_data.make_grown(place)
    words["@hot"] = tmc_data.make_hot(place)
    frames = [frame for path in tmc_data.GROWN for frame in ase.io.read(path, ":")]
    teaches, tests = {
        "larger-complexes": (lambda f: len(f) <= 9, lambda f: len(f) >= 12),
        "ligands": (lambda f: not _ligands(f) & {*LIGANDS}, lambda f: _ligands(f) & {*LIGANDS}),
        "metals": (lambda f: not _unseen(f), _unseen),
    }[task]
    common: tuple[str, ...] = _TMC
    if task == "metals":
        fitted = fit_references(
            [f.numbers for f in frames],
            np.array([f.get_potential_energy() for f in frames]),
            fit_charge=False,
        )
        energies = fitted.references.element[[atomic_numbers[m] for m in UNSEEN_METALS]]
        table = ", ".join(f"{m} = {e}" for m, e in zip(UNSEEN_METALS, energies, strict=True))
        common = (*_TMC, f"data.references={{{table}}}")
    return Task(
        _made([f for f in frames if teaches(f)], place / f"{task}-seen"),
        _made([f for f in frames if tests(f)], place / f"{task}-held-out"),
        TMC_ARMS,
        tmc_data.CONFIG,
        common,
        words,
        unseen_metals=task == "metals",
    )


def _ligands(frame: Atoms) -> set[str]:
    """Names of the ligands of a complex, from its group: Ti_tbp_NH2x4_NH3x1_q+0."""
    parts = frame.info["group"].split("_")
    return {part.rpartition("x")[0] for part in parts[2:-1]}


def _unseen(frame: Atoms) -> bool:
    return bool({*frame.get_chemical_symbols()} & {*UNSEEN_METALS})


def _made(frames: list[Atoms], place: Path) -> str:
    preprocess(frames, place)
    return str(place)


def run_of(task: Task, arm: str, replicate: int, directory: Path) -> orbq.Run:
    """The run of an arm; goes on where it was stopped."""
    words = dict(task.words)
    if task.taught and arm.startswith("gfn1"):
        words["@taught"] = task.taught(replicate)
    own = (
        f"data.dataset='{task.seen}'",
        f"data.split_seed={replicate}",
        f"training.seed={replicate}",
    )
    return trained(task.config, [*task.arms[arm], *task.common, *own], words, directory)


def measured(run: orbq.Run, task: Task) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Errors on what was held out; and, by label, the sum of absolute errors of each structure."""
    evaluation = run.evaluate(task.held_out, "all")
    errors = {name: e for name, e in evaluation.errors().items() if name.startswith(DFT)}
    energy = evaluation.values["energy"]
    difference = 1e3 * (energy.predicted - energy.label)
    structure = np.repeat(np.arange(len(evaluation.n_node)), evaluation.n_node)
    sums = {"energy": np.abs(difference)}
    if forces := evaluation.values.get("forces"):
        sums["forces"] = np.bincount(structure, np.abs(forces.predicted - forces.label).sum(-1))
    if task.unseen_metals:
        centred = []
        for symbol in UNSEEN_METALS:
            holds = structure[evaluation.numbers == atomic_numbers[symbol]]
            centred.append(difference[holds] - np.median(difference[holds]))
        errors["energy_mae_meV_centred"] = float(np.abs(np.concatenate(centred)).mean())
    return {"n_test": len(difference), "errors": errors}, sums


def change(arm: list[np.ndarray], base: list[np.ndarray], groups: np.ndarray) -> list[float]:
    """Relative change of a mean absolute error, with the bounds of its interval.

    arm, base: absolute errors of every structure, [n] of each replicate. groups: [n], from 0.
    """
    n = groups.max() + 1
    after, before = (np.bincount(groups, np.sum(errors, axis=0)) for errors in (arm, base))
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=4000)
    bounds = np.quantile((draws @ after) / (draws @ before), [0.025, 0.975])
    return [float(x) - 1 for x in (after.sum() / before.sum(), *bounds)]


TASKS = ("larger-molecules", "larger-complexes", "ligands", "metals")


def main() -> None:
    """Train, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="directory of data and runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--replicates", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    given = parser.parse_args()
    place = given.work / "data"
    for name in given.tasks:
        task = molecules(place) if name == "larger-molecules" else complexes(place, name)
        # a network knows no element that it has no structure of
        arms = ["gfn1-metals"] if task.unseen_metals else list(task.arms)
        sums: dict[str, dict[str, list[np.ndarray]]] = {arm: defaultdict(list) for arm in arms}
        for replicate, arm in ((r, a) for r in given.replicates for a in arms):
            directory = given.work / "beyond" / name / f"{arm}-{replicate}"
            found, of_structures = measured(run_of(task, arm, replicate, directory), task)
            record(RESULTS, {"task": name, "arm": arm, "replicate": replicate}, found)
            for label, values in of_structures.items():
                sums[arm][label].append(values)
        groups = np.unique(Dataset.open(task.held_out)["group"], return_inverse=True)[1]
        if not groups.any():  # molecules, each a group of its own
            groups = np.arange(len(groups))
        for arm in arms[1:]:
            changes = {x: change(sums[arm][x], base, groups) for x, base in sums[arms[0]].items()}
            record(RESULTS, {"task": name, "change": arm, "replicates": given.replicates}, changes)


if __name__ == "__main__":
    main()
