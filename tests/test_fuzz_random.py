"""Good files damaged at random, and the bombs that are too large to keep beside the tests."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orbq import run_form
from orbq.config import config_from_json, load_config, parse_config
from orbq.download import QM7_ARCHIVE, make_qm7
from orbq.errors import InputError, OrbqError
from orbq.preprocess import ase_formats
from orbq.preprocess.check import check
from orbq.preprocess.frames import find_sources
from orbq.preprocess.read import Failure, read_structures
from orbq.preprocess.store import Dataset
from orbq.preprocess.summary import summarise
from orbq.preprocess.verify import verify
from tests.malformed_datasets import make_dataset, restate
from tests.malformed_structures import WATER, gz

FUZZ = settings(
    max_examples=int(os.environ.get("ORBQ_FUZZ_EXAMPLES", "60")),
    deadline=None,  # the machine may be busy
    derandomize="ORBQ_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TOML = (Path(__file__).parents[1] / "configs" / "base.toml").read_bytes()
# what is put into a file: structure of the formats, numbers of all sizes, rubbish
PIECES = [b"\0", b"\xff" * 8, b"\n", b"[", b"{", b'"', b"1" * 30, b"-1", b"nan", b"1e999", b":"]
PIECES += [b"\x7f" + b"\xff" * 7, (10**12).to_bytes(8, "little"), b"energy", b"9" * 5000]
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where, as a share of the file
        st.integers(0, 40),  # bytes that are taken out
        st.one_of(st.sampled_from(PIECES), st.binary(max_size=12)),  # what comes in their place
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, n_removed, inserted in edits:
        place = int(where * len(data))
        data = data[:place] + inserted + data[place + n_removed :]
    return data


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good structure files by name."""
    place = tmp_path_factory.mktemp("good")
    atoms = molecule("CH3OH")
    atoms.info["charge"] = 0
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((6, 3)))
    for name in ("a.traj", "a.json", "a.extxyz"):
        ase.io.write(place / name, atoms)
    for name in ("a.cif", "a.vasp"):
        ase.io.write(place / name, bulk("Cu", cubic=True))
    with connect(place / "a.db") as database:
        database.write(atoms, charge=0, TotEnergy=-2.0)
    (place / "a.extxyz.gz").write_bytes(gz(WATER.encode() * 3))
    (place / "tmQM_X1.xyz").write_text("1\nCSD_code = A | q = 0 | S = 0 | MND = 1\nHe 0 0 0\n")
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


NAMES = ["a.traj", "a.json", "a.extxyz", "a.cif", "a.vasp", "a.db", "a.extxyz.gz", "tmQM_X1.xyz"]


@pytest.mark.parametrize("name", NAMES)
@given(edits=EDITS)
@FUZZ
def test_damaged_structure_files(good, tmp_path_factory, name, edits):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(damaged(good[name], edits))
    before = path.read_bytes()
    try:
        for item in read_structures([path]):
            assert isinstance(item, Failure) or check(item) is None or check(item)
    except InputError as error:
        assert name in str(error)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [name]
    shutil.rmtree(path.parent)


@given(edits=EDITS)
@FUZZ
def test_damaged_tables_of_tmqm(good, tmp_path_factory, edits):
    place = tmp_path_factory.mktemp("fuzz")
    (place / "tmQM_X1.xyz").write_bytes(good["tmQM_X1.xyz"])
    tables = {"tmQM_y.csv": b"CSD_code;Electronic_E\nA;-1\n", "tmQM_X.q": b"CSD_code = A |\nHe 0\n"}
    for name, content in tables.items():
        (place / name).write_bytes(damaged(content, edits))
    try:
        list(read_structures([place]))
    except InputError as error:
        assert "tmQM_" in str(error)
    shutil.rmtree(place)


@given(edits=EDITS, overrides=st.lists(st.text(max_size=30), max_size=2))
@FUZZ
def test_damaged_configurations(tmp_path_factory, edits, overrides):
    path = tmp_path_factory.mktemp("fuzz") / "a.toml"
    path.write_bytes(damaged(TOML, edits))
    try:
        load_config(path, overrides)
    except InputError as error:
        assert "a.toml" in str(error)
    shutil.rmtree(path.parent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def replaced(document, where: float, value):
    """The document with one of its values, at any depth, replaced."""
    places = []

    def walk(table):
        for key, inner in table.items() if isinstance(table, dict) else enumerate(table):
            places.append((table, key))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(document)
    table, key = places[int(where * len(places))]
    table[key] = value
    return document


@given(where=st.floats(0, 1, exclude_max=True), value=JSON)
@FUZZ
def test_damaged_descriptions_of_runs(where, value):
    config = parse_config({"loss": {"weights": {"onsite": 1.0}}})
    info = {
        "config": json.loads(config.model_dump_json()),
        "architecture": {**json.loads(config.model.model_dump_json()), "heads": [["onsite", "x"]]},
        "constants": {"elements": [1, 8], "energy_scale": 0.1, "avg_num_neighbors": 8.0},
        "references": {"energy": {"element": {"H": -13.6}, "charge": 0.0, "fitted": True}},
    }
    info["architecture"]["heads"] = [["onsite", "equivariant"]]
    assert run_form.fault(info, config) is None
    info = replaced(info, where, value)
    try:
        read = config_from_json(json.dumps(info["config"]), "run.json")
        reason = run_form.fault(info, read)
    except InputError as error:
        reason = str(error)
    assert reason is None or isinstance(reason, str)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("whole") / "set")


@given(file=st.floats(0, 1, exclude_max=True), edits=EDITS, again=st.booleans())
@FUZZ
def test_damaged_data_sets(whole, tmp_path_factory, file, edits, again):
    copy = tmp_path_factory.mktemp("fuzz") / "set"
    shutil.copytree(whole, copy)
    files = sorted(copy.iterdir())
    path = files[int(file * len(files))]
    path.write_bytes(damaged(path.read_bytes(), edits))
    if again:  # an attacker states the checksums of what he wrote
        try:
            restate(copy)
        except Exception:  # beyond what NumPy reads
            again = False
    try:
        with np.errstate(all="ignore"):
            summarise(Dataset.open(copy))
        opened = True
    except InputError as error:
        opened = False
        assert str(copy) in str(error)
    try:
        problems = verify(copy)
    except InputError as error:
        problems = [str(error)]
    assert problems or opened  # verify finds whatever opening finds
    shutil.rmtree(copy.parent)


# --------------------------------------------------------------------------- bombs

LIMITED = """
import resource, sys
from orbq.errors import InputError
from orbq.preprocess.read import read_structures
import ase.io.extxyz
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    print(*read_structures([sys.argv[1]]), sep="\\n")
except InputError as error:
    print(error)
"""


def in_400_mb(path: Path) -> str:
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_a_line_of_a_gigabyte(tmp_path):
    path = tmp_path / "a.xyz.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(b"1\n")
        for _ in range(1024):
            out.write(b"x" * 2**20)
    assert path.stat().st_size < 2**23
    assert "longer than 4,194,304 characters" in in_400_mb(path)


def test_a_frame_of_more_atoms_than_are_read(tmp_path):
    path = tmp_path / "a.xyz.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(b"1000000000000\n\n")
        for _ in range(2000):
            out.write(b"H 0 0 0\n" * 1000)
    said = in_400_mb(path)
    assert "promises 1000000000000 atoms: 1,000,000 atoms or" in said


def test_other_formats_unpack_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(ase_formats, "MAX_UNPACKED", 1 << 20)
    (tmp_path / "a.cif.bz2").write_bytes(bz2.compress(b" " * 2**21))
    with pytest.raises(InputError, match=r"unpacks to more than 1,048,576 bytes: unpack it first"):
        list(read_structures([tmp_path / "a.cif.bz2"]))


def test_an_archive_unpacks_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("orbq.download.MAX_ARCHIVE", 1 << 16)
    (tmp_path / QM7_ARCHIVE).write_bytes(gzip.compress(bytes(2**17)))
    with pytest.raises(OrbqError, match="unpacks to more than 65,536 bytes"):
        make_qm7(tmp_path)


def test_pipes_and_devices_are_no_input(tmp_path):
    os.mkfifo(tmp_path / "a.xyz")
    for path in (tmp_path / "a.xyz", Path("/dev/zero")):
        with pytest.raises(InputError, match="is not a file"):
            find_sources([path])


# --------------------------------------------------------------------------- SQLite


def sqlite(path: Path, *statements: str) -> Path:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return path


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE other (x)"],
        [
            "CREATE VIEW systems AS WITH RECURSIVE n(i) AS"
            " (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
        ],
        ["CREATE TABLE systems (id, unique_id TEXT AS (hex(zeroblob(100000000))))"],
    ],
    ids=["another program's", "an endless view", "a computed column"],
)
def test_an_sqlite_file_that_is_no_database_of_ase(tmp_path, statements):
    path = sqlite(tmp_path / "a.db", *statements)
    before = path.read_bytes()
    with pytest.raises(InputError, match="not a database that ASE made"):
        list(read_structures([path]))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.db"]


def test_a_database_is_read_only(tmp_path):
    path = tmp_path / "a.db"
    with connect(path) as database:
        for i in range(3):
            database.write(molecule("H2O"), TotEnergy=-float(i))
    path.chmod(0o400)
    (tmp_path / "a.db.lock").unlink(missing_ok=True)
    before = path.read_bytes()
    assert [s.energy for s in read_structures([path])] == [-0.0, -1.0, -2.0]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.db"]


# --------------------------------------------------------------------------- what is shown


def test_reasons_are_shown_as_they_are(tmp_path):
    from typer.testing import CliRunner

    from orbq.cli import make_app

    place = make_dataset(tmp_path / "set")
    failure = {"file": "a[1].xyz", "frame": 0, "kind": "rejected", "reason": "energy is '[/red]'"}
    (place / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    result = CliRunner().invoke(make_app(), ["inspect", str(restate(place))])
    assert result.exit_code == 0, result.output
    assert "a[1].xyz frame 0: energy is '[/red]'" in result.output
