"""Data of the studies on metal complexes: the embedded sets grown by benchmarks/make_tmc.py, and
networks that have learnt GFN1-xTB labels of complexes without DFT.
"""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from orbq.config import load_config
from orbq.fit import fit
from orbq.preprocess.label import Recipe, preprocess
from orbq.preprocess.store import Dataset

HERE = Path(__file__).parent
METALS = (*range(21, 31), *range(39, 49), 57, *range(72, 81))  # Sc-Zn, Y-Cd, La, Hf-Hg
EMBEDDED = HERE.parent / "orbq" / "data"
CONFIG = HERE / "tmc.toml"
# make_tmc.py --seed 3000 with DFT, and --seed 4000 --per-metal 200 --structures-only
GROWN = (EMBEDDED / "tmc.extxyz.gz", HERE / "data" / "tmc_3000.extxyz.gz")
MORE = (*GROWN, HERE / "data" / "tmc_3000_more.extxyz.gz")  # and the seed's next ones
MOST = (*MORE, HERE / "data" / "tmc_3000_rest.extxyz.gz")  # and its last
UNLABELLED = (
    EMBEDDED / "tmc_unlabelled.extxyz.gz",
    HERE / "data" / "tmc_4000_unlabelled.extxyz.gz",
)

PRETRAINING = (
    "data.unlabelled=[]",
    "data.validation_fraction=0.03",
    "data.test_fraction=0.0",
    "loss.weights.energy=0",
    "loss.weights.forces=0",
    "training.pretrain_steps=0",
    "training.weight_decay=0.0",
    "training.n_steps=20000",
    "training.validate_every=2000",
)
TAUGHT = {
    "all": ("loss.weights.onsite=1", "loss.weights.xtb_energy=1", "loss.weights.xtb_forces=1"),
    "forces": ("loss.weights.onsite=0", "loss.weights.xtb_energy=1", "loss.weights.xtb_forces=1"),
}
TAUGHT["hot"] = TAUGHT["all"]
TAUGHT["longer"] = (*TAUGHT["hot"], "training.n_steps=60000", "training.validate_every=6000")
TAUGHT["anew"] = (*TAUGHT["longer"], "data.charge_reference=false")
MEAN = "GFN1-xTB+GFN2-xTB"
TAUGHT["mean"] = TAUGHT["anew"]
TAUGHT["further"] = (
    *TAUGHT["hot"],
    "training.initial=gfn1-metals",
    "training.n_steps=120000",
    "training.validate_every=12000",
)
# begin with the embedded network and keep labels of distorted complexes (@hot) in each batch
FROM_METALS = (
    "training.initial=gfn1-metals",
    "data.references=taught",
    "data.charge_reference=false",
    "data.unlabelled=['@hot']",
    "training.unlabelled_share=0.5",
    "training.batch_size=16",
)


def make_grown(place: Path, files: tuple[Path, ...] = GROWN) -> dict[str, str]:
    """Label all complexes with DFT (@data), and those without (@rest), less the complexes with."""
    known = [frame for path in files for frame in _frames(path)]
    preprocess(known, place / "grown")
    preprocess(_rest(known), place / "grown-rest")
    return {"@data": str(place / "grown"), "@rest": str(place / "grown-rest")}


def make_hot(place: Path, files: tuple[Path, ...] = GROWN) -> str:
    """Label the complexes without DFT as they are, rattled, and with one ligand drawn away or
    pushed in: what dynamics meet and relaxed structures do not tell."""
    preprocess(_hot(files), place / "grown-hot")
    return str(place / "grown-hot")


def _hot(files: tuple[Path, ...]) -> list[Atoms]:
    rest = _rest([frame for path in files for frame in _frames(path)])
    rng = np.random.default_rng(0)
    return rest + [distorted(f, rng, d) for f in rest for d in (0.0, 1.0)]


def make_means(place: Path) -> dict[str, str]:
    """The mean energies and forces of two methods in place of GFN1's, of the complexes with DFT
    (@data) and of those that make_hot labels (@hot)."""
    known = [frame for path in GROWN for frame in _frames(path)]
    words = {"@data": ("grown", known), "@hot": ("grown-hot", _hot(GROWN))}
    for name, frames in words.values():
        preprocess(frames, place / f"{name}-mean", Recipe(MEAN))
    return {word: str(place / f"{name}-mean") for word, (name, _) in words.items()}


def distorted(frame: Atoms, rng: np.random.Generator, reach: float) -> Atoms:
    """Every atom moved by 0.05 Å (normal, each component), and one ligand along its bond to the
    metal by up to ``reach`` Å, or inwards by up to a fifth of it."""
    frame = frame.copy()
    frame.calc = None
    distances = frame.get_all_distances()
    radii = covalent_radii[frame.numbers]
    bonded = distances < 1.25 * (radii[:, None] + radii)
    metal = int(np.argmax(np.where(np.isin(frame.numbers, METALS), frame.numbers, 0)))
    if reach and frame.numbers[metal] in METALS and len(frame) > 1:
        bonded[metal] = bonded[:, metal] = False
        ligands = connected_components(bonded)[1]
        others = np.delete(np.arange(len(frame)), metal)
        ligand = np.flatnonzero(ligands == ligands[rng.choice(others)])
        nearest = ligand[np.argmin(distances[metal, ligand])]
        along = frame.positions[nearest] - frame.positions[metal]
        step = rng.uniform(-reach / 5, reach)
        frame.positions[ligand] += step * along / np.linalg.norm(along)
    frame.positions += rng.normal(0.0, 0.05, frame.positions.shape)
    return frame


def make_stand_in(place: Path) -> str:
    """The complexes without DFT with GFN2-xTB energies in its place: a reference method so cheap
    that thousands of structures have it."""
    rest = _rest([frame for path in GROWN for frame in _frames(path)])
    preprocess(rest, place / "grown-gfn2", Recipe("GFN2-xTB"))
    labelled = Dataset.open(place / "grown-gfn2")
    assert len(labelled) == len(rest)
    for frame, energy, has in zip(
        rest, labelled["xtb_energy"], labelled["xtb_energy_mask"], strict=True
    ):
        frame.calc = SinglePointCalculator(frame, energy=float(energy)) if has else None
    preprocess(rest, place / "grown-stand-in")
    return str(place / "grown-stand-in")


def make_turned(place: Path) -> str:
    """Label the complexes without DFT, each in a random frame of its own: make_tmc.py builds all of
    them along the same axes, where even an invariant head can tell one orbital from another."""
    rest = _rest([frame for path in GROWN for frame in _frames(path)])
    turns = Rotation.random(len(rest), random_state=0).as_matrix()
    for frame, turn in zip(rest, turns, strict=True):
        frame.positions = frame.positions @ turn.T
    preprocess(rest, place / "grown-turned")
    return str(place / "grown-turned")


def taught(place: Path, rest: str, kind: str, seed: int) -> str:
    """Directory of a run on labels (a key of TAUGHT) of the complexes without DFT; made once."""
    directory = place / f"taught-{kind}-{seed}"
    if not (directory / "summary.json").exists():
        own = (f"data.dataset='{rest}'", f"training.seed={seed}", f"run.directory='{directory}'")
        fit(load_config(CONFIG, [*PRETRAINING, *TAUGHT[kind], *own]))
    return str(directory)


def _rest(known: list[Atoms]) -> list[Atoms]:
    groups = {frame.info["group"] for frame in known}
    others = [frame for path in UNLABELLED for frame in _frames(path)]
    return [frame for frame in others if frame.info["group"] not in groups]


def _frames(path: Path) -> list[Atoms]:
    frames = ase.io.read(path, ":")
    assert isinstance(frames, list)
    return frames
