"""The notebooks run from clean kernels, and are committed as an execution has left them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("ablation", "charges", "few_configurations", "forces", "metals", "your_own_data")
MAX_BYTES = 300_000
MACHINE = re.compile(
    r"(?<![\w.])/(root|home|Users|tmp|var|work|private|opt|usr|mnt)/|\.venv|site-packages"
)

# what must be among the words that a notebook prints, however few steps it takes
FOUND = {
    "ablation": [r"^8 runs, 0 diverged", r"^onsite +40 "],
    "charges": [r"^atomic +charges: mean absolute error 0\.0[3-7]"],
    "few_configurations": [r"^xtb_forces of 12 of 12 structures", r"^after labels +energy +\d"],
    "forces": [r"^39 vibrations, 0 of them imaginary", r"^h = 1e-03 Å: .* \d\.\de-0[5-9] "],
    "metals": [r"atoms of 30 metals: Sc Ti V", r"^silhouette by group: [+-]0\.\d\d with charges"],
    "your_own_data": [r"^60 structures, 0 left out", r"^dipole moment \d\.\d\d e Å"],
}


@pytest.fixture(scope="module")
def execution() -> Any:
    """notebooks/execute.py."""
    spec = importlib.util.spec_from_file_location("execute", NOTEBOOKS / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    texts = [o.text for c in code_cells(notebook) for o in c.outputs if o.output_type == "stream"]
    return "".join(texts)


def n_pictures(notebook: Any) -> list[int]:
    """Pictures of every code cell."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in code_cells(notebook)
    ]


def committed(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_tested(execution: Any) -> None:
    assert execution.NAMES == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_clean_kernel(name: str, execution: Any, tmp_path: Path) -> None:
    """A cell that fails raises; every cell shows as many pictures as the committed one."""
    before = sorted(NOTEBOOKS.iterdir())
    notebook = execution.execute(name, tmp_path, ORBQ_FAST="1")
    assert sorted(NOTEBOOKS.iterdir()) == before
    assert n_pictures(notebook) == n_pictures(committed(name))
    for pattern in FOUND[name]:
        assert re.search(pattern, printed(notebook), re.MULTILINE), printed(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_with_its_outputs(name: str) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    assert path.stat().st_size < MAX_BYTES
    notebook = committed(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(n_pictures(notebook)) > 0 and printed(notebook)
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result")
            assert output.get("name") != "stderr"
            shown = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
            text = output.get("text", "") + json.dumps(shown)
            assert MACHINE.search(text) is None, text


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_nothing_of_the_execution(name: str, execution: Any) -> None:
    """Neither times nor versions: what cleaning leaves is what is there, but for the pictures."""
    notebook = committed(name)
    again = execution.cleaned(committed(name))
    for one in (notebook, again):
        for cell in code_cells(one):
            for output in cell.outputs:
                output.get("data", {}).pop("image/png", None)
    assert notebook == again
