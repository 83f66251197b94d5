"""Which structures share a batch: packing to one fixed size, shuffled by (seed, epoch) alone.

The structures of an epoch come in a random order. A batch takes the oldest waiting structures until
the edges still free are about those of one large structure; from then on it takes, of the next few
hundred structures in that order, the largest that fits (best fit with bounded lookahead). The
oldest always goes first, so no structure waits long and the order stays random; the closing choice
fills the edges.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from orbq.errors import InputError
from orbq.preprocess.pool import Pool

LOOKAHEAD = 256  # structures among which a batch chooses its last members
CLOSING = 3.0  # edges left, in mean structures, at which the choice begins
_SAMPLE = 5_000  # structures on which a budget is measured
_FILLS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9)  # edge fills tried
_QUANTILES = (0.8, 0.95, 1.0)  # of the atoms per batch, tried as the node budget
_SHIFT = 40  # a sort key is edges << _SHIFT | place in the order


class Budget(NamedTuple):
    """Padded sizes of every batch: nodes, edges, graphs.

    They include one padding graph, one padding node and one padding edge, so that at most
    ``n_node - 1`` atoms, ``n_edge - 1`` edges and ``n_graph - 1`` structures are real.
    """

    n_node: int
    n_edge: int
    n_graph: int


class Fill(NamedTuple):
    """Real over padded size, mean over batches: of nodes, of edges, of graphs."""

    node: float
    edge: float
    graph: float


def make_plan(
    n_nodes: np.ndarray, n_edges: np.ndarray, budget: Budget, seed: int, epoch: int
) -> list[np.ndarray]:
    """The batches of one epoch: index arrays that hold every structure exactly once.

    n_nodes, n_edges: [P] sizes. A pure function of its arguments.
    Raises InputError when a structure is larger than the budget.
    """
    check_fits(n_nodes, n_edges, budget)
    order = np.random.default_rng([seed, epoch]).permutation(len(n_nodes))
    return list(_pack(order, n_nodes, n_edges, budget))


def epoch_plan(
    pool: Pool, n_labelled: int, share: float, budget: Budget, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of one epoch, of its ``epoch_items``."""
    items = epoch_items(pool, n_labelled, share, seed, epoch)
    plan = make_plan(pool.n_nodes[items], pool.n_edges[items], budget, seed, epoch)
    return [items[batch] for batch in plan]


def epoch_items(pool: Pool, n_labelled: int, share: float, seed: int, epoch: int) -> np.ndarray:
    """The first ``n_labelled`` items, and so many of the others, chosen anew each epoch, that they
    make up ``share`` of the structures; all of them if there are too few, or at a share of 1."""
    items = np.arange(n_labelled)
    if share > 0:
        others = np.random.default_rng([seed, epoch, 2]).permutation(len(pool) - n_labelled)
        wanted = len(others) if share >= 1 else round(share / (1 - share) * n_labelled)
        items = np.concatenate([items, n_labelled + np.sort(others[:wanted])])
    return items


def check_fits(n_nodes: np.ndarray, n_edges: np.ndarray, budget: Budget) -> None:
    """Raise InputError naming the first structure that alone exceeds the budget."""
    if budget.n_graph < 2:
        raise InputError(f"{budget}: n_graph must be at least 2, one structure and the padding")
    large = np.flatnonzero((n_nodes > budget.n_node - 1) | (n_edges > budget.n_edge - 1))
    if len(large):
        i = int(large[0])
        raise InputError(
            f"structure {i} of the pool has {n_nodes[i]} atoms and {n_edges[i]} edges; the batch"
            f" holds {budget.n_node - 1} atoms, {budget.n_edge - 1} edges, {budget.n_graph - 1}"
            " structures: measure the budget on this pool, or raise it"
        )


class _Waiting:
    """The next structures of the order, findable by age and by number of edges."""

    def __init__(self, order: np.ndarray, n_nodes: np.ndarray, n_edges: np.ndarray) -> None:
        self._order, self._n_nodes, self._n_edges = order, n_nodes, n_edges
        self._head = 0
        self._queue: deque[int] = deque()
        self.keys: list[int] = []  # ascending in edges
        self.nodes: dict[int, int] = {}

    def refill(self) -> bool:
        """Keep at least LOOKAHEAD structures waiting; False when none is left at all."""
        if len(self.keys) < LOOKAHEAD and self._head < len(self._order):
            place = np.arange(self._head, min(self._head + LOOKAHEAD, len(self._order)))
            items = self._order[place]
            keys = ((self._n_edges[items].astype(np.int64) << _SHIFT) | place).tolist()
            self.nodes.update(zip(keys, self._n_nodes[items].tolist(), strict=True))
            self._queue.extend(keys)
            self.keys = sorted(self.keys + keys)
            self._head = int(place[-1]) + 1
        return bool(self.keys)

    def oldest(self) -> int:
        """Key of the structure that has waited longest."""
        while self._queue[0] not in self.nodes:
            self._queue.popleft()
        return self._queue[0]

    def best_fit(self, free_edges: int, free_nodes: int) -> int | None:
        """Key of the structure with the most edges among those that fit, None if none does."""
        place = bisect_right(self.keys, (free_edges + 1) << _SHIFT) - 1
        while place >= 0:
            key = self.keys[place]
            if self.nodes[key] <= free_nodes:
                return key
            place -= 1
        return None

    def take(self, key: int) -> int:
        """Remove a structure; its number of atoms."""
        del self.keys[bisect_right(self.keys, key) - 1]
        return self.nodes.pop(key)


def _pack(
    order: np.ndarray, n_nodes: np.ndarray, n_edges: np.ndarray, budget: Budget
) -> Iterator[np.ndarray]:
    waiting = _Waiting(order, n_nodes, n_edges)
    closing = CLOSING * float(n_edges.mean())
    place = (1 << _SHIFT) - 1
    while waiting.refill():
        members: list[int] = []
        nodes, edges = budget.n_node - 1, budget.n_edge - 1
        while len(members) < budget.n_graph - 1 and waiting.refill():
            key: int | None = waiting.oldest()
            assert key is not None
            fits = key >> _SHIFT <= edges and waiting.nodes[key] <= nodes
            if members and (edges <= closing or not fits):
                key = waiting.best_fit(edges, nodes)
                if key is None:
                    break
            nodes -= waiting.take(key)
            edges -= key >> _SHIFT
            members.append(key & place)
        yield order[members]


def fill_rates(
    plan: list[np.ndarray], n_nodes: np.ndarray, n_edges: np.ndarray, budget: Budget
) -> Fill:
    """Mean fill of the batches of a plan."""
    n = max(len(plan), 1)
    items = np.concatenate(plan) if plan else np.zeros(0, np.int64)
    real = n_nodes[items].sum(), n_edges[items].sum(), len(items)
    return Fill(*(float(r) / (n * size) for r, size in zip(real, budget, strict=True)))


# --------------------------------------------------------------------------- the budget


def choose_budget(n_nodes: np.ndarray, n_edges: np.ndarray, batch_size: float) -> Budget:
    """The budget that packs these structures best at ``batch_size`` structures a batch on average.

    n_nodes, n_edges: [P] sizes. Trial epochs over at most 5,000 of them are packed for a few edge
    budgets around ``batch_size`` times the mean; the nodes and graphs of a budget are a high
    quantile of what its batches then hold, and the budget of the best fill is taken. Every single
    structure fits; where the largest needs more edges than ``batch_size`` mean structures, the
    batches hold more structures than asked for, with a warning that names it.

    Raises InputError when ``batch_size`` is below 1 or there is no structure.
    """
    if not (np.isfinite(batch_size) and batch_size >= 1) or len(n_nodes) == 0:
        raise InputError(
            f"batch size {batch_size}, {len(n_nodes)} structures: it must be at least 1 (mean"
            " structures per batch), of a pool that is not empty"
        )
    sample = _sample(len(n_nodes))
    nodes, edges = n_nodes[sample], n_edges[sample]
    largest = Budget(int(n_nodes.max()) + 1, int(n_edges.max()) + 1, 2)
    best, best_score = largest, -np.inf
    for n_edge in _edge_budgets(edges, batch_size, largest.n_edge):
        for budget in _candidates(nodes, edges, n_edge, batch_size, largest):
            score = _score(nodes, edges, budget, batch_size)
            if score > best_score:
                best, best_score = budget, score
    _warn_if_crowded(n_edges, best, batch_size)
    return best


def mean_size(n_nodes: np.ndarray, n_edges: np.ndarray, budget: Budget) -> float:
    """How many structures a batch of this budget holds on average, of at most 5,000 of them."""
    sample = _sample(len(n_nodes))
    return len(sample) / len(make_plan(n_nodes[sample], n_edges[sample], budget, 0, 0))


def _sample(n: int) -> np.ndarray:
    if n > _SAMPLE:
        return np.random.default_rng(0).choice(n, _SAMPLE, replace=False)
    return np.arange(n)


def _score(nodes: np.ndarray, edges: np.ndarray, budget: Budget, batch_size: float) -> float:
    """How well trial epochs fill a budget; the fewer the structures, the more epochs are tried."""
    epochs = range(min(max(_SAMPLE // len(nodes), 1), 8))
    plans = [make_plan(nodes, edges, budget, 0, epoch) for epoch in epochs]
    rates = [fill_rates(plan, nodes, edges, budget) for plan in plans]
    edge, node = (float(np.mean([rate[i] for rate in rates])) for i in (1, 0))
    mean_size = len(nodes) * len(plans) / sum(len(plan) for plan in plans)
    # edges cost most, nodes some, graphs nothing; and the batch size was asked for
    return edge + node / 4 - abs(mean_size / batch_size - 1.0) / 4


def _edge_budgets(edges: np.ndarray, batch_size: float, smallest: int) -> list[int]:
    """Edge budgets to try: around the mean batch, and such that a small pool divides evenly."""
    total = max(float(edges.sum()), 1.0)
    batches = len(edges) / batch_size
    tried = {np.ceil(total / batches / fill) for fill in _FILLS}
    for n in {max(1, round(batches) + step) for step in (-1, 0, 1)}:
        if abs(n - batches) <= max(0.1 * batches, 0.5):
            tried |= {np.ceil(total / n / fill) for fill in (0.96, 0.98, 1.0)}
    return sorted({max(int(size) + 1, smallest) for size in tried})


def _candidates(
    nodes: np.ndarray, edges: np.ndarray, n_edge: int, batch_size: float, largest: Budget
) -> Iterator[Budget]:
    """Budgets of ``n_edge`` edges whose nodes are quantiles of what such batches hold."""
    crowd = max(int(np.ceil(4 * batch_size * n_edge / (batch_size * edges.mean() + 1))), 8)
    open_budget = Budget(int(nodes.sum()) + 1, n_edge, crowd + 1)
    plan = make_plan(nodes, edges, open_budget, 0, 0)
    n_node = np.array([nodes[batch].sum() for batch in plan])
    n_graph = int(np.quantile([len(batch) for batch in plan], 0.99)) + 2
    for quantile in _QUANTILES:
        size = int(np.quantile(n_node, quantile)) + 1
        yield Budget(max(size, largest.n_node), n_edge, n_graph)


def _warn_if_crowded(n_edges: np.ndarray, budget: Budget, batch_size: float) -> None:
    fitting = (budget.n_edge - 1) / max(float(n_edges.mean()), 1.0)
    if fitting > 2 * batch_size:
        i = int(n_edges.argmax())
        warnings.warn(
            f"structure {i} of the pool has {n_edges[i]} edges, so that a batch holds"
            f" {fitting:.0f} structures on average instead of {batch_size:g}: leave it out or"
            " shorten the cutoff if that is too many",
            stacklevel=3,
        )
