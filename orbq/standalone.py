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
import reprlib
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT_VERSION = 2
MANIFEST, PROGRAM = "manifest.json", "potential.bin"
STEPS = 16  # sizes of the padded edges per doubling
MIN_DISTANCE = 0.4  # Å between atoms
MIN_HEIGHT = 0.4  # Å between opposite faces of a cell
MAX_VOLUME = 1e9  # Å^3
MAX_INTEGER = 1_000_000  # of a charge or a multiplicity
CORE_F = range(58, 72)  # Ce-Lu, whose f electrons count to the core: their spin is not looked at


def load(directory: str | Path = Path(__file__).parent) -> Potential:
    """The potential of an exported directory; the default is the one this file lies in."""
    return Potential(Path(directory))


class Potential:
    """A callable potential. manifest: units, cutoff, elements, references, shells, inputs, outputs.

    Raises ValueError for a directory of another format, or when this JAX runs on a platform that
    the program was not exported for.
    """

    def __init__(self, directory: Path) -> None:
        self.manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{directory}: format {version}, this loader reads {FORMAT_VERSION}: use the "
                "loader in that directory, or export it again"
            )
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
        charge e, spin_multiplicity (None: the lowest of the electron count; any from 1 on of a
        periodic structure). Raises ValueError for an element without training data or reference
        energy, arrays of another shape, no atoms, a position that is not finite, atoms nearer than
        MIN_DISTANCE, a cell that is flat or too large, a charge or multiplicity that is not whole
        or does not fit the electrons.
        """
        numbers, charge = atomic_numbers(numbers), whole("charge", charge)
        x, periodic = coordinates(positions, len(numbers)), directions(pbc)
        reference = self.reference_energy(numbers, charge)
        spin = self.multiplicity(numbers, charge, spin_multiplicity, bool(periodic.any()))
        check_extent(x, periodic)
        x = inside(x, lattice_vectors(cell, periodic))  # far away float32 knows no distances
        found = edges(x, self.cutoff, cell, periodic)
        check_apart(x, *found)
        senders, receivers, shifts = padded(*found, len(x), self.cutoff)
        energy, forces, *charges = self.program(
            (x - x.mean(0)).astype(self.dtype),  # spares float32 its digits
            numbers,
            shifts.astype(self.dtype),
            senders,
            receivers,
            self.dtype.type(charge),
            self.dtype.type(spin),
        )
        out = {"energy": float(energy) + reference, "forces": np.asarray(forces)}
        return {**out, "charges": np.asarray(charges[0])} if charges else out

    def reference_energy(self, numbers: Any, charge: int = 0) -> float:
        """What is added to the program's energy, eV (float64)."""
        numbers, charge = atomic_numbers(numbers), whole("charge", charge)
        known = self.manifest["references"]["element"]
        if missing := sorted({int(z) for z in numbers if str(z) not in known}):
            raise ValueError(f"no energy for Z = {missing}: the potential knows Z = {list(known)}")
        atoms = sum(known[str(z)] for z in numbers)
        return float(atoms + self.manifest["references"]["charge"] * charge)

    def multiplicity(
        self, numbers: np.ndarray, charge: int, given: Any = None, periodic: bool = False
    ) -> int:
        """The spin multiplicity, by default the lowest of the electron count.

        Raises ValueError for one that is not whole, below 1, or does not fit the electrons of a
        molecule (a periodic structure may have any), and for a charge above the valence electrons
        or beyond what the valence orbitals hold.
        """
        n_electrons = int(numbers.sum()) - charge
        lowest = 1 + n_electrons % 2
        spin = lowest if given is None else whole("spin_multiplicity", given)
        valence, n_orbitals = np.sum([self.manifest["shells"][str(z)] for z in numbers], axis=0)
        n_valence = valence - charge
        if n_valence < 0:
            raise ValueError(
                f"charge {charge:+d} is above the {valence} valence electrons: at most {valence:+d}"
            )
        if n_valence > 2 * n_orbitals:
            raise ValueError(
                f"charge {charge:+d} makes {n_valence} valence electrons, more than {n_orbitals} "
                f"orbitals hold: at least {valence - 2 * n_orbitals:+d}"
            )
        if spin < 1:
            raise ValueError(f"spin_multiplicity is {spin}: 2S + 1 is a whole number, at least 1")
        if not periodic and (spin - lowest) % 2:
            kind, needed = ("even", "odd") if lowest == 1 else ("odd", "even")
            raise ValueError(
                f"spin_multiplicity {spin} does not fit {n_electrons} electrons (charge "
                f"{charge:+d}): an {kind} number needs an {needed} multiplicity"
            )
        highest = 1 + min(n_valence, 2 * n_orbitals - n_valence)
        if spin > highest and not periodic and not any(z in CORE_F for z in numbers):
            raise ValueError(
                f"spin_multiplicity {spin} does not fit {n_valence} valence electrons (charge "
                f"{charge:+d}) in {n_orbitals} orbitals: at most {highest}"
            )
        return spin


def atomic_numbers(numbers: Any) -> np.ndarray:
    """The atomic numbers [n] int32. Raises ValueError unless they are n >= 1 whole numbers."""
    found = real("numbers", numbers, "atomic numbers needed, such as 8 for O")
    if found.ndim != 1:
        raise ValueError(f"numbers has shape {found.shape}: (n,) needed, one of each atom")
    if not len(found):
        raise ValueError("numbers has no atoms: at least one needed")
    wrong = (found != np.rint(found)) | ~(np.abs(found) <= MAX_INTEGER)
    if wrong.any():
        atom = int(np.argmax(wrong))
        raise ValueError(f"numbers of atom {atom} is {found[atom]}: a whole atomic number needed")
    return found.astype(np.int32)


def coordinates(positions: Any, n_atoms: int) -> np.ndarray:
    """The positions [n, 3] float64. Raises ValueError for another shape, or values that are not
    finite."""
    x = real("positions", positions, "coordinates in Å needed")
    if x.shape != (n_atoms, 3):
        raise ValueError(
            f"positions has shape {x.shape}: ({n_atoms}, 3) needed for {n_atoms} atoms"
        )
    if not np.isfinite(x).all():
        atom = int(np.argmin(np.isfinite(x).all(1)))
        raise ValueError(f"the position of atom {atom} is not finite: {x[atom].tolist()}")
    return x


def directions(pbc: Any) -> np.ndarray:
    """Which lattice vectors are periodic, [3] bool. Raises ValueError unless pbc is one or three
    of True and False."""
    needed = "one or three of True and False needed"
    found = real("pbc", pbc, needed)
    if found.shape not in ((), (3,)) or not np.isin(found, (0, 1)).all():
        raise ValueError(f"pbc is {reprlib.repr(pbc)}: {needed}")
    return np.broadcast_to(found.astype(bool), 3)


def lattice_vectors(cell: Any, periodic: np.ndarray) -> np.ndarray:
    """The lattice vectors [p, 3] Å of the p periodic directions.

    Raises ValueError for a cell that is not [3, 3] and finite, and for periodic vectors that span
    no volume, less than MIN_HEIGHT between opposite faces, or more than MAX_VOLUME.
    """
    vectors = real("cell", np.zeros((3, 3)) if cell is None else cell, "lattice vectors needed")
    if vectors.shape != (3, 3):
        raise ValueError(f"cell has shape {vectors.shape}: (3, 3) needed, lattice vectors in rows")
    if not np.isfinite(vectors).all():
        raise ValueError(f"cell is not finite: {vectors.tolist()}: lattice vectors in Å needed")
    lattice = vectors[periodic]
    if not periodic.any():
        return lattice
    if (longest := np.abs(lattice).max()) > MAX_VOLUME:
        raise ValueError(
            f"the cell has a vector of {longest:.3g} Å: at most {MAX_VOLUME:g} Å; is it in Å?"
        )
    if np.linalg.matrix_rank(lattice) < len(lattice):
        raise ValueError(f"pbc {periodic.tolist()} needs independent lattice vectors, got {cell}")
    reciprocal = np.linalg.pinv(lattice / longest, rcond=0.0)
    height = longest / np.linalg.norm(reciprocal, axis=0).max()
    if height < MIN_HEIGHT:
        raise ValueError(
            f"the cell is {height:.3g} Å thin, at least {MIN_HEIGHT} Å needed: is it in Å? If its "
            "vectors are only badly chosen, reduce it (ase.build.niggli_reduce)"
        )
    if (volume := np.linalg.svd(lattice, compute_uv=False).prod()) > MAX_VOLUME:
        unit = f"Å^{len(lattice)}"
        raise ValueError(
            f"the cell spans {volume:.3g} {unit}: at most {MAX_VOLUME:g} {unit}; is it in Å?"
        )
    return lattice


def check_extent(positions: np.ndarray, periodic: np.ndarray) -> None:
    """Raises ValueError for atoms farther from the origin, or of a molecule in a larger box, than
    MAX_VOLUME."""
    with np.errstate(over="ignore"):
        reach = np.abs(positions).max()
        volume = np.prod(np.ptp(positions, axis=0) + 1.0)
    if reach > MAX_VOLUME or (volume > MAX_VOLUME and not periodic.any()):
        raise ValueError(
            f"the atoms lie in a box of {volume:.3g} Å^3, up to {reach:.3g} Å from the origin: at "
            f"most {MAX_VOLUME:g} Å^3; are the positions in Å?"
        )


def whole(name: str, value: Any) -> int:
    """The value as an integer. Raises ValueError unless it is one whole number."""
    needed = "it must be a whole number"
    found = real(name, value, needed)
    if found.size != 1 or found.item() != np.rint(found.item()):
        raise ValueError(f"{name} is {reprlib.repr(found.tolist())}: {needed}")
    if abs(found.item()) > MAX_INTEGER:
        raise ValueError(f"{name} is {found.item():g}: at most {MAX_INTEGER}")
    return int(found.item())


def real(name: str, value: Any, needed: str) -> np.ndarray:
    """The value as float64. Raises ValueError, which says what is needed, if it is no array of
    numbers."""
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {reprlib.repr(value)}: {needed}") from error


def inside(positions: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Positions [n, 3] moved by whole lattice vectors [p, 3] into the cell."""
    return positions - np.floor(positions @ np.linalg.pinv(lattice)) @ lattice


def edges(
    positions: np.ndarray, cutoff: float, cell: Any = None, pbc: Any = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers [E] int32 and shifts [E, 3] Å of every pair and image within the cutoff.

    Plain distances, O(n^2) for every image of the cell: for more than a few thousand atoms bring a
    neighbour list of your own. Raises ValueError as ``lattice_vectors`` does.
    """
    n = len(positions)
    lattice = lattice_vectors(cell, directions(pbc))
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
