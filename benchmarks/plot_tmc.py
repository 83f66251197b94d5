"""Metal complexes, with DFT and without: the table of study_tmc.py's `grown` studies and a picture.

    python benchmarks/plot_tmc.py

Reads results/tmc_grown*.jsonl. Each arm is held against training on energies and forces alone, on
the same split and with the same seed: the geometric mean over seeds, then Student's 95 % interval
of the log ratios over splits. Then the learning curves over subsets (curves.py; a split is a
replicate). Writes results/tmc_grown.png and tmc_curves.png.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from curves import Errors, change_text, compare, draw_curves, mean
from matplotlib.axes import Axes
from scipy.stats import t as student

from orbq.equivalence import factor_text
from orbq.plots import COLOURS, MARKERS, new_figure, save

RESULTS = Path(__file__).parent / "results"
LEVEL = 0.95
BASELINE = "energies and forces"
ARMS = {  # beginning of an ablation's name, or arm within `own` -> what it is
    "energy-only": BASELINE,
    "long": f"{BASELINE}, 12,000 steps",
    "damped": f"{BASELINE}, `radial_damping` 1",
    "longest": f"{BASELINE}, 36,000 steps",
    "dft": "and DFT atomic charges of the same complexes",
    "atomic": "and GFN1 atomic charges (`atomic`)",
    "orbital": "and GFN1 orbital charges (`orbital`)",
    "onsite": "and `onsite`, the whole blocks",
    "onsite_long": "and `onsite`, 12,000 steps",
    "first_forces": "GFN1 energies and forces first",
    "first_all": "GFN1 charges, energies and forces first",
    "kept_forces": "GFN1 energies and forces first, and kept in each batch",
    "kept_all": "GFN1 charges, energies and forces first, and kept in each batch",
    "kept_hot": "the same, of distorted complexes too",
    "hot_long": "the same, 12,000 steps",
    "guided": "the same, guided references",
    "longer": "the same, guided references, after 60,000 steps on labels",
}
PAIRS = (
    ("first_all", "first_forces"),
    ("kept_all", "kept_forces"),
    ("kept_all", "first_all"),
    ("kept_all", "long"),
    ("kept_hot", "kept_all"),
    ("kept_hot", "long"),
    ("kept_hot", "longest"),
    ("hot_long", "kept_hot"),
    ("hot_long", "long"),
    ("longer", "kept_hot"),
    ("longer", "long"),
    ("longer", "longest"),
    ("onsite", "dft"),
    ("orbital", "dft"),
    ("onsite_long", "long"),
)
LABELS = {"energy_mae_meV": "energies", "forces_mae_meV_per_A": "forces"}
UNITS = {"energy_mae_meV": "meV", "forces_mae_meV_per_A": "meV/Å"}
CURVES = {  # baseline first; as much CPU time each
    "long": BASELINE,
    "kept_hot": "after GFN1 labels of other complexes",
    "guided": "and with guided references",
    "longer": "and taught three times as long",
}
APART = tuple(  # other references in every arm (plot_taught.py), or choices
    f"tmc_grown_{study}"
    for study in (
        *(f"{name}_hot" for name in ("taught", "unsloped", "delta", "energies")),
        *("rates", "tuned_further", "second_anew", "stand_in"),
    )
)
CHOOSES = 10  # the split by which arms are chosen
ALL = 814  # mean size of the four training splits


def read(metric: str) -> dict[str, dict[int, Errors]]:
    """Test errors of every arm that has been trained, by the size of its subset (ALL: no subset)
    and (split, seed)."""
    paths = [p for p in sorted(RESULTS.glob("tmc_grown*.jsonl")) if p.stem not in APART]
    found = read_from(paths, metric)
    return {arm: found[arm] for arm in ARMS if arm in found}


def read_from(
    paths: Iterable[Path], metric: str, wanted: Callable[[dict[str, Any]], bool] = lambda _: True
) -> dict[str, dict[int, Errors]]:
    """The same of these files, whatever their arms are called, of the records that are wanted;
    splits that report alone."""
    found: dict[str, dict[int, Errors]] = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            kind, size = kind_and_size(record["ablation"])
            arm = record["arm"] if kind in ("own", "wide", "dft", "charges") else kind
            split = int(record["ablation"].split("-")[1])
            if split == CHOOSES or not wanted(record):
                continue
            found[arm][size][split, record["seed"]] = record["test"][metric]
    for arm in found.values():
        for size in [n for n, errors in arm.items() if len(errors) < 2]:
            del arm[size]  # a single trial
    return found


def kind_and_size(ablation: str) -> tuple[str, int]:
    """What an ablation is of, and its structures with DFT: kept_hot100-11-0 -> kept_hot, 100."""
    kind, size = re.fullmatch(r"(.*?)(\d*)", ablation.split("-")[0]).groups()
    return kind, int(size or ALL)


def change(arm: Errors, base: Errors) -> tuple[np.ndarray, int, int]:
    """Relative change (value, low, high), and how many splits and runs it is from."""
    shared = sorted(set(arm) & set(base))
    splits = sorted({split for split, _ in shared})
    ratios = np.array(
        [np.mean([np.log(arm[k] / base[k]) for k in shared if k[0] == s]) for s in splits]
    )
    n = len(ratios)
    width = student.ppf((1 + LEVEL) / 2, n - 1) * ratios.std(ddof=1) / n**0.5 if n > 1 else np.inf
    return np.exp(ratios.mean() + np.array([0.0, -width, width])) - 1, n, len(shared)


def main() -> None:
    """Print the table and what one arm brings beside another; draw the picture."""
    curves = {metric: read(metric) for metric in LABELS}
    tables = {
        m: {arm: sizes[ALL] for arm, sizes in curves[m].items() if ALL in sizes} for m in LABELS
    }
    energies = tables["energy_mae_meV"]
    print("| arm | runs | energy MAE, meV | change | forces MAE, meV/Å | change |")
    print("|---|---|---|---|---|---|")
    for arm in energies:
        cells = []
        for table in tables.values():
            cells.append(f"{mean(table[arm]):.0f}")
            paired = arm != "energy-only"
            cells.append(change_text(change(table[arm], table["energy-only"])[0]) if paired else "")
        print(f"| {ARMS[arm]} | {len(energies[arm])} | " + " | ".join(cells) + " |")
    for arm, base in PAIRS:
        if arm in energies and base in energies:
            both = [
                f"{n} {change_text(change(tables[m][arm], tables[m][base])[0])}"
                for m, n in LABELS.items()
            ]
            print(f"{arm} against {base}: {', '.join(both)}")
    draw(tables, RESULTS / "tmc_grown.png")
    tell_curves(curves)
    draw_both_curves(curves, CURVES, RESULTS / "tmc_curves.png")


def tell_curves(curves: dict[str, dict[str, dict[int, Errors]]]) -> None:
    """The table of the learning curves."""
    print("| structures with DFT | arm | MAE | change | data factor |")
    for metric, table in curves.items():
        base, *others = (table[arm] for arm in CURVES)
        for n in sorted(base):
            print(f"| {n}, {LABELS[metric]} | alone | {mean(base[n]):.0f} | | |")
            for arm, name in zip(others, list(CURVES)[1:], strict=True):
                if n in arm:
                    gain, factor = compare(base, arm[n], n)
                    end = f"{change_text(gain)} | {factor_text(factor)}"
                    print(f"| | {name} | {mean(arm[n]):.0f} | {end} |")
    for arm, base in (("guided", "kept_hot"), ("longer", "guided"), ("longer", "kept_hot")):
        for n in sorted({*curves["energy_mae_meV"][arm]} & {*curves["energy_mae_meV"][base]}):
            both = [
                f"{name} {change_text(change(curves[m][arm][n], curves[m][base][n])[0])}"
                for m, name in LABELS.items()
            ]
            print(f"{n}: {arm} against {base}: {', '.join(both)}")


def draw_both_curves(
    curves: dict[str, dict[str, dict[int, Errors]]], names: dict[str, str], path: Path
) -> Path:
    """Errors of energies and of forces against the number of structures with DFT, of these arms."""
    figure, axes = new_figure(2, (4.0, 3.6), 2)
    for axis, (metric, table) in zip(axes, curves.items(), strict=True):
        draw_curves(axis, {name: table[arm] for arm, name in names.items()})
        axis.set_xlabel("structures with DFT")
        axis.set_ylabel(f"test MAE of {LABELS[metric]} ({UNITS[metric]})")
    room_above(axes[0])
    axes[0].legend(frameon=False, fontsize="small", loc="upper right")
    return save(figure, path)


def room_above(axis: Axes) -> None:
    """Room for a legend above the curves of logarithmic axes."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.2)


def draw(tables: dict[str, dict[str, Errors]], path: Path) -> Path:
    """Changes of every arm, one below the other, with their intervals."""
    figure, (axis,) = new_figure(1, (7.2, 4.4), 1)
    arms = [arm for arm in tables["energy_mae_meV"] if arm != "energy-only"]
    for i, (metric, name) in enumerate(LABELS.items()):
        for row, arm in enumerate(arms):
            table = tables[metric]
            value, low, high = 100 * change(table[arm], table["energy-only"])[0]
            axis.errorbar(
                [value],
                [row + 0.24 * (i - 0.5)],
                xerr=[[value - low], [high - value]],
                color=COLOURS[i],
                marker=MARKERS[i],
                capsize=2,
                label=name if row == 0 else None,
            )
    axis.axvline(0.0, color="0.6", linewidth=0.8)
    axis.set_yticks(
        range(len(arms)), [ARMS[arm].replace("`", "") for arm in arms], fontsize="small"
    )
    axis.invert_yaxis()
    axis.set_xlabel("change of the test MAE (%)")
    axis.legend(frameon=False, fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return save(figure, path)


if __name__ == "__main__":
    main()
