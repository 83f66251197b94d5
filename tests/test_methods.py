"""Data labelled with another xTB method: its own orbitals, never mixed with those of GFN1."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from ase.build import molecule

from orbq import orbitals
from orbq.config import parse_config
from orbq.data import make_packer, prepare, to_batch
from orbq.errors import InputError
from orbq.evaluate import evaluate
from orbq.models.potential import make_potential, predict
from orbq.preprocess.label import Recipe, Resources, preprocess
from orbq.preprocess.store import Dataset
from orbq.targets import TARGETS
from tests.tiny_run import MODEL, random_run

GFN2 = "GFN2-xTB"


def label(place, method: str, seed: int) -> None:
    rng, structures = np.random.default_rng(seed), []
    for n in range(12):
        atoms = molecule(("H2O", "NaCl", "H2COH")[n % 3])  # Na has d orbitals in GFN2 alone
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
        atoms.info["energy"] = float(n % 3)
        structures.append(atoms)
    preprocess(structures, place, Recipe(method), Resources(workers=1))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    place = tmp_path_factory.mktemp("methods")
    label(place / "gfn2", GFN2, 0)
    label(place / "gfn1", orbitals.GFN1, 1)
    return place


def config_of(sets, **data: Any) -> Any:
    return parse_config(
        {
            "data": {
                "dataset": str(sets / "gfn2"), "split": "within", "validation_fraction": 0.3,
                "test_fraction": 0.1, "references": {s: -1.0 for s in ("H", "C", "O", "Na", "Cl")},
                **data,
            },
            "model": MODEL,
            "loss": {"weights": {"onsite": 1.0, "orbital": 1.0, "shell": 1.0, "forces": 0.0}},
            "training": {"unlabelled_share": 0.5 if data else 0.0},
        }
    )  # fmt: skip


def test_orbitals_are_those_of_the_method(sets):
    """Masks, statistics and heads: predicted charges sum to the total charge over GFN2's shells."""
    config = config_of(sets)
    data = prepare(config)
    assert data.constants.method == GFN2
    batch = to_batch(make_packer(data, data.pools["train"], config).batch(np.arange(4)))
    numbers = np.asarray(batch.graph.nodes["numbers"])
    assert {1, 11} <= set(numbers.tolist())
    potential = make_potential(data.architecture, data.constants)
    batch = jax.tree.map(jax.numpy.asarray, batch)
    params = potential.init(jax.random.key(0), batch.positions, batch.graph)
    out = predict(potential, params, batch.positions, batch.graph, ("onsite", "orbital", "shell"))
    for name in ("onsite", "orbital", "shell"):
        target, values = TARGETS[name], np.asarray(out.charges[name])
        present = target.elements(GFN2)[numbers]
        np.testing.assert_array_equal(np.asarray(batch.targets[f"{name}/mask"]), present)
        assert (present != target.elements(orbitals.GFN1)[numbers]).any()
        assert not values[~present].any()
        np.testing.assert_allclose((values * target.charge).sum(), 0.0, atol=1e-5)
        labels = np.asarray(batch.targets[name])
        np.testing.assert_allclose((labels * target.charge).sum(), 0.0, atol=1e-5)


def test_methods_are_not_mixed(sets):
    with pytest.raises(InputError, match=r"labelled with GFN1-xTB, .*gfn2 with GFN2-xTB"):
        prepare(config_of(sets, unlabelled=[str(sets / "gfn1")]))


def test_a_run_is_not_scored_on_another_methods_charges(sets):
    run, dataset = random_run(elements=(1, 6, 8, 11, 17)), Dataset.open(sets / "gfn2")
    assert set(evaluate(run, dataset).values) == {"energy"}
    with pytest.raises(InputError, match=r"onsite: .* labelled with GFN2-xTB, .* on GFN1-xTB"):
        evaluate(run, dataset, targets=["onsite"])


def test_charges_are_compared_where_only_the_energies_are_of_several_methods(sets, tmp_path):
    """The same orbitals; xTB energies of another kind are refused, as is teaching both at once."""
    label(tmp_path / "both", "GFN1-xTB+GFN2-xTB", 1)
    run, dataset = random_run(elements=(1, 6, 8, 11, 17)), Dataset.open(tmp_path / "both")
    alone = evaluate(run, Dataset.open(sets / "gfn1"), targets=["onsite"])
    assert evaluate(run, dataset, targets=["onsite"]).errors() == alone.errors()
    named = random_run(elements=(1, 6, 8, 11, 17), targets=("onsite", "xtb_energy"))
    assert "xtb_energy" not in evaluate(named, dataset).values
    with pytest.raises(InputError, match=r"xtb_energy: .* labelled with GFN1-xTB\+GFN2-xTB, .* on"):
        evaluate(named, dataset, targets=["xtb_energy"])
    with pytest.raises(InputError, match=r"labelled with GFN1-xTB\+GFN2-xTB, .*gfn2 with GFN2-xTB"):
        prepare(config_of(sets, unlabelled=[str(tmp_path / "both")]))
