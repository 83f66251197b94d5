"""The learning curves of benchmarks/results/qm7_curves.jsonl: a table and a picture.

    python benchmarks/plot_qm7.py

Each arm is held against energy-only training at its best: at every size, the network (3 or 5 Å)
whose validation error is lower. Reductions are of the mean over replicates (seed and subset, the
same for both arms), data factors are read from the baseline's curve on log-log axes; intervals are
95 % percentiles over 2,000 resamplings of the replicates. Writes results/qm7_curves.png.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator

from orbq.equivalence import LEVEL, needed
from orbq.plots import COLOURS, MARKERS, new_figure, plain_log, save

RESULTS = Path(__file__).parent / "results"
KCAL = 43.364  # meV in a kcal/mol
SUFFIX = {
    "first": "GFN1 labels of all first",
    "invariant": "invariant head",
    "random": "a target without information",
}
BASELINE, CLOSE, SAME = "energy-only, best", "energy-only, 3 Å", "energy-only, 5 Å"
DRAWN = (BASELINE, "onsite", "onsite+xtb_energy, GFN1 labels of all first")

Errors = dict[tuple[int, int], float]  # by (seed, subset seed)
Table = dict[str, dict[int, tuple[Errors, Errors]]]  # arm -> size -> validation, test


def read(path: Path) -> Table:
    """Errors of every arm in kcal/mol; the baseline beside them."""
    table: Table = defaultdict(lambda: defaultdict(lambda: ({}, {})))
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind = record["ablation"].split("-")[0]
        arm = record["arm"]
        if arm == "energy-only":
            arm = CLOSE if kind == "base" else SAME
        elif kind in SUFFIX:
            arm += f", {SUFFIX[kind]}"
        replicate = record["seed"], record["subset_seed"]
        for errors, part in zip(table[arm][record["n_train"]], ("validation", "test"), strict=True):
            errors[replicate] = record[part]["energy_mae_meV"] / KCAL
    for n in sorted({*table[CLOSE], *table[SAME]}):
        choices = [table[a][n] for a in (CLOSE, SAME) if n in table[a]]
        table[BASELINE][n] = min(choices, key=lambda errors: np.mean(list(errors[0].values())))
    return table


def compare(
    baseline: Mapping[int, tuple[Errors, Errors]], arm: Errors, n: int, n_samples: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Relative reduction and data factor: value, low, high."""
    rng = np.random.default_rng(0)
    sizes = sorted(baseline)
    curve = {k: np.array([baseline[k][1][r] for r in sorted(baseline[k][1])]) for k in sizes}
    own = np.array([arm[r] for r in sorted(arm)])
    shared = [r for r in sorted(baseline[n][1]) if r in arm]
    paired = np.array([[baseline[n][1][r], arm[r]] for r in shared])

    def factor(errors: Mapping[int, np.ndarray], error: float) -> float:
        means = np.array([errors[k].mean() for k in sizes])
        return needed(np.array(sizes, float), means, error) / n

    def drawn(values: np.ndarray) -> np.ndarray:
        return values[rng.integers(0, len(values), len(values))]

    gains, factors = [], []
    for _ in range(n_samples):
        base, other = drawn(paired).mean(0)
        gains.append(1 - other / base)
        factors.append(factor({k: drawn(v) for k, v in curve.items()}, drawn(own).mean()))
    tail = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    gain = 1 - paired[:, 1].mean() / paired[:, 0].mean()
    return (
        np.array([gain, *np.quantile(gains, tail)]),
        np.array([factor(curve, own.mean()), *np.quantile(factors, tail, method="nearest")]),
    )


def main() -> None:
    """Print the table, draw the picture."""
    table = read(RESULTS / "qm7_curves.jsonl")
    print("| arm | N | test MAE, kcal/mol | runs | reduction | data factor |")
    print("|---|---|---|---|---|---|")
    for arm in table:
        for n in sorted(table[arm]):
            errors = np.array(list(table[arm][n][1].values()))
            text = (
                f"| {arm} | {n} | {errors.mean():.2f} ± {errors.std(ddof=1):.2f} | {len(errors)} "
            )
            if arm.startswith("energy-only") or n not in table[BASELINE]:
                print(text + "| | |")
                continue
            gain, factor = compare(table[BASELINE], table[arm][n][1], n)
            percent = "{:+.0f} % ({:+.0f} to {:+.0f})".format(*(-100 * gain[[0, 2, 1]]))
            end = f"> {max(table[BASELINE]) / n:g}"  # of the baseline's curve
            times = "{} ({} to {})".format(*(f"{x:.1f}" if np.isfinite(x) else end for x in factor))
            print(f"{text}| {percent} | {times} |")
    draw(table, RESULTS / "qm7_curves.png")


def draw(table: Table, path: Path) -> Path:
    """Errors against the number of energies, with standard deviations over the runs."""
    figure, (axis,) = new_figure(1, (5.2, 4.0), 1)
    for i, arm in enumerate(a for a in DRAWN if a in table):
        sizes = sorted(table[arm])
        found = [np.array(list(table[arm][n][1].values())) for n in sizes]
        axis.errorbar(
            sizes,
            [e.mean() for e in found],
            [e.std(ddof=1) for e in found],
            color=COLOURS[i],
            marker=MARKERS[i],
            capsize=2,
            label=arm,
        )
    sizes = sorted(table[BASELINE])
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="molecules with a DFT energy",
        ylabel="test energy MAE (kcal/mol)",
    )
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    plain_log(axis)
    axis.legend(frameon=False, fontsize="small")
    return save(figure, path)


if __name__ == "__main__":
    main()
