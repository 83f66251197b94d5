"""What orbital charges bring on metal complexes with DFT energies and forces: the embedded set.

    python benchmarks/study_tmc.py STUDY --work DIRECTORY [--only NAME ...] [--part 0/2]
    python benchmarks/study_tmc.py STUDY report --work DIRECTORY

STUDY is a key of ``STUDIES``. Complexes are held out whole, and anew for every split seed: 50 test
complexes of one split say little (repeated hold-out). ``grown`` has the complexes of
benchmarks/data beside the embedded ones, and networks that have learnt GFN1-xTB labels of complexes
without DFT before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from study import main, make_delta
from tmc_data import (
    CONFIG,
    FROM_METALS,
    GROWN,
    MORE,
    MOST,
    TAUGHT,
    make_grown,
    make_hot,
    make_means,
    make_stand_in,
    taught,
)

from orbq.datasets import open_dataset

HERE = Path(__file__).parent
SPLITS = range(1, 6)
GROWN_SPLITS = range(11, 15)

_OWN = ("data.unlabelled=[]", "training.pretrain_steps=0", "ablation.n_train=[0]")
_XTB = (
    "ablation.baseline=false",
    "ablation.weights=[1.0]",
    "ablation.n_train=[0]",
    "training.learning_rate=2e-3",
    "training.weight_decay=0.1",
    "training.pretrain_steps=8000",
    "loss.weights.xtb_energy=1.0",
    "loss.weights.xtb_forces=1.0",
)


def _split(seed: int) -> tuple[str, ...]:
    return (f"data.split_seed={seed}", "ablation.seeds=[0, 1]")


STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    # own: the same structures teach; first: GFN1 labels of all unlabelled complexes before
    "targets": {
        **{
            f"own-{s}": (
                *_split(s),
                *_OWN,
                "ablation.targets=['onsite']",
                "ablation.weights=[0.0, 1.0]",
            )
            for s in SPLITS
        },
        **{
            f"first-{s}": (
                *_split(s),
                *_XTB,
                "ablation.targets=['onsite+xtb_energy+xtb_forces']",
            )
            for s in SPLITS
        },
        **{
            f"dft-{s}": (
                *_split(s),
                *_OWN,
                "ablation.baseline=false",
                "ablation.targets=['dft', 'atomic', 'orbital']",
                "ablation.weights=[1.0]",
            )
            for s in SPLITS
        },
    }
}


# the grown set: 1,166 structures of 554 groups; splits 11 to 14 report, 10 chooses the rates
FIRST = {"forces": "xtb_energy+xtb_forces"}


def _first(kind: str, replicate: int, rates: str) -> tuple[str, ...]:
    return (
        *_OWN,
        "ablation.baseline=false",
        f"ablation.seeds=[{replicate}]",
        f"ablation.targets=['{FIRST.get(kind, 'onsite+xtb_energy+xtb_forces')}']",
        "ablation.weights=[1.0]",
        "loss.weights.xtb_energy=1.0",
        "loss.weights.xtb_forces=1.0",
        f"training.initial='@{kind}{replicate}'",
        f"ablation.learning_rates={rates}",
    )


STUDIES["grown_rates"] = {
    f"first-{replicate}": (
        *_first("all", replicate, "[5e-4, 1e-3, 2e-3, 5e-3]"),
        "data.split_seed=10",
    )
    for replicate in (0, 1)
}
FIRST_RATE = "[5e-3]"  # the best of four by the mean validation energy of grown_rates


def _splits(kind: str) -> dict[str, tuple[str, ...]]:
    return {
        f"first_{kind}-{s}-{r}": (*_first(kind, r, FIRST_RATE), f"data.split_seed={s}")
        for s in GROWN_SPLITS
        for r in (0, 1)
    }


_BOTH = ("ablation.targets=['onsite']", "ablation.weights=[0.0, 1.0]")
STUDIES["grown"] = {f"own-{s}": (*_split(s), *_OWN, *_BOTH) for s in GROWN_SPLITS} | _splits("all")
STUDIES["grown_control"] = _splits("forces")
# as many structures with DFT in each batch, and as many without beside them, against forgetting
_KEPT = ("data.unlabelled=['@rest']", "training.unlabelled_share=0.5", "training.batch_size=16")
for _kind, _study in (("all", "grown_kept"), ("forces", "grown_kept_control")):
    STUDIES[_study] = {
        name.replace("first", "kept"): (*changes, *_KEPT)
        for name, changes in _splits(_kind).items()
    }
# whether energies and forces want more steps, alone and with charges
_LONG = "training.n_steps=12000"
_ALONE = ("ablation.targets=['onsite']", "ablation.weights=[0.0]")
STUDIES["grown_long"] = {
    f"{name}-{s}": (f"data.split_seed={s}", "ablation.seeds=[0]", *_OWN, _LONG, *arm)
    for name, arm in (
        ("long", _ALONE),
        ("longest", (*_ALONE, "training.n_steps=36000")),
        (
            "onsite_long",
            ("ablation.baseline=false", "ablation.targets=['onsite']", "ablation.weights=[1.0]"),
        ),
    )
    for s in GROWN_SPLITS
}
# smoother radial functions, which helped with acetylacetone
STUDIES["grown_damped"] = {
    f"damped-{s}": (
        f"data.split_seed={s}",
        "ablation.seeds=[0]",
        *_OWN,
        *_ALONE,
        "model.radial_damping=1.0",
    )
    for s in GROWN_SPLITS
}
# distorted complexes among those without DFT
_HOT = (*_KEPT, "data.unlabelled=['@hot']")
STUDIES["grown_hot"] = {
    name.replace("first", "kept"): (*changes, *_HOT) for name, changes in _splits("hot").items()
}
# learning curves: fewer structures with DFT, energies and forces for three times as long (as much
# CPU time), and for as many steps again from all
SIZES = (100, 200, 400)
SUBSETS = {11: 3, 12: 5, 13: 3, 14: 2}  # the first data.subset_seed of which 100 hold all elements
FIFTH = {15: 1}  # after everything else was chosen and its test errors were known


def _curves(
    trials: Iterable[tuple[str, int, tuple[str, ...]]],
    replicate: str = "",
    splits: Mapping[int, int] = SUBSETS,
) -> dict[str, tuple[str, ...]]:
    """Each (name, structures with DFT or 0 for all, overrides) on each split and its subset."""
    return {
        f"{name}{n or ''}-{s}{replicate}": (
            *arm,
            f"data.split_seed={s}",
            f"data.subset_seed={subset if n else 0}",
            f"ablation.n_train=[{n}]",
        )
        for name, n, arm in trials
        for s, subset in splits.items()
    }


_ONCE, _TWICE = "ablation.seeds=[0]", "ablation.seeds=[0, 1]"
_ALONE_LONG = (*_OWN, *_ALONE, _ONCE, _LONG)
_KEPT_HOT = (*_first("hot", 0, FIRST_RATE), *_HOT)
STUDIES["grown_sizes_hot"] = _curves(("long", n, _ALONE_LONG) for n in SIZES) | _curves(
    (("kept_hot", n, _KEPT_HOT) for n in SIZES), "-0"
)
# reference energies of the atoms fitted beside a multiple of GFN1's energies
_GUIDED = "data.references=guided"
STUDIES["grown_guided_hot"] = _curves(
    (("guided", n, (*_KEPT_HOT, _GUIDED)) for n in (100, 200, 0)), "-0"
) | _curves(("alone", n, (*_ALONE_LONG, _GUIDED)) for n in (100, 200, 0))
# the same after three times as long a teaching
STUDIES["grown_guided_longer"] = {}
for _r in (0, 1):
    _arm = (*_first("longer", _r, FIRST_RATE), *_HOT, _GUIDED)
    STUDIES["grown_guided_longer"] |= _curves((("longer", n, _arm) for n in (*SIZES, 0)), f"-{_r}")
# references of atoms and charge fitted together, as from here on everywhere, and with the readout
# of the embedded network, which is that of "longer": split 10 chooses, the others report
CHOOSING = {10: 2}
_SLOPE, _NO_SLOPE = "data.charge_reference=true", "data.charge_reference=false"
_FROM_METALS = (
    *(change for change in _first("hot", 0, FIRST_RATE) if "initial" not in change),
    *FROM_METALS,
)
_LONGEST = (*_ALONE_LONG, "training.n_steps=36000")
STUDIES["grown_taught_hot"] = _curves(
    (
        (name, n, arm)
        for n in (100, 200, 0)
        for name, arm in (
            ("long", _ALONE_LONG) if n else ("longest", _LONGEST),  # to its end, of all structures
            ("guided", (*_FROM_METALS, _SLOPE, _GUIDED)),
            ("sloped", (*_FROM_METALS, _SLOPE)),
            ("taught", _FROM_METALS),
        )
    ),
    splits=CHOOSING | SUBSETS | FIFTH,
)
# what keeps more of GFN1 while DFT is learnt, on the split that chooses
_DECAYED = "training.weight_decay=0.05"
STUDIES["grown_tuned_further"] = _curves(
    (
        (name, 200, (*_FROM_METALS, *changes))
        for name, changes in {
            "none": ("ablation.learning_rates=[5e-3, 1e-2]",),
            "decayed": (_DECAYED, "ablation.learning_rates=[5e-3, 1e-2]"),
            "undecayed": ("training.weight_decay=0", "ablation.learning_rates=[1e-3, 2e-3, 5e-3]"),
            "share": (_DECAYED, "training.unlabelled_share=0.75", "training.batch_size=32"),
            "weight": (_DECAYED, "loss.weights.xtb_energy=3", "loss.weights.xtb_forces=3"),
            "further": (_DECAYED, "training.initial='@further0'"),
        }.items()
    ),
    splits=CHOOSING,
)
# no slope in any arm: charges of the same structures, training to its end (the weight decay that
# split 10 prefers at 200 structures), and other sizes
_BOTH_LONG = (*_OWN, *_BOTH, _LONG, _NO_SLOPE)
_UNSLOPED_ALONE = (*_ALONE_LONG, _NO_SLOPE)
_WIDE = ("model.n_layers=3", "model.n_channels=64", "ablation.weights=[0.0, 1.0]")
_CHARGES = (
    "ablation.baseline=false",
    "ablation.targets=['dft', 'atomic', 'orbital']",
    "ablation.weights=[1.0]",
)
STUDIES["grown_unsloped_hot"] = _curves(
    (
        ("own", 0, (*_BOTH_LONG, _TWICE)),
        ("charges", 0, (*_BOTH_LONG, *_CHARGES, _TWICE)),
        ("wide", 0, (*_BOTH_LONG, *_WIDE, _ONCE)),
        ("taught", 0, _FROM_METALS),
        ("longest", 0, (*_LONGEST, _NO_SLOPE)),
        ("longest_decayed", 0, (*_LONGEST, _NO_SLOPE, _DECAYED)),  # as taught_long
        ("taught", 400, _FROM_METALS),
        ("taught_long", 0, (*_FROM_METALS, _LONG, _DECAYED)),
        *(("alone", n, _UNSLOPED_ALONE) for n in SIZES),
    ),
    splits=SUBSETS | FIFTH,
)
# from a second taught network, whose GFN1 energies have no slope in the charge either
STUDIES["grown_second_anew"] = _curves(
    (("second", n, (*_FROM_METALS, "training.initial='@anew0'")) for n in (100, 200)),
    splits=CHOOSING | SUBSETS,
)
# the same network taught the mean energies and forces of two methods
_FROM_MEAN = (*_FROM_METALS, "training.initial='@mean0'")
STUDIES["grown_mean"] = _curves(
    (
        *(("mean", n, _FROM_MEAN) for n in (100, 200, 0)),
        ("mean_long", 0, (*_FROM_MEAN, _LONG, _DECAYED)),
    ),
    splits=CHOOSING | SUBSETS,
)
# energies without forces, as on QM7 and in the paper: is it the forces that leave charges little?
_ENERGIES = (*_BOTH_LONG, _ONCE, "loss.weights.forces=0")
_NO_FORCES = (*_ENERGIES, "ablation.weights=[0.0, 1.0, 8.0]")
STUDIES["grown_energies_hot"] = _curves(
    (name, n, (*_NO_FORCES, *changes))
    for name, n, changes in (("own", 0, ()), ("own", 200, ()), ("wide", 0, _WIDE))
)
# is it that there are too few structures? GFN2-xTB energies of thousands in place of DFT's
_STEPS = {400: 12000, 1200: 24000, 0: 48000}
_STAND_IN = (*_NO_FORCES, _DECAYED, "data.dataset='@stand-in'")
STUDIES["grown_stand_in"] = _curves(
    (
        (name, n, (*_STAND_IN, f"training.n_steps={steps}", *changes))
        for name, changes in (("own", ()), ("wide", _WIDE))
        for n, steps in _STEPS.items()
    ),
    splits={11: 0, 12: 0},
)
# what is left to learn where GFN1's energies and forces are known exactly, at inference too
_DELTA = (*_UNSLOPED_ALONE, "data.dataset='@delta'")
STUDIES["grown_delta_hot"] = _curves(("delta", n, _DELTA) for n in (200, 0))
STUDIES["grown_long_hot"] = {
    f"hot_long-{s}-0": (*_KEPT_HOT, _LONG, f"data.split_seed={s}") for s in GROWN_SPLITS
}
# charges of the reference method against GFN1's, from one an atom to the whole block
STUDIES["grown_dft"] = {f"dft-{s}": (*_split(s), *_OWN, *_CHARGES) for s in GROWN_SPLITS}

# of twice as many complexes with DFT: to their ends, and energies without forces as in stand_in
_TO_THE_END = (
    ("taught_long", 0, (*_FROM_METALS, _LONG, _DECAYED, "training.initial='@anew0'")),
    ("longest", 0, (*_LONGEST, _NO_SLOPE)),
)
STUDIES["more_anew"] = _curves(
    (*_TO_THE_END, ("own", 0, (*_BOTH_LONG, _ONCE))), splits=SUBSETS | FIFTH
)
# and with all that there are
STUDIES["most_anew"] = _curves(_TO_THE_END, splits=SUBSETS | FIFTH)
STUDIES["more_energies"] = _curves(
    (
        ("own", 0, (*_ENERGIES, _DECAYED, "training.n_steps=24000")),
        ("wide", 0, (*_ENERGIES, _DECAYED, "training.n_steps=24000", *_WIDE)),
    ),
    splits=SUBSETS | FIFTH,
)


SETS = {"grown": GROWN, "more": MORE, "most": MOST}  # complexes with DFT, by a study's first word


def prepare(place: Path, study: str) -> dict[str, str]:
    """Label the sets and teach the networks that a study begins from, once."""
    files = SETS.get(study.split("_")[0])
    if files:
        place = place if files is GROWN else place.with_name(f"data-{study[:4]}")
        words = make_grown(place, files)
        if study == "grown_delta_hot":
            words["@delta"] = str(place / "grown-delta")
            make_delta(place / "grown", place / "grown-delta")
        kind = study.split("_")[-1]
        if study == "grown_stand_in":
            words["@stand-in"] = make_stand_in(place)
        distorted = kind in ("hot", "longer", "further", "anew", "mean")
        if distorted:
            words["@hot"] = make_hot(place, files)
        if kind == "mean":
            words |= make_means(place)
        kind = {"control": "forces"}.get(kind, kind if kind in TAUGHT else "all")
        rest = words["@hot" if distorted else "@rest"]
        used = {f"@{kind}{seed}": seed for seed in (0, 1)}
        said = " ".join(o for trial in STUDIES[study].values() for o in trial)
        return words | {w: taught(place, rest, kind, s) for w, s in used.items() if w in said}
    for name in ("tmc", "tmc_unlabelled"):
        open_dataset(name)
    return {"@data": "tmc"}


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        STUDIES,
        CONFIG,
        "tmc",
        ("meV", 1.0),
        prepare,
    )
