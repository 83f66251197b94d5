"""Evaluation against single predictions; masks, splits, unknown elements, the command, pictures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import random_run, train_tiny
from typer.testing import CliRunner

import orbq
from orbq import targets
from orbq.cli import make_app
from orbq.errors import InputError
from orbq.evaluate import evaluate, is_own, not_compared, split_rows
from orbq.initial import taught_among
from orbq.preprocess.store import Dataset
from orbq.schema import Structure
from orbq.scores import Evaluation, report


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The directory of a run of 20 steps; its data set lies beside it."""
    return train_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def run(trained):
    return orbq.load(trained)


@pytest.fixture(scope="session")
def dataset(trained) -> Dataset:
    return Dataset.open(trained.parent / "data")


@pytest.fixture(scope="session")
def evaluation(run, dataset) -> Evaluation:
    return evaluate(run, dataset, batch_size=5)


def stored(dataset: Dataset, i: int) -> Structure:
    atoms = dataset.structure_slice(i)
    return Structure(
        np.asarray(dataset["numbers"][atoms]),
        np.asarray(dataset["positions"][atoms]),
        np.asarray(dataset["cell"][i]),
        np.asarray(dataset["pbc"][i]),
        int(dataset["total_charge"][i]),
        int(dataset["spin_multiplicity"][i]),
    )


def test_predictions_are_those_of_single_structures(run, dataset, evaluation):
    assert len(evaluation.rows) == len(dataset) == 40
    assert evaluation.cost.compilations == 1
    assert evaluation.cost.edge_fill > 0.5
    ends = np.cumsum(evaluation.n_node)
    expected = run.predict(stored(dataset, 17))
    atoms = slice(ends[17] - evaluation.n_node[17], ends[17])
    # float32 sums in another order
    found = evaluation.values["energy"].predicted[17]
    assert found == pytest.approx(expected["energy"], abs=1e-3)
    for name in ("forces", "onsite"):
        found = evaluation.values[name].predicted[atoms]
        np.testing.assert_allclose(found, expected[name], atol=1e-3)


def test_a_run_evaluates_itself(run, dataset):
    own = run.evaluate(dataset)
    np.testing.assert_array_equal(own.rows, split_rows(run, dataset, "test")[1])
    assert own.errors() == evaluate(run, dataset, split="test").errors()
    with pytest.raises(InputError, match="no data set 'none'"):
        run.evaluate("none")


def test_errors_are_those_of_numpy(dataset, evaluation):
    errors = evaluation.errors()
    energy = evaluation.values["energy"].predicted - dataset["energy"]
    assert dataset.mask("energy").all()
    assert errors["energy_mae_meV"] == pytest.approx(1e3 * np.abs(energy).mean())
    per_atom = 1e3 * energy / dataset.n_atoms
    assert errors["energy_rmse_meV_per_atom"] == pytest.approx(np.sqrt(np.mean(per_atom**2)))
    forces = evaluation.values["forces"].predicted - dataset["forces"]
    assert errors["forces_rmse_meV_per_A"] == pytest.approx(1e3 * np.sqrt(np.mean(forces**2)))
    oxygen = np.asarray(dataset["numbers"]) == 8
    by_element = evaluation.by_element("forces")
    assert by_element["O", ""]["mae"] == pytest.approx(1e3 * np.abs(forces[oxygen]).mean())
    assert by_element["O", ""]["count"] == 3 * oxygen.sum()
    charges = evaluation.values["orbital"].predicted[oxygen][:, 2:5]
    label = targets.TARGETS["orbital"].extract(dataset.arrays, slice(None))[oxygen][:, 2:5]
    found = evaluation.by_element("orbital")["O", "p"]
    assert found["mae"] == pytest.approx(np.abs(charges - label).mean())


def test_charges_that_follow_from_the_onsite_block(dataset, evaluation):
    assert evaluation.values["atomic"].source == "onsite"
    total = np.add.reduceat(evaluation.values["atomic"].predicted[:, 0], dataset.offsets[:-1])
    np.testing.assert_allclose(total, dataset["total_charge"], atol=1e-4)  # float32
    shells = evaluation.values["shell"].predicted.sum(1)
    np.testing.assert_allclose(shells, evaluation.values["atomic"].predicted[:, 0], atol=1e-6)


def test_report_is_json(evaluation):
    text = json.dumps(report(evaluation, [("run", "runs/tiny")]))
    found = json.loads(text)
    assert found["structures"] == 40 and found["run"] == "runs/tiny"
    assert found["by_element"]["forces"]["unit"] == "meV/Å"
    assert found["derived"]["orbital"] == "onsite"


def test_own_split_is_taken(run, dataset):
    assert is_own(run, dataset)
    name, test = split_rows(run, dataset)
    assert name == "test" and 0 < len(test) < 40
    parts = [split_rows(run, dataset, part)[1] for part in ("train", "validation", "test")]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(40))
    assert run.info["structures"]["test"] == len(test)
    with pytest.raises(InputError, match="train, validation, test, all"):
        split_rows(run, dataset, "tests")


def test_another_data_set_is_evaluated_whole(run, dataset):
    other = Dataset(dataset.path, {**dataset.manifest, "arrays": {}}, dataset.arrays)
    assert split_rows(run, other)[0] == "all"
    with pytest.raises(InputError, match="not trained on"):
        split_rows(run, other, "test")


def test_unknown_elements_are_left_out_and_counted(dataset):
    titanium = np.asarray(dataset["numbers"]) == 22
    structure = np.repeat(np.arange(40), dataset.n_atoms)
    holding = np.unique(structure[titanium])
    assert 0 < len(holding) < 40
    ignorant = random_run(("atomic",), (1, 6, 7, 8), lmax=1)
    found = evaluate(ignorant, dataset, targets=("atomic",), batch_size=5)
    assert found.left_out == {"Ti": len(holding)} and found.n_left_out == len(holding)
    assert not np.isin(found.rows, holding).any()
    with pytest.raises(InputError, match="they hold Ti, the run knows H, C, N, O"):
        evaluate(ignorant, dataset, holding)


def test_missing_labels_are_masked(run, dataset):
    arrays = dict(dataset.arrays)
    arrays["energy_mask"] = np.arange(40) % 2 == 0
    partly = Dataset(dataset.path, dataset.manifest, arrays)
    found = evaluate(run, partly, batch_size=5)
    assert report(found)["labels"]["energy"] == 20
    errors = found.values["energy"].predicted[::2] - dataset["energy"][::2]
    assert found.errors()["energy_mae_meV"] == pytest.approx(1e3 * np.abs(errors).mean())
    for name in ("energy", "forces", "onsite"):
        arrays[f"{name}_mask"] = np.zeros(40, bool)
    with pytest.raises(InputError, match="has a label of energy, forces, onsite"):
        evaluate(run, Dataset(dataset.path, dataset.manifest, arrays))


def test_labels_of_another_method_are_named(run, dataset):
    """Energies of the reference are the same; charges of another first method are not."""
    other = Dataset(dataset.path, {**dataset.manifest, "method": "GFN2-xTB"}, dict(dataset.arrays))
    assert "onsite" not in evaluate(run, other).values
    assert not_compared(run, dataset) is None
    assert "not compared: onsite" in str(not_compared(run, other))
    with pytest.raises(InputError, match="is labelled with GFN2-xTB, the run was"):
        evaluate(orbq.load("gfn1-metals"), other)


def test_damaged_atoms_are_named(run, dataset):
    arrays = dict(dataset.arrays)
    arrays["numbers"] = np.array(arrays["numbers"])
    arrays["numbers"][3] = 99_999
    with pytest.raises(InputError, match="is damaged: it holds an atom of atomic number 99999"):
        evaluate(run, Dataset(dataset.path, dataset.manifest, arrays))


def test_targets_must_be_predicted_by_the_run(run, dataset):
    with pytest.raises(InputError, match="'dft' cannot be evaluated"):
        evaluate(run, dataset, targets=("dft",))


# --------------------------------------------------------------------------- the command


def orbq_command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), [str(a) for a in arguments])
    return result.exit_code, result.output


def test_evaluate_writes_tables_and_pictures(trained, tmp_path):
    status, text = orbq_command("evaluate", trained, trained.parent / "data", "--out", tmp_path)
    assert status == 0, text
    assert "split test" in text and "meV/Å" in text and "MAE by element" in text
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["split"] == "test" and found["errors"]["forces_mae_meV_per_A"] > 0
    info = json.loads((trained / "run.json").read_text())
    assert found["structures"] == info["structures"]["test"]
    for name in ("", "-energy", "-forces", "-onsite", "-orbital"):
        picture = tmp_path / f"parity{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_pictures_of_an_earlier_evaluation_go(trained, tmp_path):
    (tmp_path / "parity-dft.png").write_bytes(b"of another data set")
    (tmp_path / "parity_mine.png").write_bytes(b"of the user")
    status, text = orbq_command("evaluate", trained, trained.parent / "data", "--out", tmp_path)
    assert status == 0, text
    assert not (tmp_path / "parity-dft.png").exists()
    assert (tmp_path / "parity_mine.png").exists()


def test_what_a_run_was_judged_by_stays(trained, dataset, tmp_path):
    """Other structures than its test split have a directory of their own."""
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(dataset.path, tmp_path / "other")
    np.save(tmp_path / "other" / "group.npy", np.array([f"g{i}" for i in range(40)], "S64"))
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["arrays"]["group"]["sha256"] = "0" * 64
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    assert orbq_command("evaluate", run, dataset.path)[0] == 0
    judged = (run / "evaluation" / "metrics.json").read_text()
    name = dataset.path.name
    for more, place in (
        ((tmp_path / "other",), "other-all"),
        ((dataset.path, "--split", "train"), f"{name}-train"),
    ):
        status, text = orbq_command("evaluate", run, *more, "--no-plots")
        assert status == 0 and (run / "evaluation" / place / "metrics.json").exists(), text
    assert (run / "evaluation" / "metrics.json").read_text() == judged


@pytest.mark.parametrize("plots", [(), ("--no-plots",)])
def test_an_evaluation_is_written_before_it_is_told(trained, tmp_path, plots):
    """``orbq evaluate ... | head -1`` leaves what it leaves without head."""
    (tmp_path / "parity-energy.png").write_bytes(b"of another data set")
    read, write = os.pipe()
    os.close(read)  # whoever read has had enough
    command = [sys.executable, "-m", "orbq", "evaluate", trained, trained.parent / "data"]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path), *plots],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["split"] == "test"
    picture = tmp_path / "parity-energy.png"
    assert not picture.exists() if plots else picture.read_bytes().startswith(b"\x89PNG")


def test_a_directory_that_cannot_be_named_is_told(trained, tmp_path):
    out = tmp_path / ("x" * 300)
    status, text = orbq_command("evaluate", trained, trained.parent / "data", "--out", out)
    assert status == 2 and "the directory cannot be made (File name too long)" in text, text


def test_training_structures_of_another_data_set_are_told(trained, run, dataset, tmp_path):
    everything = np.arange(len(dataset))
    train = split_rows(run, dataset, "train")[1]
    told = taught_among(trained, dataset, everything)
    assert f"was trained on {len(train)} of these {len(everything)} structures" in told
    assert taught_among(trained, dataset, np.setdiff1d(everything, train)) == ""
    assert "could not be checked" in taught_among(tmp_path, dataset, everything)
    shutil.copytree(dataset.path, tmp_path / "other")  # the same structures, other groups
    groups = np.array([f"g{i}" for i in everything], "S64")
    np.save(tmp_path / "other" / "group.npy", groups)
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["arrays"]["group"]["sha256"] = "0" * 64
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    status, text = orbq_command("evaluate", trained, tmp_path / "other", "--out", tmp_path / "new")
    assert status == 0 and told in text, text


def test_evaluate_refuses_what_is_no_run(trained, tmp_path):
    assert orbq_command("evaluate", tmp_path, "tmc")[0] == 2
    status, text = orbq_command("evaluate", trained, tmp_path / "none")
    assert status == 2 and "no data set" in text
    status, text = orbq_command("evaluate", trained, trained.parent / "data", "--split", "tst")
    assert status == 2 and "train, validation, test, all" in text
