"""Scripts beside the package: what they take from it is there."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path
    for place in ("benchmarks", "benchmarks/tmc", "notebooks", "docs", "docs/figures")
    for path in sorted((ROOT / place).glob("*.py"))
]


def taken(source: str) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of every import from orbq, also of those within functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "orbq":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.split(".")[0] == "orbq")


def missing(source: str) -> list[str]:
    """What a source imports from orbq and orbq does not have."""
    found = []
    for module, name in taken(source):
        try:
            place = importlib.import_module(module)
        except ModuleNotFoundError:
            found.append(module)
            continue
        if name is None or hasattr(place, name):
            continue
        try:
            importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            found.append(f"{module}.{name}")
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_script_imports_exists(path):
    assert not missing(path.read_text(encoding="utf-8"))


def test_a_moved_name_is_found():
    source = (
        "def late():\n    from orbq.calculator import Calculator, Capacity_\n    import orbq.gone"
    )
    assert missing(source) == ["orbq.calculator.Capacity_", "orbq.gone"]
