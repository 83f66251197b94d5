"""From runs to a data set: consistent, distinct structures, rounded and compressed.

A labelled structure is dropped when its (group, geometry) occurred before; its Mulliken charges do
not sum to the total charge; its gap is below 0.5 eV; its energy contradicts the forces (the SCF
found another electronic state); or it repeats another structure of the same composition. Every
check uses DFT alone: one on agreement with xTB would favour models that are taught xTB labels.
The output is a function of the input frames: the same frames give the same bytes.
Units: eV, Å, e.
"""

from __future__ import annotations

import gzip
import io
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.io import read, write

from orbq.errors import InputError

from .dft import MIN_GAP

CHARGE_SUM = 1e-3  # e; the SCF conserves it to 1e-8, the rounding of a data set to 1e-4
STATE_JUMP = 0.5  # eV between energy difference and trapezoid rule of the forces
NEAR = 0.15  # Å, displacement up to which the trapezoid rule means something
SAME = 0.02  # Å, largest difference of sorted distances between duplicates
DECIMALS = {"positions": 6, "forces": 5, "charges": 5, "energy": 6, "gap": 4, "dipole": 5}
UNLABELLED_DECIMALS = 4  # Å; the rattle is 0.05 Å
CHARGES = ("dft_mulliken", "dft_lowdin")


class Filtered(NamedTuple):
    """What is left of the frames, and what was dropped.

    frames: in the order read, rounded. dropped: count by reason. mismatch: eV, energy difference
    minus trapezoid rule, for every pair of a group's ``relaxed`` and a nearby structure.
    """

    frames: list[Atoms]
    dropped: Counter[str]
    mismatch: np.ndarray


def read_frames(sources: list[Path], labelled: bool = True) -> list[Atoms]:
    """The frames of run directories and extxyz files (.gz too), with labels as plain fields.

    Raises InputError naming the file, and the frame where a field is missing.
    """
    name = "raw.extxyz" if labelled else "unlabelled.extxyz"
    frames: list[Atoms] = []
    for source in sources:
        path = source / name if source.is_dir() else source
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a run's directory or an extxyz file")
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
            found = list(read(io.StringIO(text), ":", format="extxyz"))
        except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
            raise InputError(f"{path}: cannot be read as extxyz ({error})") from error
        for index, frame in enumerate(found):
            _restore(frame, labelled, f"{path}, frame {index}")
        frames += found
    if not frames:
        raise InputError(f"no structures in {', '.join(map(str, sources))}")
    return frames


def filter_labelled(frames: list[Atoms]) -> Filtered:
    """The consistent, distinct structures among labelled ones, rounded in place."""
    dropped: Counter[str] = Counter()
    keep = _first_of_key(frames, dropped)
    for reason, bad in (("charge sum", _bad_charges), ("gap", _small_gap)):
        dropped[reason] += sum(map(bad, keep))
        keep = [f for f in keep if not bad(f)]
    mismatch = state_mismatch(keep)
    jumped = np.abs(np.nan_to_num(mismatch)) > STATE_JUMP
    dropped["state jump"] += int(jumped.sum())
    keep = [f for f, jump in zip(keep, jumped, strict=True) if not jump]
    keep = _distinct(keep, dropped)
    for frame in keep:
        _round(frame)
    return Filtered(keep, +dropped, mismatch[np.isfinite(mismatch)])


def filter_unlabelled(frames: list[Atoms]) -> Filtered:
    """The structures without DFT of distinct complexes, rounded in place.

    A complex is dropped when its minimum repeats that of another one.
    """
    dropped: Counter[str] = Counter()
    keep = _first_of_key(frames, dropped)
    minima = [f for f in keep if f.info["geometry"] == "relaxed"]
    repeated = {minima[i].info["group"] for i in duplicates(minima)}
    distinct = [f for f in keep if f.info["group"] not in repeated]
    dropped["duplicate"] += len(keep) - len(distinct)
    for frame in distinct:
        frame.positions = frame.positions.round(UNLABELLED_DECIMALS)
    return Filtered(distinct, +dropped, np.zeros(0))


def state_mismatch(frames: list[Atoms]) -> np.ndarray:
    """Energy difference to the group's ``relaxed`` minus the trapezoid rule of the forces, eV.

    ``E(x) - E(x0) + (F(x) + F(x0)).(x - x0)/2``, third order in the displacement; NaN for
    ``relaxed`` itself, without one, and for displacements above NEAR.
    """
    minima = {f.info["group"]: f for f in frames if f.info["geometry"] == "relaxed"}
    out = np.full(len(frames), np.nan)
    for i, frame in enumerate(frames):
        minimum = minima.get(frame.info["group"])
        if minimum is None or minimum is frame:
            continue
        step = frame.positions - minimum.positions
        if np.abs(step).max() <= NEAR:
            work = 0.5 * ((frame.arrays["forces"] + minimum.arrays["forces"]) * step).sum()
            out[i] = frame.info["energy"] - minimum.info["energy"] + work
    return out


def duplicates(frames: list[Atoms]) -> set[int]:
    """Indices of frames that repeat an earlier one of the same formula and charge.

    Two frames are the same when their distances, sorted within each pair of elements, differ by
    less than SAME everywhere.
    """
    buckets: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, frame in enumerate(frames):
        buckets[frame.get_chemical_formula(), int(frame.info["charge"])].append(i)
    repeated = set()
    for indices in buckets.values():
        prints = [_fingerprint(frames[i]) for i in indices]
        for a in range(len(indices)):
            for b in range(a + 1, len(indices)):
                if np.abs(prints[a] - prints[b]).max(initial=0.0) < SAME:
                    repeated.add(indices[b])
    return repeated


def save(frames: list[Atoms], path: Path) -> int:
    """Write a gzip-compressed extxyz file, the same bytes for the same frames; returns its size."""
    text = io.StringIO()
    write(text, frames, format="extxyz")
    data = gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
    return len(data)


def _restore(frame: Atoms, labelled: bool, where: str) -> None:
    """Put energy, forces and dipole, which ASE moves into a calculator, back beside the rest."""
    results = frame.calc.results if frame.calc else {}
    info = {k: results[k] for k in ("energy", "dipole") if k in results}
    frame.info.update({k: np.array(v) if np.ndim(v) else float(v) for k, v in info.items()})
    if "forces" in results:
        frame.arrays["forces"] = np.array(results["forces"])
    frame.calc = None
    wanted = ["charge", "group", "metal", "geometry"]
    if labelled:
        wanted += ["energy", "homo_lumo_gap", "gfn1_energy", "dipole"]
    missing = [k for k in wanted if k not in frame.info]
    if labelled:
        missing += [k for k in ("forces", *CHARGES) if k not in frame.arrays]
    if missing:
        raise InputError(f"{where}: lacks {', '.join(missing)}; is it an output of this script?")


def _first_of_key(frames: list[Atoms], dropped: Counter[str]) -> list[Atoms]:
    first = {(f.info["group"], f.info["geometry"]): f for f in reversed(frames)}
    keep = [f for f in frames if first[f.info["group"], f.info["geometry"]] is f]
    dropped["repeated key"] += len(frames) - len(keep)
    return keep


def _bad_charges(frame: Atoms) -> bool:
    return bool(abs(frame.arrays["dft_mulliken"].sum() - frame.info["charge"]) > CHARGE_SUM)


def _small_gap(frame: Atoms) -> bool:
    return bool(frame.info["homo_lumo_gap"] < MIN_GAP)


def _distinct(frames: list[Atoms], dropped: Counter[str]) -> list[Atoms]:
    repeated = duplicates(frames)
    dropped["duplicate"] += len(repeated)
    return [f for i, f in enumerate(frames) if i not in repeated]


def _fingerprint(frame: Atoms) -> np.ndarray:
    """[pairs, 2]: products of atomic numbers and distances (Å), sorted."""
    pairs = np.triu_indices(len(frame), 1)
    product = np.outer(frame.numbers, frame.numbers)[pairs].astype(float)
    distance = frame.get_all_distances()[pairs]
    order = np.lexsort((distance, product))
    return np.stack([product[order], distance[order]], axis=1)


def _round(frame: Atoms) -> None:
    """Round far below the numerical noise, for compression."""
    frame.positions = frame.positions.round(DECIMALS["positions"])
    frame.arrays["forces"] = frame.arrays["forces"].round(DECIMALS["forces"])
    for name in CHARGES:
        frame.arrays[name] = frame.arrays[name].round(DECIMALS["charges"])
    for key in ("energy", "gfn1_energy"):
        frame.info[key] = round(frame.info[key], DECIMALS["energy"])
    frame.info["homo_lumo_gap"] = round(frame.info["homo_lumo_gap"], DECIMALS["gap"])
    frame.info["dipole"] = np.asarray(frame.info["dipole"]).round(DECIMALS["dipole"])
