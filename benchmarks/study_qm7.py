"""Sample efficiency on QM7: what each auxiliary target does to the energy error.

    python benchmarks/study_qm7.py STUDY --work DIRECTORY [--only NAME ...] [--part 0/2]

STUDY is a key of ``STUDIES``: a set of named ablations (``orbq ablate``) over benchmarks/qm7.toml.
Each goes on where it was stopped; two processes may share a study by ``--part``. ``report`` as the
last argument prints the tables and writes benchmarks/results/qm7_<STUDY>.jsonl. QM7 is read from
../shared/data; without it there is nothing to do.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from study import main

from orbq.config import load_config
from orbq.data import make_packer, prepare, to_batch
from orbq.models.potential import make_potential
from orbq.orbitals import COLUMN_SHELL, GFN1
from orbq.preprocess.label import preprocess
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.store import Dataset
from orbq.splits import split
from orbq.targets import TARGETS

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

_STEPS = {100: 3000, 200: 3000, 400: 4000, 800: 6000, 1600: 8000}


def _curve(n: int, cutoff: float = 5.0) -> tuple[str, ...]:
    """One point of a learning curve: two seeds on each of three subsets."""
    return (
        "model.backbone=mace",
        f"model.cutoff={cutoff}",
        "ablation.weights=[0.0, 8.0]",
        "ablation.seeds=[0, 1, 2, 3, 4, 5]",
        "ablation.subset_seeds=[0, 0, 1, 1, 2, 2]",
        f"ablation.n_train=[{n}]",
        f"training.n_steps={_STEPS[n]}",
    )


_TWO = ("ablation.seeds=[0, 1]", "ablation.subset_seeds=[0, 0]")
_LARGE = (*_curve(800, 3.0), *_TWO, "ablation.weights=[0.0, 20.0]", "ablation.targets=['onsite']")
_FIRST = (
    "data.unlabelled=['@rest']",
    "training.pretrain_steps=20000",
    "training.pretrain_learning_rate=5e-3",
    "training.learning_rate=1e-3",
    "ablation.baseline=false",
    "ablation.targets=['onsite+xtb_energy']",
    "ablation.weights=[20.0]",
    "loss.weights.xtb_energy=1.0",
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
    # what the targets need: they reward reach and depth, which energies alone do not
    "search800": {
        name: (*_LARGE, *changes)
        for name, changes in {
            "base": (),
            "rate2e-3": ("training.learning_rate=2e-3",),
            "cutoff5": ("model.cutoff=5.0",),
            "cutoff5_weights": (
                "model.cutoff=5.0",
                "ablation.weights=[4.0, 80.0]",
                "ablation.baseline=false",
            ),
            "cutoff5_fade": (
                "model.cutoff=5.0",
                "ablation.weights=[20.0, 80.0]",
                "ablation.baseline=false",
                "loss.auxiliary_final_fraction=0.0",
            ),
            "layers3": ("model.n_layers=3",),
            "layers3_cutoff4": ("model.n_layers=3", "model.cutoff=4.0"),
        }.items()
    },
    # pre-training on the GFN1 labels of all training molecules, energies of 100
    "search_first": {
        name: (*_curve(100, cutoff), *_FIRST, *_TWO, *changes)
        for name, (cutoff, changes) in {
            "rate5e-3": (3.0, ("training.pretrain_steps=6000", "training.learning_rate=5e-3")),
            "rate1e-3": (3.0, ("training.pretrain_steps=6000",)),
            "rate5e-4": (3.0, ("training.pretrain_steps=6000", "training.learning_rate=5e-4")),
            "share": (3.0, ("training.pretrain_steps=6000", "training.unlabelled_share=0.5")),
            "cutoff5": (5.0, ("training.pretrain_steps=6000",)),
            "cutoff5_long": (5.0, ()),
        }.items()
    },
    # learning curves. base: energy-only at its own best cutoff; own: labels of the same molecules;
    # first: GFN1 labels of all training molecules before; arms: the other targets, and controls
    "curves": {
        **{
            f"base-{n}": (
                *_curve(n, 3.0),
                "ablation.targets=['onsite']",
                "ablation.weights=[0.0]",
            )
            for n in _STEPS
        },
        **{f"own-{n}": (*_curve(n), "ablation.targets=['onsite']") for n in _STEPS},
        **{f"first-{n}": (*_curve(n), *_FIRST) for n in _STEPS},
        **{
            f"arms-{n}": (
                *_curve(n),
                "ablation.baseline=false",
                "ablation.targets=['density', 'orbital', 'shell', 'atomic', 'xtb_energy']",
            )
            for n in (400,)
        },
        **{
            f"invariant-{n}": (
                *_curve(n),
                "ablation.baseline=false",
                "ablation.targets=['orbital']",
                "model.head=invariant",
            )
            for n in (400,)
        },
        **{
            f"random-{n}": (
                *_curve(n),
                "data.dataset='@random'",
                "ablation.baseline=false",
                "ablation.targets=['onsite']",
            )
            for n in (400,)
        },
    },
}


def make_data(place: Path) -> dict[str, str]:
    """Label QM7; its training molecules without energies, as charge-only data (@rest); and all of
    it with a target that says nothing (@random)."""
    if not SOURCE.exists():
        raise SystemExit(f"{SOURCE} is not there: nothing to study")
    dataset = preprocess([str(SOURCE)], place / "qm7")
    if not (place / "rest" / "manifest.json").exists():
        config = load_config(HERE / "qm7.toml")
        fractions = config.data.validation_fraction, config.data.test_fraction
        rows = split(dataset["group"], dataset["content_hash"], "within", fractions)["train"]
        preprocess([molecule(dataset, row) for row in rows], place / "rest")
    if not (place / "random" / "manifest.json").exists():
        make_random(place / "qm7", place / "random")
    return {
        "@data": str(place / "qm7"),
        "@rest": str(place / "rest"),
        "@random": str(place / "random"),
    }


def make_random(source: Path, place: Path) -> None:
    """A data set whose on-site blocks are those of an untrained network: equivariant, of the same
    means and spreads by element and shell, conserving charge, and without chemistry."""
    config = load_config(
        HERE / "qm7.toml",
        [f"data.dataset='{source}'", "loss.weights.onsite=1.0", "model.backbone=mace"],
    )
    data = prepare(config)
    potential = make_potential(data.architecture, data.constants)
    dataset = data.datasets[0]
    pool = Pool([Part(dataset, np.arange(len(dataset)))], config.model.cutoff)
    packer = make_packer(data, pool, config)
    predict = jax.jit(lambda p, b: potential.apply(p, b.positions, b.graph, ("onsite",))[1])
    first = to_batch(packer.batch(np.arange(1)))
    params = jax.jit(potential.init)(jax.random.key(2026), *first[:2])
    mean, scale = data.constants.statistics["onsite"]
    numbers, offsets = np.asarray(dataset["numbers"]), dataset["offsets"]
    made = np.array(dataset["onsite"], float)
    for rows in packer.plan(0):
        packed = packer.batch(rows)
        found = np.asarray(predict(params, to_batch(packed))["onsite"])
        rows = packed.index[packed.mask]
        atoms = np.concatenate([np.arange(*offsets[row : row + 2]) for row in rows])
        made[atoms] = found[: len(atoms)]
    spread = made - mean[numbers]  # far smaller than the real one: the head starts near the mean
    for z in np.unique(numbers):
        for shell in np.unique(COLUMN_SHELL):
            place_of = np.ix_(numbers == z, shell == COLUMN_SHELL)
            rms = np.sqrt((spread[place_of] ** 2).mean())
            real = np.asarray(dataset["onsite"])[place_of] - mean[z, shell == COLUMN_SHELL]
            spread[place_of] *= np.sqrt((real**2).mean()) / max(rms, 1e-12)
    made = mean[numbers] + spread
    weight = np.where(TARGETS["onsite"].elements(GFN1)[numbers], TARGETS["onsite"].charge, 0.0)
    step = weight * scale[numbers] ** 2
    excess, size = (np.add.reduceat((weight * x).sum(1), offsets[:-1]) for x in (made, step))
    made -= step * np.repeat(excess / size, np.diff(offsets))[:, None]  # neutral molecules
    shutil.copytree(source, place)
    np.save(place / "onsite.npy", made.astype(dataset["onsite"].dtype))


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
