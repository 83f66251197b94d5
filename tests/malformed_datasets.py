"""Malformed data sets and what is said of them; see make_malformed.py."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from orbq.preprocess import store
from orbq.schema import FAILURES, FIELDS, MANIFEST, SCHEMA_VERSION
from tests.malformed_structures import HUGE, PICKLE

ABSENT = "<absent>"


def make_dataset(directory: Path) -> Path:
    """A whole data set of two hydrogen molecules, without tblite."""
    directory.mkdir()
    n = {"structure": 2, "atom": 4, "offset": 3}
    for name, (per, shape, dtype) in store.array_names().items():
        array = np.zeros((n[per], *shape), dtype)
        if name == store.OFFSETS:
            array[:] = [0, 2, 4]
        elif name == "numbers":
            array[:] = 1
        elif name == "positions":
            array[1::2, 2] = 0.74
        elif name.endswith("_mask") or name == "spin_multiplicity":
            array[:] = 1
        np.save(store.array_file(directory, name), array)
    failure = {"file": "a.xyz", "frame": 2, "reason": "energy is not finite", "kind": "rejected"}
    (directory / FAILURES).write_text(json.dumps(failure) + "\n")
    labels = {name: 2 for name, field in FIELDS.items() if field.maskable}
    counts = {"structures": 2, "atoms": 4, "rejected": 1, "without_xtb": 0}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "method": "GFN1-xTB",
        "settings": {},
        "tblite_version": "0.4.0",
        "blas": ["stock"],
        "units": {},
        "sources": [{"name": "a.xyz", "sha256": "0" * 64}],
        "keys": {"energy": {"energy": 2}},
        "counts": {**counts, "rescued": {}, "labels": labels},
        "arrays": {},
        "failures": {},
        "job": {},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return restate(directory)


def restate(directory: Path) -> Path:
    """Write shapes, types and checksums of the files into the manifest, as an attacker would."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in store.array_names():
        path = store.array_file(directory, name)
        array = np.load(path)
        shape, dtype = list(array.shape), array.dtype.str
        manifest["arrays"][name] = {"shape": shape, "dtype": dtype, "sha256": store.sha256_of(path)}
    manifest["failures"] = {"sha256": store.sha256_of(directory / FAILURES)}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return directory


def npy_file(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A .npy file of any header."""
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + data


def npy_header(shape: Any, descr: str = "<f8", order: str = "False") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"


def npy_array(values: Any, dtype: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array(values, dtype), version=(1, 0))
    return stream.getvalue()


def datasets() -> dict[str, tuple[dict[str, bytes], list[list[Any]], str]]:
    """Files and manifest entries that are not what a data set holds."""
    energy, numbers, offsets = "energy.npy", "numbers.npy", "offsets.npy"
    damaged = r"energy\.npy is missing or damaged"
    two = struct.pack("<2d", -1.0, -2.0)
    arrays = {
        "empty": b"",
        "magic-only": b"\x93NUMPY",
        "words": b"hello",
        "header-cut": npy_file(npy_header("(2,)"))[:40],
        "header-too-long": b"\x93NUMPY\1\0\xe0\x2e" + b" " * 12000,
        "header-not-python": npy_file("hello(", two),
        "header-calls": npy_file("{'descr': open('executed', 'w'), 'shape': (2,)}", two),
        "header-not-a-table": npy_file("[1, 2]", two),
        "header-lacks-shape": npy_file("{'descr': '<f8', 'fortran_order': False}", two),
        "header-deep": npy_file("(" * 9000, two),
        "header-nul": npy_file("\0\0\0", two),
        "data-cut": npy_file(npy_header("(2,)"), two[:-1]),
        "no-data": npy_file(npy_header("(2,)")),
        "version-2": npy_file(npy_header("(2,)"), two, b"\2\0"),
        "version-9": npy_file(npy_header("(2,)"), two, b"\x09\0"),
        "shape-1e15": npy_file(npy_header(f"({10**15},)"), two),
        "shape-2e63": npy_file(npy_header(f"({2**63},)"), two),
        "shape-2e64": npy_file(npy_header(f"({2**32}, {2**32})"), two),
        "shape-negative": npy_file(npy_header("(-2,)"), two),
        "shape-word": npy_file(npy_header("'two'"), two),
        "shape-of-halves": npy_file(npy_header("(2.0,)"), two),
        "type-unknown": npy_file(npy_header("(2,)", "<q9"), two),
        "type-object": npy_file(npy_header("(2,)", "|O"), PICKLE),
        "type-of-width-1e9": npy_file(npy_header("(2,)", "|S40000000"), two),
        "pickle": PICKLE,
    }
    out: dict[str, tuple[dict[str, bytes], list[list[Any]], str]] = {
        f"array-{name}": ({energy: data}, [], damaged) for name, data in arrays.items()
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("../outside.npy"), npy_array([1, 2], "<f8"))
    out["array-zip"] = ({energy: archive.getvalue()}, [], damaged)
    holds = {
        "scalar": npy_array(1.0, "<f8"),
        "two-dimensions": npy_array([[1.0], [2.0]], "<f8"),
        "three-values": npy_array([1.0] * 3, "<f8"),
        "no-values": npy_array([], "<f8"),
        "float32": npy_array([1, 2], "<f4"),
        "big-endian": npy_array([1, 2], ">f8"),
        "complex": npy_array([1, 2], "<c16"),
        "text": npy_array(["a", "b"], "<U1"),
    }
    said = r"energy\.npy holds .*the manifest states float64 \(2,\)"
    out |= {f"array-of-{name}": ({energy: data}, [], said) for name, data in holds.items()}
    needed = r"energy\.npy holds .*float64 \(N\)|energy\.npy: \d rows, 2 needed"
    restated = {k: v for k, v in holds.items() if k != "no-values"}
    again = [[MANIFEST, "", "restated"]]
    out |= {f"restated-{k}": ({energy: v}, again, needed) for k, v in restated.items()}
    divide = "does not divide 4 atoms into structures"
    wrong_offsets = {
        "decreasing": [0, 6, 4],
        "from-one": [1, 2, 4],
        "too-short": [0, 2, 3],
        "too-long": [0, 2, HUGE],
        "negative": [0, -2, 4],
        "one-empty": [0, 4, 4],
        "one-only": [0],
        "overflowing": [0, -(2**63), 4],
    }
    for name, values in wrong_offsets.items():
        file = {offsets: npy_array(values, "<i8")}
        out[f"offsets-{name}"] = (file, again, divide)
    for name, values in {"zero": 0, "negative": -7, "87": 87, "huge": 2**31 - 1}.items():
        file = {numbers: npy_array([values, 1, 1, 1], "<i4")}
        said = f"it holds an atom of atomic number {values} at"
        out[f"numbers-{name}"] = (file, again, said)
    for name, value in {"nan": np.nan, "inf": -np.inf, "1e300": 1e300}.items():
        values = [[0, 0, 0], [0, 0, value], [0, 0, 0], [0, 0, 1]]
        file = {"positions.npy": npy_array(values, "<f8")}
        said = "is damaged: it holds an atom of atomic number 1 at"
        out[f"positions-{name}"] = (file, again, said)
    out["array-missing"] = ({}, [[energy, "", ABSENT]], damaged)
    failures = {
        "words": b"hello\n",
        "list": b"[]\n",
        "lacking": b'{"file": "a"}\n',
        "deep": b"[" * 4000,
        "binary": b"\xff\xfe\n",
        "reason-number": b'{"file": "a", "frame": 1, "kind": "rejected", "reason": 3}\n',
    }
    said = r"failures\.jsonl is missing or damaged"
    out |= {f"failures-{name}": ({FAILURES: data}, [], said) for name, data in failures.items()}
    out["failures-missing"] = ({}, [[FAILURES, "", ABSENT]], said)
    return out | _manifests()


def _manifests() -> dict[str, tuple[dict[str, bytes], list[list[Any]], str]]:
    said = r"manifest\.json is damaged"
    texts = {
        "empty": b"",
        "words": b"hello",
        "null": b"null",
        "list": b"[]",
        "number": b"1",
        "cut": b'{"schema_version": 1, "arrays": {',
        "binary": bytes(range(128, 256)),
        "utf-16": '{"schema_version": 1}'.encode("utf-16"),
        "deep": b"[" * 4000,
        "only-the-version": b'{"schema_version": 1}',
        "5000-digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    }
    out: dict[str, tuple[dict[str, bytes], list[list[Any]], str]] = {
        f"manifest-{name}": ({MANIFEST: data}, [], said) for name, data in texts.items()
    }
    edits: list[tuple[str, str, Any, str]] = [
        ("version-text", "schema_version", "1", said),
        ("version-true", "schema_version", True, said),
        ("version-older", "schema_version", 0, "has schema version 0.*convert it"),
        ("version-newer", "schema_version", 10**30, "install a newer orbq"),
        ("version-absent", "schema_version", ABSENT, said),
        ("method-unknown", "method", "PM6", f"{said}: method must be one of GFN1-xTB"),
        ("method-list", "method", [], said),
        ("sources-text", "sources", "a.xyz", f"{said}: sources must be a list"),
        ("sources-of-text", "sources", ["a"], rf"{said}: sources\[0\] must be a table"),
        ("counts-absent", "counts", ABSENT, f"{said}: counts is missing"),
        ("counts-text", "counts.atoms", "4", f"{said}: counts.atoms must be a whole number"),
        ("arrays-list", "arrays", [], f"{said}: arrays must be a table"),
        ("array-absent", "arrays.energy", ABSENT, r"energy\.npy is missing or damaged: KeyError"),
        ("array-null", "arrays.energy", None, f"{said}: arrays.energy must be a table"),
        ("shape-text", "arrays.energy.shape", "2", f"{said}: arrays.energy.shape must be a list"),
        ("shape-1e15", "arrays.energy.shape", [10**15], r"the manifest states float64 \(10{15},\)"),
        ("shape-negative", "arrays.energy.shape", [-2], r"the manifest states float64 \(-2,\)"),
        ("type-unknown", "arrays.energy.dtype", "nonsense", r"energy\.npy is missing or damaged"),
        ("type-object", "arrays.energy.dtype", "O", "the manifest states object"),
        ("type-commas", "arrays.energy.dtype", "f8,f8", "the manifest states"),
        ("failures-null", "failures", None, f"{said}: failures must be a table"),
    ]
    for name, key, value, text in edits:
        out[f"manifest-{name}"] = ({}, [[MANIFEST, key, value]], text)
    return out
