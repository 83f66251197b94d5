"""Sample efficiency on QM7: what each auxiliary target does to the energy error.

    python benchmarks/study_qm7.py STUDY --work DIRECTORY [--only NAME ...] [--part 0/2]

STUDY is a key of ``STUDIES``: a set of named ablations (``orbq ablate``) over benchmarks/qm7.toml.
Each goes on where it was stopped; two processes may share a study by ``--part``. ``report`` as the
last argument prints the tables and writes benchmarks/results/qm7_<STUDY>.jsonl. QM7 is read from
../shared/data; without it there is nothing to do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from study import main

from orbq.config import load_config
from orbq.preprocess.label import preprocess
from orbq.preprocess.store import Dataset
from orbq.splits import split

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "shared" / "data" / "qm7.extxyz.gz"

# Baseline search: two subsets of 200 molecules, each with both learning rates. `onsite` goes along
# so that the arms may differ in what is best for them.
_SEARCH = (
    "ablation.targets=['onsite']",
    "ablation.weights=[0.0, 20.0]",
    "ablation.seeds=[0, 1]",
    "ablation.subset_seeds=[0, 1]",
    "ablation.n_train=[200]",
    "ablation.learning_rates=[2e-3, 5e-3]",
)

_CLOSE = (*_SEARCH, "model.cutoff=4.0")
_CLOSER = (*_SEARCH, "model.cutoff=3.0")

_STEPS = {100: 3000, 200: 3000, 400: 4000, 800: 6000, 1600: 8000, 4000: 12000}
_FIRST = (
    "data.unlabelled=['@rest']",
    "training.pretrain_steps=6000",
    "training.pretrain_learning_rate=5e-3",
    "ablation.baseline=false",
)


def _curve(n: int) -> tuple[str, ...]:
    """One point of a learning curve: two seeds on each of three subsets."""
    return (
        "model.backbone=mace",
        "model.cutoff=3.0",
        "ablation.weights=[0.0, 20.0]",
        "ablation.seeds=[0, 1, 2, 3, 4, 5]",
        "ablation.subset_seeds=[0, 0, 1, 1, 2, 2]",
        f"ablation.n_train=[{n}]",
        f"training.n_steps={_STEPS[n]}",
    )


STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    "search": {
        "base": _SEARCH,
        "mace": (*_SEARCH, "model.backbone=mace"),
        "free": (*_SEARCH, "model.species=free"),
        "channels64": (*_SEARCH, "model.n_channels=64"),
        "layers3": (*_SEARCH, "model.n_layers=3"),
        "lmax1": (
            *_SEARCH[:1],
            "ablation.weights=[0.0]",
            *_SEARCH[2:],
            "model.lmax=1",
            "model.head=invariant",
            "ablation.targets=['atomic']",
        ),
        "decay": (*_SEARCH, "training.weight_decay=0.1"),
        "batch10": (*_SEARCH, "training.batch_size=10"),
        "cutoff4": (*_SEARCH, "model.cutoff=4.0"),
        "peratom": (*_SEARCH, "loss.energy_per=atom"),
        "mae": (*_SEARCH, "loss.kind=mae"),
        "long": (*_SEARCH, "training.n_steps=9000", "training.validate_every=750"),
        "ema999": (*_SEARCH, "training.ema_decay=0.999"),
    },
    # what helped, together, from the cutoff that helped most
    "search2": {
        "mae": (*_CLOSE, "loss.kind=mae"),
        "mace": (*_CLOSE, "model.backbone=mace"),
        "layers3": (*_CLOSE, "model.n_layers=3"),
        "mace_mae": (*_CLOSE, "model.backbone=mace", "loss.kind=mae"),
        "cutoff3": (*_CLOSE, "model.cutoff=3.0"),
        "cutoff3.5": (*_CLOSE, "model.cutoff=3.5"),
        "free": (*_CLOSE, "model.species=free"),
        "readout64": (*_CLOSE, "model.readout_hidden=64"),
        "radial4": (*_CLOSE, "model.n_radial=4"),
        "channels16": (*_CLOSE, "model.n_channels=16"),
        "layers4": (*_CLOSE, "model.cutoff=3.0", "model.n_layers=4"),
        "mace64": (*_CLOSE, "model.backbone=mace", "model.n_channels=64"),
    },
    # closer still
    "search3": {
        "mae": (*_CLOSER, "loss.kind=mae"),
        "mace": (*_CLOSER, "model.backbone=mace"),
        "layers3": (*_CLOSER, "model.n_layers=3"),
        "cutoff2.5": (*_CLOSER, "model.cutoff=2.5"),
    },
    # learning curves of the baseline that was found. own: labels of the same molecules;
    # xtb, all: GFN1 labels of all training molecules first, their energies alone or with the blocks
    "curves": {
        **{
            f"own-{n}": (*_curve(n), "ablation.targets=['onsite','orbital','shell','atomic']")
            for n in (200, 800, 400, 100)
        },
        **{
            f"all-{n}": (
                *_curve(n),
                *_FIRST,
                "ablation.targets=['onsite+xtb_energy']",
                "loss.weights.xtb_energy=1.0",
            )
            for n in (100, 200, 400, 800)
        },
        **{
            f"xtb-{n}": (
                *_curve(n),
                *_FIRST,
                "ablation.targets=['xtb_energy']",
                "ablation.weights=[1.0]",
            )
            for n in (100, 200, 400, 800)
        },
        "own-1600": (*_curve(1600), "ablation.targets=['onsite']"),
        **{
            f"first-{n}": (*_curve(n), *_FIRST, "ablation.targets=['onsite']")
            for n in (100, 200, 400, 800)
        },
    },
}


def make_data(place: Path) -> dict[str, str]:
    """Label QM7; and its training molecules without energies, as charge-only data (@rest)."""
    if not SOURCE.exists():
        raise SystemExit(f"{SOURCE} is not there: nothing to study")
    dataset = preprocess([str(SOURCE)], place / "qm7")
    if not (place / "rest" / "manifest.json").exists():
        config = load_config(HERE / "qm7.toml")
        fractions = config.data.validation_fraction, config.data.test_fraction
        rows = split(dataset["group"], dataset["content_hash"], "within", fractions)["train"]
        preprocess([molecule(dataset, row) for row in rows], place / "rest")
    return {"@data": str(place / "qm7"), "@rest": str(place / "rest")}


def molecule(dataset: Dataset, row: int) -> Atoms:
    """One structure without its energy."""
    atoms = slice(*dataset["offsets"][row : row + 2])
    return Atoms(np.array(dataset["numbers"][atoms]), np.array(dataset["positions"][atoms]))


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        STUDIES,
        HERE / "qm7.toml",
        "qm7",
        ("kcal/mol", 43.364),
        make_data,
    )
