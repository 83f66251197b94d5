"""The figures of the README and the documents, from committed results.

    python docs/figures/make.py

demo.png: the demonstration (benchmarks/results/demo.json, `make demo`). qm7.png: learning curves on
QM7, where benchmarks/results/qm7_curves.jsonl is there (`benchmarks/study_qm7.py curves`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
COLOURS = 64  # of a palette; a third of the bytes


def make(place: Path = HERE) -> list[Path]:
    """Draw every figure for which there are results into ``place``."""
    made = [*_demo(place), *_curves(place)]
    for path in made:
        Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    return made


def _demo(place: Path) -> Iterator[Path]:
    from orbq.demo import Row
    from orbq.plots import arms_figure

    arms = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))["arms"]
    path = place / "demo.png"
    arms_figure([Row(arm["arm"], arm["values"], arm["ratios"]) for arm in arms], path)
    yield path


def _curves(place: Path) -> Iterator[Path]:
    sys.path.insert(0, str(RESULTS.parent))
    import plot_qm7

    source = RESULTS / "qm7_curves.jsonl"
    if source.is_file():
        yield plot_qm7.draw(plot_qm7.read(), place / "qm7.png")


if __name__ == "__main__":
    for figure in make():
        print(f"{figure.relative_to(HERE.parents[1])}: {figure.stat().st_size // 1024} kB")
