"""Data of the studies on QM7: labels of all molecules, two sets derived from them, and networks
taught by the labels alone.

QM7 is read from ../shared/data; without it there is nothing to study.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from study import make_delta

from orbq.config import load_config
from orbq.data import make_packer, prepare, to_batch
from orbq.fit import fit
from orbq.models.potential import make_potential
from orbq.orbitals import COLUMN_SHELL, GFN1
from orbq.preprocess.label import Recipe, preprocess
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.store import Dataset
from orbq.splits import split
from orbq.targets import TARGETS

HERE = Path(__file__).parent
CONFIG = HERE / "qm7.toml"
SOURCE = HERE.parent.parent / "shared" / "data" / "qm7.extxyz.gz"


def make_data(place: Path, split_seed: int) -> dict[str, str]:
    """Label QM7 (@data); its training molecules without energies, as charge-only data (@rest); and
    all of it with a target that says nothing (@random), or with what the reference energies add to
    those of GFN1 in their place (@delta)."""
    if not SOURCE.exists():
        raise SystemExit(f"{SOURCE} is not there: nothing to study")
    dataset = preprocess([str(SOURCE)], place / "qm7")
    rest = place / f"rest-{split_seed}"
    if not (rest / "manifest.json").exists():
        config = load_config(CONFIG)
        fractions = config.data.validation_fraction, config.data.test_fraction
        rows = split(
            dataset["group"], dataset["content_hash"], "within", fractions, seed=split_seed
        )["train"]
        preprocess([molecule(dataset, row) for row in rows], rest)
    if not (place / "random" / "manifest.json").exists():
        make_random(place / "qm7", place / "random")
    make_delta(place / "qm7", place / "delta")
    return {
        "@data": str(place / "qm7"),
        "@rest": str(rest),
        "@random": str(place / "random"),
        "@delta": str(place / "delta"),
    }


# of a network that learns GFN1 labels before any energy; three layers and 5 Å reward its size
PRETRAINING = (
    "data.test_fraction=0.0",
    "data.validation_fraction=0.03",
    "loss.weights.energy=0",
    "model.backbone=mace",
    "model.n_layers=3",
    "model.cutoff=5.0",
    "training.n_steps=40000",
    "training.validate_every=4000",
    "training.checkpoint_every=2000",
)
TAUGHT = {
    "both": ("loss.weights.onsite=20", "loss.weights.xtb_energy=1"),
    "forces": (
        "loss.weights.onsite=20",
        "loss.weights.xtb_energy=1",
        "loss.weights.xtb_forces=1",
    ),
    "longer": (
        "loss.weights.onsite=20",
        "loss.weights.xtb_energy=1",
        "training.n_steps=80000",
    ),
    "charges": ("loss.weights.onsite=20",),
    "energies": ("loss.weights.xtb_energy=1",),
}
TAUGHT["mean"] = TAUGHT["gfn2"] = TAUGHT["longer"]
WIDE = ("model.n_channels=64", "model.cutoff=4.0")  # what charges of the same molecules want
TAUGHT["wide"] = (*TAUGHT["mean"], *WIDE)

METHODS = {"mean": "GFN1-xTB+GFN2-xTB", "gfn2": "GFN2-xTB"}


def make_others(place: Path, split_seed: int, kind: str) -> dict[str, str]:
    """Labels of another method (that of METHODS) in place of GFN1's, of all molecules (@data) and
    of the training molecules without energies (@rest)."""
    method = Recipe(METHODS[kind])
    preprocess([str(SOURCE)], place / f"qm7-{kind}", method)
    dataset = Dataset.open(place / f"rest-{split_seed}")
    rest = [molecule(dataset, row) for row in range(len(dataset))]
    preprocess(rest, place / f"rest-{split_seed}-{kind}", method)
    return {
        "@data": str(place / f"qm7-{kind}"),
        "@rest": str(place / f"rest-{split_seed}-{kind}"),
    }


def pretrained(place: Path, rest: str, kind: str, seed: int) -> str:
    """Directory of a run on labels (a key of TAUGHT) of the charge-only molecules ``rest``, which
    is made if it is not there."""
    directory = place / f"pretrained-{kind}-{seed}"
    if not (directory / "summary.json").exists():
        own = (f"data.dataset='{rest}'", f"training.seed={seed}", f"run.directory='{directory}'")
        fit(load_config(CONFIG, [*PRETRAINING, *TAUGHT[kind], *own]))
    return str(directory)


def make_random(source: Path, place: Path) -> None:
    """A data set whose on-site blocks are those of an untrained network: equivariant, of the same
    means and spreads by element and shell, conserving charge, and without chemistry."""
    config = load_config(
        CONFIG,
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
