"""Public data sets, downloaded and verified: what is not what was published is not kept.

The files come from public repositories at a fixed commit, and are verified by the identifiers git
itself gives to contents: the SHA-1 of a file, or of a whole folder.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orbq.errors import InputError, OrbqError
from orbq.preprocess.links import make_directory
from orbq.preprocess.store import write_atomically
from orbq.units import KCAL_PER_MOL

MAX_MEMBER = 1 << 20  # bytes of one file of an archive
MAX_MEMBERS = 20_000
MAX_ARCHIVE = 1 << 28  # bytes unpacked
NAME = "{name}"


class Remote(NamedTuple):
    """One published data set.

    what: in a few words, with licence and source. where: address, {name} stands for the file.
    files: name -> git's identifier of its content ("" for an archive, whose parts are verified).
    finish: makes a file that ``orbq preprocess`` reads of the downloads in a directory.
    """

    what: str
    where: str
    files: Mapping[str, str]
    finish: Callable[[Path], Path] | None = None


class Bar:
    """What pooch tells while it downloads; a command draws it."""

    total: int = 0

    def update(self, n: int) -> None:
        """``n`` more bytes."""

    def reset(self) -> None:
        """Begin anew."""

    def close(self) -> None:
        """The end."""


def blob_id(data: bytes) -> str:
    """git's identifier of a file's content, hex."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_id(path: Path) -> str:
    """``blob_id`` of a file, in constant memory."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_id(files: Mapping[str, bytes]) -> str:
    """git's identifier of a folder of plain files."""
    entries = [
        b"100644 %s\0" % n.encode() + bytes.fromhex(blob_id(files[n])) for n in sorted(files)
    ]
    data = b"".join(entries)
    return hashlib.sha1(b"tree %d\0" % len(data) + data).hexdigest()


# --------------------------------------------------------------------------- QM7

QM7_COMMIT = "da714b16201955b9d5ce2efaab824da55a0c2807"
QM7_ARCHIVE, QM7_FILE, QM7_ENERGIES = f"{QM7_COMMIT}.tar.gz", "qm7.extxyz", "hof_qm7.txt"
QM7_IDS = {
    "qm7": "b641b26c32dd0c889a66447eea4a4fec8ee602ba",
    QM7_ENERGIES: "bc19e94808674fc509db83357aebc3c0562af1f2",
}


def make_qm7(directory: Path, ids: Mapping[str, str] = QM7_IDS) -> Path:
    """``qm7.extxyz`` from the downloaded archive: PBE0 atomization energies in eV.

    Raises OrbqError when the archive is damaged or holds something else.
    """
    archive = directory / QM7_ARCHIVE
    molecules: dict[str, bytes] = {}
    energies = b""
    try:
        for name, data in _members(archive):
            folder, _, last = name.partition("/")
            if folder == "qm7" and last:
                molecules[last] = data
            elif name == QM7_ENERGIES:
                energies = data
    except Exception as error:  # tarfile raises many types on headers that make no sense
        raise OrbqError(
            f"{archive} is damaged ({error or type(error).__name__}): delete it and fetch again"
        ) from error
    found = {"qm7": tree_id(molecules), QM7_ENERGIES: blob_id(energies)}
    if found != ids:
        raise OrbqError(
            f"{archive} does not hold what was published ({found}, expected {dict(ids)}): delete "
            "it and fetch again"
        )
    frames = []
    for line in energies.decode().splitlines():
        path, energy = line.split()[:2]
        name = path.removeprefix("qm7/")
        rows = molecules[name].decode().split("\n")
        n = int(rows[0])
        head = (
            f"Properties=species:S:1:pos:R:3 name={name.removesuffix('.xyz')} charge=0 "
            f'energy={float(energy) * KCAL_PER_MOL:.12g} pbc="F F F"'
        )
        frames.append("\n".join([str(n), head, *(row.strip() for row in rows[2 : 2 + n])]))
    out = directory / QM7_FILE
    write_atomically(out, "\n".join(frames) + "\n")
    return out


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names (without the first folder) and contents of an archive's files; nothing is unpacked.

    Raises TarError for a name that would leave the archive, or an absurd size.
    """
    with gzip.open(archive) as packed:
        content = packed.read(MAX_ARCHIVE + 1)  # bounded, whatever a header claims
    if len(content) > MAX_ARCHIVE:
        raise tarfile.TarError(f"it unpacks to more than {MAX_ARCHIVE:,} bytes")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for number, member in enumerate(tar):
            parts = Path(member.name).parts
            if member.name.startswith("/") or ".." in parts or number > MAX_MEMBERS:
                raise tarfile.TarError(f"{member.name[:80]!r} does not belong there")
            if not member.isfile():
                continue
            if member.size > MAX_MEMBER:
                raise tarfile.TarError(f"{member.name[:80]!r} is too large: {member.size} bytes")
            handle = tar.extractfile(member)
            yield "/".join(parts[1:]), handle.read() if handle else b""


# --------------------------------------------------------------------------- what there is

_RAW = "https://raw.githubusercontent.com"
REMOTES: dict[str, Remote] = {
    "tmqm": Remote(
        "108,000 transition-metal complexes, TPSSh-D3BJ/def2-SVP energies, natural charges "
        "(uiocompcat/tmQM, MIT)",
        f"{_RAW}/uiocompcat/tmQM/bb1bc1c9f145a8ad2d35ce98ee5478fd01c5c48e/tmQM/{NAME}",
        {
            "tmQM_X1.xyz.gz": "93a288e6c1c5dc846c193ab3cfdf5ef1f74a81ed",
            "tmQM_X2.xyz.gz": "855cca2b9ae5e64502d487e522690b06e54580ce",
            "tmQM_X3.xyz.gz": "68c2e981357ca70060329c45378062bc5cb0c7f2",
            "tmQM_y.csv": "077ae2fa1fc0c9e976cbf7bfd097a9b6223b177b",
            "tmQM_X.q": "ea4ca92f66bb95f0ba62ad65191e130509c02c43",
        },
    ),
    "qm7": Remote(
        "7,101 organic molecules, PBE0 atomization energies (qmlcode/tutorial, MIT)",
        f"https://github.com/qmlcode/tutorial/archive/{NAME}",
        {QM7_ARCHIVE: ""},
        make_qm7,
    ),
    "acac": Remote(
        "acetylacetone, PBE-D3/def2-SVP energies and forces at 300 K and 600 K "
        "(davkovacs/BOTNet-datasets, MIT)",
        f"{_RAW}/davkovacs/BOTNet-datasets/29e6d467317e4b5967b7ea5cbee54de953fa0d45/"
        f"dataset_acac/{NAME}",
        {
            "train_300K.xyz": "5f83fc060856b25b9942b320c73a6b58dbc29c0a",
            "test_MD_300K.xyz": "01d273fdf2a11b3d462143b1b538f367845771ef",
            "test_MD_600K.xyz": "60920a5a506f7581c7a0f3c9f0cf677b1af03079",
            "test_H_transfer.xyz": "b0b2c6c542d6cef64b5d17d5bbbaf7b2d4a274c3",
            "test_dihedral.xyz": "6b98a848f50cd355df71b6292d1bf8e34d0f6267",
            "isolated_atoms.xyz": "beb88f3f07c8cfd8dc23cb650d1ec3aa85c62c4d",
        },
    ),
}


def fetch(
    name: str,
    directory: Path,
    mirror: str | None = None,
    bar: Callable[[str], Any] = lambda file: False,
) -> Path:
    """Download a data set; what ``orbq preprocess`` is to be given: a file or a directory.

    Files that are there and right are kept, so that the download goes on where it stopped, and
    files brought by hand are verified. mirror: address to take the place of the published one, up
    to the last slash. bar: file -> a progress bar for pooch, or False.

    Raises InputError for an unknown name or without a connection, OrbqError for damaged files.
    """
    if name not in REMOTES:
        raise InputError(f"no data set {name!r} to fetch; there are: {', '.join(REMOTES)}")
    remote = REMOTES[name]
    where = f"{mirror.rstrip('/')}/{NAME}" if mirror else remote.where
    make_directory(directory, "--out")
    if remote.finish and (done := directory / QM7_FILE).is_file():
        return done
    for file, wanted in remote.files.items():
        path = directory / file
        if not path.is_file() or (wanted and file_id(path) != wanted):
            _download(where.replace(NAME, file), path, remote, where, bar(file))
        if wanted and (found := file_id(path)) != wanted:
            path.unlink()
            raise OrbqError(
                f"{where.replace(NAME, file)} is not what was published (git id {found}, expected "
                f"{wanted}) and was not kept: try again, or another --mirror"
            )
    return remote.finish(directory) if remote.finish else directory


def _download(url: str, path: Path, remote: Remote, where: str, bar: Any) -> None:
    import logging

    import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)
    path.unlink(missing_ok=True)
    try:
        pooch.retrieve(
            url,
            known_hash=None,
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=60),
        )
    except (requests.RequestException, OSError, ValueError) as error:
        files = ", ".join(remote.files)
        addresses = ", ".join(where.replace(NAME, file) for file in remote.files)
        raise InputError(
            f"{url} cannot be downloaded ({type(error).__name__}: {str(error)[:200]}). Without a "
            f"connection: bring {files} ({addresses}) into {path.parent} and give the same command "
            "again, which verifies them"
        ) from error
