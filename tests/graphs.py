"""Small molecules as the graphs that potentials take: padding, permutation, rotation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import ase.build
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from scipy.linalg import block_diag

from orbq.models.potential import Architecture, Constants, Potential
from orbq.orbitals import SYMBOLS, rotation_matrix
from orbq.preprocess.neighbors import neighbor_list
from orbq.targets import TARGETS, Statistics

CUTOFF = 3.5  # Å
ELEMENTS = (1, 6, 8, 17, 46)  # s s' | s p | s p | s p d | d s p
TINY = Architecture(
    cutoff=CUTOFF,
    n_layers=2,
    n_channels=4,
    lmax=2,
    n_radial=4,
    radial_hidden=(8,),
    readout_hidden=4,
)


# XLA options that compile these small programs three times faster, and run them hardly slower
quick_jit = partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)


class Molecule(NamedTuple):
    """numbers [n], positions [n, 3] Å, total charge (e), spin multiplicity 2S + 1."""

    numbers: np.ndarray
    positions: np.ndarray
    total_charge: int = 0
    spin_multiplicity: int = 1


class Size(NamedTuple):
    """Padded numbers of nodes, edges and structures."""

    nodes: int
    edges: int
    structures: int


def of_name(
    name: str, total_charge: int = 0, spin_multiplicity: int = 1, seed: int = 0
) -> Molecule:
    """A molecule of ASE's g2 set, turned and rattled so that nothing is symmetric."""
    atoms = ase.build.molecule(name)
    rng = np.random.default_rng(seed)
    positions = atoms.positions @ random_rotation(seed).T + 0.1 * rng.normal(size=(len(atoms), 3))
    return Molecule(atoms.numbers, positions, total_charge, spin_multiplicity)


def complex_cation() -> Molecule:
    """[PdCl(H2O)]+ bent out of its plane: s, s', p and d shells, a charge."""
    symbols = ("Pd", "Cl", "O", "H", "H")
    positions = [[0.1, 0, 0], [-2.2, 0.3, 0.1], [2.0, 0.2, 0.2], [2.5, -0.6, 0.1], [2.4, 0.7, 0.8]]
    return Molecule(np.array([SYMBOLS.index(s) for s in symbols]), np.array(positions), 1, 1)


def three() -> list[Molecule]:
    """A batch with every shell, a cation, and a triplet."""
    return [of_name("CH3OH"), complex_cation(), of_name("O2", spin_multiplicity=3, seed=1)]


# --------------------------------------------------------------------------- transformations


def random_rotation(seed: int, improper: bool = False) -> np.ndarray:
    """A random rotation [3, 3], times the inversion if ``improper``."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q) * (-1 if improper else 1)


def representation(irreps: str, rotation: np.ndarray) -> np.ndarray:
    """D [k, k] of ``irreps`` (e3nn notation) for a rotation or rotation times inversion [3, 3].

    Of orbq's own rotation matrices, which test_orbitals.py holds against e3nn's: e3nn's take
    seconds to compile.
    """
    sign = round(np.linalg.det(rotation))
    blocks = []
    for word in irreps.split("+"):
        mul, ir = word.split("x")
        proper = rotation_matrix(int(ir[:-1]), sign * rotation)
        blocks += [proper * (sign if ir[-1] == "o" else 1)] * int(mul)
    return block_diag(*blocks)


def moved(
    molecule: Molecule, rotation: np.ndarray | None = None, shift: Sequence[float] = (0, 0, 0)
) -> Molecule:
    """``x -> R x + shift``."""
    turn = np.eye(3) if rotation is None else rotation
    return molecule._replace(positions=molecule.positions @ turn.T + np.asarray(shift))


def permuted(molecule: Molecule, order: np.ndarray) -> Molecule:
    """The same atoms in another order."""
    return molecule._replace(numbers=molecule.numbers[order], positions=molecule.positions[order])


def together(molecules: Sequence[Molecule]) -> Molecule:
    """All atoms as one structure; charges add up, the spin is a singlet."""
    return Molecule(
        np.concatenate([m.numbers for m in molecules]),
        np.concatenate([m.positions for m in molecules]),
        sum(m.total_charge for m in molecules),
    )


# --------------------------------------------------------------------------- graphs


def make_graph(
    molecules: Sequence[Molecule], size: Size | None = None, cutoff: float = CUTOFF
) -> tuple[jnp.ndarray, jraph.GraphsTuple]:
    """Positions and graph; padded to ``size`` as the packer pads: one structure takes every padding
    node and edge, padding edges join the last node to itself beyond the cutoff.

    Floating-point arrays are of JAX's default precision.
    """
    lists = [neighbor_list(m.positions, cutoff) for m in molecules]
    n_node, n_edge = [len(m.numbers) for m in molecules], [len(e.senders) for e in lists]
    exact = Size(sum(n_node), sum(n_edge), len(molecules))
    n, e, m = size or exact
    if size and not all(have < padded for have, padded in zip(exact, size, strict=True)):
        raise ValueError(f"{exact} does not fit {size}")
    positions, numbers = np.zeros((n, 3)), np.zeros(n, np.int32)
    shifts, ends = np.zeros((e, 3)), np.full((2, e), n - 1, np.int32)
    shifts[:, 0] = 2 * cutoff
    node = edge = 0
    for mol, near in zip(molecules, lists, strict=True):
        atoms, edges = slice(node, node + len(mol.numbers)), slice(edge, edge + len(near.senders))
        positions[atoms], numbers[atoms] = mol.positions, mol.numbers
        ends[:, edges] = near.senders + node, near.receivers + node
        shifts[edges] = near.shifts
        node, edge = atoms.stop, edges.stop
    rest = m - len(molecules)
    charge = [mol.total_charge for mol in molecules] + [0.0] * rest
    spin = [mol.spin_multiplicity for mol in molecules] + [1.0] * rest
    graph = jraph.GraphsTuple(
        nodes={"numbers": jnp.asarray(numbers)},
        edges={"shifts": jnp.asarray(shifts, float)},
        senders=jnp.asarray(ends[0]),
        receivers=jnp.asarray(ends[1]),
        n_node=_padded_sizes(n_node, n, m),
        n_edge=_padded_sizes(n_edge, e, m),
        globals={
            "total_charge": jnp.asarray(charge, float),
            "spin_multiplicity": jnp.asarray(spin, float),
            "mask": jnp.arange(m) < len(molecules),
        },
    )
    return jnp.asarray(positions, float), graph


def _padded_sizes(sizes: list[int], total: int, m: int) -> jnp.ndarray:
    rest = [total - sum(sizes)] + [0] * (m - len(sizes) - 1) if m > len(sizes) else []
    return jnp.asarray(sizes + rest, jnp.int32)


# --------------------------------------------------------------------------- constants


def random_params(potential: Potential, dtype: str = "float64", seed: int = 0) -> Any:
    """Parameters of order 1, biases too, and no small read-outs: every part of the model counts.

    NumPy arrays, drawn without compiling the potential's own initialisation.
    """
    shapes = jax.eval_shape(potential.init, jax.random.key(0), *make_graph([of_name("H2O")]))
    rng, backbone = np.random.default_rng(seed), potential.architecture.backbone

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = leaf.shape[0] if len(leaf.shape) == 2 else 10
        before_products = "'mix'" in jax.tree_util.keystr(path) and backbone == "mace"
        scale = fan_in**-0.5 * (0.1 if before_products else 1.0)  # their third power is taken
        return (rng.normal(size=leaf.shape) * scale).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_statistics(name: str, seed: int = 0) -> Statistics:
    """A valid normalisation: one scale per element and shell, one mean on its l = 0 columns."""
    target, rng = TARGETS[name], np.random.default_rng(seed)
    shells = len(target.shell_names)
    mean = rng.normal(size=(87, shells))[:, target.shell] * target.has_mean
    scale = rng.uniform(0.1, 1.0, size=(87, shells))[:, target.shell]
    return Statistics(mean, scale)


def constants(targets: Sequence[str] = tuple(TARGETS), elements=ELEMENTS) -> Constants:
    """Constants of a potential with a head for each of the per-atom ``targets``."""
    statistics = {n: random_statistics(n) for n in targets if not n.startswith("xtb_")}
    return Constants(tuple(elements), 2.0, 4.0, statistics)


def heads(kind: str, targets: Sequence[str] = tuple(TARGETS)) -> tuple[tuple[str, str], ...]:
    """One head of ``kind`` for each target; the xTB energy and forces share an energy readout."""
    return tuple((n, "energy" if n.startswith("xtb_") else kind) for n in targets)


def split_heads(params: Any) -> tuple[dict, dict]:
    """(backbone and energy readout, everything that only auxiliary targets need)."""
    auxiliary = {k: v for k, v in params.items() if k.startswith("head_") or k == "xtb_energy"}
    return {k: v for k, v in params.items() if k not in auxiliary}, auxiliary
