"""Train, validation and test splits as pure functions of names, so that they never drift.

``group``: every structure of one group (one complex, say) falls on the same side; structures
without a group name count as groups of their own, by content hash. ``within``: structures are
dealt out one by one by content hash, so that a group may be on every side.
"""

from __future__ import annotations

import hashlib

import numpy as np

SPLITS = ("group", "within")
PARTS = ("train", "validation", "test")


def fraction_of(name: bytes, salt: str) -> float:
    """A number in [0, 1) that depends on ``name`` and ``salt`` alone (SHA-256)."""
    digest = hashlib.sha256(salt.encode() + b"\0" + name).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(
    group: np.ndarray,
    content_hash: np.ndarray,
    method: str = "group",
    fractions: tuple[float, float] = (0.1, 0.2),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Sorted indices of the ``train``, ``validation`` and ``test`` structures.

    group, content_hash: [S] bytes. fractions: shares of (validation, test) in expectation. seed:
    of another split of the same kind.
    Raises KeyError for an unknown ``method``.
    """
    if method not in SPLITS:
        raise KeyError(f"unknown split {method!r}; known: {', '.join(SPLITS)}")
    names = [
        g if (g and method == "group") else h
        for g, h in zip(group.tolist(), content_hash.tolist(), strict=True)
    ]
    salt = f"orbq split {seed}" if seed else "orbq split"
    u = np.array([fraction_of(name, salt) for name in names])
    validation, test = fractions
    part = np.where(u < test, 2, np.where(u < test + validation, 1, 0))
    return {name: np.flatnonzero(part == i) for i, name in enumerate(PARTS)}
