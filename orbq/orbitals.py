"""Valence shells of the xTB methods, and an atom's on-site density in irreducible components.

Every atom carries ten orbital slots ``[s, s', p(3), d(5)]``, in e3nn's component order (p: x, y, z;
d: e3nn's 2e). An element fills the slots of the shells its method gives it; the rest are masked.

With P the density matrix, S the overlap and M = P S restricted to one atom, the on-site block is
``B = (M + M^T)/2``; its diagonal holds the Mulliken orbital populations. The *charge block*
``C = diag(refocc/(2l+1)) - B`` is what a network is taught: its diagonal holds the orbital charges
``q_k = refocc/(2l+1) - pop_k`` (positive = electron deficit, unit e).

Under a rotation R, ``B -> D(R) B D(R)^T``: the ten diagonal entries depend on the laboratory frame,
the irreducible components do not. A symmetric 10 x 10 block has 55 of them; those that a spherical
single-s-p-d valence can fill are kept, 47 in all:

    same shell  (23)  s 0e | s' 0e | p 0e | d 0e | p 2e | d 2e | d 4e
    cross shell (24)  s-s' 0e | s-p 1o | s-d 2e | p-d 1o | p-d 2o | p-d 3o

Each component is the projection on an orthonormal set of matrices, so that the ten orbital charges
are a constant linear map (``ORBITAL_FROM_DENSITY``) of the first 23.

References: GFN1-xTB, Grimme, Bannwarth, Shushkov, J. Chem. Theory Comput. 13, 1989 (2017); real
spherical harmonics in e3nn's convention, Geiger and Smidt, arXiv:2207.09453.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise, permutations
from math import factorial
from typing import NamedTuple

import numpy as np

MAX_Z = 86
N_SLOTS = 10
SHELL_NAMES = ("s", "s'", "p", "d")
SHELL_L = np.array([0, 0, 1, 2])
SHELL_SLOTS = (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 10))
SLOT_SHELL = np.array([0, 1, 2, 2, 2, 3, 3, 3, 3, 3])
SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy "
    "Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn"
).split()

# Shells in tblite's order with their reference occupations, one word per element from H to Rn.
# Read off tblite's exported parameters (library.export_*_param, 'refocc'); for IPEA1 the extra
# diffuse s shells, whose exported occupation is not used by the method, are 0.
_LANTHANIDES = " ".join(["d1s2p0"] * 15)
_SHELL_TABLE = {
    "GFN1-xTB": (
        "s1s0 s2 s1p0 s2p0 s2p1 s2p2 s2p3 s2p4 s2p5 s2p6d0 s1p0 s2p0 s2p1d0 s2p2d0 s2p3d0 s2p4d0 "
        "s2p5d0 s2p6d0 s1p0 s2p0d0 d1s2p0 d2s2p0 d3s2p0 d4s2p0 d5s2p0 d6s2p0 d7s2p0 d8s2p0 d9s2p0 "
        "s2p0 s2p1d0 s2p2d0 s2p3d0 s2p4d0 s2p5d0 s2p6d0 s1p0 s2p0d0 d1s2p0 d2s2p0 d3s2p0 d4s2p0 "
        "d5s2p0 d6s2p0 d7s2p0 d8s2p0 d9s2p0 s2p0 s2p1d0 s2p2d0 s2p3d0 s2p4d0 s2p5d0 s2p6d0 s1p0 "
        f"s2p0d0 {_LANTHANIDES} d2s2p0 d3s2p0 d4s2p0 d5s2p0 d6s2p0 d7s2p0 d8s2p0 d9s2p0 s2p0 s2p1 "
        "s2p2 s2p3 s2p4d0 s2p5d0 s2p6d0"
    ),
    "GFN2-xTB": (
        "s1 s2p0 s1p0 s2p0 s2p1 s1p3 s1.5p3.5 s2p4 s2p5 s2p6d0 s1p0 s2p0d0 s2p1d0 s1.5p2.5d0 "
        "s1.5p3.5d0 s2p4d0 s2p5d0 s2p6d0 s1p0 s2p0d0 d1s1p1 d2s1p1 d3s1p1 d4s1p1 d5s1p1 d6s1p1 "
        "d7s1p1 d8s1p1 d10s1p0 s2p0 s2p1d0 s1.5p2.5d0 s1.5p3.5d0 s2p4d0 s2p5d0 s2p6d0 s1p0 s2p0d0 "
        "d1s1p1 d2s1p1 d3s1p1 d4s1p1 d5s1p1 d6s1p1 d7s1p1 d8s1p1 d10s1p0 s2p0 s2p1d0 s2p2d0 s2p3d0 "
        f"s2p4d0 s2p5d0 s2p6d0 s1p0 s2p0d0 {_LANTHANIDES.replace('d1s2p0', 'd1s1p1')} d2s1p1 "
        "d3s1p1 d4s1p1 d5s1p1 d6s1p1 d7s1p1 d8s1p1 d10s1p0 s2p0 s2p1 s2p2 s2p3 s2p4 s2p5d0 s2p6d0"
    ),
    "IPEA1-xTB": (
        "s1s0 s2 s1p0 s2p0 s2p1s0 s2p2s0 s2p3s0 s2p4s0 s2p5s0 s2p6d0 s1p0 s2p0 s2p1d0 s2p2d0 "
        "s2p3d0 s2p4d0 s2p5d0 s2p6d0 s1p0 s2p0d0 d1s2p0 d2s2p0 d3s2p0 d4s2p0 d5s2p0 d6s2p0 d7s2p0 "
        "d8s2p0 d9s2p0 s2p0 s2p1d0 s2p2d0 s2p3d0 s2p4d0 s2p5d0 s2p6d0 s1p0 s2p0d0 d1s2p0 d2s2p0 "
        "d3s2p0 d4s2p0 d5s2p0 d6s2p0 d7s2p0 d8s2p0 d9s2p0 s2p0 s2p1d0 s2p2d0 s2p3d0 s2p4d0 s2p5d0 "
        f"s2p6d0 s1p0 s2p0d0 {_LANTHANIDES} d2s2p0 d3s2p0 d4s2p0 d5s2p0 d6s2p0 d7s2p0 d8s2p0 "
        "d9s2p0 s2p0 s2p1 s2p2 s2p3 s2p4d0 s2p5d0 s2p6d0"
    ),
}
METHODS = tuple(_SHELL_TABLE)
GFN1 = METHODS[0]
# charges of the first, energies and forces the mean of all: often nearer to DFT's than each
SUMS = tuple("+".join(some) for n in (1, 2, 3) for some in permutations(METHODS, n))


class Shells(NamedTuple):
    """Valence shells of one method for Z = 0..86; row 0 (padding) is empty.

    order: per Z, the slots of its atomic orbitals in tblite's shell order.
    slot_mask: [87, 10] bool, slots an element has.
    shell_mask: [87, 4] bool, shells an element has.
    occupation: [87, 4] reference occupation of each shell, electrons.
    valence: [87] reference valence electrons.
    """

    order: tuple[np.ndarray, ...]
    slot_mask: np.ndarray
    shell_mask: np.ndarray
    occupation: np.ndarray
    valence: np.ndarray


def check_method(method: str) -> None:
    """Raise KeyError, with what is known, unless ``method`` is one of SUMS."""
    if method not in SUMS:
        raise KeyError(
            f"unknown xTB method {method!r}; known: {', '.join(METHODS)}, and two or three of them "
            "joined by +"
        )


def parts(method: str) -> list[str]:
    """The methods that are joined in one: the first gives the charges."""
    return method.split("+")


@cache
def shells(method: str = GFN1) -> Shells:
    """Shells, masks and reference occupations of ``method`` for every element; of several joined
    by + those of the first.

    Raises KeyError naming the known methods when ``method`` is not one of them.
    """
    check_method(method)
    method = parts(method)[0]
    order: list[np.ndarray] = [np.zeros(0, int)]
    occupation = np.zeros((MAX_Z + 1, 4))
    shell_mask = np.zeros((MAX_Z + 1, 4), bool)
    for z, word in enumerate(_SHELL_TABLE[method].split(), start=1):
        slots: list[int] = []
        for letter, occ in _letters(word):
            shell = {"s": 1 if shell_mask[z, 0] else 0, "p": 2, "d": 3}[letter]
            shell_mask[z, shell], occupation[z, shell] = True, occ
            slots += range(*SHELL_SLOTS[shell].indices(N_SLOTS))
        order.append(np.array(slots))
    valence = occupation.sum(1)
    return Shells(tuple(order), shell_mask[:, SLOT_SHELL], shell_mask, occupation, valence)


def _letters(word: str) -> list[tuple[str, float]]:
    """Split ``"d1s2p0"`` into ``[("d", 1.0), ("s", 2.0), ("p", 0.0)]``."""
    starts = [i for i, c in enumerate(word) if c in "spd"] + [len(word)]
    return [(word[i], float(word[i + 1 : j])) for i, j in pairwise(starts)]


# --------------------------------------------------------------------------- rotations


def solid_harmonics(l: int, xyz: np.ndarray) -> np.ndarray:
    """Real spherical harmonics of degree ``l``, orthonormal up to one constant per l.

    xyz: [..., 3] unit vectors. Returns [..., 2l+1] in e3nn's component order: the textbook order
    m = -l..l with the polar axis along y, i.e. evaluated at (z, x, y).
    """
    x, y, z = xyz[..., 2], xyz[..., 0], xyz[..., 1]
    out = []
    for m in range(-l, l + 1):
        a = abs(m)
        polar = sum(
            (-1) ** k
            * factorial(2 * l - 2 * k)
            / (factorial(k) * factorial(l - k) * factorial(l - 2 * k - a) * 2**l)
            * z ** (l - 2 * k - a)
            for k in range((l - a) // 2 + 1)
        )
        norm = np.sqrt((2.0 if m else 1.0) * factorial(l - a) / factorial(l + a))
        power = (x + 1j * y) ** a
        out.append(norm * polar * (power.imag if m < 0 else power.real))
    return np.stack(out, axis=-1)


def rotation_matrix(l: int, rotation: np.ndarray) -> np.ndarray:
    """The matrix D_l(R), [2l+1, 2l+1], with Y_l(R x) = D_l(R) Y_l(x), for a rotation R [3, 3]."""
    points = np.random.default_rng(l).standard_normal((4 * l + 4, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    before, after = solid_harmonics(l, points), solid_harmonics(l, points @ rotation.T)
    return np.linalg.lstsq(before, after, rcond=None)[0].T


def _random_rotations(n: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(7).standard_normal((n, 3, 3)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    return q * np.linalg.det(q)[:, None, None]


@cache
def coupling(l1: int, l2: int, l3: int) -> np.ndarray:
    """Orthonormal coupling coefficients Q [2l1+1, 2l2+1, 2l3+1] of l1 x l2 -> l3.

    For each component k of l3, sum_ij Q_ijk^2 = 1, and contracting with Q maps D_l1 A D_l2^T to
    D_l3 applied to the contraction of A. Found as the one invariant of l1 x l2 x l3 (the null space
    of D1 x D2 x D3 - 1 over a few fixed rotations); the sign makes the first sizeable entry
    positive.
    """
    n1, n2, n3 = 2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1
    rows = []
    for rot in _random_rotations(3):
        d = np.kron(
            np.kron(rotation_matrix(l1, rot), rotation_matrix(l2, rot)), rotation_matrix(l3, rot)
        )
        rows.append(d - np.eye(n1 * n2 * n3))
    q = np.linalg.svd(np.concatenate(rows))[2][-1].reshape(n1, n2, n3) * np.sqrt(n3)
    q[np.abs(q) < 1e-12] = 0.0
    return q * np.sign(q.flat[np.argmax(np.abs(q.ravel()) > 1e-3)])


# --------------------------------------------------------------------------- the on-site block


class Component(NamedTuple):
    """One irreducible component of the on-site block.

    name: as in ``"p-d 1o"``. shell: index into STATISTICS_SHELLS whose scale it shares.
    first, second: the two shells it couples. l, parity: its irrep (parity +1 e, -1 o).
    columns: its columns among the 47.
    """

    name: str
    shell: int
    first: int
    second: int
    l: int
    parity: int
    columns: slice


def _components() -> tuple[Component, ...]:
    spec = [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 0), (2, 2, 2), (3, 3, 2), (3, 3, 4)]
    spec += [(0, 1, 0), (0, 2, 1), (0, 3, 2), (2, 3, 1), (2, 3, 2), (2, 3, 3)]
    cross = {(0, 1): 4, (0, 2): 5, (0, 3): 6, (2, 3): 7}
    out, start = [], 0
    for a, b, l in spec:
        parity = (-1) ** int(SHELL_L[a] + SHELL_L[b])
        pair = SHELL_NAMES[a] if a == b else f"{SHELL_NAMES[a]}-{SHELL_NAMES[b]}"
        name = f"{pair} {l}{'e' if parity > 0 else 'o'}"
        stop = start + 2 * l + 1
        shell = a if a == b else cross[a, b]
        out.append(Component(name, shell, a, b, l, parity, slice(start, stop)))
        start = stop
    return tuple(out)


STATISTICS_SHELLS = ("s", "s'", "p", "d", "s-s'", "s-p", "s-d", "p-d")
COMPONENTS = _components()
N_DENSITY, N_ONSITE = 23, 47
DENSITY_IRREPS = "4x0e+2x2e+1x4e"
ONSITE_IRREPS = DENSITY_IRREPS + "+1x0e+1x1o+1x2e+1x1o+1x2o+1x3o"


@cache
def onsite_basis() -> np.ndarray:
    """[47, 10, 10] matrices whose contraction with a symmetric on-site block gives its components.

    Same-shell matrices are orthonormal; a cross-shell matrix fills the one block (first, second).
    """
    basis = np.zeros((N_ONSITE, N_SLOTS, N_SLOTS))
    for c in COMPONENTS:
        q = coupling(int(SHELL_L[c.first]), int(SHELL_L[c.second]), c.l)
        basis[c.columns, SHELL_SLOTS[c.first], SHELL_SLOTS[c.second]] = np.moveaxis(q, 2, 0)
    return basis


def orbital_from_density() -> np.ndarray:
    """The constant map [10, 23] from the same-shell components to the ten orbital charges."""
    return np.einsum("ckk->kc", onsite_basis()[:N_DENSITY])


@cache
def onsite_mask(method: str = GFN1) -> np.ndarray:
    """[87, 47] bool: the components that an element has under ``method``."""
    has = shells(method).shell_mask
    mask = np.zeros((MAX_Z + 1, N_ONSITE), bool)
    for c in COMPONENTS:
        mask[:, c.columns] = (has[:, c.first] & has[:, c.second])[:, None]
    return mask


def shell_mask(method: str = GFN1) -> np.ndarray:
    """[87, 8] bool: the STATISTICS_SHELLS that an element has under ``method``."""
    mask = onsite_mask(method)
    return np.stack([mask[:, _first_column(s)] for s in range(len(STATISTICS_SHELLS))], axis=1)


def _first_column(shell: int) -> int:
    return next(c.columns.start for c in COMPONENTS if c.shell == shell)


COLUMN_SHELL = np.concatenate(
    [np.full(c.columns.stop - c.columns.start, c.shell) for c in COMPONENTS]
)
COLUMN_L = np.concatenate([np.full(c.columns.stop - c.columns.start, c.l) for c in COMPONENTS])


def onsite_from_blocks(blocks: np.ndarray, numbers: np.ndarray, method: str = GFN1) -> np.ndarray:
    """Components [N, 47] of the charge block, from the symmetrised on-site blocks B [N, 10, 10].

    ``blocks`` are in slot order with e3nn's components; entries of absent slots are ignored.
    """
    table = shells(method)
    reference = (table.occupation / (2 * SHELL_L + 1))[numbers][:, SLOT_SHELL]  # [N, 10]
    charge = np.einsum("nk,kl->nkl", reference, np.eye(N_SLOTS)) - blocks
    return np.einsum("cij,nij->nc", onsite_basis(), charge) * onsite_mask(method)[numbers]


def orbital_charges(onsite: np.ndarray) -> np.ndarray:
    """Ten orbital charges [N, 10] (e) from the on-site components [N, >= 23]."""
    return onsite[..., :N_DENSITY] @ orbital_from_density().T


def shell_charges(onsite: np.ndarray) -> np.ndarray:
    """Charges of the shells s, s', p, d [N, 4] (e): traces of the shell blocks."""
    return onsite[..., :4] * np.sqrt(2 * SHELL_L + 1)


def atomic_charges(onsite: np.ndarray) -> np.ndarray:
    """Mulliken atomic charges [N] (e)."""
    return shell_charges(onsite).sum(-1)
