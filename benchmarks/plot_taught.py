"""Metal complexes without a slope in the charge: the table and picture of study_tmc.py's
`grown_unsloped_hot`, `grown_taught_hot`, `grown_delta_hot` and `grown_energies_hot`; and what else
is held against them: `grown_second_anew`, `grown_mean`, `more_anew`.

    python benchmarks/plot_taught.py

Training on energies and forces alone (12,000 steps), from the embedded network with references
taught (4,000 steps), and on the differences to exact GFN1 energies and forces; on all structures
the first two for three times as long. A split is a replicate (curves.py). Writes
results/tmc_taught.png.

Of two arms that are compared only the splits that both have count.
"""

from __future__ import annotations

from curves import Errors, change_text, compare, mean
from plot_tmc import ALL, LABELS, RESULTS, UNITS, change, draw_both_curves, read_from

from orbq.equivalence import factor_text

STUDIES = ("unsloped_hot", "taught_hot", "delta_hot")
NAMES = {
    "alone": "energies and forces alone",
    "delta": "their difference to GFN1's, known exactly",
    "taught": "energies and forces, after GFN1 labels of others",
}
Curves = dict[str, dict[int, Errors]]


def read(metric: str) -> Curves:
    """Test errors by arm, size (ALL: no subset) and (split, seed)."""
    paths = [RESULTS / f"tmc_grown_{study}.jsonl" for study in STUDIES]
    found = read_from(paths, metric, lambda r: not r["ablation"].startswith("wide"))
    alone = {**found["alone"], ALL: found["longest"][ALL]}
    taught = {**found["taught"], ALL: found["taught_long"][ALL]}
    beside = {arm: found[arm] for arm in ("delta", "energy-only", "onsite")}
    shorter = {"taught, shorter": {ALL: found["taught"][ALL]}}
    return {"alone": alone, "taught": taught, **beside, **shorter}


def tell(curves: dict[str, Curves]) -> None:
    """The table of the learning curves, then what else is compared."""
    print("| structures with DFT | alone | after labels | change | data factor |")
    for metric, table in curves.items():
        base, taught = table["alone"], table["taught"]
        for n in sorted(base):
            gain, factor = compare(base, taught[n], n)
            end = f"{change_text(gain)} | {factor_text(factor)}"
            means = f"{mean(base[n]):.0f} | {mean(taught[n]):.0f}"
            print(f"| {n}, {LABELS[metric]}, {UNITS[metric]} | {means} | {end} |")
    for metric, table in curves.items():
        pairs = [
            (
                "after labels for a third of the time",
                table["taught, shorter"][ALL],
                table["energy-only"][ALL],
            ),
            ("and against the whole", table["taught, shorter"][ALL], table["alone"][ALL]),
            (
                "after labels, whole against a third",
                table["taught"][ALL],
                table["taught, shorter"][ALL],
            ),
            ("36,000 against 12,000 steps", table["alone"][ALL], table["energy-only"][ALL]),
            ("onsite of the same", table["onsite"][ALL], table["energy-only"][ALL]),
        ]
        for n, base in ((200, table["alone"]), (ALL, {ALL: table["energy-only"][ALL]})):
            pairs.append((f"delta, {n}", table["delta"][n], base[n]))
        pairs.append(("taught against delta, 200", table["taught"][200], table["delta"][200]))
        for name, arm, base in pairs:
            both = [{k: errors[k] for k in arm if k in base} for errors in (arm, base)]
            means = " against ".join(f"{mean(errors):.0f}" for errors in both)
            print(f"{LABELS[metric]}: {name}: {means}, {change_text(change(arm, base)[0])}")


def tell_wide(curves: dict[str, Curves]) -> None:
    """What `onsite` of the same structures brings in the larger network; its runs, of one seed a
    split, beside the small network's mean over its seeds, too."""
    for metric, table in curves.items():
        paths = [RESULTS / "tmc_grown_unsloped_hot.jsonl"]
        wide = read_from(paths, metric, lambda r: r["ablation"].startswith("wide"))
        arm, base, small = wide["onsite"][ALL], wide["energy-only"][ALL], table["energy-only"][ALL]
        of_split = {k: mean({r: e for r, e in small.items() if r[0] == k[0]}) for k in base}
        means = f"{mean(arm):.0f} against {mean(base):.0f}"
        print(f"{LABELS[metric]}: onsite in the larger network: {means}", end="")
        pairs = {"both": (arm, base), "to small alone": (arm, of_split), "alone": (base, of_split)}
        print("".join(f", {n} {change_text(change(*pair)[0])}" for n, pair in pairs.items()))


def tell_charges(curves: dict[str, Curves]) -> None:
    """What charges of the same structures bring, from one an atom to the whole block, and GFN1's
    beside those of the reference method."""
    for metric, table in curves.items():
        paths = [RESULTS / "tmc_grown_unsloped_hot.jsonl"]
        found = read_from(paths, metric, lambda r: r["ablation"].startswith("charges"))
        arms = {name: found[name][ALL] for name in ("dft", "atomic", "orbital") if found[name]}
        arms["onsite"] = table["onsite"][ALL]
        bases = {"alone": table["energy-only"][ALL], "dft": arms.get("dft", {})}
        for name, arm in arms.items():
            print(f"{LABELS[metric]}: {name} of the same: {mean(arm):.0f}", end="")
            told = {k: change(arm, b)[0] for k, b in bases.items() if b and k != name}
            print("".join(f", to {k} {change_text(value)}" for k, value in told.items()))


def tell_energies() -> None:
    """What `onsite` of the same structures brings where no forces are taught."""
    path = RESULTS / "tmc_grown_energies_hot.jsonl"
    for network, n, weight in (
        *(("own", n, w) for w in (1.0, 8.0) for n in (200, ALL)),
        ("wide", ALL, 1.0),
    ):
        found = read_from(
            [path],
            "energy_mae_meV",
            lambda r, k=network, w=weight: r["ablation"].startswith(k) and r["weight"] in (0.0, w),
        )
        arm, base = found["onsite"][n], found["energy-only"][n]
        means = f"{mean(arm):.0f} / {mean(base):.0f}"
        told = change_text(change(arm, base)[0])
        print(f"no forces, {network}, {n}, weight {weight:g}: {means}, {told}")


def tell_others(curves: dict[str, Curves]) -> None:
    """The same from a second taught network, and from one taught the mean energies and forces of
    two methods; of all structures for a third of the time, too ("shorter")."""
    for metric, table in curves.items():
        second = read_from([RESULTS / "tmc_grown_second_anew.jsonl"], metric)["second"]
        beside = {**table, "second": second}
        for name, study in (("second", "second_anew"), ("mean", "mean")):
            found = read_from([RESULTS / f"tmc_grown_{study}.jsonl"], metric)
            own = {f"{name}{n}": (n, errors) for n, errors in found[name].items() if n != ALL}
            if ALL in found[name]:
                own[f"{name}, all, shorter"] = ALL, found[name][ALL]
            if ALL in found[f"{name}_long"]:
                own[f"{name}, all"] = ALL, found[f"{name}_long"][ALL]
            for told, (n, errors) in own.items():
                shorter = told.endswith("shorter")
                bases = ("taught, shorter",) if shorter else ("alone", "taught", "second")
                changes = "".join(
                    f", {change_text(change(errors, beside[base][n])[0])} to {base}"
                    for base in bases
                    if base != name and beside[base].get(n)
                )
                print(f"{told}, {LABELS[metric]}: {mean(errors):.0f}{changes}")


def tell_more(curves: dict[str, Curves]) -> None:
    """With twice as many complexes in training, to the ends of both arms; and what they bring to
    each, beside the same split without them (whose test complexes are among the others' now)."""
    for metric, table in curves.items():
        found = read_from([RESULTS / "tmc_more_anew.jsonl"], metric)
        base, arm = found["longest"][ALL], found["taught_long"][ALL]
        both = [{k: errors[k] for k in arm if k in base} for errors in (arm, base)]
        means = " against ".join(f"{mean(errors):.0f}" for errors in both)
        print(f"{LABELS[metric]}: more complexes: {means}, {change_text(change(arm, base)[0])}")
        for name, errors, before in (("alone", base, "alone"), ("labels first", arm, "taught")):
            gain = change_text(change(errors, table[before][ALL])[0])
            print(f"    to half as many, {name}: {mean(errors):.0f}, {gain}")


if __name__ == "__main__":
    found = {metric: read(metric) for metric in LABELS}
    tell(found)
    tell_wide(found)
    tell_charges(found)
    tell_energies()
    tell_others(found)
    tell_more(found)
    print(draw_both_curves(found, NAMES, RESULTS / "tmc_taught.png"))
