"""The learning curves of study_qm7.py: tables and a picture.

    python benchmarks/plot_qm7.py

Reads results/qm7_{curves,targets,first_*}.jsonl, and for a second table those of ``longest``,
``first_longest`` and ``first_wide``; a third holds what labels first bring against energies alone
in as many or in four times the steps, whichever validation prefers at each size (and so do mean
energies, in its last rows). Each arm is held
against energy-only training, both with the network that its own validation error chose (study
``networks``), over replicates of the same seed and subset (curves.py). Writes
results/qm7_curves.png.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from curves import Errors, change_text, compare, draw_curves, mean

from orbq.equivalence import factor_text
from orbq.plots import new_figure, save

RESULTS = Path(__file__).parent / "results"
KCAL = 43.364  # meV in a kcal/mol
STUDIES = (
    "curves",
    "first_both",
    "first_forces",
    "first_longer",
    "first_mean",
    "first_gfn2",
    "first_charges",
    "first_energies",
    "targets",
)
LONGEST = ("longest", "first_longest", "first_wide")
BASELINE = "energy-only"
ARMS = {  # of the ablations' names, less what follows the dash
    "base": BASELINE,
    "base_deep": "energy-only, the network of onsite",
    "base_wide": "energy-only, the network of onsite with 64 channels",
    "base_wider": "energy-only, the network of onsite with 128 channels",
    "onsite_wide": "onsite, with 64 channels",
    "onsite_wider": "onsite, with 128 channels",
    "invariant": "orbital, invariant head",
    "random": "onsite, a target without information",
    "both": "GFN1 charges and energies first",
    "forces": "GFN1 charges, energies and forces first",
    "longer": "GFN1 charges and energies first, for twice as long",
    "mean": "the same with mean energies of GFN1 and GFN2",
    "longest": "GFN1 charges, mean energies of GFN1 and GFN2 first",
    "wide": "the same first, in 64 channels and 4 Å",
    "gfn2": "the same with charges and energies of GFN2",
    "charges": "GFN1 charges first",
    "energies": "GFN1 energies first",
}
LONG = f"{BASELINE}, four times the steps"
FIRST = tuple(ARMS[name] for name in ("both", "longer", "mean"))
DRAWN = (BASELINE, LONG, "onsite", ARMS["mean"])
LABELS = {
    "onsite": "and charges of these molecules",
    ARMS["mean"]: "after xTB labels of all 4,841 to train",
}

Table = dict[str, dict[int, Errors]]  # arm -> size -> kcal/mol by (seed, subset seed)


def read(studies: Iterable[str] = STUDIES, split: str = "test") -> Table:
    """Errors of every arm that has been trained."""
    table: Table = defaultdict(lambda: defaultdict(dict))
    for path in (RESULTS / f"qm7_{name}.jsonl" for name in studies):
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            kind = record["ablation"].split("-")[0]
            replicate = record["seed"], record["subset_seed"]
            error = record[split]["energy_mae_meV"] / KCAL
            table[ARMS.get(kind, kind)][record["n_train"]][replicate] = error
    return table


def main() -> None:
    """Print the tables, draw the picture."""
    table = read()
    tell(table)
    draw(table, RESULTS / "qm7_curves.png")
    print("\nlabels first, against energies alone in the better of two lengths of training")
    alone = best((BASELINE, "curves"), (BASELINE, "longest"))
    first = best((ARMS["mean"], "first_mean"), (ARMS["longest"], "first_longest"))
    tell(
        {
            BASELINE: alone,
            **{arm: table[arm] for arm in FIRST},
            f"{ARMS['mean']}, the better of two lengths": first,
        }
    )
    print("\nfour times the steps")
    longest, chosen_by = read(LONGEST), read(LONGEST, "validation")
    for arm in (ARMS[f"base_{size}"] for size in ("deep", "wide", "wider")):  # if better
        for n, errors in longest.pop(arm, {}).items():
            here, there = (mean(chosen_by[name][n]) for name in (arm, BASELINE))
            print(f"{n}: {arm}: {mean(errors):.2f}; validation {here:.2f}, not {there:.2f}")
            if here < there:
                longest[BASELINE][n], chosen_by[BASELINE][n] = errors, chosen_by[arm][n]
    tell(longest)


def best(short: tuple[str, str], long: tuple[str, str]) -> dict[int, Errors]:
    """An arm (its name, its study), or the same in four times the steps where validation errors are
    lower so, by size."""
    (arm, study), (long_arm, long_study) = short, long
    chosen_by, longer_by = (
        read((s,), "validation")[a] for a, s in ((arm, study), (long_arm, long_study))
    )
    longer, found = read((long_study,))[long_arm], dict(read((study,))[arm])
    for n, errors in longer_by.items():
        both = {k: chosen_by[n][k] for k in errors}
        if mean(errors) < mean(both):
            found[n] = longer[n]
        print(
            f"{arm}, {n}: validation {mean(both):.2f}, in four times the steps {mean(errors):.2f}"
        )
    return found


def tell(table: Table) -> None:
    """Print every arm against energies alone."""
    print("| arm | N | test MAE, kcal/mol | runs | reduction | data factor |")
    print("|---|---|---|---|---|---|")
    for arm in table:
        for n in sorted(table[arm]):
            errors = np.array(list(table[arm][n].values()))
            spread = f" ± {errors.std(ddof=1):.2f}" if len(errors) > 1 else ""
            text = f"| {arm} | {n} | {errors.mean():.2f}{spread} | {len(errors)} "
            if arm == BASELINE or n not in table[BASELINE]:
                print(text + "| | |")
                continue
            gain, factor = compare(table[BASELINE], table[arm][n], n)
            times = factor_text(factor)
            told = change_text(gain) if len(errors) > 1 else f"{100 * gain[0]:+.0f} %"
            print(f"{text}| {told} | {times} |")


def draw(table: Table, path: Path) -> Path:
    """Errors against the number of energies, with standard deviations over the runs."""
    table = {**table, LONG: read(("longest",))[BASELINE]}
    figure, (axis,) = new_figure(1, (5.2, 4.0), 1)
    draw_curves(axis, {LABELS.get(arm, arm): table[arm] for arm in DRAWN if arm in table})
    axis.set(xlabel="molecules with a DFT energy", ylabel="test energy MAE (kcal/mol)")
    axis.legend(frameon=False, fontsize="small")
    return save(figure, path)


if __name__ == "__main__":
    main()
