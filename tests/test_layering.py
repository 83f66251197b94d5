"""Who may import what: read from the source, and checked again on the modules really loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "orbq").rglob("*.py"))
}
JAX = {"jax", "jaxlib", "flax", "e3nn_jax", "jraph", "optax", "orbax"}
FILES = {"io", "json", "os", "pathlib", "shutil", "sqlite3", "tempfile", "tomllib"}
START_UP_SECONDS = 1.0  # CPU time of `import orbq` and of `orbq --help`


class Layer(NamedTuple):
    """modules: full names, or prefixes that end in a dot. packages: what they may import beside the
    standard library. own: the modules of orbq that they may import. only_in: package -> the modules
    that alone may import it. io: whether they may touch files. absent: must not get loaded.
    """

    modules: tuple[str, ...]
    packages: frozenset[str]
    own: tuple[str, ...]
    only_in: dict[str, tuple[str, ...]]
    io: bool
    absent: frozenset[str]


CONTRACT = tuple(
    f"orbq.{name}"
    for name in "units orbitals elements schema targets splits errors".split()
    + "config config_rules config_text".split()
)
LAYERS = {
    "contract": Layer(
        modules=CONTRACT,
        packages=frozenset({"numpy", "pydantic"}),
        own=CONTRACT,
        only_in={"pydantic": ("orbq.config", "orbq.config_text")},
        io=True,
        absent=frozenset(JAX | {"tblite", "ase", "matscipy", "matplotlib"}),
    ),
    "preprocess": Layer(
        modules=("orbq.preprocess", "orbq.preprocess."),
        packages=frozenset(
            {"numpy", "ase", "matscipy", "tblite", "dask", "distributed", "dask_jobqueue"}
        ),
        own=(*CONTRACT, "orbq.preprocess", "orbq.preprocess."),
        only_in={
            "matscipy": ("orbq.preprocess.neighbors",),
            "tblite": ("orbq.preprocess.xtb",),
        },
        io=True,
        absent=frozenset(JAX | {"matplotlib", "typer"}),
    ),
    "models": Layer(
        modules=("orbq.models", "orbq.models."),
        packages=frozenset(
            {"numpy", "jax", "flax", "e3nn_jax", "jraph", "jaxtyping"}
            | {"cuequivariance", "cuequivariance_jax"}
        ),
        own=(*CONTRACT, "orbq.models", "orbq.models."),
        only_in={
            "cuequivariance": ("orbq.models.fused",),
            "cuequivariance_jax": ("orbq.models.fused",),
        },
        io=False,
        absent=frozenset(
            {"tblite", "ase", "matscipy", "orbax", "orbq.preprocess", "typer"}
            | {"cuequivariance", "cuequivariance_jax"}
        ),
    ),
    "training": Layer(
        modules=tuple(f"orbq.{name}" for name in ("losses", "metrics", "train", "ablate")),
        packages=frozenset({"numpy", "jax", "flax", "optax", "jraph", "jaxtyping"}),
        own=(
            *CONTRACT,
            *(f"orbq.{name}" for name in ("losses", "metrics", "train", "ablate")),
            "orbq.models.potential",
        ),
        only_in={},
        io=False,
        absent=frozenset({"tblite", "ase", "matscipy", "orbq.preprocess", "typer"}),
    ),
}
# at the top of a command's file; all else is imported when the command runs
COMMAND_IMPORTS = ("typer", "rich", "orbq.errors", "orbq.output", "orbq.units")


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or (p.endswith(".") and name.startswith(p)) for p in prefixes)


def of_layer(layer: Layer) -> list[str]:
    return [name for name in MODULES if within(name, layer.modules)]


def imports(module: str, top_level_only: bool = False) -> Iterator[str]:
    """Full names of what a module imports, ``from a import b`` as ``a.b`` if it is one."""
    tree = ast.parse(MODULES[module].read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        later = top_level_only and isinstance(node, ast.FunctionDef)
        if for_types or later:
            hidden.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full == "orbq.__version__":  # a constant of the root, which is light itself
                    continue
                yield full if full in MODULES else str(node.module)


@pytest.mark.parametrize("name", LAYERS)
def test_imports_stay_within_the_layer(name: str) -> None:
    layer = LAYERS[name]
    wrong = []
    for module in of_layer(layer):
        for imported in imports(module):
            package = imported.split(".")[0]
            if package == "orbq":
                right = within(imported, layer.own)
            elif package in sys.stdlib_module_names:
                right = layer.io or package not in FILES
            else:
                right = package in layer.packages
                right = right and module in layer.only_in.get(package, (module,))
            if not right:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if not layer.io])
def test_layers_without_io_open_no_file(name: str) -> None:
    for module in of_layer(LAYERS[name]):
        for node in ast.walk(ast.parse(MODULES[module].read_text())):
            opens = isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "print")
            assert not opens, f"{module}:{node.lineno}"


def test_the_layers_are_there() -> None:
    assert {name for name in CONTRACT if name not in MODULES} == set()
    assert all(of_layer(layer) for name, layer in LAYERS.items() if name != "training")


def test_commands_import_the_heavy_parts_when_they_run() -> None:
    wrong = []
    for module in MODULES:
        if not within(module, ("orbq.cli", "orbq.commands.")):
            continue
        for imported in imports(module, top_level_only=True):
            package = imported.split(".")[0]
            light = package in sys.stdlib_module_names or package in COMMAND_IMPORTS
            if not (light if package != "orbq" else within(imported, COMMAND_IMPORTS)):
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def loaded_by(code: str) -> tuple[set[str], float]:
    """Modules that a fresh interpreter holds after ``code``, and the CPU seconds it took."""
    report = "\nimport sys, time; print('\\n', time.process_time(), *sys.modules, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code + report], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seconds, *modules = done.stderr.splitlines()[-1].split()
    return set(modules), float(seconds)


@pytest.mark.parametrize("name", LAYERS)
def test_loaded_modules_stay_within_the_layer(name: str) -> None:
    modules = of_layer(LAYERS[name])
    if not modules:
        pytest.skip(f"no module of the layer {name} yet")
    loaded, _ = loaded_by(f"import {', '.join(modules)}")
    assert loaded & LAYERS[name].absent == set()
    assert set(modules) <= loaded


HELP = """
from orbq.cli import make_app
try:
    make_app()(['--help'], prog_name='orbq')
except SystemExit:
    pass
"""


@pytest.mark.parametrize("code", ["import orbq", HELP], ids=["import orbq", "orbq --help"])
def test_start_up_is_light(code: str) -> None:
    loaded, seconds = loaded_by(code)
    heavy = JAX | {"tblite", "ase", "matscipy", "matplotlib", "numpy", "pydantic", "scipy"}
    assert loaded & heavy == set()
    assert seconds < START_UP_SECONDS
