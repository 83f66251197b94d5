"""Links in a directory that is written to: those that lead out of it are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orbq import records
from orbq.aside import replaced
from orbq.cli import make_app
from orbq.config import Config, parse_config
from orbq.errors import InputError
from orbq.fit import fit
from orbq.preprocess.links import make_directory, refuse_links
from orbq.run_files import RUN_FILE
from orbq.study.report import write_report
from orbq.study.run import run_ablation
from tests.tiny_run import random_run, save_run

PRECIOUS = "mine"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory with a file that nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text(PRECIOUS)
    return tmp_path / "outside"


def untouched(outside: Path) -> bool:
    (only,) = outside.iterdir()
    return only.read_text() == PRECIOUS


# --------------------------------------------------------------------------- which ones


@pytest.mark.parametrize("name", ["a", "b/c", "b/c/d.json"])
@pytest.mark.parametrize("target", ["file", "", "not-there"])
def test_links_out_at_any_depth(tmp_path, outside, name, target):
    link = tmp_path / "own" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / target)
    with pytest.raises(InputError, match=rf"{link} is a link out of .*own, .*choose another --out"):
        refuse_links(tmp_path / "own", "--out")


def test_a_link_to_a_link_and_one_in_a_circle(tmp_path, outside):
    own = tmp_path / "own"
    (own / "b").mkdir(parents=True)
    (tmp_path / "between").symlink_to(outside)
    (own / "b" / "a").symlink_to("../../between/file")
    with pytest.raises(InputError, match="b/a is a link out of"):
        refuse_links(own, "--out")
    (own / "b" / "a").unlink()
    (own / "x").symlink_to("x")
    with pytest.raises(InputError, match="x is a link out of"):
        refuse_links(own, "--out")


def test_links_within_and_the_directory_itself_are_nobodys_business(tmp_path, outside):
    own, disk = tmp_path / "own", tmp_path / "disk"
    (disk / "checkpoints" / "step_1").mkdir(parents=True)
    own.symlink_to(disk)
    (own / "latest").symlink_to("checkpoints/step_1")
    (own / "absolute").symlink_to(own / "checkpoints")
    refuse_links(own, "--out")
    refuse_links(tmp_path / "not-there", "--out")


def test_only_what_is_written_and_nothing_of_others(tmp_path, outside):
    own = tmp_path / "own"
    (own / "wandb" / "run").mkdir(parents=True)
    (own / "wandb" / "run" / "debug.log").symlink_to(outside / "file")
    (own / "datasets").symlink_to(outside)
    refuse_links(own, "--out", ["wandb", "*.png"], ["wandb"])
    with pytest.raises(InputError, match=r"debug\.log"):
        refuse_links(own, "--out", ["wandb"])
    with pytest.raises(InputError, match="datasets"):
        refuse_links(own, "--out", foreign=["wandb"])
    with pytest.raises(InputError, match="datasets"):
        refuse_links(own, "--out", foreign=["wandb", "datasets"])


# --------------------------------------------------------------------------- train and ablate


def config_in(directory: Path) -> Config:
    """Of a run that is refused before its data set, which is not there, is looked at."""
    document = {
        "data": {"dataset": "not-there"},
        "loss": {"weights": {"onsite": 1.0}},
        "ablation": {"targets": ["onsite"], "weights": [0.0, 1.0]},
        "run": {"directory": str(directory)},
    }
    return parse_config(document)


TRAINED = [
    "statistics.npz",
    "run.json.tmp",
    "run.json",
    "metrics.jsonl",
    "summary.json",
    "tensorboard",
]
TRAINED += ["checkpoints", "checkpoints/best.new", "checkpoints/step_000000001", "wandb"]


@pytest.mark.parametrize("name", TRAINED)
def test_train_refuses_a_link_out_of_its_directory(tmp_path, outside, name):
    directory = tmp_path / "run"
    config = config_in(directory)
    if name not in ("statistics.npz", "run.json.tmp", RUN_FILE):  # there before, or itself
        directory.mkdir()
        stored = {"run_version": 1, "config": json.loads(config.model_dump_json())}
        (directory / RUN_FILE).write_text(json.dumps(stored))
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).symlink_to(outside / "file" if "." in name else outside)
    with pytest.raises(InputError, match=rf"{name} is a link out of .*choose another run\.dir"):
        fit(config)
    assert untouched(outside)


def test_the_links_of_weights_and_biases_are_its_own(tmp_path, outside):
    directory = tmp_path / "run"
    config = config_in(directory)
    (directory / "wandb" / "run-1" / "logs").mkdir(parents=True)
    (directory / "wandb" / "run-1" / "logs" / "debug-core.log").symlink_to(outside / "file")
    stored = {"run_version": 1, "config": json.loads(config.model_dump_json())}
    (directory / RUN_FILE).write_text(json.dumps(stored))
    with ExitStack() as held:
        assert records.claim(directory, config, False, held)


@pytest.mark.parametrize("name", ["results.jsonl", "ablation.json", "report.html", "programs/a"])
def test_ablate_refuses_a_link_out_of_its_directory(tmp_path, outside, name):
    directory = tmp_path / "ablation"
    (directory / "programs").mkdir(parents=True)
    (directory / name).symlink_to(outside if name == "programs/a" else outside / "file")
    told = rf"{name} is a link out of .*choose another run\.directory"
    with pytest.raises(InputError, match=told):
        run_ablation(config_in(directory))
    with pytest.raises(InputError, match=told):
        write_report(directory, [{"target": None}])
    assert untouched(outside)


@pytest.mark.parametrize("claim", [records.claim, "ablation"], ids=["train", "ablate"])
def test_a_directory_that_is_a_link_stays_one_when_it_is_overwritten(tmp_path, claim):
    from orbq.study import run as study

    disk, directory = tmp_path / "disk" / "here", tmp_path / "run"
    disk.mkdir(parents=True)
    directory.symlink_to(disk)
    take: Callable[..., object] = study._claim if claim == "ablation" else claim
    config = config_in(directory)
    with ExitStack() as held:
        take(directory, config, False, held)
    (disk / (study.DESCRIPTION if claim == "ablation" else RUN_FILE)).write_text("{}")
    (disk / "old").write_text("")
    with ExitStack() as held:
        take(directory, config, True, held)
        replaced(directory)
    assert directory.readlink() == disk
    assert {path.name for path in disk.iterdir()} <= {study.DESCRIPTION}
    assert [path.name for path in disk.parent.iterdir()] == ["here"]


# --------------------------------------------------------------------------- into a trained run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(random_run(), tmp_path_factory.mktemp("trained") / "run")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["evaluate", "RUN", "tmc"], "evaluation"),
        (["evaluate", "RUN", "tmc"], "evaluation/metrics.json"),
        (["evaluate", "RUN", "tmc", "--out", "RUN/mine"], "mine/parity.png"),
        (["export", "RUN"], "export"),
        (["export", "RUN"], "export.partial"),
        (["embed", "RUN", "tmc", "--no-chemiscope", "--out", "RUN/latent"], "latent/pca.png"),
        (["plot", "RUN", "--no-parity", "--out", "RUN"], "learning-curves.csv"),
        (["demo", "--out", "RUN"], "table.json"),
    ],
)
def test_commands_refuse_a_link_out_of_a_run(trained, outside, arguments, name):
    if arguments[0] == "embed":
        pytest.importorskip("sklearn", reason="the extra explore is not installed")
    link = trained / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside / "file" if "." in link.name else outside)
    try:
        typed = [argument.replace("RUN", str(trained)) for argument in arguments]
        done = CliRunner().invoke(make_app(), typed)
    finally:
        link.unlink()
    assert done.exit_code == 2, done.output
    assert f"{link} is a link out of" in done.output.replace("\n", "")
    assert untouched(outside)


def test_a_directory_that_cannot_be_made_is_refused_by_the_option_that_names_it(
    tmp_path: Path,
) -> None:
    make_directory(tmp_path / "a" / "b", "--out")
    make_directory(tmp_path / "a" / "b", "--out")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--out .*file/c: .*cannot be made \(Not a directory\)"):
        make_directory(tmp_path / "file" / "c", "--out")


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize("begin", [fit, run_ablation])
@pytest.mark.parametrize("name", ["z[1]", "g[1]/run"])
def test_a_path_in_which_checkpoints_cannot_be_read_is_refused_at_once(tmp_path, begin, name):
    with pytest.raises(InputError, match=r"run\.directory .* a path with '\[' cannot be read"):
        begin(config_in(tmp_path / name))
    assert not (tmp_path / name).exists()
