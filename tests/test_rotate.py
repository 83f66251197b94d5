"""Rotated batches: everything turns exactly as the stored irreps say, and as tblite's labels do."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import ase
import ase.build
import jax
import numpy as np
import pytest
from graphs import CUTOFF, TINY, constants, heads, quick_jit, random_params, random_statistics
from memory_dataset import MemoryDataset, random_molecules

from orbq import orbitals
from orbq.data import to_batch
from orbq.losses import LossSpec, loss_terms
from orbq.models.potential import make_potential, predict
from orbq.preprocess.pack import Packer, Part, Pool, measure_budget
from orbq.preprocess.references import References
from orbq.preprocess.rotate import ROTATE, Turn, random_rotations, representation, turned
from orbq.targets import TARGETS

EXACT = 1e-12  # float64 rounding of rotations of numbers of order 10
ITEMS = np.arange(8)
ZERO = {"energy": References.zero(), "xtb_energy": References.zero()}
EVERY = ("energy", "forces", "stress", *TARGETS)


@pytest.fixture(scope="module")
def pool() -> Pool:
    crystals = [ase.build.bulk("Cu"), ase.build.bulk("NaCl", "rocksalt", a=5.6)]
    return Pool([Part(MemoryDataset([*random_molecules([3, 5, 7, 4, 6, 2]), *crystals]))], CUTOFF)


def packer(pool: Pool, rotate: str, targets: tuple[str, ...] = EVERY, **options) -> Packer:
    budget = measure_budget(pool, 9.0)
    return Packer(pool, budget, targets, ZERO, dtype=np.float64, rotate=rotate, **options)


def rotations(improper: bool) -> np.ndarray:
    return random_rotations(3, 1, np.arange(40), improper)


# --------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("l", range(5))
def test_representations_are_those_of_the_harmonics(l):
    found = representation(l, rotations(improper=False)[:4])
    for matrix, r in zip(found, rotations(improper=False)[:4], strict=True):
        np.testing.assert_allclose(matrix, orbitals.rotation_matrix(l, r), atol=EXACT)


@pytest.mark.parametrize("improper", [False, True])
def test_rotations_are_orthogonal_and_of_both_signs_if_improper(improper):
    r = rotations(improper)
    np.testing.assert_allclose(r @ np.swapaxes(r, 1, 2), np.tile(np.eye(3), (40, 1, 1)), atol=EXACT)
    assert set(np.round(np.linalg.det(r)).tolist()) == ({-1.0, 1.0} if improper else {1.0})


def test_rotations_are_uniform():
    """A direction goes to every direction alike: mean 0 and covariance 1/3, to 5 standard errors
    of 20,000 (0.58 and 0.3 of one)."""
    v = random_rotations(0, 0, np.arange(20_000)) @ np.array([0.6, 0.0, 0.8])
    assert np.abs(v.mean(0)).max() < 5 * 0.58 / 141
    assert np.abs(v.T @ v / 20_000 - np.eye(3) / 3).max() < 5 * 0.3 / 141


def test_rotations_follow_from_seed_epoch_and_structures_alone():
    keys = [(0, 0, [0, 1]), (1, 0, [0, 1]), (0, 1, [0, 1]), (0, 0, [0, 2])]
    found = [random_rotations(s, e, np.array(items)) for s, e, items in keys]
    np.testing.assert_array_equal(found[0], random_rotations(0, 0, np.array([0, 1])))
    assert all(np.abs(found[0] - other).max() > 0.1 for other in found[1:])
    assert random_rotations(0, 0, np.zeros(0, np.int64)).shape == (0, 3, 3)


# --------------------------------------------------------------------------- batches


@pytest.mark.parametrize("rotate", ["proper", "improper"])
def test_a_batch_turns_as_a_whole(pool, rotate):
    plain = packer(pool, "none").batch(ITEMS, epoch=2)
    new = packer(pool, rotate, seed=5).batch(ITEMS, epoch=2)
    matrices = random_rotations(5, 2, ITEMS, rotate == "improper")
    node = np.repeat(np.arange(len(plain.n_node)), plain.n_node)
    edge = np.repeat(np.arange(len(plain.n_edge)), plain.n_edge)
    n, e = plain.n_node[:8].sum(), plain.n_edge[:8].sum()

    def vectors(b):
        return (b.positions[b.receivers] - b.positions[b.senders] + b.shifts)[:e]

    def by(matrix, x):
        return np.einsum("nij,nj->ni", matrix, x)

    np.testing.assert_allclose(vectors(new), by(matrices[edge[:e]], vectors(plain)), atol=EXACT)
    for name in ("forces", "xtb_forces"):
        expected = by(matrices[node[:n]], plain.targets[name][:n])
        np.testing.assert_allclose(new.targets[name][:n], expected, atol=EXACT)
    expected = matrices @ plain.targets["stress"][:8] @ np.swapaxes(matrices, 1, 2)
    np.testing.assert_allclose(new.targets["stress"][:8], expected, atol=EXACT)
    assert np.abs(new.shifts[:e]).max() > 1  # the crystals' images turned, too
    onsite = new.targets["onsite"]
    np.testing.assert_allclose(
        new.targets["orbital"], orbitals.orbital_charges(onsite) * new.targets["orbital/mask"],
        atol=EXACT,
    )  # fmt: skip
    for c in orbitals.COMPONENTS:  # lengths stay, directions do not
        sizes = [np.linalg.norm(b.targets["onsite"][:, c.columns], axis=1) for b in (new, plain)]
        np.testing.assert_allclose(*sizes, atol=EXACT)
    assert np.abs(onsite - plain.targets["onsite"]).max() > 0.1
    for name in ("energy", "shell", "atomic", "dft", "xtb_energy"):
        np.testing.assert_allclose(new.targets[name], plain.targets[name], atol=EXACT)
    for name in new.targets:
        if name.endswith("/mask"):
            np.testing.assert_array_equal(new.targets[name], plain.targets[name])


def test_an_epoch_can_be_entered_anywhere_and_stored_frames_stay(pool):
    def make(rotate="improper"):
        return Packer(pool, measure_budget(pool, 3.0), EVERY, ZERO, seed=7, rotate=rotate)

    whole, rest = list(make().epoch(4)), make().epoch(4, start_batch=1)
    for a, b in zip(whole[1:], rest, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    again = list(make().epoch(5))
    assert not np.array_equal(np.sort(again[0].positions, 0), np.sort(whole[0].positions, 0))
    stored, plain = make().batch(ITEMS[:2]), make("none").batch(ITEMS[:2], epoch=4)
    jax.tree.map(np.testing.assert_array_equal, stored, plain)


def test_an_unknown_rotation_is_refused(pool):
    with pytest.raises(Exception, match="known: none, proper, improper"):
        packer(pool, "inproper")


# --------------------------------------------------------------------------- labels


@pytest.mark.parametrize("improper", [False, True])
@pytest.mark.parametrize("symbols", ["CH3OH", "FeCl2OH2"])
def test_turned_labels_are_tblite_s_labels_of_the_turned_molecule(symbols, improper):
    from orbq.preprocess import xtb
    from orbq.schema import Structure

    positions = {
        "CH3OH": ase.build.molecule("CH3OH").positions,
        "FeCl2OH2": np.array(
            [[0, 0, 0], [2.1, 0.2, 0], [-1.2, 1.8, 0.3], [-0.6, -1.5, 1.2], [-1.5, -1.9, 1.3],
             [0, -2.1, 1.7]]
        ),
    }  # fmt: skip
    atoms = {"CH3OH": ase.build.molecule("CH3OH"), "FeCl2OH2": ase.Atoms("FeCl2OH2")}[symbols]
    turn = Turn(random_rotations(1, 0, np.arange(2), improper)[:1], np.zeros(len(atoms), int))
    matrix = turn.matrices[0] * (-1 if improper and np.linalg.det(turn.matrices[0]) > 0 else 1)
    turn = turn._replace(matrices=matrix[None])
    before, after = (
        xtb.label(Structure(atoms.numbers, x, np.zeros((3, 3)), np.zeros(3, bool), 0, 1))
        for x in (positions[symbols], turned("positions", positions[symbols], turn))
    )
    onsite = turned("onsite", before.onsite, turn)
    assert np.abs(after.onsite - onsite).max() < 1e-8
    charges = [orbitals.orbital_charges(x) for x in (after.onsite, onsite, before.onsite)]
    assert np.abs(charges[0] - charges[1]).max() < 1e-8
    assert np.abs(charges[0] - charges[2]).max() > 1e-2  # which the stored charges are not
    assert np.abs(after.forces - turned("xtb_forces", before.forces, turn)).max() < 1e-8


# --------------------------------------------------------------------------- losses


@lru_cache
def network(kind: str, targets: tuple[str, ...]) -> SimpleNamespace:
    """A network with heads of a kind, its compiled predictions and loss terms of a batch."""
    elements = (1, 6, 7, 8)
    # a NequIP-like one reads its heads before the last layer: of a single one, scalars alone
    architecture = TINY._replace(backbone="mace", n_layers=1, heads=heads(kind, targets))
    potential = make_potential(architecture, constants(targets, elements))
    statistics = {name: random_statistics(name) for name in targets}
    names = ("energy", "forces", *targets)
    spec = LossSpec(names, "mse", 1.0, "atom", {"energy": 1.0, "forces": 1.0}, statistics)

    def both(params, batch):
        found = predict(potential, params, batch.positions, batch.graph, targets)
        return found.charges, loss_terms(spec, found, batch)

    params, compiled = random_params(potential), quick_jit(both)
    return SimpleNamespace(names=names, of=lambda batch: jax.device_get(compiled(params, batch)))


def in_frames(names: tuple[str, ...], dataset: MemoryDataset | None = None) -> list:
    """One batch as it is stored, rotated, and rotated or inverted."""
    dataset = dataset or MemoryDataset(random_molecules([3, 5, 7, 4]))
    pool = Pool([Part(dataset)], CUTOFF)
    packers = [packer(pool, r, names) for r in ROTATE]
    return [to_batch(p.batch(ITEMS[:4], epoch=1)) for p in packers]


def test_losses_on_irreps_do_not_depend_on_the_frame():
    with jax.enable_x64(True):
        model = network("equivariant", ("density", "onsite"))
        plain, *others = (model.of(batch)[1] for batch in in_frames(model.names))
    for other in others:
        for name in ("energy", "density", "onsite"):
            assert other[name] == pytest.approx(plain[name], rel=1e-10), name
    assert plain["onsite"] > 0.1


def test_orbital_charges_follow_an_equivariant_network_into_every_frame():
    """Labels that a network meets in the stored frame it meets in all, because they are turned as
    irreps; labels left in the stored frame it would miss. (The loss of a network that misses them
    depends on the frame: it is the diagonal's share of the error that is seen.)"""
    with jax.enable_x64(True):
        model = network("equivariant", ("density", "onsite"))
        dataset = MemoryDataset(random_molecules([3, 5, 7, 4]))
        names = ("energy", "forces", "orbital", "density", "onsite")
        first = in_frames(names, dataset)[0]
        n = len(dataset.arrays["numbers"])
        dataset.arrays["onsite"] = model.of(first)[0]["onsite"][:n]
        plain, *others = in_frames(names, dataset)
        for batch in (plain, *others):
            found = orbitals.orbital_charges(model.of(batch)[0]["onsite"])
            np.testing.assert_allclose(found, batch.targets["orbital"], atol=1e-10)
    for batch in others:
        assert np.abs(batch.targets["orbital"] - plain.targets["orbital"]).max() > 0.01


def test_an_invariant_head_is_shown_other_charges_in_every_frame():
    """Its prediction stays and its label turns: what is learnt is the mean over frames."""
    with jax.enable_x64(True):
        model = network("invariant", ("orbital",))
        plain, *others = (model.of(batch) for batch in in_frames(model.names))
    for other in others:
        np.testing.assert_allclose(other[0]["orbital"], plain[0]["orbital"], atol=1e-10)
        assert abs(other[1]["orbital"] / plain[1]["orbital"] - 1) > 1e-4
