"""What ``orbq embed`` writes beside its pictures: features, tables, a chemiscope file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np

from orbq.embed import Atoms, Elements, Map, Statistic
from orbq.errors import InputError
from orbq.orbitals import SYMBOLS
from orbq.preprocess.store import Dataset

MAX_ENVIRONMENTS = 5000  # atoms in a chemiscope file, more are slow to look at
NEIGHBOURHOOD = 3.5  # Å, what is shown around a picked atom


class Space(NamedTuple):
    """The latent space of one network.

    species: what its elements were described by ("shells" or "free"). features: [A, C] as the
    network has them. means: [K, C2] of the elements, standardised. maps: "PCA", "t-SNE". atoms: [A,
    2] the atoms in the axes of the PCA. statistics: (label, statistic) -> value of the network, and
    of the same network before training.
    """

    species: str
    features: np.ndarray
    means: np.ndarray
    maps: Mapping[str, Map]
    atoms: np.ndarray
    statistics: Mapping[tuple[str, str], tuple[Statistic, Statistic]]
    differences: Mapping[tuple[str, str], tuple[float, float]]


def write_features(
    spaces: Mapping[str, Space], atoms: Atoms, elements: Elements, path: Path
) -> Path:
    """``embeddings.npz``: numbers, structure (row of the data set) and atom of every atom [A]; per
    network NAME/features [A, C], NAME/means [K, C2] and the maps [K, 2] of ``elements`` [K]."""
    arrays: dict[str, np.ndarray] = {
        "numbers": atoms.numbers,
        "structure": atoms.rows[atoms.structure],
        "atom": atoms.atom,
        "elements": elements.numbers,
    }
    for name, space in spaces.items():
        arrays |= {f"{name}/features": space.features, f"{name}/means": space.means}
        arrays |= {f"{name}/{kind}": m.points for kind, m in space.maps.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def write_elements(spaces: Mapping[str, Space], elements: Elements, path: Path) -> Path:
    """``elements.csv``: group, row, d electrons, atoms, and the maps of every network."""
    maps = [
        (f"{name} {kind} {i + 1}", m.points[:, i])
        for name, space in spaces.items()
        for kind, m in space.maps.items()
        for i in (0, 1)
    ]
    columns: list[tuple[str, Sequence[Any] | np.ndarray]] = [
        ("element", elements.symbols),
        ("group", elements.labels("group")),
        ("row", elements.labels("row")),
        ("d_electrons", [f"{d:.3f}" for d in elements.d_electrons]),
        ("atoms", elements.counts),
        *((title, [f"{v:.5f}" for v in values]) for title, values in maps),
    ]
    return _write(path, [n for n, _ in columns], zip(*(v for _, v in columns), strict=True))


def write_statistics(spaces: Mapping[str, Space], path: Path) -> Path:
    """``clustering.csv``: per network, label and statistic its value, the chance value, p, the same
    network's value before training, and the difference to the first network with its p."""
    header = (
        "run species label statistic value chance p untrained untrained_p "
        "difference_to_first difference_p"
    ).split()
    return _write(path, header, statistic_rows(spaces))


def statistic_rows(spaces: Mapping[str, Space]) -> list[list[str]]:
    """The lines of ``clustering.csv``."""
    lines = []
    for name, space in spaces.items():
        for (label, statistic), (own, before) in space.statistics.items():
            numbers = [own.value, own.chance, own.p, before.value, before.p]
            numbers += space.differences.get((label, statistic), ())
            told = [f"{x:.4g}" for x in numbers]
            lines.append([name, space.species, label, statistic, *told, *[""] * (7 - len(told))])
    return lines


def _write(path: Path, header: Sequence[str], rows: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


# --------------------------------------------------------------------------- chemiscope


def require(module: str) -> Any:
    """A package of the extra ``explore``. Raises InputError when it is not installed."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        name = {"sklearn": "scikit-learn"}.get(module, module)
        without = ", or leave the chemiscope file out with --no-chemiscope"
        raise InputError(
            f"orbq embed needs {name}, which is not installed ({error}): pip install "
            f"'orbq[explore]'{without if module == 'chemiscope' else ''}"
        ) from error


def write_chemiscope(
    spaces: Mapping[str, Space], dataset: Dataset, atoms: Atoms, elements: Elements, path: Path
) -> tuple[Path, int]:
    """A file for https://chemiscope.org: the atoms on every network's principal components, with
    their structures. Returns it and how many atoms it holds, evenly chosen if there are many."""
    chemiscope = require("chemiscope")
    n = len(atoms.numbers)
    kept = np.unique(np.linspace(0, n - 1, min(n, MAX_ENVIRONMENTS)).astype(int))
    shown, place = np.unique(atoms.structure[kept], return_inverse=True)
    structures = [structure_of(dataset, int(atoms.rows[s])) for s in shown]
    z = atoms.numbers[kept]
    properties: dict[str, Any] = {
        "element": _property([SYMBOLS[i] for i in z]),
        "group": _property(_per_atom(elements, elements.labels("group"), z)),
        "row": _property(_per_atom(elements, elements.labels("row"), z)),
        "d electrons of the element": _property(_per_atom(elements, elements.d_electrons, z)),
    }
    if np.isfinite(d := atoms.d_electrons[kept]).all():
        properties["d electrons of the atom"] = _property(d)
    for name, space in spaces.items():
        for i in (0, 1):
            values = space.atoms[kept, i]
            properties[f"{name} PCA {i + 1}"] = _property(values, f"features of {name}")
    first = next(iter(spaces))
    chemiscope.write_input(
        str(path),
        structures=structures,
        properties=properties,
        environments=[
            (int(s), int(a), NEIGHBOURHOOD) for s, a in zip(place, atoms.atom[kept], strict=True)
        ],
        metadata={
            "name": f"latent space of {', '.join(spaces)}",
            "description": f"atoms of {', '.join(elements.symbols)} in {dataset.path.name}",
        },
        settings={
            "map": {
                "x": {"property": f"{first} PCA 1"},
                "y": {"property": f"{first} PCA 2"},
                "color": {"property": "group"},
            }
        },
    )
    return path, len(kept)


def _property(values: Any, description: str = "") -> dict[str, Any]:
    listed = values if isinstance(values, list) else np.asarray(values).tolist()
    return {"target": "atom", "values": listed, "description": description}


def _per_atom(elements: Elements, values: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.asarray(values)[np.searchsorted(elements.numbers, z)]


def structure_of(dataset: Dataset, row: int) -> ase.Atoms:
    """A structure of a data set, with its charge and spin multiplicity."""
    offsets = dataset["offsets"]
    own = slice(int(offsets[row]), int(offsets[row + 1]))
    return ase.Atoms(
        numbers=dataset["numbers"][own],
        positions=dataset["positions"][own],
        cell=dataset["cell"][row],
        pbc=dataset["pbc"][row],
        info={
            "charge": int(dataset["total_charge"][row]),
            "spin_multiplicity": int(dataset["spin_multiplicity"][row]),
        },
    )
