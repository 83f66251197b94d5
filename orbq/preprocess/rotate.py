"""Random rotations of a batch's structures and, exactly, of everything they are labelled with.

Ten orbital charges depend on the laboratory frame, in which a network with an invariant head cannot
know where a molecule points; that head learns their mean over frames only if it is shown many. The
charges themselves cannot be rotated, the stored on-site irreps they are made from can:

    x -> R x,  F -> R F,  stress -> R stress R^T,  c_l -> D_l(R) c_l for a component of degree l

(R = -R' turns components of odd parity by -D_l(R'), others by D_l(R')). This is why the packer does
it, before it takes the charges out of the irreps, and not the compiled step, which only sees the
charges; and in float64, before the cast. Rotations are a pure function of (seed, epoch, structures
of the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from orbq.orbitals import COMPONENTS, coupling

ROTATE = ("none", "proper", "improper")


class Turn(NamedTuple):
    """matrices [m, 3, 3]: orthogonal, one per structure. atom [n]: structure of each atom."""

    matrices: np.ndarray
    atom: np.ndarray


def random_rotations(
    seed: int, epoch: int, items: np.ndarray, improper: bool = False
) -> np.ndarray:
    """Uniform random rotations [m, 3, 3] for the structures ``items`` [m] of one batch.

    improper: half of them, by chance, times the inversion.
    """
    rng = np.random.default_rng([seed, epoch, 3, *items.tolist()])
    q = rng.standard_normal((len(items), 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    sign = 1 - 2 * rng.integers(0, 2, len(items)) if improper else np.ones(len(items))
    return np.moveaxis(np.array(rows), 2, 0) * sign[:, None, None]


def representation(l: int, rotations: np.ndarray) -> np.ndarray:
    """D_l [m, 2l+1, 2l+1] of proper rotations [m, 3, 3], in e3nn's order of components.

    D_l = Q^T (D_a x D_b) Q with the coupling Q of a x b -> l, up to l = 4.
    """
    if l == 0:
        return np.ones((len(rotations), 1, 1))
    if l == 1:
        return rotations
    a, b = {2: (1, 1), 3: (1, 2), 4: (2, 2)}[l]
    left, right = representation(a, rotations), representation(b, rotations)
    q, norm = coupling(a, b, l), (2 * a + 1) * (2 * b + 1)
    both = np.einsum("mip,mjq->mijpq", left, right).reshape(-1, norm, norm)
    basis = q.reshape(norm, 2 * l + 1)
    turned: np.ndarray = basis.T @ both @ basis
    return turned


def turned_vectors(vectors: np.ndarray, turn: Turn) -> np.ndarray:
    """Per-atom vectors [n, 3] -> R vector."""
    return _turned(vectors, turn.matrices, turn.atom)


def turned_rows(cells: np.ndarray, turn: Turn) -> np.ndarray:
    """Per-structure matrices whose rows are vectors, [m, 3, 3] -> C R^T."""
    return cells @ np.swapaxes(turn.matrices, 1, 2)


def turned_tensors(tensors: np.ndarray, turn: Turn) -> np.ndarray:
    """Per-structure tensors [m, 3, 3] -> R T R^T."""
    return turn.matrices @ turned_rows(tensors, turn)


def turned_onsite(onsite: np.ndarray, turn: Turn) -> np.ndarray:
    """On-site components [n, 47] of the atoms of turned structures."""
    sign = np.sign(np.linalg.det(turn.matrices))
    proper = turn.matrices * sign[:, None, None]
    by_degree = {l: representation(l, proper) for l in {c.l for c in COMPONENTS if c.l}}
    out = np.array(onsite, np.float64)
    for c in COMPONENTS:
        if c.l:
            matrices = (
                by_degree[c.l] * (sign if c.parity < 0 else np.ones_like(sign))[:, None, None]
            )
            out[:, c.columns] = _turned(onsite[:, c.columns], matrices, turn.atom)
    return out


def _turned(x: np.ndarray, matrices: np.ndarray, atom: np.ndarray) -> np.ndarray:
    product: np.ndarray = np.einsum("nij,nj->ni", matrices[atom], np.asarray(x, np.float64))
    return product


# how an array of a data set turns; those that are not named stay as they are
TURNING: dict[str, Callable[[np.ndarray, Turn], np.ndarray]] = {
    "positions": turned_vectors,
    "forces": turned_vectors,
    "xtb_forces": turned_vectors,
    "cell": turned_rows,
    "stress": turned_tensors,
    "onsite": turned_onsite,
}


def turned(name: str, values: np.ndarray, turn: Turn | None) -> np.ndarray:
    """The values of array ``name`` of a data set in the turned frames; as they are without one."""
    how = TURNING.get(name)
    return values if turn is None or how is None else how(values, turn)
