"""The configuration: defaults, strictness, errors reported together, overrides, inheritance."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbq.config import (
    BACKBONES,
    Config,
    LossWeights,
    check_against,
    config_from_json,
    load_config,
    parse_config,
)
from orbq.config_text import keys_of
from orbq.errors import InputError
from orbq.schema import FIELDS
from orbq.targets import MAIN_TERMS, TARGETS

CONFIGS = Path(__file__).parents[1] / "configs"

INVALID = [
    (
        "[model]\ncutof = 5.0",
        ["model.cutof: unknown key (value 5.0)", "did you mean model.cutoff?"],
    ),
    ("[modle]\ncutoff = 5.0", ["modle: unknown key", "did you mean model?"]),
    ("seed = 1", ["seed: unknown key", "did you mean training.seed?"]),
    ("[model]\nlearning_rate = 1e-3", ["did you mean training.learning_rate?"]),
    ("[loss.weights]\norbitals = 1", ["did you mean loss.weights.orbital?"]),
    ("[model]\ncutoff = -5.0", ["model.cutoff: must be above 0.0, is -5.0"]),
    ("[model]\ncutoff = '5'", ["model.cutoff: must be a number, is '5'"]),
    ("[model]\nlmax = 4", ["model.lmax: must be at most 3, is 4"]),
    ("[model]\nlmax = 2.0", ["model.lmax: must be a whole number, is 2.0"]),
    ("[model]\nn_layers = true", ["model.n_layers: must be a whole number, is true"]),
    ("[model]\nembed_charge = 1", ["model.embed_charge: must be true or false, is 1"]),
    (
        "[model]\nbackbone = 'nequib'",
        ["must be 'nequip', 'mace' or 'invariant', is 'nequib'", "did you mean nequip?"],
    ),
    ("[model]\nradial_hidden = 32", ["model.radial_hidden: must be a list, is 32"]),
    ("[model]\nradial_hidden = [32, 0]", ["model.radial_hidden[1]: must be at least 1, is 0"]),
    ("[model]\nradial_hidden = [32.0]", ["model.radial_hidden[0]: must be a whole number"]),
    ("[data]\nsplit = 'groups'", ["'group' or 'within', is 'groups'", "did you mean group?"]),
    ("[data]\ndataset = ''", ["data.dataset: must not be empty"]),
    ("[data]\ndataset = 3", ["data.dataset: must be text in quotes, is 3"]),
    ("[data]\nunlabelled = 'a'", ["data.unlabelled: must be a list, is 'a'"]),
    (
        "[data]\nreferences = 'fitted'",
        ["data.references: must be 'fit', 'guided' or 'taught' or a table"],
    ),
    ("[data.references]\nHx = 1.0", ["data.references.Hx: not an element symbol"]),
    ("[data.references]\nH = '1'", ["data.references.H: must be a number, is '1'"]),
    ("[data]\nvalidation_fraction = 0.5\ntest_fraction = 0.5", ["must be below 1", "is 1"]),
    ("[loss.weights]\nforces = -1", ["loss.weights.forces: must be at least 0.0, is -1"]),
    ("[loss.weights]\nforces = inf", ["loss.weights.forces: must be finite, is inf"]),
    ("[loss.weights]\nforces = nan", ["loss.weights.forces: must be finite, is nan"]),
    ("[loss.weights]\nenergy = 0\nforces = 0", ["loss.weights: all are 0"]),
    (
        "[loss.weights]\nonsite = 1\n[model]\nhead = 'invariant'",
        ["loss.weights.onsite", "equivariant"],
    ),
    ("[loss.weights]\norbital = 1\n[model]\nlmax = 1", ["model.lmax", "lmax >= 2, is 1"]),
    (
        "[ablation]\ntargets = ['onsite']\n[model]\nlmax = 1",
        ["model.lmax", "lmax >= 2, is 1"],
    ),
    (
        "[training]\nwarmup_steps = 6000",
        ["training.warmup_steps: must be at most", "(5000), is 6000"],
    ),
    ("[training]\nn_steps = 0", ["training.n_steps: must be at least 1, is 0"]),
    ("[training]\nseed = 99999999999", ["training.seed: must be at most 2147483647"]),
    ("[training]\nema_decay = 1.0", ["training.ema_decay: must be below 1.0, is 1.0"]),
    ("[training]\nunlabelled_share = 0.5", ["data.unlabelled names no data set", "needs a target"]),
    ("[data]\nunlabelled = ['a']", ["data.unlabelled: would teach nothing"]),
    ("[training]\npretrain_steps = 10", ["training.pretrain_steps: needs a target to teach"]),
    ("data = 3", ["data: must be a table of keys, is 3"]),
    ("[model]\ncutoff = 1979-05-27", ["model.cutoff: must be a number"]),
    ("[model\ncutoff = 5", ["not valid TOML", "line 1"]),
    ("a = 1\na = 2", ["not valid TOML"]),
    ("a = " + "[" * 5000, ["not valid TOML"]),
    ("base = 3", ["base: must be the path of a TOML file, is 3"]),
    ("base = 'none.toml'", ["none.toml: no such file"]),
    ("base = 'config.toml'", ["go in a circle"]),
]


def write(directory: Path, text: str, name: str = "config.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("text, expected", INVALID, ids=[text[:40] for text, _ in INVALID])
def test_invalid_files_name_key_value_and_limit(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    path = write(tmp_path, text)
    told = message(path)
    assert str(tmp_path) in told
    for part in expected:
        assert part in told


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    text = "[model]\ncutof = 5.0\nlmax = 7\n[training]\nn_steps = 10\n[loss.weights]\nforces = -1"
    told = message(write(tmp_path, text), "training.sede=1", "nonsense")
    assert told.splitlines()[0].endswith("6 problems")
    for key in ("model.cutof", "model.lmax", "warmup_steps", "weights.forces", "training.sede"):
        assert key in told
    assert "'nonsense': an override is written section.key=value" in told


def test_a_conflict_that_follows_from_a_wrong_key_is_not_reported(tmp_path: Path) -> None:
    text = "[training]\nn_steps = 'many'\nwarmup_steps = 9000"  # the default n_steps is below 9000
    assert "warmup" not in message(write(tmp_path, text))


def test_base_toml_lists_every_key_with_its_default() -> None:
    document = tomllib.loads((CONFIGS / "base.toml").read_text())
    assert parse_config(document) == Config()
    listed = {".".join(path) for path in _paths(document)}
    assert listed == set(keys_of(Config))


def _paths(document: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = []
    for key, value in document.items():
        paths.append((*prefix, key))
        if isinstance(value, dict):
            paths += _paths(value, (*prefix, key))
    return paths


def test_every_key_of_base_toml_is_explained() -> None:
    for line in (CONFIGS / "base.toml").read_text().splitlines():
        if "=" in line and not line.startswith("#") and not line.lstrip().startswith("#"):
            assert "#" in line, f"no comment: {line}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_committed_configs_are_valid_and_open_with_their_command(path: Path) -> None:
    config = load_config(path)
    assert config.run.directory
    opening = path.read_text().split("\n\n")[0]
    assert opening.startswith("#")
    assert "    orbq " in opening


def test_weights_are_the_targets() -> None:
    assert set(LossWeights.model_fields) == {*MAIN_TERMS, *TARGETS}


def test_whole_numbers_stand_for_real_ones() -> None:
    config = parse_config({"model": {"cutoff": 6}, "data": {"references": {"H": -13}}})
    assert config.model.cutoff == 6.0 and isinstance(config.model.cutoff, float)
    assert config.data.references == {"H": -13.0}


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("training.seed=3", "training", "seed", 3),
        ("training.learning_rate = 1e-3", "training", "learning_rate", 1e-3),
        ("data.dataset=some/where else", "data", "dataset", "some/where else"),
        ("data.dataset='quoted'", "data", "dataset", "quoted"),
        ("data.dataset=a=b", "data", "dataset", "a=b"),
        ("model.radial_hidden=[8, 8]", "model", "radial_hidden", (8, 8)),
        ("model.embed_spin=false", "model", "embed_spin", False),
        ("data.references={H=-13.6}", "data", "references", {"H": -13.6}),
    ],
)
def test_overrides(tmp_path: Path, override: str, section: str, key: str, value: object) -> None:
    config = load_config(write(tmp_path, ""), [override])
    assert getattr(getattr(config, section), key) == value


def test_an_override_of_one_reference_leaves_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, "[data]\nreferences = {H = -13.6, C = -1030.0}")
    config = load_config(path, ["data.references.H=-13.7", "data.references.O=-2041.0"])
    assert config.data.references == {"H": -13.7, "C": -1030.0, "O": -2041.0}
    assert load_config(path, ["data.references={O=-1.0}"]).data.references == {"O": -1.0}
    named = load_config(path, ["data.references=taught", "data.references.O=-1.0"])
    assert named.data.references == {"O": -1.0}


@pytest.mark.parametrize(
    "override, expected",
    [
        ("training.seed='3'", "training.seed: must be a whole number, is '3'"),
        ("training.seed=", "training.seed: must be a whole number, is ''"),
        ("training.seed=3\nx=1", "training.seed: must be a whole number"),
        ("training..seed=3", "an override is written section.key=value"),
        ("a.b.c.d.e=3", "an override is written section.key=value"),
        ("data.dataset.x=3", "data.dataset: must be text in quotes"),
        ("base=other.toml", "base: unknown key"),
    ],
)
def test_invalid_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in message(write(tmp_path, ""), override)


def test_a_file_starts_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "[model]\nn_layers = 3\nlmax = 1\n[data.references]\nH = -1\nC = -2", "a.toml")
    text = "base = '../a.toml'\n[model]\nlmax = 0\n[data.references]\nO = -3"
    config = load_config(write(tmp_path / "sub", text, "b.toml"))
    assert (config.model.n_layers, config.model.lmax) == (3, 0)
    assert config.data.references == {"O": -3.0}, "a reference table is replaced as a whole"
    assert config.run.directory == "runs/b"


def test_unreadable_files(tmp_path: Path) -> None:
    write(tmp_path, "", "demo.toml")
    assert "demo.tom: no such file; did you mean demo.toml?" in message(tmp_path / "demo.tom")
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"a = '\xff'")
    assert "not UTF-8 text at byte 5" in message(tmp_path / "binary.toml")
    write(tmp_path, "#" * 1_000_001, "long.toml")
    assert "longer than 1000000 bytes" in message(tmp_path / "long.toml")


def test_stored_configs_read_back_unchanged(tmp_path: Path) -> None:
    config = parse_config(
        {
            "data": {"references": {"H": -13.6, "C": -1e-7}, "dataset": 'a "b"\\c\té\x7f'},
            "training": {"learning_rate": 1e-30},
            "model": {"radial_hidden": []},
        }
    )
    assert config_from_json(config.model_dump_json()) == config
    for backbone, start in (("mace", 1.0), ("nequip", 0.2)):  # kept before there was the key
        document = config.model_dump(mode="json")
        document["model"]["backbone"] = backbone
        del document["model"]["product_init"]
        assert config_from_json(json.dumps(document)).model.product_init == start
    assert load_config(write(tmp_path, config.model_dump_toml())).data == config.data
    for wrong in ("{", "[]", "[" * 100_000):
        with pytest.raises(InputError, match=r"config\.json"):
            config_from_json(wrong, "config.json")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
_DOCUMENTS = st.dictionaries(
    st.sampled_from([*Config.model_fields, "extra"]),
    st.dictionaries(st.sampled_from([k.split(".")[-1] for k in keys_of(Config)]), _VALUES)
    | _VALUES,
)


@settings(max_examples=30, deadline=None)
@given(_DOCUMENTS)
def test_any_document_is_accepted_or_refused_in_words(document: dict) -> None:
    try:
        config = parse_config(document)
    except InputError as error:
        assert str(error).startswith("configuration")
    else:
        assert parse_config(json.loads(config.model_dump_json())) == config


def test_guided_references_need_xtb_energies() -> None:
    config = parse_config({"data": {"references": "guided"}})
    check_against(config, dict.fromkeys(FIELDS, 5), "full")
    with pytest.raises(InputError, match=r"data\.references: is 'guided', but no structure .*'b'"):
        check_against(config, dict.fromkeys(FIELDS, 5) | {"xtb_energy": 0}, "b")


def test_a_weight_needs_labels() -> None:
    weights = {"orbital": 2.0, "dft": 1.0, "xtb_forces": 1.0}
    config = parse_config({"loss": {"weights": weights}})
    check_against(config, dict.fromkeys(FIELDS, 5), "full")
    with pytest.raises(InputError) as caught:
        check_against(config, {"energy": 5, "onsite": 0}, "bare")
    told = str(caught.value)
    assert "4 problems" in told and "'bare'" in told
    for part in (
        "loss.weights.forces: is 1, but no structure",
        "loss.weights.orbital: is 2,",
        "has onsite",
        "loss.weights.dft",
        "has dft_charges",
        "`orbq preprocess INPUT... --out DATASET`",
    ):
        assert part in told


def test_configs_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().model.cutoff = 3.0  # type: ignore[misc]
    assert "nequip" in BACKBONES


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    """A shell expands ``~`` in no ``run.directory=~/mine``."""
    monkeypatch.setenv("HOME", "/home/ada")
    more = "[data]\nunlabelled = ['~/more', 'tmc_unlabelled']\n[training]\npretrain_steps = 1\n"
    (tmp_path / "c.toml").write_text(more + "[loss.weights]\nonsite = 1.0\n")
    overrides = ["run.directory=~/mine", "data.dataset=~/set", "training.initial=~/old"]
    config = load_config(tmp_path / "c.toml", overrides)
    assert config.run.directory == "/home/ada/mine"
    assert config.data.dataset == "/home/ada/set"
    assert config.data.unlabelled == ("/home/ada/more", "tmc_unlabelled")
    assert config.training.initial == "/home/ada/old"
