"""What an accuracy costs on metal complexes, labels included: from the results of study_tmc.py.

    python benchmarks/plot_cost.py

CPU seconds of everything that is computed for a network: DFT of its structures and, where they
teach, GFN1-xTB labels of the complexes without DFT (label_cost.jsonl, a structure) and the network
taught by them (TEACHING_S); then its training (the records of tmc_grown*.jsonl). Geometries are
left out on both sides. "first" counts all of it; "further" what a second data set costs, when the
taught network is at hand. Of an arm's forms (FORMS) that with the smallest error of energies in
validation stands for it, at each number of structures. Prints the tables and writes
results/tmc_cost.png.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import NullLocator
from plot_taught import NAMES
from plot_tmc import LABELS, RESULTS, UNITS, kind_and_size, room_above

from orbq.plots import COLOURS, MARKERS, new_figure, plain_log, save

STUDIES = ("unsloped_hot", "taught_hot")
ARMS = {arm: NAMES[arm] for arm in ("alone", "taught")}
FORMS = {"alone": ("alone", "longest"), "taught": ("taught", "taught_long")}
MEASURE = "energy_mae_meV"  # in validation, by which a form is chosen
TAUGHT = 21_396  # structures of tmc_data.make_hot
TEACHING_S = 720.0  # of the embedded network: 60,000 steps, one core (orbq/data/README.md)
N_SPLITS = 4


class Point(NamedTuple):
    """Means over the splits: CPU seconds of each part, and errors by label, of the form chosen."""

    form: str
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
            records[kind_and_size(record["ablation"])].append(record)
    sizes = sorted({size for _, size in records})
    found: dict[str, dict[int, Point]] = {arm: {} for arm in ARMS}
    for arm, size in ((a, n) for a in ARMS for n in sizes):
        forms = {kind: records[kind, size] for kind in FORMS[arm] if (kind, size) in records}
        forms = {kind: runs for kind, runs in forms.items() if len(runs) >= N_SPLITS}
        kind = min(forms, key=lambda kind: mean(r["validation"][MEASURE] for r in forms[kind]))
        gfn1 = TAUGHT * cost["mean_s"]["gfn1"] + TEACHING_S
        found[arm][size] = Point(
            form=kind,
            dft=size * cost["mean_s"]["dft"],
            gfn1=gfn1 * (arm != "alone"),
            training=mean(r["program_cpu_seconds"] / r["program_runs"] for r in forms[kind]),
            errors={m: mean(r["test"][m] for r in forms[kind]) for m in LABELS},
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
        "| arm | form | structures with DFT | DFT, CPU s | GFN1, teaching | training | "
        + " | ".join(f"{name}, {UNITS[m]}" for m, name in LABELS.items())
        + " |"
    )
    for arm, curve in found.items():
        for size, p in curve.items():
            seconds = (f"{s:,.0f}" for s in (p.dft, p.gfn1, p.training))
            errors = (f"{p.errors[m]:.0f}" for m in LABELS)
            print("|", " | ".join((ARMS[arm], p.form, str(size), *seconds, *errors)), "|")
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
    """Errors, means over the splits, against CPU hours."""
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
    room_above(axes[0])
    axes[0].legend(frameon=False, fontsize="small", loc="upper right")
    return save(figure, path)


if __name__ == "__main__":
    main()
