"""Splits: functions of names alone, that keep groups whole and never drift."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from orbq.splits import PARTS, fraction_of, split

N = 3000
GROUPS = np.array([f"complex {i // 3}".encode() for i in range(N)], "S64")
HASHES = np.array([hashlib.sha256(str(i).encode()).hexdigest()[:32].encode() for i in range(N)])
METHODS = pytest.mark.parametrize("method", ["group", "within"])


@METHODS
def test_every_structure_is_in_exactly_one_part(method):
    parts = split(GROUPS, HASHES, method)
    assert tuple(parts) == PARTS
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(N))
    for rows in parts.values():
        assert (np.diff(rows) > 0).all()


@METHODS
def test_parts_have_the_sizes_asked_for(method):
    parts = split(GROUPS, HASHES, method, (0.1, 0.2))
    draws = N / 3 if method == "group" else N  # independent draws
    for name, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        deviation = (share * (1 - share) / draws) ** 0.5
        assert len(parts[name]) / N == pytest.approx(share, abs=4 * deviation)


def test_a_seed_deals_anew():
    first, again, other = (split(GROUPS, HASHES, seed=seed) for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in PARTS)
    both = np.intersect1d(first["test"], other["test"])
    assert len(both) < 0.6 * len(first["test"])  # 0.2 of it in expectation


def test_groups_are_never_divided():
    parts = split(GROUPS, HASHES)
    names = [set(GROUPS[rows]) for rows in parts.values()]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_within_divides_groups():
    parts = split(GROUPS, HASHES, "within")
    assert set(GROUPS[parts["train"]]) & set(GROUPS[parts["test"]])


def test_structures_without_a_group_are_dealt_out_by_content():
    bare = np.zeros(N, "S64")
    one, other = split(bare, HASHES, "group"), split(bare, HASHES, "within")
    for name in PARTS:
        np.testing.assert_array_equal(one[name], other[name])
    assert min(len(rows) for rows in one.values()) > 0


@METHODS
def test_a_structure_keeps_its_part_whatever_stands_beside_it(method):
    """Adding, dropping and reordering structures moves no other."""
    whole = split(GROUPS, HASHES, method)
    part_of = {HASHES[i]: name for name, rows in whole.items() for i in rows}
    some = np.random.default_rng(0).permutation(N)[:700]
    for name, rows in split(GROUPS[some], HASHES[some], method).items():
        assert {part_of[h] for h in HASHES[some][rows]} <= {name}


def test_growing_the_test_share_never_returns_a_structure_to_training():
    small = split(GROUPS, HASHES, "group", (0.1, 0.1))["test"]
    large = split(GROUPS, HASHES, "group", (0.1, 0.3))["test"]
    assert set(small) < set(large)


def test_the_function_has_not_drifted():
    """A change here moves test structures of published figures into training."""
    digest = hashlib.sha256(b"orbq split\0complex 7").digest()
    assert fraction_of(b"complex 7", "orbq split") == int.from_bytes(digest[:8], "big") / 2**64
    found = [fraction_of(f"complex {k}".encode(), "orbq split") for k in range(6)]
    frozen = [0.377486, 0.209807, 0.700630, 0.787076, 0.897595, 0.888367]
    np.testing.assert_allclose(found, frozen, atol=1e-6)
    parts = split(GROUPS[:18], HASHES[:18], "group", (0.2, 0.3))
    assert {GROUPS[i] for i in parts["test"]} == {b"complex 1"}
    assert {GROUPS[i] for i in parts["validation"]} == {b"complex 0"}


def test_unknown_method_is_refused():
    with pytest.raises(KeyError, match="within"):
        split(GROUPS, HASHES, "random")


def test_nothing_gives_nothing():
    parts = split(np.zeros(0, "S64"), np.zeros(0, "S32"))
    assert all(len(rows) == 0 for rows in parts.values())
