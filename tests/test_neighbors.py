"""Neighbour lists against ASE's, in molecules and periodic cells, and their cache on disk."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import ase
import ase.build
import ase.neighborlist
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_dataset import MemoryDataset, random_molecules

from orbq.errors import InputError, OrbqError
from orbq.preprocess import neighbor_cache
from orbq.preprocess import neighbors as nb
from orbq.preprocess.neighbor_cache import neighbors

SLAB = ase.build.fcc111("Cu", (2, 2, 2))  # periodic in two directions, no third lattice vector
OUTSIDE = ase.build.bulk("NaCl", "rocksalt", a=5.6)
OUTSIDE.positions += [[30.0, -20.0, 7.0], [-11.0, 3.0, 50.0]]  # atoms cells away from their home
TRICLINIC = ase.Atoms(
    "H3",
    [[0, 0, 0], [1, 1, 1], [2.5, 0.2, 0.1]],
    cell=[[3, 0, 0], [1, 2.5, 0], [-1, 0.5, 4]],
    pbc=True,
)
STRUCTURES = {
    "ethanol": ase.build.molecule("CH3CH2OH"),
    "benzene, planar": ase.build.molecule("C6H6"),
    "CO2, linear": ase.build.molecule("CO2"),
    "one atom": ase.Atoms("Ar", [[3.0, -2.0, 1.0]]),
    "two far atoms": ase.Atoms("Ar2", [[0, 0, 0], [100.0, 0, 0]]),
    "300 atoms, above the dense limit": random_molecules([300])[0],
    "box that is not periodic": ase.Atoms("OH", [[0, 0, 0], [0.97, 0, 0]], cell=[1.0, 1.0, 1.0]),
    "Cu, one atom in the cell": ase.build.bulk("Cu"),
    "NaCl, atoms outside the cell": OUTSIDE,
    "triclinic, cutoff beyond the cell": TRICLINIC,
    "slab": SLAB,
}


def edge_set(senders, receivers, shifts):
    """Edges as a set; shifts rounded to 1e-6 Å, far above rounding, far below lattice vectors."""
    rounded = np.round(np.asarray(shifts), 6) + 0.0
    return set(
        zip(
            np.asarray(senders).tolist(),
            np.asarray(receivers).tolist(),
            map(tuple, rounded.tolist()),
            strict=True,
        )
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_edges_equal_ase(name):
    atoms = STRUCTURES[name]
    found = nb.neighbor_list(atoms.positions, 5.0, atoms.cell, atoms.pbc)
    i, j, images = ase.neighborlist.neighbor_list("ijS", atoms, 5.0)
    # ASE: x[j] - x[i] + S cell, so i is the sender
    expected = edge_set(i, j, images @ atoms.cell.array)
    assert edge_set(*found) == expected
    assert len(found.senders) == len(expected)  # none twice
    assert found.senders.dtype == found.receivers.dtype == np.int32


@pytest.mark.parametrize("name", STRUCTURES)
def test_edges_are_sorted_short_and_go_both_ways(name):
    atoms = STRUCTURES[name]
    senders, receivers, shifts = nb.neighbor_list(atoms.positions, 4.0, atoms.cell, atoms.pbc)
    assert (np.diff(receivers.astype(np.int64) * len(atoms) + senders) >= 0).all()
    vectors = atoms.positions[receivers] - atoms.positions[senders] + shifts
    lengths = np.linalg.norm(vectors, axis=1)
    assert (lengths < 4.0).all() and (lengths > 0.1).all()
    assert edge_set(senders, receivers, shifts) == edge_set(receivers, senders, -shifts)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    cutoff=st.floats(0.1, 8.0),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 99),
)
def test_dense_and_cell_list_agree_with_all_pairs(n, cutoff, scale, seed):
    x = np.random.default_rng(seed).normal(size=(n, 3)) * scale
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1) + 1e9 * np.eye(n)
    receivers, senders = np.nonzero(distance < cutoff)
    dense = nb.neighbor_list(x, cutoff)
    assert np.array_equal(dense.receivers, receivers) and np.array_equal(dense.senders, senders)
    listed = nb.cell_list(x, cutoff, np.zeros((3, 3)), np.zeros(3, bool))
    assert np.array_equal(listed[1], receivers) and np.array_equal(listed[0], senders)


def test_many_molecules_equal_one_by_one():
    sizes = [5, 1, 300, 5, 17, 2, 17, 5]
    molecules = random_molecules(sizes)
    x = np.concatenate([m.positions for m in molecules])
    counts, senders, receivers = nb.molecule_edges(x, np.array(sizes), 4.0)
    each = [nb.neighbor_list(m.positions, 4.0) for m in molecules]
    assert counts.tolist() == [len(e.senders) for e in each]
    assert np.array_equal(senders, np.concatenate([e.senders for e in each]))
    assert np.array_equal(receivers, np.concatenate([e.receivers for e in each]))


@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan, np.inf])
def test_bad_cutoff(cutoff):
    with pytest.raises(InputError, match="cutoff"):
        nb.neighbor_list(np.zeros((1, 3)), cutoff)
    with pytest.raises(InputError, match="cutoff"):
        neighbors(MemoryDataset(random_molecules([2])), cutoff)


def test_bad_positions_and_cells():
    with pytest.raises(InputError, match=r"atom 1.*finite"):
        nb.neighbor_list(np.array([[0, 0, 0], [np.nan, 0, 0]]), 5.0)
    with pytest.raises(InputError, match="no volume"):
        nb.neighbor_list(np.zeros((1, 3)), 5.0, np.zeros((3, 3)), True)
    with pytest.raises(InputError, match="no volume"):
        nb.neighbor_list(np.zeros((1, 3)), 5.0, np.ones((3, 3)), True)


# --------------------------------------------------------------------------- of a data set


def mixed() -> MemoryDataset:
    """Molecules and crystals in one data set."""
    molecules = random_molecules([3, 1, 9, 300, 4])
    return MemoryDataset([*molecules[:3], OUTSIDE, TRICLINIC, *molecules[3:], SLAB])


def assert_right(dataset, found, cutoff):
    """Every structure's edges are those of ``neighbor_list``."""
    for i in range(len(dataset)):
        rows, edges = dataset.rows(i), slice(*found.offsets[i : i + 2].tolist())
        cell, pbc = dataset.arrays["cell"][i], dataset.arrays["pbc"][i]
        one = nb.neighbor_list(dataset.arrays["positions"][rows], cutoff, cell, pbc)
        assert np.array_equal(found.senders[edges], one.senders)
        assert np.array_equal(found.receivers[edges], one.receivers)
        if found.images is not None:
            assert np.allclose(found.images[edges] @ cell, one.shifts)


@pytest.mark.parametrize("chunk", [1, 20, 10**6])
@pytest.mark.parametrize("on_disk", [False, True])
def test_data_set(tmp_path, monkeypatch, chunk, on_disk):
    monkeypatch.setattr(neighbor_cache, "_CHUNK_ATOMS", chunk)
    dataset = mixed().save(tmp_path / "data") if on_disk else mixed()
    steps = []
    found = neighbors(dataset, 4.5, lambda done, of: steps.append((done, of)))
    assert_right(dataset, found, 4.5)
    assert steps[-1] == (len(dataset), len(dataset))
    assert found.senders.dtype == np.uint16  # the largest structure has 300 atoms


def test_images_only_where_something_is_periodic():
    assert neighbors(MemoryDataset(random_molecules([4, 5])), 4.0).images is None
    assert neighbors(mixed(), 4.0).images.dtype == np.int16


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1]])
def test_isolated_atoms_have_no_edges(tmp_path, sizes):
    dataset = MemoryDataset(random_molecules(sizes)).save(tmp_path / "data")
    for _ in range(2):  # written, then opened
        found = neighbors(dataset, 5.0)
        assert found.offsets.tolist() == [0] * (len(sizes) + 1) and len(found.senders) == 0


def test_cache_is_used_and_kept_apart_by_cutoff(tmp_path, monkeypatch):
    dataset = mixed().save(tmp_path / "data")
    first = neighbors(dataset, 4.0)
    neighbors(dataset, 4.5)
    assert sorted(p.name for p in dataset.path.glob("neighbors*")) == [
        "neighbors-4",
        "neighbors-4.5",
    ]
    monkeypatch.setattr(neighbor_cache, "_chunks", None)  # would fail if it computed again
    again = neighbors(dataset, 4.0)
    assert isinstance(again.senders.base, np.memmap) or again.senders.base is not None
    assert np.array_equal(first.receivers, again.receivers)


def _other_manifest(place: Path) -> None:
    (place.parent / "manifest.json").write_text('{"changed": true}')


def _truncated(place: Path) -> None:
    data = (place / "senders.npy").read_bytes()
    (place / "senders.npy").write_bytes(data[: len(data) // 2])


def _no_meta(place: Path) -> None:
    (place / "meta.json").unlink()


def _other_version(place: Path) -> None:
    meta = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps({**meta, "version": -1}))


@pytest.mark.parametrize("damage", [_other_manifest, _truncated, _no_meta, _other_version])
def test_stale_or_damaged_cache_is_made_again(tmp_path, damage):
    dataset = mixed().save(tmp_path / "data")
    neighbors(dataset, 4.0)
    damage(dataset.path / "neighbors-4")
    assert_right(dataset, neighbors(dataset, 4.0), 4.0)
    assert [p.name for p in dataset.path.glob("neighbors*")] == ["neighbors-4"]  # nothing left over


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    dataset = mixed().save(tmp_path / "data")
    host = neighbor_cache.socket.gethostname()
    left = dataset.path / f"neighbors-4.tmp-{host}-999999999-abc"
    foreign = dataset.path / "neighbors-4.tmp-another.host-1-abc"
    left.mkdir()
    foreign.mkdir()
    neighbors(dataset, 4.0)
    assert not left.exists() and foreign.exists()


def test_two_at_once(tmp_path):
    dataset = mixed().save(tmp_path / "data")
    results: list = []
    threads = [
        threading.Thread(target=lambda: results.append(neighbors(dataset, 4.0))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for found in results:
        assert_right(dataset, found, 4.0)
    assert [p.name for p in dataset.path.glob("neighbors*")] == ["neighbors-4"]


def _failing(monkeypatch, code):
    def fail(*_args):
        raise OSError(code, "injected")

    monkeypatch.setattr(neighbor_cache, "_write", fail)


def test_read_only_data_set_is_held_in_memory(tmp_path, monkeypatch):
    dataset = mixed().save(tmp_path / "data")
    _failing(monkeypatch, errno.EROFS)
    with pytest.warns(UserWarning, match="cannot be written"):
        found = neighbors(dataset, 4.0)
    assert_right(dataset, found, 4.0)


def test_full_disk(tmp_path, monkeypatch):
    dataset = mixed().save(tmp_path / "data")
    _failing(monkeypatch, errno.ENOSPC)
    with pytest.raises(OrbqError, match="make room"):
        neighbors(dataset, 4.0)
    assert not list(dataset.path.glob("neighbors*"))
