"""A run and an ablation have one writer, in a directory that can be written to; else they are
refused, and change nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from training_runs import config_of, label, records, settings_put_back

from orbq.config import Config
from orbq.errors import InputError
from orbq.fit import fit
from orbq.study.run import run_ablation

HOLD = """
import sys
from pathlib import Path
from orbq.lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_in(directory: Path) -> Iterator[None]:
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield
        process.kill()  # as by a scheduler: nothing is put in order


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(tmp_path_factory.mktemp("lock"))


def test_a_second_training_of_a_run_is_refused(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    short = config_of(data, place, training={"n_steps": 4, "pretrain_steps": 0})
    with settings_put_back():
        fit(short)
        before = records(place)
        with another_process_in(place):
            for overwrite in (False, True):
                with pytest.raises(InputError, match=r"another process is training in .*run"):
                    fit(short, overwrite=overwrite)
            assert records(place) == before
        fit(short)  # the other process is dead, and so is its hold
    assert records(place) == before


def test_a_second_process_of_an_ablation_is_refused(data: Path, tmp_path: Path) -> None:
    config: Config = config_of(data, tmp_path / "grid", training={"pretrain_steps": 0})
    table = config.ablation.model_copy(update={"targets": ("atomic",), "weights": (0.0, 1.0)})
    config = config.model_copy(update={"ablation": table})
    place = tmp_path / "grid"
    place.mkdir()
    (place / "results.jsonl").write_text("")
    with another_process_in(place):
        for overwrite in (False, True):
            with pytest.raises(InputError, match=r"another process is training in .*grid"):
                run_ablation(config, overwrite=overwrite)
        assert [p.name for p in place.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("begin", [fit, run_ablation])
@pytest.mark.parametrize(
    ("name", "told"), [("file", "is a file: name another"), ("file/run", "cannot be made")]
)
def test_a_directory_that_cannot_be_made_is_named(
    data: Path, tmp_path: Path, begin: Callable[[Config], Any], name: str, told: str
) -> None:
    (tmp_path / "file").write_text("")
    config: Config = config_of(data, tmp_path / name, training={"pretrain_steps": 0})
    table = config.ablation.model_copy(update={"targets": ("atomic",), "weights": (0.0, 1.0)})
    with settings_put_back(), pytest.raises(InputError, match=f"run.directory .*{told}"):
        begin(config.model_copy(update={"ablation": table}))


def test_a_directory_behind_a_dangling_link_is_made(data: Path, tmp_path: Path) -> None:
    """As on the first day of a scratch disk."""
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    config = config_of(data, tmp_path / "run", data={"n_train": 999})  # refused after that
    with settings_put_back(), pytest.raises(InputError, match="n_train"):
        fit(config)
    assert (tmp_path / "scratch").is_dir()
