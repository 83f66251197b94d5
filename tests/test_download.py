"""Fetching from a real server on loopback: verified, resumed, refused when it is not the thing."""

from __future__ import annotations

import io
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orbq import cli, download
from orbq.download import REMOTES, Remote, blob_id, fetch, file_id, make_qm7, tree_id
from orbq.errors import InputError, OrbqError
from orbq.preprocess.read import read_structures

PUBLISHED = dict(REMOTES)  # some tests put a small one in the place of "acac"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


class Server(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Path, str, list[str]]]:
    """A directory, its address on this machine, and the list of what was asked for."""
    place, asked = tmp_path / "served", []
    place.mkdir()
    handler = type("Handler", (Server,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(place)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield place, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def small(served, monkeypatch):
    """A data set "acac" of two small files; (directory served, address, requests)."""
    contents = {
        "train_300K.xyz": b"1\n\nH 0 0 0\n",
        "isolated_atoms.xyz": b"1\n\nHe 0 0 0\n" * 1000,
    }
    for name, data in contents.items():
        (served[0] / name).write_bytes(data)
    ids = {name: blob_id(data) for name, data in contents.items()}
    monkeypatch.setitem(REMOTES, "acac", Remote("two files", f"{served[1]}/{{name}}", ids))
    return served


def git(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(("git", *arguments), cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_identifiers_are_those_of_git(tmp_path):
    files = {"b.xyz": b"two\n", "a.xyz": b"one\n"}
    git("init", "-q", cwd=tmp_path)
    (tmp_path / "sub").mkdir()
    for name, data in files.items():
        (tmp_path / "sub" / name).write_bytes(data)
    git("add", "sub", cwd=tmp_path)
    tree = git("write-tree", cwd=tmp_path)
    assert git("rev-parse", f"{tree}:sub", cwd=tmp_path) == tree_id(files)
    assert git("hash-object", "sub/a.xyz", cwd=tmp_path) == file_id(tmp_path / "sub" / "a.xyz")


def test_known_identifiers_are_those_of_the_published_files():
    if not (SHARED / "acac").is_dir():
        pytest.skip("needs ../shared/data/acac")
    for name in ("train_300K.xyz", "test_MD_300K.xyz", "isolated_atoms.xyz"):
        assert file_id(SHARED / "acac" / name) == REMOTES["acac"].files[name]


def test_fetch_verifies_and_keeps_what_is_there(small, tmp_path):
    place, _, asked = small
    out = fetch("acac", tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == sorted(REMOTES["acac"].files)
    assert (out / "train_300K.xyz").read_bytes() == (place / "train_300K.xyz").read_bytes()
    (out / "isolated_atoms.xyz").write_bytes(b"cut o")
    asked.clear()
    fetch("acac", tmp_path / "out")
    assert asked == ["/isolated_atoms.xyz"]  # the damaged one alone
    assert file_id(out / "isolated_atoms.xyz") == REMOTES["acac"].files["isolated_atoms.xyz"]


def test_another_content_is_not_kept(small, tmp_path):
    (small[0] / "train_300K.xyz").write_bytes(b"something else")
    with pytest.raises(OrbqError, match=r"train_300K\.xyz is not what was published .* not kept"):
        fetch("acac", tmp_path / "out")
    assert not (tmp_path / "out" / "train_300K.xyz").exists()


def test_a_missing_file_and_a_missing_server_are_told(small, tmp_path):
    (small[0] / "train_300K.xyz").unlink()
    with pytest.raises(InputError, match=r"cannot be downloaded .*404.* bring train_300K\.xyz"):
        fetch("acac", tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot be downloaded .*ConnectionError.* Without a"):
        fetch("acac", tmp_path / "out", mirror="http://127.0.0.1:9")


def test_files_brought_by_hand_need_no_connection(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in REMOTES["acac"].files:
        (out / name).write_bytes((small[0] / name).read_bytes())
    assert fetch("acac", out, mirror="http://127.0.0.1:9") == out


def test_unknown_names():
    with pytest.raises(InputError, match=r"no data set 'qm8' to fetch; there are: tmqm, qm7, acac"):
        fetch("qm8", Path("nowhere"))


def test_the_command(small, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fetch", "acac", "--out", str(tmp_path / "out"), "--mirror", small[1] + "/"])
    assert ended.value.code == 0
    _, *following = capsys.readouterr().out.splitlines()
    assert following == [  # training and test configurations are not mixed
        f"next: orbq preprocess {tmp_path}/out/train_300K.xyz --out data/acac_train",
        f"next: orbq preprocess {tmp_path}/out/test_MD_300K.xyz --out data/acac_test",
    ]
    assert {Path(line.split()[3]).name for line in following} < set(PUBLISHED["acac"].files)


# --------------------------------------------------------------------------- QM7

WATER = b"3\ncharge = 0\n O 0.0 0.0 0.119262\n H 0.0 0.763239 -0.477047\n H 0.0 -0.763239 -0.477047"
ENERGIES = b"qm7/0001.xyz -232.5 -230.0\n"


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_qm7_becomes_one_file(tmp_path):
    top = "tutorial-1"
    members = {f"{top}/qm7/0001.xyz": WATER, f"{top}/hof_qm7.txt": ENERGIES, f"{top}/x.py": b"1"}
    archive(tmp_path / download.QM7_ARCHIVE, members)
    ids = {"qm7": tree_id({"0001.xyz": WATER}), "hof_qm7.txt": blob_id(ENERGIES)}
    (s,) = read_structures([make_qm7(tmp_path, ids)])
    assert s.energy == pytest.approx(-232.5 * 0.0433641, rel=1e-5)
    assert s.numbers.tolist() == [8, 1, 1]
    assert s.positions[0, 2] == 0.119262
    with pytest.raises(OrbqError, match="does not hold what was published"):
        make_qm7(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "tutorial/../../x", "../x"])
def test_archives_that_reach_out_are_refused(tmp_path, name):
    archive(tmp_path / download.QM7_ARCHIVE, {name: b"x"})
    with pytest.raises(OrbqError, match="does not belong there"):
        make_qm7(tmp_path)


def test_damaged_archives_are_named(tmp_path):
    (tmp_path / download.QM7_ARCHIVE).write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(OrbqError, match="is damaged"):
        make_qm7(tmp_path)


def test_a_place_that_cannot_be_is_told(small, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "under", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"--out .* name another"):
            fetch("acac", place)
