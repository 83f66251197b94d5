"""What a network has learnt of the elements: its atoms' latent features, and how they cluster.

An atom's features are the scalars after the last layer, from which its energy is read. Each channel
is divided by its deviation over all atoms looked at, so that none counts more for its scale; an
element is the mean over its atoms. Whether elements of one group (or row) lie together is told by
two numbers, with the share of random exchanges of the labels that reach them:

    silhouette   mean over elements of (b - a) / max(a, b), with a the mean distance to the elements
                 of the same label and b that to the nearest other label (0 for a label of its own);
                 Rousseeuw, J. Comput. Appl. Math. 20, 53 (1987)
    purity       share of the elements whose nearest neighbour has the same label

The maps need scikit-learn (extra ``explore``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from orbq.data import to_batch
from orbq.elements import group, row
from orbq.errors import InputError
from orbq.inference import budget_of
from orbq.models.potential import Params, node_features, smallest_graph
from orbq.orbitals import SYMBOLS, shells
from orbq.preprocess.flat import ragged_rows
from orbq.preprocess.pack import Packer
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.prefetch import prefetch
from orbq.preprocess.store import Dataset
from orbq.run import Run
from orbq.targets import TARGETS

MIN_ELEMENTS = 4
N_PERMUTATIONS = 999
LABELS: Mapping[str, Callable[[int], int]] = {"group": group, "row": row}
_FLAT = 1e-6  # of the largest deviation: a channel below it holds nothing


class Atoms(NamedTuple):
    """The atoms that are looked at, one after another.

    rows: [S] structures of the data set that hold any. structure: [A] place in ``rows``. atom: [A]
    place in the structure. numbers: [A]. d_electrons: [A] of the d shell, by the xTB labels; NaN
    without.
    """

    rows: np.ndarray
    structure: np.ndarray
    atom: np.ndarray
    numbers: np.ndarray
    d_electrons: np.ndarray


class Elements(NamedTuple):
    """numbers [K] ascending. counts [K]: atoms. d_electrons [K]: mean of the atoms, or what the xTB
    method gives the free atom where no atom has a label."""

    numbers: np.ndarray
    counts: np.ndarray
    d_electrons: np.ndarray

    @property
    def symbols(self) -> list[str]:
        """As in the periodic table."""
        return [SYMBOLS[z] for z in self.numbers]

    def labels(self, name: str) -> np.ndarray:
        """[K] group or row."""
        return np.array([LABELS[name](int(z)) for z in self.numbers])


class Statistic(NamedTuple):
    """How elements cluster by a label. chance: mean over random exchanges of the labels. p: share
    of them (of N + 1, this one included) that reach the value. each [K]: of every element."""

    value: float
    chance: float
    p: float
    each: np.ndarray


# --------------------------------------------------------------------------- atoms


def choose_atoms(
    dataset: Dataset, rows: np.ndarray, elements: Sequence[int], known: Sequence[int]
) -> Atoms:
    """The atoms of ``elements`` in those of ``rows`` that hold no element beyond ``known``.

    Raises InputError when fewer than MIN_ELEMENTS elements are left.
    """
    rows = np.asarray(rows, np.int64)
    n_node = dataset.n_atoms[rows]
    flat = ragged_rows(np.asarray(dataset["offsets"])[rows], n_node)
    numbers = np.asarray(dataset["numbers"][flat])
    structure = np.repeat(np.arange(len(rows)), n_node)
    strange = np.bincount(structure[~np.isin(numbers, known)], minlength=len(rows)) > 0
    picked = np.isin(numbers, elements) & ~strange[structure]
    found = np.unique(numbers[picked])
    if len(found) < MIN_ELEMENTS:
        what = ", ".join(SYMBOLS[z] for z in found) or "none"
        raise InputError(
            f"{dataset.path}: at least {MIN_ELEMENTS} elements are needed, found {what} in "
            "structures that the runs know; name others with --elements, or use another data set"
        )
    atom = np.arange(len(flat)) - np.repeat(np.cumsum(n_node) - n_node, n_node)
    used, place = np.unique(structure[picked], return_inverse=True)
    d = _d_electrons(dataset, flat[picked], rows[structure[picked]], numbers[picked])
    return Atoms(rows[used], place, atom[picked], numbers[picked], d)


def _d_electrons(
    dataset: Dataset, flat: np.ndarray, rows: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    target = TARGETS["shell"]
    labelled = np.all([np.asarray(dataset.mask(f))[rows] for f in target.fields], axis=0)
    charges = target.extract(dataset.arrays, flat)[:, -1]
    occupation = shells(dataset.method).occupation[numbers, -1]
    return np.where(labelled, occupation - charges, np.nan)


def elements_of(atoms: Atoms, method: str) -> Elements:
    """The elements of the atoms, ascending."""
    numbers, counts = np.unique(atoms.numbers, return_counts=True)
    free = shells(method).occupation[numbers, -1]
    means = np.array(
        [
            np.nanmean(d) if np.isfinite(d := atoms.d_electrons[atoms.numbers == z]).any() else f
            for z, f in zip(numbers, free, strict=True)
        ]
    )
    return Elements(numbers, counts, means)


# --------------------------------------------------------------------------- features


def features_of(
    run: Run,
    dataset: Dataset,
    atoms: Atoms,
    batch_size: float = 16,
    params: Params | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Latent features [A, C] of the atoms. params: None for the run's own. progress: called with
    (done, all structures)."""
    pool = Pool([Part(dataset, atoms.rows)], run.potential.architecture.cutoff)
    dtype = np.dtype(run.config.training.precision)
    packer = Packer(pool, budget_of(pool, batch_size), targets=(), dtype=dtype)
    starts = np.searchsorted(atoms.structure, np.arange(len(atoms.rows) + 1))

    @jax.jit
    def program(params: Params, positions: Any, graph: Any) -> Any:
        return node_features(run.potential, params, positions, graph)

    out: np.ndarray | None = None
    done = 0
    for packed in prefetch(map(packer.batch, packer.plan(0))):
        batch = to_batch(packed)
        found = np.asarray(program(params or run.params, batch.positions, batch.graph))
        out = np.zeros((len(atoms.numbers), found.shape[1])) if out is None else out
        begins = np.cumsum(packed.n_node) - packed.n_node
        for place, item in enumerate(packed.index[packed.mask].tolist()):
            own = slice(starts[item], starts[item + 1])
            out[own] = found[begins[place] + atoms.atom[own]]
        done += int(packed.mask.sum())
        if progress is not None:
            progress(done, len(atoms.rows))
    assert out is not None  # a pool is never empty
    return out


def untrained(run: Run, seed: int = 0) -> Params:
    """Initial parameters of a run's network: what its form alone knows of the elements."""
    dtype = jax.dtypes.canonicalize_dtype(run.config.training.precision)
    params: Params = jax.jit(run.potential.init)(jax.random.key(seed), *smallest_graph(dtype))
    return params


def standardised(features: np.ndarray) -> np.ndarray:
    """Channels [A, C2] of mean 0 and deviation 1 over the atoms; those without any are left out."""
    scale = features.std(0)
    varied = scale > _FLAT * scale.max()
    return np.asarray((features - features.mean(0))[:, varied] / scale[varied])


def means_of(features: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """[K, C] mean over the atoms of every element, ascending."""
    return np.stack([features[numbers == z].mean(0) for z in np.unique(numbers)])


# --------------------------------------------------------------------------- statistics


def silhouettes(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Silhouettes [P, K] of K elements for P assignments of labels [P, K], from their distances
    [K, K]."""
    kinds = np.unique(labels)
    member = (labels[..., None] == kinds).astype(float)  # [P, K, G]
    sizes = member.sum(1, keepdims=True)
    sums = distances @ member
    own = (sums * member).sum(-1)
    size = (sizes * member).sum(-1)
    a = own / np.maximum(size - 1, 1)
    others = np.where((member > 0) | (sizes == 0), np.inf, sums / np.maximum(sizes, 1))
    b = others.min(-1)
    return np.asarray(np.where(size > 1, (b - a) / np.maximum(a, b), 0.0))


def hits(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether [P, K] the nearest neighbour has the same label, 0 or 1; as ``silhouettes``."""
    nearest = np.argmin(distances + np.diag(np.full(len(distances), np.inf)), axis=1)
    return np.asarray(labels[:, nearest] == labels, float)


STATISTICS = {"silhouette": silhouettes, "purity": hits}


def clustering(
    means: np.ndarray, labels: np.ndarray, n_permutations: int = N_PERMUTATIONS, seed: int = 0
) -> dict[str, Statistic]:
    """Silhouette and nearest-neighbour purity of elements [K, C] by their labels [K].

    NaN where there is one label alone, or as many as elements.
    """
    if not 1 < len(np.unique(labels)) < len(labels):
        nothing = Statistic(np.nan, np.nan, np.nan, np.full(len(labels), np.nan))
        return dict.fromkeys(STATISTICS, nothing)
    distances = np.linalg.norm(means[:, None] - means, axis=-1)
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(labels) for _ in range(n_permutations)])
    return {
        name: _tested(f(distances, labels[None])[0], f(distances, shuffled).mean(1))
        for name, f in STATISTICS.items()
    }


def _tested(each: np.ndarray, others: np.ndarray) -> Statistic:
    value = float(each.mean())
    reached = np.sum(others >= value - 1e-12)  # equal but for the order of a sum
    return Statistic(value, float(others.mean()), float((1 + reached) / (1 + len(others))), each)


def difference(
    first: Statistic, second: Statistic, n_permutations: int = N_PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """How much more the second clusters, and the two-sided p-value of exchanging the two networks
    element by element; NaN where there is no statistic."""
    each = second.each - first.each
    if np.isnan(each).any():
        return np.nan, np.nan
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_permutations, len(each)))
    others = np.abs((signs * each).mean(1))
    reached = np.sum(others >= abs(each.mean()) - 1e-12)
    return float(each.mean()), float((1 + reached) / (1 + n_permutations))


# --------------------------------------------------------------------------- maps


class Map(NamedTuple):
    """Elements in two dimensions [K, 2]. shares: of the variance along the axes, of a PCA."""

    points: np.ndarray
    shares: tuple[float, float] | None


def principal(means: np.ndarray, atoms: np.ndarray) -> tuple[Map, np.ndarray]:
    """The two principal components of the elements; the atoms [A, C] in the same axes [A, 2]."""
    from sklearn.decomposition import PCA

    model = PCA(2, svd_solver="full").fit(means)
    shares = model.explained_variance_ratio_
    points = Map(model.transform(means), (float(shares[0]), float(shares[1])))
    return points, np.asarray(model.transform(atoms))


def tsne(means: np.ndarray, seed: int = 0) -> Map:
    """t-SNE of the elements: neighbourhoods are kept, distances are not. van der Maaten and Hinton,
    J. Mach. Learn. Res. 9, 2579 (2008)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(means) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return Map(np.asarray(model.fit_transform(means)), None)
