"""Execute the notebooks from clean kernels, and keep what they print and draw.

    python notebooks/execute.py                 # all of them, in place: minutes
    python notebooks/execute.py charges metals
    ORBQ_FAST=1 python notebooks/execute.py --out fast

Written are pictures of few colours, and neither warnings, times of execution, nor the version of
the kernel: a notebook changes when what it shows does.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

HERE = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.ipynb")))
COLOURS = 128  # of a picture: a third of the bytes, and no difference that the eye sees
TIMEOUT = 3600  # seconds for a cell


def execute(name: str, place: Path, **environment: str) -> nbformat.NotebookNode:
    """The notebook with the outputs of a clean kernel, as ``cleaned``.

    place: where the files it writes are left; made to look like a checkout. environment: variables
    of the kernel beside those of this process. Raises nbclient.exceptions.CellExecutionError with
    the cell and its traceback when one fails.
    """
    work = place / "notebooks"
    work.mkdir(parents=True, exist_ok=True)
    models = place / "benchmarks"
    if not models.exists():
        models.symlink_to(HERE.parent / "benchmarks")
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3")
    variables = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | environment
    client.execute(cwd=str(work), env=variables)
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from one execution to the next though the results do not."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("transient", None)
                if image := output.get("data", {}).get("image/png"):
                    output.metadata = {}
                    output.data["image/png"] = smaller(image)
                    output.data["text/plain"] = "<Figure>"
    return notebook


def smaller(image: str) -> str:
    """A PNG (base64) with a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
    out = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(out, format="png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    """Execute and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=HERE, help="directory of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        with tempfile.TemporaryDirectory() as place:
            notebook = execute(name, Path(place))
        path = given.out / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
