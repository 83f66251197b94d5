"""What the package promises: typed and documented public names, one version, a true map."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import orbq

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OBJECTS = [name for name in orbq.__all__ if name != "__version__"]


def callables_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The functions behind a public name: itself, or the public methods of orbq's own classes."""
    if not inspect.isclass(value):
        yield value.__name__, value
        return
    for name, member in vars(value).items():
        if isinstance(member, classmethod | staticmethod):
            member = member.__func__
        elif isinstance(member, property):
            member = member.fget
        public = name == "__init__" or not name.startswith("_")
        if public and inspect.isfunction(member) and member.__module__.startswith("orbq"):
            yield f"{value.__name__}.{name}", member


@pytest.mark.parametrize("name", OBJECTS)
def test_public_names_are_typed_and_documented(name: str) -> None:
    value = getattr(orbq, name)
    assert inspect.getdoc(value), f"orbq.{name} has no docstring"
    for where, function in callables_of(value):
        signature = inspect.signature(function)
        if not where.endswith("__init__"):
            assert inspect.getdoc(function), f"orbq.{where} has no docstring"
            assert signature.return_annotation is not signature.empty, f"orbq.{where} -> ?"
        for parameter in list(signature.parameters.values()):
            typed = parameter.annotation is not parameter.empty or parameter.name in ("self", "cls")
            assert typed, f"orbq.{where}: {parameter.name} has no type"


def test_public_names_are_listed_once() -> None:
    assert sorted(orbq.__all__, key=str) == orbq.__all__
    tree = ast.parse((ROOT / "orbq" / "__init__.py").read_text(encoding="utf-8"))
    checked = next(n for n in tree.body if isinstance(n, ast.If))  # what type checkers see
    seen = {
        a.asname or a.name
        for n in ast.walk(checked)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    assert seen == set(orbq._LAZY)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    public, _, _ = page.partition("## Potentials")
    told = re.findall(r"^::: orbq\.(\w+)$", public, re.MULTILINE)
    assert set(told) == set(OBJECTS), "docs/api.md"


def test_one_version() -> None:
    version = Version(orbq.__version__)
    assert len(version.release) == 3 and str(version) == orbq.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.findall(r"^## \[([^\]]+)\]", changes, re.MULTILINE)
    assert next(v for v in latest if v != "Unreleased") == orbq.__version__
    assert f"version: {orbq.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_requirements_have_lower_bounds_that_the_tested_versions_meet() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"constraints.txt: {line} pins no version"
            pins[name.lower().replace("_", "-")] = Version(version)
    project = PROJECT["project"]
    for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in map(Requirement, texts):
            name = requirement.name.lower().replace("_", "-")
            if name == "orbq":
                assert requirement.extras <= set(project["optional-dependencies"])
                continue
            assert any(s.operator == ">=" for s in requirement.specifier), requirement
            if name in pins:
                assert requirement.specifier.contains(pins[name], prereleases=True), requirement
            assert extra not in ("", "dev", "docs") or name in pins, f"{name} is not pinned"


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("orbq tra", "train"),
        ("orbq train --res", "--resume"),
        ("orbq preprocess --wor", "--workers"),
    ],
)
def test_the_shell_completes_commands_and_options(words: str, wanted: str) -> None:
    environment = {
        **os.environ,
        "_ORBQ_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    command = [sys.executable, "-m", "orbq"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert wanted in done.stdout.split(), done.stderr


def test_the_map_names_every_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(\w+\.py)", text))
    whole = [word.rstrip("/") for word in re.findall(r"^\| `(\w+/)`", text, re.MULTILINE)]
    files = sorted((ROOT / "orbq").rglob("*.py"))
    lost = [
        str(path.relative_to(ROOT))
        for path in files
        if path.name not in {*named, "__init__.py"} and path.parent.name not in whole
    ]
    assert lost == []
    assert named - {path.name for path in files} <= {
        path.name for place in ("tests", "benchmarks") for path in (ROOT / place).glob("*.py")
    }
