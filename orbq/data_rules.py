"""What the data of a run must be, and what is told of them: nothing held out that is taught, labels
and elements where they are needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from orbq.config import Training as TrainingConfig
from orbq.errors import InputError
from orbq.orbitals import SYMBOLS
from orbq.preprocess.pool import Pool
from orbq.preprocess.references import References, pool_elements
from orbq.preprocess.store import Dataset
from orbq.targets import TARGETS


def check_no_leak(
    dataset: Dataset, parts: Mapping[str, np.ndarray], unlabelled: list[Dataset]
) -> None:
    """Structures that are held out must not teach: as copies in another group, or charges alone."""
    held_out = np.concatenate([parts["validation"], parts["test"]])
    copies = "give copies the name of one group, take them out, or set data.split = 'within'"
    holder = f"the training split of {dataset.path}"
    refuse_taught(dataset, held_out, dataset["content_hash"][parts["train"]], (holder, copies))
    remedy = "take them out of data.unlabelled"
    for extra in unlabelled:
        refuse_taught(dataset, held_out, extra["content_hash"], (str(extra.path), remedy))


def warn_of_groups(
    dataset: Dataset, parts: Mapping[str, np.ndarray], unlabelled: list[Dataset]
) -> None:
    """Other geometries of a group that is held out teach its charges, if names mean the same."""
    held_out = np.unique(dataset["group"][np.concatenate([parts["validation"], parts["test"]])])
    for extra in unlabelled:
        same = extra["group"][np.isin(extra["group"], held_out[held_out != b""])]
        if len(same):
            warnings.warn(
                f"{extra.path} holds {len(same)} structures of groups that are held out, such as "
                f"{same[0].decode()!r}: take them out of data.unlabelled, unless the name is of "
                "something else there",
                stacklevel=3,
            )


def refuse_taught(
    dataset: Dataset, held_out: np.ndarray, hashes: np.ndarray, told: tuple[str, str]
) -> None:
    """Raise InputError when held-out structures [n] are among those taught (by content hash).

    hashes: of those taught, perhaps only their first digits. told: what holds the taught ones, and
    what to do about it.
    """
    own = dataset["content_hash"][held_out].astype(hashes.dtype)
    _, first, _ = np.intersect1d(own, hashes, return_indices=True)
    if len(first):
        holder, remedy = told
        raise InputError(
            f"{holder} holds {len(first)} structures of the validation or test split, the first is "
            f"structure {int(held_out[first[0]])} of {dataset.path}: {remedy}, else the test would "
            "be on structures that were taught"
        )


def check_one_method(dataset: Dataset, unlabelled: list[Dataset]) -> None:
    """One head cannot learn the charges of two xTB methods: their orbitals differ."""
    for extra in unlabelled:
        if extra.method != dataset.method:
            raise InputError(
                f"{extra.path} is labelled with {extra.method}, {dataset.path} with "
                f"{dataset.method}: label both with one of them (`orbq preprocess --method`)"
            )


def require_elements(
    pools: Mapping[str, Pool], elements: np.ndarray, references: Mapping[str, References]
) -> None:
    for name in ("validation", "test"):
        if name not in pools:
            continue
        found = pool_elements(pools[name])
        if len(unseen := np.setdiff1d(found, elements)):
            symbols = ", ".join(SYMBOLS[z] for z in unseen)
            raise InputError(
                f"the {name} structures hold {symbols}, which no training structure does: add "
                "structures with them, or use another split"
            )
        for reference in references.values():
            reference.require(found, f"the {name} structures")


def require_edges(train: Pool) -> None:
    """Atoms without neighbours teach nothing of geometries."""
    if not train.n_edges.any():
        raise InputError(
            f"model.cutoff = {train.cutoff:g} Å: no atom of the {len(train)} training structures "
            "has a neighbour that close: raise it"
        )


def require_validation(validation: Pool, terms: Sequence[str]) -> None:
    """Something that is trained must be labelled where the best step is chosen."""
    fields = {n: TARGETS[n].fields if n in TARGETS else (n,) for n in terms}
    found = [n for n in terms if all(validation.labelled(f).any() for f in fields[n])]
    remedy = "another data.split_seed, or a larger data.validation_fraction, may give it some"
    if not found:
        raise InputError(
            f"none of the {len(validation)} validation structures has a label that is trained "
            f"({', '.join(terms)}), so that no best step can be chosen: {remedy}"
        )
    if "energy" in terms and "energy" not in found:
        warnings.warn(
            f"none of the {len(validation)} validation structures has an energy, so that the best "
            f"step is chosen by {found[0]}: {remedy}",
            stacklevel=2,
        )


def warn_of_parity(train: Pool) -> None:
    """Crystals whose multiplicities say no more than whether a cell's electrons are odd."""
    arrays, rows = train.parts[0].dataset.arrays, train.rows[0]
    periodic = rows[np.asarray(arrays["pbc"][rows]).any(1)]
    if set(np.asarray(arrays["spin_multiplicity"][periodic]).tolist()) == {1, 2}:
        warnings.warn(
            f"the {len(periodic)} periodic training structures have spin multiplicities of 1 and "
            "2, the lowest of an even and of an odd number of electrons in the cell, as when none "
            "is given: a network that sees them takes a cell and its double for different; set "
            "model.embed_spin=false, or give multiplicities (`orbq preprocess --spin-key`)",
            stacklevel=3,
        )


def warn_of_share(n_labelled: int, n_others: int, training: TrainingConfig) -> None:
    """Too few structures for the share that is asked for: none is seen twice in an epoch."""
    share = training.unlabelled_share
    if 0 < share < 1 and n_others < (reached := n_labelled * share / (1 - share)) - 0.5:
        warnings.warn(
            f"training.unlabelled_share = {share:g} asks for {reached:.0f} structures of "
            f"data.unlabelled in an epoch, beside {n_labelled} of data.dataset, and there are "
            f"{n_others}: their share is {n_others / (n_others + n_labelled):.2g}",
            stacklevel=2,
        )
