"""The packer: nothing lost, nothing twice, order from (seed, epoch) alone, full batches."""

from __future__ import annotations

import gzip
import io
import threading
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packers import assert_same, make_packer, molecules_and_crystals, pool_with

from orbq.errors import InputError
from orbq.preprocess.neighbors import molecule_edges
from orbq.preprocess.pack import Budget, Packer, Pool, fill, measure_budget, prefetch
from orbq.preprocess.plan import choose_budget, fill_rates, make_plan

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def pool() -> Pool:
    return pool_with(molecules_and_crystals())


def real(batches):
    """Places in the pool of all real structures, sorted."""
    return sorted(i for batch in batches for i in batch.index[batch.mask].tolist())


# --------------------------------------------------------------------------- which structures

SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 900)), min_size=1, max_size=300)


@settings(max_examples=80, deadline=None)
@given(
    sizes=SIZES, batch_size=st.floats(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 9)
)
@pytest.mark.filterwarnings("ignore:structure .* has .* edges")
def test_plan_holds_every_structure_once_within_the_budget(sizes, batch_size, seed, epoch):
    n_nodes, n_edges = np.array(sizes, np.int32).T
    budget = choose_budget(n_nodes, n_edges, batch_size)
    plan = make_plan(n_nodes, n_edges, budget, seed, epoch)
    assert np.array_equal(np.sort(np.concatenate(plan)), np.arange(len(sizes)))
    for batch in plan:
        assert 1 <= len(batch) <= budget.n_graph - 1
        assert n_nodes[batch].sum() <= budget.n_node - 1
        assert n_edges[batch].sum() <= budget.n_edge - 1
    again = make_plan(n_nodes.copy(), n_edges.copy(), Budget(*budget), seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))


def test_order_depends_on_seed_and_epoch(pool):
    def first(seed, epoch):
        return np.concatenate(make_packer(pool, seed=seed).plan(epoch)).tolist()

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_order_is_random_and_nobody_waits_long():
    """A structure's place in the epoch is that of the permutation to within the lookahead."""
    rng = np.random.default_rng(0)
    n_edges = rng.integers(50, 400, 6000)
    n_nodes = n_edges // 12 + 1
    budget = choose_budget(n_nodes, n_edges, 16)
    plan = make_plan(n_nodes, n_edges, budget, 3, 0)
    permutation = np.random.default_rng([3, 0]).permutation(6000)
    place, planned = np.empty(6000), np.empty(6000)
    place[permutation], planned[np.concatenate(plan)] = np.arange(6000), np.arange(6000)
    assert np.abs(place - planned).max() < 600  # two lookaheads and a batch
    mean = np.array([n_edges[batch].mean() for batch in plan])
    # batches are not sorted by size: early and late ones look alike (6 standard errors)
    third = len(mean) // 3
    error = np.hypot(mean[:third].std(), mean[-third:].std()) / np.sqrt(third)
    assert abs(mean[:third].mean() - mean[-third:].mean()) < 6 * error


def sizes_of(name: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    path = DATA / f"{name}.extxyz.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    text = io.StringIO(gzip.decompress(path.read_bytes()).decode())  # ASE is slow on packed files
    frames = ase.io.read(text, format="extxyz", index=f":{limit}")
    n = np.array([len(atoms) for atoms in frames])
    return n, molecule_edges(np.concatenate([a.positions for a in frames]), n, 5.0)[0]


@pytest.fixture(scope="module")
def mixed_sizes() -> tuple[np.ndarray, np.ndarray]:
    """QM7 (15 atoms), tmc (8) and tmQMg (53) in one pool."""
    parts = [sizes_of("qm7", 600), sizes_of("tmc", 400), sizes_of("tmqmg_479", 150)]
    n_nodes, n_edges = (np.concatenate(column) for column in zip(*parts, strict=True))
    return n_nodes, n_edges


@pytest.mark.parametrize("batch_size", [5, 8, 16, 32])
@pytest.mark.filterwarnings("ignore:structure .* has .* edges")
def test_fill_on_mixed_sizes(mixed_sizes, batch_size):
    n_nodes, n_edges = mixed_sizes
    budget = choose_budget(n_nodes, n_edges, batch_size)
    for epoch in range(3):
        plan = make_plan(n_nodes, n_edges, budget, 7, epoch)
        rates = fill_rates(plan, n_nodes, n_edges, budget)
        assert rates.edge >= 0.93
        assert rates.node >= 0.65
    asked = max(batch_size, n_edges.max() / n_edges.mean())  # every structure must fit
    assert len(n_nodes) / len(plan) == pytest.approx(asked, rel=0.15)


@pytest.mark.parametrize("batch_size", [5, 8, 16, 32])
def test_fill_on_equal_and_nearly_equal_sizes(batch_size):
    """500 frames of one molecule: the budget must be a whole number of them."""
    rng = np.random.default_rng(0)
    n_nodes, n_edges = np.full(500, 15), 182 + 2 * rng.integers(-2, 3, 500)
    budget = choose_budget(n_nodes, n_edges, batch_size)
    plan = make_plan(n_nodes, n_edges, budget, 0, 0)
    assert fill_rates(plan, n_nodes, n_edges, budget).edge >= 0.93


def test_one_huge_structure_is_named():
    n_edges = np.append(np.full(100, 50), 5000)
    with pytest.warns(UserWarning, match="structure 100 of the pool has 5000 edges"):
        budget = choose_budget(n_edges // 5, n_edges, 4)
    assert budget.n_edge == 5001 and budget.n_node >= 1001


def test_budget_errors(pool):
    with pytest.raises(InputError, match="batch size 0"):
        measure_budget(pool, 0)
    with pytest.raises(InputError, match=r"structure \d+ of the pool has .* edges"):
        Packer(pool, Budget(1000, 10, 10), ["forces"])
    with pytest.raises(InputError, match="n_graph"):
        Packer(pool, Budget(1000, 10_000, 1), ["forces"])
    packer = make_packer(pool)
    with pytest.raises(InputError, match="do not fit"):
        packer.batch(np.arange(len(pool)))


# --------------------------------------------------------------------------- epochs and shards


@pytest.mark.parametrize("n_shards", [1, 2, 3, 7])
def test_every_structure_once_over_all_shards(pool, n_shards):
    packer = make_packer(pool, targets=["energy"])
    shards = [list(packer.epoch(2, shard=(s, n_shards))) for s in range(n_shards)]
    assert real(b for shard in shards for b in shard) == list(range(len(pool)))
    assert {len(shard) for shard in shards} == {packer.n_batches(2, (0, n_shards))}


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_restart_in_the_middle_of_an_epoch(pool, shard):
    packer = make_packer(pool)
    whole = list(packer.epoch(4, shard=shard))
    for start in range(len(whole) + 1):
        rest = list(make_packer(pool).epoch(4, start_batch=start, shard=shard))
        assert len(rest) == len(whole) - start
        for a, b in zip(rest, whole[start:], strict=True):
            assert_same(a, b)


def test_epochs_padded_to_one_length(pool):
    packer = make_packer(pool, targets=["energy"])
    batches = list(packer.epoch(0, n_batches=packer.n_batches(0) + 3))
    assert [bool(b.mask.any()) for b in batches[-4:]] == [True, False, False, False]
    assert real(batches) == list(range(len(pool)))
    with pytest.raises(InputError, match="not 1"):
        next(packer.epoch(0, n_batches=1))
    with pytest.raises(InputError, match="shard 2 of 2"):
        next(packer.epoch(0, shard=(2, 2)))


def test_fill_of_batches_is_the_fill_of_the_plan(pool):
    packer = make_packer(pool, targets=["energy"])
    rates = np.mean([fill(batch) for batch in packer.epoch(0)], axis=0)
    assert np.allclose(rates, packer.fill(0), atol=1e-12)


# --------------------------------------------------------------------------- prefetch


def test_prefetch_keeps_the_order_and_runs_ahead():
    started = threading.Event()

    def source():
        yield 0
        yield 1
        started.set()
        yield 2

    ahead = prefetch(source(), size=2)
    assert next(ahead) == 0
    assert started.wait(5)  # item 2 is begun while the consumer still holds item 0
    assert list(ahead) == [1, 2]


def test_prefetch_hands_on_the_exception_after_the_items_before_it():
    def source():
        yield 1
        raise ValueError("broken source")

    ahead = prefetch(source())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken source"):
        next(ahead)


@pytest.mark.parametrize("consumed", [1, 5])
def test_prefetch_closes_its_source_and_thread(consumed):
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    ahead = prefetch(source(), size=3)
    for _ in range(consumed):
        next(ahead)
    begin = time.monotonic()
    ahead.close()
    assert closed.is_set() and threading.active_count() == before
    assert time.monotonic() - begin < 2


def test_prefetched_epoch_equals_plain(pool):
    packer = make_packer(pool)
    for a, b in zip(prefetch(packer.epoch(0)), packer.epoch(0), strict=True):
        assert_same(a, b)
