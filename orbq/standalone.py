"""An exported potential: energy, forces and charges with JAX and NumPy alone.

    import potential                                   # this file, in the exported directory

    model = potential.load()
    found = model(numbers, positions, cell, pbc=True, charge=0)
    found["energy"], found["forces"]                   # eV; [n, 3] eV/Å

The program itself is ``potential.bin``, StableHLO as ``jax.export`` writes it (which reads and
writes with the package flatbuffers); ``manifest.json`` says what goes in and comes out:

    program = jax.export.deserialize(bytearray(Path("potential.bin").read_bytes()))
    energy, forces = program.call(positions, numbers, shifts, senders, receivers, charge, spin)

An edge (sender j -> receiver i) stands for ``r = x[i] - x[j] + shift`` with |r| < cutoff, both
directions, sorted by receiver. More edges with sender = receiver = n - 1 and a shift of twice the
cutoff add nothing, so that arrays of a few sizes do for many structures. The energy lacks the
references of the manifest, which are added in float64.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT_VERSION = 1
MANIFEST, PROGRAM = "manifest.json", "potential.bin"
STEPS = 16  # sizes of the padded edges per doubling
MIN_DISTANCE = 0.4  # Å between atoms


def load(directory: str | Path = Path(__file__).parent) -> Potential:
    """The potential of an exported directory; the default is the one this file lies in."""
    return Potential(Path(directory))


class Potential:
    """A callable potential. manifest: units, cutoff, elements, references, inputs, outputs.

    Raises ValueError for a directory of another format, or when this JAX runs on a platform that
    the program was not exported for.
    """

    def __init__(self, directory: Path) -> None:
        self.manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{directory}: format {version}, this loader reads {FORMAT_VERSION}")
        platforms = self.manifest["platforms"]
        here = jax.default_backend()
        if not {here, *(["cuda", "rocm"] if here == "gpu" else [])} & set(platforms):
            raise ValueError(
                f"{directory} was exported for {', '.join(platforms)}, JAX runs on {here}: set "
                "JAX_PLATFORMS, or export it again with --platform"
            )
        if self.manifest["precision"] == "float64":
            jax.config.update("jax_enable_x64", True)
        self.dtype = np.dtype(self.manifest["precision"])
        self.cutoff = float(self.manifest["cutoff"])
        stored = bytearray((directory / PROGRAM).read_bytes())
        self.program = jax.jit(jax.export.deserialize(stored).call)

    def __call__(
        self,
        numbers: Any,
        positions: Any,
        cell: Any = None,
        pbc: Any = False,
        charge: int = 0,
        spin_multiplicity: int | None = None,
    ) -> dict[str, Any]:
        """Total energy (eV), forces [n, 3] (eV/Å) and, if exported, charges [n] (e).

        numbers [n], positions [n, 3] Å, cell [3, 3] lattice vectors in rows, pbc one or three bool,
        charge e, spin_multiplicity (None: the lowest of the electron count). Raises ValueError for
        an element without training data or reference energy, a position that is not finite, atoms
        nearer than MIN_DISTANCE.
        """
        numbers = np.asarray(numbers, np.int32)
        x = np.asarray(positions, np.float64).reshape(len(numbers), 3)
        reference = self.reference_energy(numbers, charge)
        if spin_multiplicity is None:
            spin_multiplicity = 1 + int(numbers.sum() - charge) % 2
        if not np.isfinite(x).all():
            atom = int(np.argmin(np.isfinite(x).all(1)))
            raise ValueError(f"the position of atom {atom} is not finite: {x[atom].tolist()}")
        found = edges(x, self.cutoff, cell, pbc)
        check_apart(x, *found)
        senders, receivers, shifts = padded(*found, len(x), self.cutoff)
        energy, forces, *charges = self.program(
            (x - x.mean(0)).astype(self.dtype),  # spares float32 its digits
            numbers,
            shifts.astype(self.dtype),
            senders,
            receivers,
            self.dtype.type(charge),
            self.dtype.type(spin_multiplicity),
        )
        out = {"energy": float(energy) + reference, "forces": np.asarray(forces)}
        return {**out, "charges": np.asarray(charges[0])} if charges else out

    def reference_energy(self, numbers: Any, charge: int = 0) -> float:
        """What is added to the program's energy, eV (float64)."""
        known = self.manifest["references"]["element"]
        if missing := sorted({int(z) for z in numbers if str(z) not in known}):
            raise ValueError(f"no energy for Z = {missing}: the potential knows Z = {list(known)}")
        atoms = sum(known[str(z)] for z in numbers)
        return float(atoms + self.manifest["references"]["charge"] * charge)


def edges(
    positions: np.ndarray, cutoff: float, cell: Any = None, pbc: Any = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers [E] int32 and shifts [E, 3] Å of every pair and image within the cutoff.

    Plain distances, O(n^2) for every image of the cell: for more than a few thousand atoms bring a
    neighbour list of your own. Raises ValueError for periodic lattice vectors without volume.
    """
    n = len(positions)
    periodic = np.broadcast_to(np.asarray(pbc, bool), 3)
    lattice = np.zeros((0, 3)) if cell is None else np.asarray(cell, float)[periodic]
    if periodic.any() and np.linalg.matrix_rank(lattice) < periodic.sum():
        raise ValueError(f"pbc {periodic.tolist()} needs independent lattice vectors, got {cell}")
    reciprocal = np.linalg.pinv(lattice)  # [3, p]; planes are 1 / |column| apart
    wrapped = np.floor(positions @ reciprocal)
    x = positions - wrapped @ lattice
    reach = [int(cutoff * length) + 1 for length in np.linalg.norm(reciprocal, axis=0)]
    found = []
    for image in itertools.product(*(range(-r, r + 1) for r in reach)):
        vectors = x[:, None] - x[None] + np.array(image, float) @ lattice
        near = (vectors**2).sum(-1) < cutoff**2
        if not any(image):
            near[np.arange(n), np.arange(n)] = False
        i, j = np.nonzero(near)
        found.append((i, j, (np.array(image) - wrapped[i] + wrapped[j]) @ lattice))
    receivers, senders, shifts = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(receivers, kind="stable")
    return senders[order].astype(np.int32), receivers[order].astype(np.int32), shifts[order]


def check_apart(
    positions: np.ndarray, senders: np.ndarray, receivers: np.ndarray, shifts: np.ndarray
) -> None:
    """Raises ValueError for the two atoms that an edge joins and that are nearer than MIN_DISTANCE
    to each other."""
    if not len(shifts):
        return
    distances = np.linalg.norm(positions[receivers] - positions[senders] + shifts, axis=1)
    if (shortest := distances.min()) < MIN_DISTANCE:
        edge = distances.argmin()
        i, j = sorted((senders[edge], receivers[edge]))
        raise ValueError(
            f"atoms {i} and {j} are {shortest:.3f} Å apart: at least {MIN_DISTANCE} Å needed"
        )


def padded(
    senders: np.ndarray, receivers: np.ndarray, shifts: np.ndarray, n_atoms: int, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges with others that are longer than the cutoff, up to one of a few sizes."""
    n_edges = len(senders)
    step = max(1 << (n_edges // STEPS).bit_length(), 16)
    spare = step - n_edges % step
    far = np.tile([2.0 * cutoff, 0.0, 0.0], (spare, 1))
    last = np.full(spare, n_atoms - 1, np.int32)
    join = np.concatenate
    return join([senders, last]), join([receivers, last]), join([shifts, far])
