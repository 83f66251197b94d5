"""What an accuracy costs on metal complexes, labels included: from the results of study_tmc.py.

    python benchmarks/plot_cost.py

CPU seconds of everything that is computed for a network: DFT of its structures and, where they
teach, GFN1-xTB labels of the complexes without DFT (label_cost.jsonl, a structure) and the network
taught by them (TEACHING_S); then its training (the records of tmc_grown*.jsonl). Geometries are
left out on both sides. "first" counts all of it; "further" what a second data set costs, when the
taught network is at hand. Prints the tables and writes results/tmc_cost.png.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import NullLocator
from plot_tmc import ALL, CURVES, LABELS, RESULTS, UNITS, kind_and_size

from orbq.plots import COLOURS, MARKERS, new_figure, plain_log, save

STUDIES = ("sizes_hot", "long", "hot", "guided_hot")
ARMS = {arm: CURVES[arm] for arm in ("long", "kept_hot")}
GUIDED = (100, 200)  # structures with DFT, of which guided references are better
BEST = {  # what an arm and size stands for; "": nothing
    ("long", ALL): "",
    ("longest", ALL): "long",
    **{("kept_hot", n): "" for n in GUIDED},
    **{("guided", n): "kept_hot" for n in GUIDED},
}
TAUGHT = 21_396  # structures of tmc_data.make_hot
TEACHING_S = 228.0  # of 20,000 steps: "seconds" of the taught run's summary.json, one idle core


class Point(NamedTuple):
    """Means over the splits: CPU seconds of each part, and errors by label."""

    dft: float
    gfn1: float
    training: float
    errors: dict[str, float]

    def total(self, further: bool = False) -> float:
        """All CPU seconds; ``further``: without labels and teaching, which are there already."""
        return self.dft + self.training + (0.0 if further else self.gfn1)


def points() -> dict[str, dict[int, Point]]:
    """By arm and number of structures with DFT."""
    cost = json.loads((RESULTS / "label_cost.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    records = defaultdict(list)
    for study in STUDIES:
        path = RESULTS / f"tmc_grown_{study}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            kind, size = kind_and_size(record["ablation"])
            records[BEST.get((kind, size), kind), size].append(record)
    found: dict[str, dict[int, Point]] = {arm: {} for arm in ARMS}
    for (arm, size), runs in sorted(records.items(), key=lambda item: item[0][1]):
        if arm in found:
            found[arm][size] = Point(
                dft=size * cost["mean_s"]["dft"],
                gfn1=(TAUGHT * cost["mean_s"]["gfn1"] + TEACHING_S) * (arm != "long"),
                training=float(
                    np.mean([r["program_cpu_seconds"] / r["program_runs"] for r in runs])
                ),
                errors={m: float(np.mean([r["test"][m] for r in runs])) for m in LABELS},
            )
    return found


def needed(curve: dict[int, Point], metric: str, error: float, further: bool) -> float:
    """CPU seconds to an error, between the points of a curve on log-log axes; infinite beyond."""
    errors = np.log([p.errors[metric] for p in curve.values()])
    totals = np.log([p.total(further) for p in curve.values()])
    if not errors.min() <= np.log(error) <= errors.max():
        return float("inf")
    return float(np.exp(np.interp(-np.log(error), -errors, totals)))


def main() -> None:
    """Print the tables, draw the picture."""
    found = points()
    print(
        "| arm | structures with DFT | DFT, CPU s | GFN1, teaching | training | "
        + " | ".join(f"{name}, {UNITS[m]}" for m, name in LABELS.items())
        + " |"
    )
    for arm, curve in found.items():
        for size, p in curve.items():
            errors = " | ".join(f"{p.errors[m]:.0f}" for m in LABELS)
            print(
                f"| {ARMS[arm]} | {size} | {p.dft:,.0f} | {p.gfn1:,.0f} | {p.training:,.0f} |"
                f" {errors} |"
            )
    base, own = (found[arm] for arm in ARMS)
    print("| to reach | alone, CPU s | with labels, first | ratio | with labels, further | ratio |")
    for metric, name in LABELS.items():
        for size, p in base.items():
            error, before = p.errors[metric], p.total()
            cells = []
            for further in (False, True):
                after = needed(own, metric, error, further)
                cells.append(f"{after:,.0f} | {before / after:.1f}" if after < np.inf else "- | -")
            print(
                f"| {name} of {size}: {error:.0f} {UNITS[metric]} | {before:,.0f} | "
                + " | ".join(cells)
                + " |"
            )
    draw(found, RESULTS / "tmc_cost.png")


def draw(found: dict[str, dict[int, Point]], path: Path) -> Path:
    """Errors against CPU hours."""
    figure, axes = new_figure(2, (4.0, 3.6), 2)
    for axis, (metric, name) in zip(axes, LABELS.items(), strict=True):
        for i, (arm, curve) in enumerate(found.items()):
            hours = [p.total() / 3600 for p in curve.values()]
            errors = [p.errors[metric] for p in curve.values()]
            axis.plot(hours, errors, color=COLOURS[i], marker=MARKERS[i], label=ARMS[arm])
        axis.set(xscale="log", yscale="log", xlabel="labels and training (CPU hours)")
        axis.set_ylabel(f"test MAE of {name} ({UNITS[metric]})")
        axis.set_xticks([0.5, 1, 2, 3], ["0.5", "1", "2", "3"])
        axis.xaxis.set_minor_locator(NullLocator())
        plain_log(axis)
    axes[0].legend(frameon=False, fontsize="small")
    return save(figure, path)


if __name__ == "__main__":
    main()
