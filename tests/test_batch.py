"""What is in a batch: shapes, padding, every array and target of every structure, masks."""

from __future__ import annotations

import os

import numpy as np
import pytest
from memory_dataset import MemoryDataset, random_molecules
from packers import (
    CUTOFF,
    EVERY_TARGET,
    assert_same,
    crystals,
    make_packer,
    molecules_and_crystals,
    pool_with,
)

from orbq.errors import InputError, OrbqError
from orbq.preprocess import gather
from orbq.preprocess.neighbors import neighbor_list
from orbq.preprocess.pack import Packer, Part, Pool, measure_budget
from orbq.preprocess.references import References
from orbq.targets import TARGETS


@pytest.fixture(scope="module")
def dataset() -> MemoryDataset:
    return molecules_and_crystals()


@pytest.fixture(scope="module")
def pool(dataset: MemoryDataset) -> Pool:
    return pool_with(dataset)


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
