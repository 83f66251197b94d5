"""Hostile input: a message that names the file, and nothing else happens.

tests/malformed/ holds what must be refused, made by make_malformed.py; hostile.py runs it as a user
would and watches. Beside it, Hypothesis damages good files at random.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import molecule

from orbq.download import QM7_ARCHIVE, make_qm7
from orbq.errors import InputError, OrbqError
from orbq.preprocess.label import Resources, preprocess
from orbq.preprocess.store import write_atomically
from tests import make_malformed
from tests.malformed_config import archives

ROOT = Path(__file__).parents[1]
INDEX = json.loads((make_malformed.PLACE / make_malformed.INDEX).read_text())
GROUPS = ("structure", "configuration", "dataset", "run")


def test_the_committed_cases_are_those_of_the_script(tmp_path):
    make_malformed.write(tmp_path / "malformed")
    difference = filecmp.dircmp(make_malformed.PLACE, tmp_path / "malformed")
    pending = [difference]
    while pending:
        part = pending.pop()
        wrong = [*part.left_only, *part.right_only, *part.diff_files, *part.funny_files]
        assert not wrong, f"{wrong}: make them again with python -m tests.make_malformed"
        pending += part.subdirs.values()
    assert len(INDEX) >= 200


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """case -> (exit status, output, forbidden acts); a process for each group, when asked for."""
    found: dict[str, dict[str, tuple[int, str, list[str]]]] = {}

    def of(case: str) -> tuple[int, str, list[str]]:
        group = case.split("/")[0]
        if group not in found:
            place = tmp_path_factory.mktemp(group)
            environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
            done = subprocess.run(
                [sys.executable, "-m", "tests.hostile", group, str(place)],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            found[group] = {name: (code, out, wrong) for name, code, out, wrong in lines}
            assert done.returncode == 0, done.stderr[-2000:]
        return found[group][case]

    return of


@pytest.mark.parametrize("case", [name for name in INDEX if name.split("/")[0] in GROUPS])
def test_a_malformed_input_is_one_message(told, case):
    status, output, forbidden = told(case)
    assert status in (1, 2), output
    assert re.search(INDEX[case]["said"], output), output
    assert "Traceback" not in output
    assert "Event loop" not in output  # of threads of Orbax: it never sees damaged files
    assert "not foreseen" not in output
    assert not forbidden


@pytest.mark.parametrize("name", archives())
def test_an_archive_is_never_unpacked(tmp_path, name):
    archive = tmp_path / "out" / QM7_ARCHIVE
    archive.parent.mkdir()
    archive.write_bytes((make_malformed.PLACE / "archive" / name / "qm7.tar.gz").read_bytes())
    with pytest.raises(OrbqError, match=INDEX[f"archive/{name}"]["said"]) as error:
        make_qm7(archive.parent)
    assert str(archive) in str(error.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [archive]


@pytest.mark.parametrize("name", [".job/lock", ".job/staged.json.tmp", ".job"])
def test_links_are_not_followed_out_of_the_directory(tmp_path, name):
    precious = tmp_path / "precious"
    precious.mkdir() if name == ".job" else precious.write_text("mine")
    link = tmp_path / "set" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    with pytest.raises(InputError, match=rf"{link} is a link"):
        preprocess([molecule("H2O")], tmp_path / "set", resources=Resources(workers=1))
    assert list(precious.iterdir()) == [] if name == ".job" else precious.read_text() == "mine"


def test_a_link_in_place_of_a_partial_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.json.tmp").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "a.json", "{}")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "{}"
