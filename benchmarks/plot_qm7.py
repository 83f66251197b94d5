"""The learning curves of study_qm7.py: a table and a picture.

    python benchmarks/plot_qm7.py

Reads results/qm7_{curves,targets,first_*}.jsonl. Each arm is held against energy-only training,
both with the network that its own validation error chose (study ``networks``). Reductions are of
the geometric mean over replicates (seed and subset, the same for both arms) with Student's 95 %
interval of the paired log ratios; data factors are read from the baseline's curve on log-log axes,
their intervals are 95 % percentiles over 2,000 resamplings of the replicates, which four of them
make too narrow. Writes results/qm7_curves.png.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator
from scipy.stats import t as student

from orbq.equivalence import LEVEL, needed
from orbq.plots import COLOURS, MARKERS, new_figure, plain_log, save

RESULTS = Path(__file__).parent / "results"
KCAL = 43.364  # meV in a kcal/mol
STUDIES = (
    "curves",
    "first_both",
    "first_forces",
    "first_longer",
    "first_charges",
    "first_energies",
    "targets",
)
BASELINE = "energy-only"
ARMS = {  # of the ablations' names, less what follows the dash
    "base": BASELINE,
    "invariant": "orbital, invariant head",
    "random": "onsite, a target without information",
    "both": "GFN1 charges and energies first",
    "forces": "GFN1 charges, energies and forces first",
    "longer": "GFN1 charges and energies first, for twice as long",
    "charges": "GFN1 charges first",
    "energies": "GFN1 energies first",
}
DRAWN = (BASELINE, "onsite", ARMS["both"])
LABELS = {
    "onsite": "and charges of these molecules",
    ARMS["both"]: "after GFN1 labels of 4,800 molecules without one",
}

Errors = dict[tuple[int, int], float]  # kcal/mol by (seed, subset seed)
Table = dict[str, dict[int, Errors]]  # arm -> size


def read() -> Table:
    """Test errors of every arm that has been trained."""
    table: Table = defaultdict(lambda: defaultdict(dict))
    for path in (RESULTS / f"qm7_{name}.jsonl" for name in STUDIES):
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            kind = record["ablation"].split("-")[0]
            replicate = record["seed"], record["subset_seed"]
            error = record["test"]["energy_mae_meV"] / KCAL
            table[ARMS.get(kind, kind)][record["n_train"]][replicate] = error
    return table


def compare(
    baseline: Mapping[int, Errors], arm: Errors, n: int, n_samples: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Relative reduction and data factor: value, low, high; one replicate has no interval."""
    rng = np.random.default_rng(0)
    sizes = sorted(baseline)
    curve = {k: np.array([baseline[k][r] for r in sorted(baseline[k])]) for k in sizes}
    own = np.array([arm[r] for r in sorted(arm)])
    shared = [r for r in sorted(baseline[n]) if r in arm]
    ratios = np.log([arm[r] / baseline[n][r] for r in shared])
    width = np.inf
    if len(ratios) > 1:
        width = (
            student.ppf((1 + LEVEL) / 2, len(ratios) - 1) * ratios.std(ddof=1) / len(ratios) ** 0.5
        )

    def factor(errors: Mapping[int, np.ndarray], error: float) -> float:
        means = np.array([errors[k].mean() for k in sizes])
        return needed(np.array(sizes, float), means, error) / n

    def drawn(values: np.ndarray) -> np.ndarray:
        return values[rng.integers(0, len(values), len(values))]

    factors = [
        factor({k: drawn(v) for k, v in curve.items()}, drawn(own).mean()) for _ in range(n_samples)
    ]
    tail = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return (
        1 - np.exp(ratios.mean() + np.array([0.0, width, -width])),
        np.array([factor(curve, own.mean()), *np.quantile(factors, tail, method="nearest")]),
    )


def main() -> None:
    """Print the table, draw the picture."""
    table = read()
    print("| arm | N | test MAE, kcal/mol | runs | reduction | data factor |")
    print("|---|---|---|---|---|---|")
    for arm in table:
        for n in sorted(table[arm]):
            errors = np.array(list(table[arm][n].values()))
            text = (
                f"| {arm} | {n} | {errors.mean():.2f} ± {errors.std(ddof=1):.2f} | {len(errors)} "
            )
            if arm == BASELINE or n not in table[BASELINE]:
                print(text + "| | |")
                continue
            gain, factor = compare(table[BASELINE], table[arm][n], n)
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
        found = [np.array(list(table[arm][n].values())) for n in sizes]
        axis.errorbar(
            sizes,
            [e.mean() for e in found],
            [e.std(ddof=1) for e in found],
            color=COLOURS[i],
            marker=MARKERS[i],
            capsize=2,
            label=LABELS.get(arm, arm),
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
