"""Latent spaces: the features themselves, the statistics of clustering, and the command."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import complexes, random_run, save_run

import orbq
from orbq import elements, embed
from orbq.cli import main
from orbq.datasets import open_dataset
from orbq.embed_files import require, structure_of
from orbq.errors import InputError
from orbq.evaluate import split_rows
from orbq.inference import open_run
from orbq.models.potential import node_features
from orbq.orbitals import SYMBOLS
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import Dataset

METALS = (22, 26, 28, 29, 30, 44)


def symbols(text: str) -> list[int]:
    return [SYMBOLS.index(s) for s in text.split()]


def test_the_periodic_table() -> None:
    table = {"H Li Cs": 1, "Sc Y La": 3, "Hf Ti": 4, "Cu Ag Au": 11, "He Ne Rn": 18}
    for text, group in table.items():
        assert {elements.group(z) for z in symbols(text)} == {group}
    assert [elements.row(z) for z in symbols("H Ne Na Kr Rb Rn")] == [1, 2, 3, 4, 5, 6]
    assert set(symbols("Li Al Fe Sn La Bi")) <= set(elements.METALS)
    assert not set(symbols("H B C Si Ge Sb Te At")) & set(elements.METALS)


# --------------------------------------------------------------------------- statistics


def test_silhouettes_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import pairwise_distances, silhouette_samples

    rng = np.random.default_rng(0)
    distances = pairwise_distances(rng.normal(size=(12, 3)))
    labels = np.stack([rng.permutation([1, 1, 1, 4, 4, 4, 7, 7, 7, 7, 7, 9]) for _ in range(3)])
    for own, found in zip(labels, embed.silhouettes(distances, labels), strict=True):
        expected = silhouette_samples(distances, own, metric="precomputed")
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_p_values() -> None:
    """Clusters far apart: no exchange reaches them. Labels without relation: p is uniform."""
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 4, 5], 4)
    apart = rng.normal(size=(12, 5)) + 50.0 * labels[:, None]
    found = embed.clustering(apart, labels, n_permutations=199)
    for statistic in found.values():
        assert statistic.p == 1 / 200
        assert statistic.value > 0.9 > 0.5 > statistic.chance
    values = []
    for i in range(60):
        found = embed.clustering(rng.normal(size=(12, 5)), labels, n_permutations=99, seed=i)
        values.append(found["silhouette"].p)
    # of 60 uniform p-values the mean is 0.5 with a standard error of 0.037; 4 of them
    assert abs(np.mean(values) - 0.5) < 0.15
    assert np.isnan(embed.clustering(apart, np.arange(12))["purity"].value)


def test_difference_of_two_networks() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 4, 5, 6], 5)
    apart, mixed = (rng.normal(size=(20, 5)) + s * labels[:, None] for s in (9.0, 0.0))
    first, second = (embed.clustering(x, labels, 19)["silhouette"] for x in (mixed, apart))
    more, p = embed.difference(first, second)
    assert more == pytest.approx(second.value - first.value) and more > 0.5 and p < 0.01
    assert embed.difference(first, first) == (0.0, 1.0)
    one = embed.clustering(apart, np.arange(20), 19)["silhouette"]
    assert np.isnan(embed.difference(one, one)).all()  # of no statistic, no p-value either


# --------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few complexes of six metals, and two networks with random parameters."""
    place = tmp_path_factory.mktemp("embed")
    light = {1, 6, 7, 8, 9, 17}
    of_light = complexes(10_000, light | set(METALS))
    found = [a for z in METALS for a in [b for b in of_light if z in b.numbers][:3]]
    preprocess(found, place / "data", resources=Resources(workers=1))
    known = sorted({int(z) for a in found for z in a.numbers})
    for name, species in {"one": "free", "two": "shells"}.items():
        save_run(random_run((), known, n_layers=1, species=species), place / name)
    return place


def test_features_are_those_of_the_atoms_and_decide_the_energy(place: Path) -> None:
    run, data = open_run(place / "one"), open_dataset(str(place / "data"))
    atoms = embed.choose_atoms(data, np.arange(len(data)), METALS, run.elements)
    assert set(atoms.numbers) <= set(METALS)
    features = embed.features_of(run, data, atoms, batch_size=3)
    offsets = np.asarray(data["offsets"])
    for i in (0, len(atoms.numbers) - 1):  # in a batch as alone
        row = atoms.rows[atoms.structure[i]]
        own = slice(offsets[row], offsets[row + 1])
        assert data["numbers"][own][atoms.atom[i]] == atoms.numbers[i]
        positions, graph = run.graph(structure_of(data, int(row)))
        alone = node_features(run.potential, run.params, positions, graph)[atoms.atom[i]]
        np.testing.assert_allclose(features[i], alone, rtol=1e-4, atol=1e-5)  # float32 sums
    # the energy of a one-layer network is its readout of these features
    energy = run.params["energy"]
    h = node_features(run.potential, run.params, positions, graph)
    hidden = jax.nn.silu(h @ energy["hidden"]["kernel"] + energy["hidden"]["bias"])
    total = (hidden @ energy["layer0"]["kernel"]).sum() * run.potential.constants.energy_scale
    assert float(run.energy(run.params, positions, graph)) == pytest.approx(float(total), rel=1e-4)


def test_d_electrons_come_from_the_labels(place: Path) -> None:
    data = open_dataset(str(place / "data"))
    atoms = embed.choose_atoms(data, np.arange(len(data)), METALS, range(1, 87))
    found = embed.elements_of(atoms, data.method)
    d = dict(zip(found.symbols, found.d_electrons, strict=True))
    assert d["Zn"] == 0.0  # GFN1-xTB has no d shell there
    assert 1 < d["Ti"] < 4 and 8 < d["Cu"] <= 10.1
    with pytest.raises(InputError, match=r"at least 4 elements are needed, found Ti, Zn"):
        embed.choose_atoms(data, np.arange(len(data)), (22, 30), range(1, 87))


# --------------------------------------------------------------------------- command


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["embed", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_two_networks_side_by_side(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (place / "one", place / "two", place / "data", "--out", tmp_path / "new")
    assert call(*arguments, "--permutations", 19) == 0
    out = capsys.readouterr().out
    assert "two: model.species" in out and "one: model.species" not in out
    new = tmp_path / "new"
    for name in ("pca.png", "tsne.png"):
        assert (new / name).read_bytes().startswith(b"\x89PNG")
    with (new / "clustering.csv").open(encoding="utf-8") as handle:
        lines = list(csv.DictReader(handle))
    assert [(r["run"], r["label"], r["statistic"]) for r in lines[:2]] == [
        ("one", "group", "silhouette"), ("one", "group", "purity"),
    ]  # fmt: skip
    assert all(0 < float(r["p"]) <= 1 and -1 <= float(r["value"]) <= 1 for r in lines)
    assert not lines[0]["difference_p"] and float(lines[4]["difference_p"]) > 0
    with np.load(new / "embeddings.npz", allow_pickle=False) as arrays:
        assert arrays["one/features"].shape == (len(arrays["numbers"]), 4)
        assert arrays["two/PCA"].shape == (len(arrays["elements"]), 2)
    with (new / "elements.csv").open(encoding="utf-8") as handle:
        table = {r["element"]: r for r in csv.DictReader(handle)}
    assert (table["Ru"]["group"], table["Ru"]["row"]) == ("8", "5")
    with gzip.open(new / "chemiscope.json.gz") as handle:
        shown = json.load(handle)
    assert len(shown["environments"]) == len(shown["properties"]["element"]["values"])
    assert {"one PCA 1", "two PCA 2", "group"} <= set(shown["properties"])


def test_where_there_is_no_statistic_none_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = "Sc,Ti,V,Cr,Mn,Fe,Co,Ni,Cu,Zn"
    arguments = (place / "one", place / "two", place / "data", "--elements", row)
    assert call(*arguments, "--out", tmp_path, "--no-chemiscope", "--permutations", 19) == 0
    out = capsys.readouterr().out
    assert "no statistic by group, row" in out and "…" not in out
    with (tmp_path / "clustering.csv").open(encoding="utf-8") as handle:
        assert {r["difference_p"] for r in csv.DictReader(handle)} == {"", "nan"}


def test_what_is_missing_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, told in {
        (place / "one",): "orbq embed RUN... DATASET",
        (place / "one", place / "data", "--elements", "Fe,Xx"): "'Xx' is no element",
    }.items():
        assert call(*arguments, "--out", tmp_path) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "chemiscope", None)
    with pytest.raises(InputError, match=r"orbq\[explore\].*--no-chemiscope"):
        require("chemiscope")


def test_a_part_is_what_every_run_holds_there(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs that divide the data set differently: a structure that one was taught is in none."""
    data = Dataset.open(place / "data")
    parts = []
    for seed in (0, 1):
        run = orbq.load(place / "one")
        own = {
            "split": "within",
            "split_seed": seed,
            "test_fraction": 0.6,
            "validation_fraction": 0.2,
        }
        run.config = run.config.model_copy(update={"data": run.config.data.model_copy(update=own)})
        entry = {"path": str(data.path), "arrays": data.manifest["arrays"]}
        save_run(run, tmp_path / f"seed{seed}", data=[entry])
        parts.append(set(split_rows(orbq.load(tmp_path / f"seed{seed}"), data, "test")[1].tolist()))
    assert parts[0] != parts[1] and len(parts[0] & parts[1]) > 4
    arguments = (tmp_path / "seed0", tmp_path / "seed1", place / "data", "--split", "test")
    assert call(*arguments, "--out", tmp_path, "--no-chemiscope", "--permutations", 19) == 0
    out = capsys.readouterr().out
    assert "divide" in out and f"of {len(parts[0] & parts[1])} structures" in out


def test_a_file_to_explore_of_earlier_runs_goes(place: Path, tmp_path: Path) -> None:
    (tmp_path / "chemiscope.json.gz").write_bytes(b"of an earlier command")
    arguments = (place / "one", place / "data", "--out", tmp_path, "--no-chemiscope")
    assert call(*arguments, "--permutations", 19) == 0
    assert (tmp_path / "pca.png").exists() and not (tmp_path / "chemiscope.json.gz").exists()
