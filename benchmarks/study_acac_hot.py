"""Models of acetylacetone where no training configuration is: hot, and with the proton under way.

    python benchmarks/study_acac_hot.py [RUN ...]

Errors on the sets of benchmarks/data/acac_hot.extxyz.gz (make_acac_hot.py) of runs that saw 300 K
alone; without RUN of those in benchmarks/models/acac. The labels lie a constant above those of the
training set, measured on the training configurations in "check" and taken off. Along the transfer
energies above the first image are compared, too. Writes results/acac_hot.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from study import record

import orbq

HERE = Path(__file__).parent
DATA = HERE / "data" / "acac_hot.extxyz.gz"
TRAINING = HERE.parent.parent / "shared" / "data" / "acac" / "train_300K.xyz"
RESULTS = HERE / "results" / "acac_hot.jsonl"


def rms(differences: np.ndarray) -> float:
    return float(1e3 * np.sqrt((differences**2).mean()))


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, nargs="*", help="run directories")
    given = parser.parse_args()
    if not TRAINING.exists():
        raise SystemExit(f"{TRAINING} is not there: nothing to compare the labels with")
    sets: dict[str, list[Atoms]] = {}
    for frame in ase.io.read(DATA, ":"):
        sets.setdefault(frame.info["set"], []).append(frame)
    above = checked(sets.pop("check"))
    for path in given.runs or sorted((HERE / "models" / "acac").iterdir()):
        run = orbq.load(path)
        for name, frames in sets.items():
            what = {"run": path.name, "set": name, "n": len(frames)}
            record(RESULTS, what, measured(run, frames, above, name == "transfer"))


def checked(frames: list[Atoms]) -> float:
    """How far these energies are above those of the same training configurations, eV."""
    training = ase.io.read(TRAINING, ":")
    before = [training[frame.info["row"]] for frame in frames]
    pairs = list(zip(frames, before, strict=True))
    energies = np.array([a.get_potential_energy() - b.get_potential_energy() for a, b in pairs])
    forces = np.array([a.get_forces() - b.get_forces() for a, b in pairs])
    print(
        f"check: energies {1e3 * energies.mean():.2f} ± {1e3 * energies.std():.2f} meV above those "
        f"of the training set, forces differ by {rms(forces):.1f} meV/Å (root mean square)",
        file=sys.stderr,
    )
    return float(energies.mean())


def measured(run: orbq.Run, frames: list[Atoms], above: float, path: bool) -> dict[str, Any]:
    """Root mean square errors, meV and meV/Å; on a path those of energies above its first, too."""
    found = list(run.predict(frames))
    energy = np.array([f["energy"] for f in found])
    truth = np.array([frame.get_potential_energy() for frame in frames]) - above
    forces = [f["forces"] - frame.get_forces() for f, frame in zip(found, frames, strict=True)]
    errors: dict[str, Any] = {
        "energy_rmse_meV": rms(energy - truth),
        "energy_offset_meV": float(1e3 * (energy - truth).mean()),
        "forces_rmse_meV_per_A": rms(np.array(forces)),
    }
    if path:
        errors["path_rmse_meV"] = rms(energy - energy[0] - truth + truth[0])
    return errors


if __name__ == "__main__":
    main()
