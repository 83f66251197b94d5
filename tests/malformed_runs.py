"""Malformed run directories and what is said of them; see make_malformed.py."""

from __future__ import annotations

import io
import zipfile
from typing import Any

from tests.malformed_datasets import ABSENT, npy_array, npy_file, npy_header
from tests.malformed_structures import HUGE, PICKLE


def runs() -> dict[str, tuple[dict[str, bytes], list[list[Any]], str]]:
    """Run directories whose files are damaged."""
    run, statistics, best = "run.json", "statistics.npz", "checkpoints/best"
    no_run, damaged = "is not a run directory", "is damaged"
    out: dict[str, tuple[dict[str, bytes], list[list[Any]], str]] = {}
    texts = {
        "empty": b"",
        "words": b"hello",
        "null": b"null",
        "list": b"[1]",
        "cut": b'{"run_version": 1, "config": {',
        "binary": bytes(range(128, 256)),
        "deep": b'{"a":' * 2000,
    }
    out |= {f"run-json-{name}": ({run: data}, [], no_run) for name, data in texts.items()}
    out["run-json-missing"] = ({}, [[run, "", ABSENT]], no_run)
    out["run-json-only-the-version"] = ({run: b'{"run_version": 1}'}, [], "JSON object of sections")
    edits: list[tuple[str, str, Any, str]] = [
        ("version-text", "run_version", "1", no_run),
        ("version-99", "run_version", 99, "run format 99"),
        ("config-null", "config", None, "JSON object of sections"),
        ("config-unknown-key", "config.model.nonsense", 1, "unknown key"),
        ("config-channels-1e12", "config.model.n_channels", HUGE, "must be at most 4096"),
        ("architecture-list", "architecture", [], damaged),
        ("architecture-backbone", "architecture.backbone", "os.system", damaged),
        ("architecture-channels-1e12", "architecture.n_channels", HUGE, damaged),
        ("architecture-channels-text", "architecture.n_channels", "4", damaged),
        ("architecture-layers-1e6", "architecture.n_layers", 10**6, damaged),
        ("architecture-hidden-1e12", "architecture.radial_hidden", [HUGE], damaged),
        ("architecture-unknown", "architecture.nonsense", 1, damaged),
        ("architecture-heads", "architecture.heads", [["nonsense", "equivariant"]], damaged),
        ("architecture-heads-text", "architecture.heads", "onsite", damaged),
        ("constants-null", "constants", None, damaged),
        ("elements-99", "constants.elements", [1, 99], damaged),
        ("elements-negative", "constants.elements", [-1], damaged),
        ("elements-text", "constants.elements", "HCNO", damaged),
        ("elements-none", "constants.elements", [], damaged),
        ("scale-text", "constants.energy_scale", "1", damaged),
        ("scale-nan", "constants.energy_scale", float("nan"), damaged),
        ("neighbors-zero", "constants.avg_num_neighbors", 0, damaged),
        ("method-unknown", "constants.method", "PM6", damaged),
        ("references-list", "references", [], damaged),
        ("references-element", "references.energy.element", {"Qq": 1.0}, damaged),
        ("references-text", "references.energy.charge", "much", damaged),
    ]
    out |= {name: ({}, [[run, key, value]], said) for name, key, value, said in edits}

    def npz(**members: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as zipped:
            for name, data in members.items():
                zipped.writestr(zipfile.ZipInfo(name.replace("__", "/") + ".npy"), data)
        return stream.getvalue()

    good = npz(onsite__mean=npy_array([1.0], "<f8"), onsite__scale=npy_array([1.0], "<f8"))
    files = {
        "words": b"hello",
        "empty": b"",
        "pickle": PICKLE,
        "cut": good[:-30],
        "no-members": npz(),
        "wrong-shape": good,
        "object": npz(onsite__mean=npy_file(npy_header("(1,)", "|O"), PICKLE)),
        "1e15-values": npz(
            onsite__mean=npy_file(npy_header(f"({10**15},)")),
            onsite__scale=npy_file(npy_header("(1,)")),
        ),
        "flip": good[:60] + b"\xff" + good[61:],
        "encrypted": good.replace(b"PK\3\4\x14\0\0\0", b"PK\3\4\x14\0\1\0").replace(
            b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"
        ),
    }
    out |= {f"statistics-{name}": ({statistics: data}, [], damaged) for name, data in files.items()}
    out["statistics-missing"] = ({}, [[statistics, "", ABSENT]], damaged)
    restored = "cannot be restored, it is damaged: "
    for name, data in {
        "empty": b"",
        "words": b"hello",
        "list": b"[]",
        "deep": b"[" * 4000,
    }.items():
        out[f"checkpoint-meta-{name}"] = ({f"{best}/orbq.json": data}, [], restored)
    out["checkpoint-meta-missing"] = ({}, [[f"{best}/orbq.json", "", ABSENT]], restored)
    for name in ("_METADATA", "manifest.ocdbt", "d"):
        file = "d/[0-9a-f]{32}" if name == "d" else name
        said = f"{restored}{file} is missing"
        out[f"checkpoint-without-{name}"] = ({}, [[f"{best}/{name}", "", ABSENT]], said)
    for name in ("_METADATA", "manifest.ocdbt"):
        out[f"checkpoint-rubbish-in-{name}"] = (
            {f"{best}/{name}": b"\x80\x04rubbish"},
            [],
            f"{restored}{name} has 9 bytes, [0-9]+ were written",
        )
    changed = f"{restored}orbq.json does not have the checksum"
    for name, key, value in (
        ("list-null", "files", None),
        ("list-empty", "files", {}),
        ("list-absent", "files", ABSENT),
        ("list-of-another-place", "files", {"../../run.json": {"bytes": 0, "sha256": ""}}),
        ("own-checksum-absent", "own_sha256", ABSENT),
        ("own-checksum-list", "own_sha256", []),
        ("checksum-text", "sha256", "1"),
    ):
        out[f"checkpoint-{name}"] = ({}, [[f"{best}/orbq.json", key, value]], changed)
    out["checkpoint-version-99"] = (
        {},
        [[f"{best}/orbq.json", "checkpoint_version", 99]],
        "checkpoint format 99, this orbq reads 1",
    )
    out["checkpoint-missing"] = ({}, [[best, "", ABSENT]], "no validated parameters yet")
    return out
