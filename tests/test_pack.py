"""The packer: nothing lost, nothing twice, order from (seed, epoch) alone, full batches."""

from __future__ import annotations

import gzip
import io
import os
import threading
import time
from pathlib import Path

import ase
import ase.build
import ase.io
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_dataset import MemoryDataset, random_molecules

from orbq.errors import InputError, OrbqError
from orbq.preprocess import gather
from orbq.preprocess.neighbors import molecule_edges, neighbor_list
from orbq.preprocess.pack import Budget, Packer, Part, Pool, fill, measure_budget, prefetch
from orbq.preprocess.plan import choose_budget, fill_rates, make_plan
from orbq.preprocess.references import References
from orbq.targets import TARGETS

DATA = Path(__file__).parents[2] / "shared" / "data"
CUTOFF = 4.0
EVERY_TARGET = ("energy", "forces", "stress", *TARGETS)
ZERO = {"energy": References.zero(), "xtb_energy": References.zero()}


def crystals() -> list[ase.Atoms]:
    return [ase.build.bulk("Cu"), ase.build.bulk("NaCl", "rocksalt", a=5.6)]


@pytest.fixture(scope="module")
def dataset() -> MemoryDataset:
    sizes = np.random.default_rng(1).integers(1, 20, 60)
    return MemoryDataset([*random_molecules(sizes), *crystals()])


@pytest.fixture(scope="module")
def pool(dataset) -> Pool:
    other = MemoryDataset(random_molecules([4, 9, 12]), seed=5)
    return Pool([Part(dataset), Part(other, np.array([2, 0]))], CUTOFF)


def make_packer(pool, batch_size=6.0, targets=EVERY_TARGET, **options) -> Packer:
    return Packer(pool, measure_budget(pool, batch_size), targets, ZERO, **options)


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


def assert_same(a, b):
    for name, left, right in zip(a._fields, a, b, strict=True):
        if name == "targets":
            assert left.keys() == right.keys()
            assert all(np.array_equal(left[key], right[key]) for key in left)
        else:
            assert np.array_equal(left, right), name


def test_epochs_padded_to_one_length(pool):
    packer = make_packer(pool, targets=["energy"])
    batches = list(packer.epoch(0, n_batches=packer.n_batches(0) + 3))
    assert [bool(b.mask.any()) for b in batches[-4:]] == [True, False, False, False]
    assert real(batches) == list(range(len(pool)))
    with pytest.raises(InputError, match="not 1"):
        next(packer.epoch(0, n_batches=1))
    with pytest.raises(InputError, match="shard 2 of 2"):
        next(packer.epoch(0, shard=(2, 2)))


# --------------------------------------------------------------------------- what is in a batch


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_types_and_padding(pool, dtype):
    packer = make_packer(pool, dtype=dtype)
    n, e, m = packer.budget
    shapes = {(b.positions.shape, b.shifts.shape, b.mask.shape) for b in packer.epoch(0)}
    assert shapes == {((n, 3), (e, 3), (m,))}
    for batch in [*packer.epoch(0), packer.batch(np.zeros(0, int))]:
        k = int(batch.mask.sum())
        assert batch.mask[:k].all() and not batch.mask[k:].any() and k < m
        assert batch.n_node.sum() == n and batch.n_edge.sum() == e
        assert (batch.n_node[k] >= 1) and (batch.n_edge[k] >= 1)  # all padding is in structure k
        assert not batch.n_node[k + 1 :].any() and not batch.n_edge[k + 1 :].any()
        assert (np.diff(batch.receivers) >= 0).all()
        assert batch.positions.dtype == batch.shifts.dtype == batch.total_charge.dtype == dtype
        assert batch.senders.dtype == batch.receivers.dtype == batch.numbers.dtype == np.int32
        atoms, edges = batch.n_node[:k].sum(), batch.n_edge[:k].sum()
        assert not batch.numbers[atoms:].any() and batch.numbers[:atoms].all()
        assert (batch.senders[edges:] == n - 1).all() and (batch.receivers[edges:] == n - 1).all()
        assert (batch.spin_multiplicity[k:] == 1).all() and not batch.total_charge[k:].any()
        assert (batch.index[k:] == -1).all()
        for name, value in batch.targets.items():
            assert np.isfinite(value).all()
            if name.endswith("/mask"):
                values = batch.targets[name.removesuffix("/mask")]
                assert value.dtype == bool and values.dtype == dtype
                assert not values[~value].any()


def test_padding_edges_lie_beyond_the_cutoff_and_real_ones_within(pool):
    for batch in make_packer(pool).epoch(0):
        x = batch.positions
        r = np.linalg.norm(x[batch.receivers] - x[batch.senders] + batch.shifts, axis=1)
        n_real = batch.n_edge[batch.mask].sum()
        assert (r[:n_real] < CUTOFF + 1e-5).all()  # float32 rounding of positions
        assert (r[n_real:] == 2 * CUTOFF).all()


def test_structures_arrive_whole(pool, dataset):
    """Positions, charges, cells, edges and every target equal those stored, one by one."""
    packer = make_packer(pool, dtype=np.float64)
    starts = pool.starts
    for batch in packer.epoch(1):
        ends = np.cumsum(batch.n_node)
        for g in np.flatnonzero(batch.mask):
            part = int(np.searchsorted(starts, batch.index[g], side="right")) - 1
            data = pool.parts[part].dataset
            row = int(pool.rows[part][batch.index[g] - starts[part]])
            nodes, atoms = slice(ends[g] - batch.n_node[g], ends[g]), data.rows(row)
            assert np.array_equal(batch.positions[nodes], data.arrays["positions"][atoms])
            assert np.array_equal(batch.numbers[nodes], data.arrays["numbers"][atoms])
            assert batch.total_charge[g] == data.arrays["total_charge"][row]
            assert batch.spin_multiplicity[g] == data.arrays["spin_multiplicity"][row]
            assert np.array_equal(batch.cell[g], data.arrays["cell"][row])
            assert_edges(batch, nodes, data, row)
            assert_targets(batch, g, nodes, data, row)


def assert_edges(batch, nodes, data, row):
    cell, pbc = data.arrays["cell"][row], data.arrays["pbc"][row]
    expected = neighbor_list(data.arrays["positions"][data.rows(row)], CUTOFF, cell, pbc)
    mine = (batch.receivers >= nodes.start) & (batch.receivers < nodes.stop)
    assert np.array_equal(batch.senders[mine] - nodes.start, expected.senders)
    assert np.array_equal(batch.receivers[mine] - nodes.start, expected.receivers)
    assert np.allclose(batch.shifts[mine], expected.shifts, atol=1e-12)


def assert_targets(batch, g, nodes, data, row):
    arrays, atoms, targets = data.arrays, data.rows(row), batch.targets
    for name in ("energy", "xtb_energy", "stress"):
        assert targets[f"{name}/mask"][g] and np.array_equal(targets[name][g], arrays[name][row])
    for name in ("forces", "xtb_forces"):
        assert targets[f"{name}/mask"][nodes].all()
        assert np.array_equal(targets[name][nodes], arrays[name][atoms])
    for name, target in TARGETS.items():
        if not name.startswith("xtb_"):
            mask = target.mask(arrays["numbers"][atoms], True)
            assert np.array_equal(targets[f"{name}/mask"][nodes], mask)
            expected = np.where(mask, target.extract(arrays, atoms), 0.0)
            assert np.allclose(targets[name][nodes], expected, atol=1e-12)


LABELS = ("energy", "forces", "stress", "onsite", "dft_charges", "xtb_energy", "xtb_forces")
MASK_OF = {"orbital": "onsite", "density": "onsite", "shell": "onsite", "atomic": "onsite"} | {
    "dft": "dft_charges"
}


def test_labels_are_masked_independently():
    """Any subset of labels per structure; NaNs where a label is missing never come through."""
    rng = np.random.default_rng(3)
    data = MemoryDataset(random_molecules(rng.integers(1, 9, 64)))
    structure = np.repeat(np.arange(len(data)), np.diff(data.arrays["offsets"]))
    for name in LABELS:
        mask = rng.random(len(data)) < 0.5
        data.arrays[f"{name}_mask"] = mask
        missing = ~mask if len(data.arrays[name]) == len(data) else ~mask[structure]
        data.arrays[name][missing] = np.nan
    pool = Pool([Part(data)], CUTOFF)
    packer = make_packer(pool)
    for batch in packer.epoch(0):
        k = int(batch.mask.sum())
        node_of = np.repeat(batch.index[:k], batch.n_node[:k])
        for name in EVERY_TARGET:
            stored = data.arrays[f"{MASK_OF.get(name, name)}_mask"]
            mask = batch.targets[f"{name}/mask"]
            per_atom = len(mask) == packer.budget.n_node
            items = node_of if per_atom else batch.index[:k]
            assert np.array_equal(
                mask[: len(items)].any(axis=tuple(range(1, mask.ndim))), stored[items]
            )
            assert not mask[len(items) :].any()
            assert np.isfinite(batch.targets[name]).all()
    counts = packer.n_labelled()
    assert counts == {n: int(data.arrays[f"{MASK_OF.get(n, n)}_mask"].sum()) for n in EVERY_TARGET}


def test_labels_of_a_part_can_be_ignored_or_absent(dataset):
    bare = MemoryDataset(random_molecules([3, 4]))
    del bare.arrays["energy"], bare.arrays["energy_mask"], bare.arrays["onsite"]
    pool = Pool([Part(dataset, None, ("energy", "forces")), Part(bare)], CUTOFF)
    packer = make_packer(pool, targets=["energy", "forces", "onsite"])
    assert packer.n_labelled() == {"energy": 0, "forces": 2, "onsite": len(dataset)}
    for batch in packer.epoch(0):
        assert not batch.targets["energy/mask"].any() and not batch.targets["energy"].any()
    with pytest.raises(InputError, match="ignores 'enrgy'"):
        Pool([Part(dataset, None, ("enrgy",))], CUTOFF)


def test_reference_energies_leave_in_float64_before_the_cast():
    """Totals near 1e4 eV keep 1e-6 eV; cast first, they would be rounded to 1e-3 eV."""
    rng = np.random.default_rng(0)
    data = MemoryDataset(random_molecules(np.full(40, 10)))
    table = References(rng.uniform(-2000.0, -500.0, 87), -7.5, True, np.ones(87, bool))
    n_node = np.diff(data.arrays["offsets"])
    e0 = table.of_many(data.arrays["numbers"], n_node, data.arrays["total_charge"])
    rest = rng.normal(size=40)
    assert np.abs(e0).max() > 1e4
    data.arrays["energy"] = e0 + rest
    data.arrays["xtb_energy"] = rest.copy()
    references = {"energy": table, "xtb_energy": References.zero()}
    pool = Pool([Part(data)], CUTOFF)
    packer = Packer(pool, measure_budget(pool, 8), ["energy", "xtb_energy"], references)
    for batch in packer.epoch(0):
        for name in ("energy", "xtb_energy"):
            error = np.abs(batch.targets[name][batch.mask] - rest[batch.index[batch.mask]])
            assert batch.targets[name].dtype == np.float32 and error.max() < 1e-6


def test_bad_targets_and_pools(pool, dataset):
    budget = measure_budget(pool, 4)
    with pytest.raises(InputError, match="did you mean 'orbital'"):
        Packer(pool, budget, ["orbitals"])
    with pytest.raises(InputError, match="'energy' needs reference energies"):
        Packer(pool, budget, ["energy"])
    with pytest.raises(InputError, match="holds no structure"):
        Pool([], CUTOFF)
    with pytest.raises(InputError, match=r"index 62 lies outside the 62"):
        Pool([Part(dataset, np.array([0, 62]))], CUTOFF)


@pytest.mark.parametrize("read_above", [0, 10**9])
def test_data_set_on_disk_gives_the_same_batches(tmp_path, monkeypatch, read_above):
    """Read from its files (what is done with large arrays) or through the mapping."""
    structures = [*random_molecules([3, 8, 1, 13, 2]), *crystals()]
    monkeypatch.setattr(gather, "READ_ABOVE", read_above)
    packers = [
        make_packer(Pool([Part(data)], CUTOFF), 2)
        for data in (MemoryDataset(structures), MemoryDataset(structures).save(tmp_path / "data"))
    ]
    reads = [packer._gather[0]["onsite"]._file is not None for packer in packers]
    assert reads == [False, read_above == 0]
    for a, b in zip(*(p.epoch(0) for p in packers), strict=True):
        assert_same(a, b)


def test_pieces_of_a_mapped_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "READ_ABOVE", 0)
    whole = np.arange(40.0).reshape(20, 2)
    np.save(tmp_path / "a.npy", whole)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    pieces = gather.span(np.array([7, 0, 7]), np.array([2, 3, 0]))
    expected = whole[[7, 8, 0, 1, 2]]
    for array in (whole, mapped, np.asarray(mapped), mapped[:10], mapped[:, :1], mapped[::-1]):
        reader = gather.Gatherer(array)
        assert np.array_equal(reader(pieces), np.asarray(array)[pieces.rows])
    reader = gather.Gatherer(mapped)
    assert reader._file is not None and np.array_equal(reader(pieces), expected)
    os.truncate(tmp_path / "a.npy", mapped.offset + 8)
    with pytest.raises(OrbqError, match=r"a\.npy ends before byte"):
        reader(pieces)


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
