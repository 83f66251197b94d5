"""Acetylacetone where no training configuration is: hot, and with its proton under way. DFT labels.

    pip install 'orbq[make-data]'
    python benchmarks/make_acac_hot.py train_300K.xyz --out benchmarks/data/acac_hot.extxyz.gz

Three sets, told apart by ``info["set"]``: "600K" and "1000K", frames of GFN2-xTB dynamics (not
GFN1: nothing that teaches comes from there) every 30 fs after 150 fs; and "transfer", the images of
a nudged elastic band (GFN2-xTB) between the two places of the proton. A fourth, "check", repeats
training configurations, and says how far the labels are from theirs. Labels as the data set's:
PBE-D3(BJ)/def2-SVP with density fitting (PySCF, dftd3). About 15 CPU seconds a configuration; a
run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PySCF start their thread pools

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.mep import NEB
from ase.optimize import BFGS
from make_acac_xtb import trajectory
from tblite.ase import TBLite
from tqdm import tqdm

METHOD = "GFN2-xTB"
HOT = {"600K": (600.0, 3), "1000K": (1000.0, 2)}  # temperature in K, trajectories
FRAMES, EVERY = 15, 60  # of each trajectory; steps of 0.5 fs between them
IMAGES, CHECKS = 11, 5
GRID = {"H": (50, 194), "C": (60, 302), "O": (60, 302)}  # radial x angular points of PySCF


def main() -> None:
    """Make the geometries, label what is not labelled yet, write them together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="training configurations, to start from")
    parser.add_argument("--out", type=Path, required=True, help="extxyz or extxyz.gz to write")
    given = parser.parse_args()
    starts = ase.io.read(given.source, ":")
    assert isinstance(starts, list)
    part = given.out.with_name(given.out.name + ".part.extxyz")  # as they come, in their order
    known: list[Atoms] = ase.io.read(part, ":") if part.exists() else []  # type: ignore[assignment]
    frames = geometries(starts)
    for frame, old in zip(frames, known, strict=False):
        if not np.allclose(frame.positions, old.positions, atol=1e-4):
            raise SystemExit(f"{part} holds other configurations: choose another --out, or move it")
    for frame in tqdm(frames[len(known) :], unit="configuration"):
        known.append(labelled(frame))
        ase.io.write(part, known[-1], format="extxyz", append=True)
    ase.io.write(given.out, known, format="extxyz")
    part.unlink()


def geometries(starts: list[Atoms]) -> list[Atoms]:
    """All configurations, without labels; the same each time."""
    order = np.random.default_rng(7).permutation(len(starts))
    frames = [Atoms(starts[i].numbers, starts[i].positions) for i in order[:CHECKS]]
    for frame, row in zip(frames, order[:CHECKS].tolist(), strict=True):
        frame.info |= {"set": "check", "row": row}
    seed = 0
    for name, (temperature, trajectories) in HOT.items():
        for _ in range(trajectories):
            start = starts[order[CHECKS + seed]]
            for frame in trajectory(start, temperature, FRAMES, 1000 + seed, METHOD, EVERY):
                frame.info = {"set": name}
                frames.append(frame)
            seed += 1
    return frames + transfer(starts[order[0]])


def transfer(start: Atoms) -> list[Atoms]:
    """Images along the way of the proton from one oxygen to the other, ends included."""
    first = Atoms(start.numbers, start.positions)
    oxygens = np.flatnonzero(first.numbers == 8)
    hydrogens = np.flatnonzero(first.numbers == 1)
    away = first.get_all_distances()[np.ix_(oxygens, hydrogens)]
    proton = hydrogens[int(away.min(0).argmin())]
    near, far = oxygens[np.argsort(away[:, hydrogens == proton][:, 0])]
    relax(first)
    last = first.copy()
    along = first.positions[near] - first.positions[far]
    last.positions[proton] = first.positions[far] + along / np.linalg.norm(along)  # 1 Å from it
    relax(last)
    images = [first, *(first.copy() for _ in range(IMAGES - 2)), last]
    for image in images:
        image.calc = TBLite(method=METHOD, verbosity=0)
    band = NEB(images, climb=True, method="improvedtangent")
    band.interpolate(method="idpp")
    BFGS(band, logfile=None).run(fmax=0.05, steps=500)
    frames = [Atoms(image.numbers, image.positions) for image in images]
    for number, frame in enumerate(frames):
        frame.info |= {"set": "transfer", "image": number}
    return frames


def relax(atoms: Atoms) -> None:
    """To the nearest minimum of GFN2-xTB."""
    atoms.calc = TBLite(method=METHOD, verbosity=0)
    BFGS(atoms, logfile=None).run(fmax=0.01, steps=500)


def labelled(frame: Atoms) -> Atoms:
    """The frame with its energy (eV) and forces (eV/Å)."""
    from dftd3.interface import DispersionModel, RationalDampingParam
    from pyscf import dft, gto, lib

    lib.num_threads(1)
    symbols = frame.get_chemical_symbols()
    atoms = list(zip(symbols, frame.positions.tolist(), strict=True))
    mean_field: Any = dft.RKS(gto.M(atom=atoms, basis="def2-svp", verbose=0), xc="pbe")
    mean_field = mean_field.density_fit(auxbasis="def2-universal-jfit")
    mean_field.with_df.build()
    # a crude calculation starts the accurate one
    mean_field.grids.level, mean_field.conv_tol, mean_field.conv_check = 0, 1e-3, False
    mean_field.kernel()
    mean_field.grids.reset()
    mean_field.grids.atom_grid, mean_field.conv_tol = GRID, 1e-8
    energy = mean_field.kernel(dm0=mean_field.make_rdm1())
    if not mean_field.converged:
        raise SystemExit(f"the SCF of a configuration of {frame.info} does not converge")
    gradient = mean_field.nuc_grad_method().kernel()
    model = DispersionModel(frame.numbers, frame.positions / units.Bohr)
    dispersion = model.get_dispersion(RationalDampingParam(method="pbe"), grad=True)
    total = (energy + dispersion["energy"]) * units.Hartree
    forces = -(gradient + dispersion["gradient"]) * units.Hartree / units.Bohr
    result = frame.copy()
    result.calc = SinglePointCalculator(result, energy=total, forces=forces)
    return result


if __name__ == "__main__":
    main()
