"""Orbital slots, rotations and the irreducible components of the on-site block."""

from __future__ import annotations

import e3nn_jax as e3nn
import jax
import numpy as np
import pytest
from graphs import random_rotation, representation
from tblite import library

from orbq import orbitals as orb

EXACT = 1e-13  # float64 rounding of sums of at most a hundred products of numbers of order 1
COUPLED = {(int(orb.SHELL_L[c.first]), int(orb.SHELL_L[c.second]), c.l) for c in orb.COMPONENTS}


def random_blocks(n: int = 5, seed: int = 0) -> np.ndarray:
    """Symmetric on-site blocks [n, 10, 10]."""
    b = np.random.default_rng(seed).normal(size=(n, 10, 10))
    return (b + b.transpose(0, 2, 1)) / 2


def slot_rotation(rotation: np.ndarray) -> np.ndarray:
    """D [10, 10] of the slots s, s', p, d."""
    return representation("2x0e+1x1o+1x2e", rotation)


# --------------------------------------------------------------------------- the table of shells


def exported(method: str) -> dict:
    """tblite's own parameters of a method, by element symbol."""
    export = {
        "GFN1-xTB": library.export_gfn1_param,
        "GFN2-xTB": library.export_gfn2_param,
        "IPEA1-xTB": library.export_ipea1_param,
    }[method]
    parameters = library.new_param()
    export(parameters)
    table = library.new_table()
    library.dump_param(parameters, table)
    return library.table_to_dict(table)["element"]


@pytest.mark.parametrize("method", orb.METHODS)
def test_shells_are_those_of_tblite(method):
    table, elements = orb.shells(method), exported(method)
    for z in range(1, orb.MAX_Z + 1):
        entry = elements[orb.SYMBOLS[z]]
        slots, seen, occupation = [], [], np.zeros(4)
        for word, occ in zip(entry["shells"], entry["refocc"], strict=True):
            letter = word[-1]
            shell = {"s": 1 if "s" in seen else 0, "p": 2, "d": 3}[letter]
            diffuse = method == "IPEA1-xTB" and shell == 1  # exported, but not what it uses
            occupation[shell] = 0.0 if diffuse else occ
            seen.append(letter)
            slots += range(10)[orb.SHELL_SLOTS[shell]]
        np.testing.assert_array_equal(table.order[z], slots, err_msg=orb.SYMBOLS[z])
        np.testing.assert_array_equal(table.occupation[z], occupation, err_msg=orb.SYMBOLS[z])
        assert table.valence[z] == pytest.approx(occupation.sum())
        assert set(np.flatnonzero(table.slot_mask[z])) == set(slots)


def test_shells_have_the_field_s_landmarks():
    """Hydrogen's second s, first-row transition metals with d first, zinc without d."""
    order = orb.shells().order
    assert order[1].tolist() == [0, 1]
    assert order[26].tolist() == [5, 6, 7, 8, 9, 0, 2, 3, 4]
    assert order[30].tolist() == [0, 2, 3, 4]
    assert order[0].size == 0
    assert not orb.shells().slot_mask[0].any()
    assert orb.shells().valence[[1, 6, 26, 79]].tolist() == [1, 4, 8, 11]
    with pytest.raises(KeyError, match="GFN2-xTB"):
        orb.shells("GFN3-xTB")


# --------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("l", range(5))
def test_solid_harmonics_are_those_of_e3nn(l):
    points = np.random.default_rng(0).normal(size=(20, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    with jax.enable_x64(True):
        vectors = e3nn.IrrepsArray("1o", jax.numpy.asarray(points))
        expected = e3nn.spherical_harmonics(l, vectors, normalize=False, normalization="norm")
    ours = orb.solid_harmonics(l, points)
    np.testing.assert_allclose(ours, np.asarray(expected.array), atol=EXACT)


def test_rotation_matrices_are_those_of_e3nn():
    r = random_rotation(2)
    with jax.enable_x64(True):
        expected = e3nn.Irreps("0e+1e+2e+3e+4e").D_from_matrix(jax.numpy.asarray(r))
    ours = representation("1x0e+1x1e+1x2e+1x3e+1x4e", r)
    # e3nn goes through Euler angles and matrix exponentials
    np.testing.assert_allclose(ours, np.asarray(expected), atol=1e-10)


@pytest.mark.parametrize("l", range(5))
def test_rotation_matrices_are_a_representation(l):
    a, b = random_rotation(0), random_rotation(1)
    da, db = orb.rotation_matrix(l, a), orb.rotation_matrix(l, b)
    np.testing.assert_allclose(da @ da.T, np.eye(2 * l + 1), atol=EXACT)
    np.testing.assert_allclose(orb.rotation_matrix(l, a @ b), da @ db, atol=EXACT)
    if l == 1:
        np.testing.assert_allclose(da, a, atol=EXACT)


@pytest.mark.parametrize("l1,l2,l3", sorted(COUPLED))
def test_coupling_intertwines_and_is_orthonormal(l1, l2, l3):
    q, r = orb.coupling(l1, l2, l3), random_rotation(4)
    d1, d2, d3 = (orb.rotation_matrix(l, r) for l in (l1, l2, l3))
    a = np.random.default_rng(0).normal(size=(2 * l1 + 1, 2 * l2 + 1))
    turned = np.einsum("ijk,ij->k", q, d1 @ a @ d2.T)
    np.testing.assert_allclose(turned, d3 @ np.einsum("ijk,ij->k", q, a), atol=EXACT)
    gram = np.einsum("ijk,ijm->km", q, q)
    np.testing.assert_allclose(gram, np.eye(2 * l3 + 1), atol=EXACT)
    theirs = e3nn.clebsch_gordan(l1, l2, l3) * (2 * l3 + 1) ** 0.5
    sign = np.sign(np.sum(theirs * q))
    np.testing.assert_allclose(q, sign * theirs, atol=1e-12)


# --------------------------------------------------------------------------- the on-site block


def test_components_fill_the_irreps_that_are_declared():
    words = [f"{c.l}{'e' if c.parity > 0 else 'o'}" for c in orb.COMPONENTS]
    assert "+".join(f"1x{w}" for w in words) == _expanded(orb.ONSITE_IRREPS)
    assert "+".join(f"1x{w}" for w in words[:7]) == _expanded(orb.DENSITY_IRREPS)
    assert orb.COMPONENTS[6].columns.stop == orb.N_DENSITY == e3nn.Irreps(orb.DENSITY_IRREPS).dim
    assert orb.COMPONENTS[-1].columns.stop == orb.N_ONSITE == e3nn.Irreps(orb.ONSITE_IRREPS).dim
    starts = [c.columns.start for c in orb.COMPONENTS]
    assert starts == np.cumsum([0, *(2 * c.l + 1 for c in orb.COMPONENTS[:-1])]).tolist()


def _expanded(irreps: str) -> str:
    return "+".join(f"1x{ir}" for mul, ir in e3nn.Irreps(irreps) for _ in range(mul))


def test_ten_charges_of_the_23_are_the_diagonal():
    """For elements with every shell but one s, with s p d and with s s'."""
    numbers = np.array([26, 17, 1, 6, 30])
    blocks, table = random_blocks(), orb.shells()
    onsite = orb.onsite_from_blocks(blocks, numbers)
    per_orbital = (table.occupation / (2 * orb.SHELL_L + 1))[numbers][:, orb.SLOT_SHELL]
    population = np.einsum("nkk->nk", blocks)
    expected = np.where(table.slot_mask[numbers], per_orbital - population, 0.0)
    charges = orb.orbital_charges(onsite)
    np.testing.assert_allclose(charges, expected, atol=EXACT)
    np.testing.assert_allclose(orb.orbital_charges(onsite[:, :23]), expected, atol=EXACT)
    shells = np.stack([expected[:, s].sum(1) for s in orb.SHELL_SLOTS], axis=1)
    np.testing.assert_allclose(orb.shell_charges(onsite), shells, atol=EXACT)
    np.testing.assert_allclose(orb.atomic_charges(onsite), expected.sum(1), atol=EXACT)


def test_same_shell_components_give_the_shell_blocks_back():
    """The same-shell basis is orthonormal: summing component times matrix rebuilds the s s, s' s',
    p p and d d blocks, whose p and d ones are symmetric."""
    blocks, basis = random_blocks(), orb.onsite_basis()
    components = np.einsum("cij,nij->nc", basis, blocks)
    rebuilt = np.einsum("nc,cij->nij", components[:, :23], basis[:23])
    for slots in orb.SHELL_SLOTS:
        np.testing.assert_allclose(rebuilt[:, slots, slots], blocks[:, slots, slots], atol=EXACT)
    np.testing.assert_allclose(
        np.einsum("aij,bij->ab", basis[:23], basis[:23]), np.eye(23), atol=EXACT
    )


def test_cross_shell_components_give_the_off_diagonal_blocks_back():
    """s s', s p, s d and p d (all 15 entries: 1o + 2o + 3o); s' p and s' d are not kept."""
    blocks, basis = random_blocks(), orb.onsite_basis()
    components = np.einsum("cij,nij->nc", basis, blocks)
    rebuilt = np.einsum("nc,cij->nij", components[:, 23:], basis[23:])
    s, s2, p, d = orb.SHELL_SLOTS
    for a, b in ((s, s2), (s, p), (s, d), (p, d)):
        np.testing.assert_allclose(rebuilt[:, a, b], blocks[:, a, b], atol=EXACT)
    for a, b in ((s2, p), (s2, d), (p, p), (d, d)):
        assert not rebuilt[:, a, b].any()


@pytest.mark.parametrize("improper", [False, True])
def test_components_turn_as_their_irreps(improper):
    r, numbers = random_rotation(6, improper), np.array([26, 17, 1, 6, 30])
    blocks, d = random_blocks(), slot_rotation(r)
    before = orb.onsite_from_blocks(blocks, numbers)
    after = orb.onsite_from_blocks(d @ blocks @ d.T, numbers)
    expected = before @ representation(orb.ONSITE_IRREPS, r).T
    np.testing.assert_allclose(after, expected, atol=EXACT)
    assert np.abs(after - before).max() > 0.1


def test_ten_charges_depend_on_the_frame_and_their_shell_sums_do_not():
    r, numbers = random_rotation(6), np.array([26, 17, 1, 6, 30])
    blocks, d = random_blocks(), slot_rotation(r)
    before = orb.onsite_from_blocks(blocks, numbers)
    after = orb.onsite_from_blocks(d @ blocks @ d.T, numbers)
    assert np.abs(orb.orbital_charges(after) - orb.orbital_charges(before)).max() > 0.1
    np.testing.assert_allclose(orb.shell_charges(after), orb.shell_charges(before), atol=EXACT)


# --------------------------------------------------------------------------- masks


@pytest.mark.parametrize("method", orb.METHODS)
def test_masks_follow_from_the_shells(method):
    table = orb.shells(method)
    mask = orb.onsite_mask(method)
    assert mask.shape == (87, 47)
    assert not mask[0].any()
    for c in orb.COMPONENTS:
        both = table.shell_mask[:, c.first] & table.shell_mask[:, c.second]
        np.testing.assert_array_equal(mask[:, c.columns], np.repeat(both[:, None], 2 * c.l + 1, 1))
    groups = orb.shell_mask(method)
    for z in (1, 6, 17, 26, 86):
        present = set(orb.COLUMN_SHELL[mask[z]])
        assert set(np.flatnonzero(groups[z])) == present


def test_counts_of_components():
    """H: s, s', s-s'. C: s, p (0e + 2e), s-p. Fe: everything without s'."""
    counts = orb.onsite_mask().sum(1)
    assert counts[[1, 6, 26, 30]].tolist() == [3, 10, 44 + 1, 10]


def test_entries_of_absent_slots_are_ignored():
    numbers, blocks = np.array([1, 6]), random_blocks(2)
    spoilt = blocks.copy()
    spoilt[0, 2:] = spoilt[0, :, 2:] = 1e6
    spoilt[1, 1] = spoilt[1, :, 1] = 1e6
    spoilt[1, 5:] = spoilt[1, :, 5:] = 1e6
    np.testing.assert_array_equal(
        orb.onsite_from_blocks(blocks, numbers), orb.onsite_from_blocks(spoilt, numbers)
    )
    absent = ~orb.onsite_mask()[numbers]
    assert not orb.onsite_from_blocks(spoilt, numbers)[absent].any()
