"""The stress as a target: its loss, its derivative in a batch, a run that learns it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from graphs import TINY, constants, make_graph, of_name, quick_jit, random_params
from training_runs import settings_put_back
from typer.testing import CliRunner

import orbq
from orbq.cli import make_app
from orbq.config import check_against, parse_config
from orbq.data import prepare, to_batch
from orbq.errors import InputError
from orbq.evaluate import evaluate
from orbq.losses import Batch, LossSpec, batch_to_device, error_sums, loss_terms
from orbq.models.potential import Prediction, make_potential, predict
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import Dataset
from orbq.study.plan import fingerprint
from tests.packers import CUTOFF, make_packer, molecules_and_crystals, pool_with

# --------------------------------------------------------------------------- as a pure function


def test_the_term_is_the_mean_of_components_and_of_labelled_structures():
    """Against loops; a prediction where there is no label does not enter."""
    rng = np.random.default_rng(0)
    positions, graph = make_graph([of_name("H2O"), of_name("CH3OH"), of_name("H2O", seed=1)])
    label, value = rng.normal(size=(2, 3, 3, 3))
    mask = np.array([True, False, True])
    targets = {"stress": jnp.asarray(label), "stress/mask": jnp.asarray(mask)}
    batch, value[1] = Batch(positions, graph, targets), 1e6
    prediction = Prediction(jnp.zeros(3), positions, {}, jnp.asarray(value))
    spec = LossSpec(("stress",), "mae", 1.0, "structure", {"stress": 0.2}, {})
    expected = np.mean([np.abs(value[m] - label[m]).mean() / 0.2 for m in (0, 2)])
    assert float(loss_terms(spec, prediction, batch)["stress"]) == pytest.approx(expected, rel=1e-6)
    absolute, _, count = np.asarray(error_sums(("stress",), prediction, batch)["stress"])
    assert count == 18 and absolute / count == pytest.approx(0.2 * expected, rel=1e-6)


def test_stresses_of_a_batch_are_strain_derivatives():
    """Crystals beside molecules in one padded batch, in float64; molecules have none, and energies
    and forces are those without it."""
    with jax.enable_x64(True):
        packer = make_packer(pool_with(molecules_and_crystals()), targets=(), dtype=np.float64)
        packed = packer.batch(np.array([0, 1, 60, 61]))  # the last two are crystals
        batch = batch_to_device(to_batch(packed, with_cell=True))
        elements = tuple(sorted({int(z) for z in packed.numbers} - {0}))
        potential = make_potential(TINY._replace(cutoff=CUTOFF), constants((), elements))
        params = random_params(potential)
        program = quick_jit(lambda x, g: predict(potential, params, x, g, ("stress",)))
        found = program(batch.positions, batch.graph)
        plain = quick_jit(lambda x, g: predict(potential, params, x, g))(*batch[:2])
        assert plain.stress is None
        np.testing.assert_allclose(found.energy, plain.energy, rtol=1e-12)
        np.testing.assert_allclose(found.forces, plain.forces, atol=1e-12)
        strain = np.random.default_rng(1).normal(size=(3, 3))
        strain = (strain + strain.T) / 2
        step, energies = 1e-5, []
        for sign in (1, -1):
            deform = np.eye(3) + sign * step * strain
            edges = {"shifts": batch.graph.edges["shifts"] @ deform}
            energies.append(program(batch.positions @ deform, batch.graph._replace(edges=edges))[0])
        numeric = np.asarray(energies[0] - energies[1]) / (2 * step)
    volume = np.abs(np.linalg.det(packed.cell))
    crystals = volume > 0
    assert 0 < crystals.sum() < packed.mask.sum()
    stress = np.asarray(found.stress)
    assert not stress[~crystals].any()
    exact = np.einsum("mij,ij->m", stress, strain) * volume
    np.testing.assert_allclose(exact[crystals], numeric[crystals], rtol=1e-6)
    assert np.abs(exact[crystals]).min() > 1e-3


# --------------------------------------------------------------------------- in a configuration


def test_it_needs_energies_or_forces_beside_it():
    weights = {"energy": 0.0, "forces": 0.0, "stress": 1.0}
    with pytest.raises(InputError, match=r"loss\.weights\.stress.*energies, forces or both"):
        parse_config({"loss": {"weights": weights}})


def test_data_without_it_are_refused_with_the_remedy():
    config = parse_config({"loss": {"weights": {"stress": 1.0}}})
    with pytest.raises(InputError, match=r"loss\.weights\.stress.*has stress.*--stress-key KEY"):
        check_against(config, {"energy": 9, "forces": 9}, "mine")


def test_an_ablation_begun_without_it_goes_on():
    """A weight of 0 is what there was before the key: the fingerprint is the same."""
    document = {"ablation": {"targets": ["onsite"]}}
    with_it = {**document, "loss": {"weights": {"stress": 2.0}}}
    assert fingerprint(parse_config(document)) == BEFORE
    assert fingerprint(parse_config(with_it)) != BEFORE


BEFORE = "d7cea1a237f8eaf8"  # of this configuration, computed before the key came


def test_cells_of_odd_and_even_electrons_are_told(tmp_path):
    """A primitive cell of copper is a doublet, its double a singlet, if nothing else is said."""
    cells = [bulk("Cu", a=3.6 + 0.01 * k).repeat((1 + k % 2, 1, 1)) for k in range(20)]
    for atoms in cells:
        atoms.info["energy"] = -1.0 * len(atoms)
    preprocess(cells, tmp_path / "data", resources=Resources(workers=1))
    document = {
        "data": {"dataset": str(tmp_path / "data"), "split": "within"},
        "loss": {"weights": {"forces": 0.0}},
    }
    with pytest.warns(UserWarning, match=r"a cell and its double .* model.embed_spin=false"):
        prepare(parse_config(document))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepare(parse_config({**document, "model": {"embed_spin": False}}))
    assert not [w for w in told if "embed_spin" in str(w.message)]


# --------------------------------------------------------------------------- a run


def alloys(n: int) -> list[Atoms]:
    """Strained and rattled cells of copper and gold, with EMT's energies, forces and stresses."""
    rng, out = np.random.default_rng(0), []
    for k in range(n):
        atoms = bulk("Cu", cubic=True, a=3.75)
        atoms.symbols[: k % 3] = "Au"
        strain = rng.uniform(-0.05, 0.05, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain + strain.T), scale_atoms=True)
        atoms.rattle(0.08, rng=rng)
        atoms.calc = EMT()
        atoms.get_stress()
        out.append(atoms)
    return out


def config_of(directory: Path, name: str, stress: float) -> Any:
    model = {"n_channels": 8, "n_layers": 1, "lmax": 1, "radial_hidden": [8], "cutoff": 4.0}
    weights = {"energy": 1.0, "forces": 1.0, "stress": stress}
    training = {"n_steps": 250, "warmup_steps": 10, "validate_every": 250, "learning_rate": 1e-2}
    data = {"dataset": str(directory / "data"), "split": "within", "test_fraction": 0.3}
    return parse_config(
        {
            "data": data,
            "model": model,
            "loss": {"weights": weights},
            "training": {**training, "batch_size": 8, "rotate": "proper"},
            "run": {"directory": str(directory / name)},
        }
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The directory of a data set and of two runs on it, without and with stresses."""
    from orbq.fit import fit

    directory = tmp_path_factory.mktemp("alloys")
    preprocess(alloys(60), directory / "data", resources=Resources(workers=1))
    with settings_put_back():
        for name, weight in (("without", 0.0), ("with", 1.0)):
            fit(config_of(directory, name, weight))
    return directory


def test_a_weight_on_stresses_lowers_their_error(runs):
    data = Dataset.open(runs / "data")
    errors = {}
    for name in ("without", "with"):
        found = evaluate(orbq.load(runs / name), data, split="test", targets=["energy", "stress"])
        errors[name] = found.errors()["stress_mae_meV_per_A3"]
        assert found.values["stress"].label.shape == (len(found.rows), 9)
    assert errors["with"] < 0.8 * errors["without"]
    spread = 1e3 * np.abs(np.asarray(data["stress"])).mean()
    assert errors["with"] < 0.5 * spread


def test_records_and_run_json_tell_of_it(runs):
    lines = (runs / "with" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation/stress_mae_meV_per_A3"] > 0
    scale, unit = json.loads((runs / "with" / "run.json").read_text())["scales"]["stress"]
    stress = np.asarray(Dataset.open(runs / "data")["stress"])
    assert unit == "eV/Å^3" and scale == pytest.approx(np.sqrt((stress**2).mean()), rel=0.2)


def orbq_command(*arguments: object) -> str:
    result = CliRunner().invoke(make_app(), [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_evaluate_shows_it_and_draws_it(runs, tmp_path):
    told = orbq_command("evaluate", runs / "with", runs / "data", "--out", tmp_path)
    assert "meV/Å^3" in told
    assert list(tmp_path.rglob("parity-stress.png"))
    without = orbq_command("evaluate", runs / "without", runs / "data", "--out", tmp_path / "two")
    assert "meV/Å^3" not in without


def test_predicted_stresses_are_those_of_the_calculator(runs, tmp_path):
    frames = [*alloys(3), bulk("Cu", cubic=True, a=3.7).repeat(1)]
    frames[1].pbc = False
    ase.io.write(tmp_path / "in.extxyz", [Atoms(f) for f in frames])
    out = tmp_path / "out.extxyz"
    orbq_command("predict", runs / "with", tmp_path / "in.extxyz", "--out", out, "--stress")
    run = orbq.load(runs / "with")
    for atoms in ase.io.read(out, ":"):
        if not atoms.pbc.all():
            assert "stress" not in atoms.calc.results
            continue
        predicted = atoms.get_stress()
        atoms.calc = orbq.Calculator(run)
        np.testing.assert_allclose(predicted, atoms.get_stress(), rtol=1e-4, atol=1e-6)
    both = tmp_path / "both.extxyz"
    runs_of_it = runs / "with", runs / "without"
    orbq_command("predict", *runs_of_it, tmp_path / "in.extxyz", "--out", both, "--stress")
    assert ase.io.read(both, 0).info["stress_std"].shape == (6,)
