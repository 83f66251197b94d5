"""What orbital charges bring on metal complexes with DFT energies and forces: the embedded set.

    python benchmarks/study_tmc.py STUDY --work DIRECTORY [--only NAME ...] [--part 0/2]
    python benchmarks/study_tmc.py STUDY report --work DIRECTORY

STUDY is a key of ``STUDIES``. Complexes are held out whole, and anew for every split seed: 50 test
complexes of one split say little (repeated hold-out). ``grown`` has the complexes of
benchmarks/data beside the embedded ones, and networks that have learnt GFN1-xTB labels of complexes
without DFT before.
"""

from __future__ import annotations

from pathlib import Path

from study import main, make_delta
from tmc_data import CONFIG, TAUGHT, make_grown, make_hot, taught

from orbq.data import open_dataset

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
STUDIES["grown_sizes_hot"] = {
    f"{name}{n}-{s}{suffix}": (
        *arm,
        f"data.split_seed={s}",
        f"data.subset_seed={subset}",
        f"ablation.n_train=[{n}]",
    )
    for n in SIZES
    for s, subset in SUBSETS.items()
    for name, suffix, arm in (
        ("long", "", (*_OWN, *_ALONE, "ablation.seeds=[0]", _LONG)),
        ("kept_hot", "-0", (*_first("hot", 0, FIRST_RATE), *_HOT)),
    )
}
# reference energies of the atoms fitted beside a multiple of GFN1's energies
STUDIES["grown_guided_hot"] = {
    f"{name}{n or ''}-{s}{suffix}": (
        *arm,
        "data.references=guided",
        f"data.split_seed={s}",
        f"data.subset_seed={subset if n else 0}",
        f"ablation.n_train=[{n}]",
    )
    for n in (100, 200, 0)
    for s, subset in SUBSETS.items()
    for name, suffix, arm in (
        ("guided", "-0", (*_first("hot", 0, FIRST_RATE), *_HOT)),
        ("alone", "", (*_OWN, *_ALONE, "ablation.seeds=[0]", _LONG)),
    )
}
# the same after three times as long a teaching
STUDIES["grown_guided_longer"] = {
    f"longer{n or ''}-{s}-{r}": (
        *_first("longer", r, FIRST_RATE),
        *_HOT,
        "data.references=guided",
        f"data.split_seed={s}",
        f"data.subset_seed={subset if n else 0}",
        f"ablation.n_train=[{n}]",
    )
    for r in (0, 1)
    for n in (100, 200, 400, 0)
    for s, subset in SUBSETS.items()
}
# references of atoms and charge fitted together, as from here on everywhere, and with the readout
# of the embedded network, which is that of "longer": split 10 chooses, the others report
_SHIPPED = (
    *(change for change in _first("hot", 0, FIRST_RATE) if "initial" not in change),
    *_HOT,
    "training.initial=gfn1-metals",
)
_NO_SLOPE = "data.charge_reference=false"
_TAUGHT = {
    "long": (*_OWN, *_ALONE, "ablation.seeds=[0]", _LONG),
    "longest": (*_OWN, *_ALONE, "ablation.seeds=[0]", "training.n_steps=36000"),
    "guided": (*_SHIPPED, "data.references=guided"),
    "sloped": (*_SHIPPED, "data.references=taught"),
    "taught": (*_SHIPPED, "data.references=taught", _NO_SLOPE),
}
STUDIES["grown_taught_hot"] = {
    f"{name}{n or ''}-{s}": (
        *arm,
        f"data.split_seed={s}",
        f"data.subset_seed={subset if n else 0}",
        f"ablation.n_train=[{n}]",
    )
    for n in (100, 200, 0)
    for s, subset in {10: 2, **SUBSETS}.items()
    for name, arm in _TAUGHT.items()
    if name != ("longest" if n else "long")  # training alone to its end, of all structures
}
# no slope in any arm: charges of the same structures, training to its end (the weight decay that
# split 10 prefers at 200 structures), and other sizes
_BOTH_LONG = (*_OWN, *_BOTH, _LONG, _NO_SLOPE)
_ONCE, _TWICE = "ablation.seeds=[0]", "ablation.seeds=[0, 1]"
_UNSLOPED_ALONE = (*_TAUGHT["long"], _NO_SLOPE)
_UNSLOPED = (  # name, structures with DFT (0: all), overrides
    ("own", 0, (*_BOTH_LONG, _TWICE)),
    ("taught", 0, _TAUGHT["taught"]),
    ("longest", 0, (*_TAUGHT["longest"], _NO_SLOPE)),
    ("taught", 400, _TAUGHT["taught"]),
    ("taught_long", 0, (*_TAUGHT["taught"], _LONG, "training.weight_decay=0.05")),
    *(("alone", n, _UNSLOPED_ALONE) for n in (400, 100, 200)),
)
STUDIES["grown_unsloped_hot"] = {
    f"{name}{n or ''}-{s}": (
        *arm,
        f"data.split_seed={s}",
        f"data.subset_seed={subset if n else 0}",
        f"ablation.n_train=[{n}]",
    )
    for name, n, arm in _UNSLOPED
    for s, subset in SUBSETS.items()
}
# energies without forces, as on QM7 and in the paper: is it the forces that leave charges little?
_NO_FORCES = "loss.weights.forces=0"
STUDIES["grown_energies_hot"] = {
    f"own{n or ''}-{s}": (
        *_BOTH_LONG,
        _ONCE,
        "ablation.weights=[0.0, 1.0, 8.0]",
        _NO_FORCES,
        f"data.split_seed={s}",
        f"data.subset_seed={subset if n else 0}",
        f"ablation.n_train=[{n}]",
    )
    for n in (0, 200)
    for s, subset in SUBSETS.items()
}
# what is left to learn where GFN1's energies and forces are known exactly, at inference too
STUDIES["grown_delta_hot"] = {
    f"delta{n or ''}-{s}": (
        *_UNSLOPED_ALONE,
        "data.dataset='@delta'",
        f"data.split_seed={s}",
        f"data.subset_seed={subset if n else 0}",
        f"ablation.n_train=[{n}]",
    )
    for n in (200, 0)
    for s, subset in SUBSETS.items()
}
STUDIES["grown_long_hot"] = {
    f"hot_long-{s}-0": (*_first("hot", 0, FIRST_RATE), *_HOT, _LONG, f"data.split_seed={s}")
    for s in GROWN_SPLITS
}
# charges of the reference method against GFN1's, from one an atom to the whole block
STUDIES["grown_dft"] = {
    f"dft-{s}": (
        *_split(s),
        *_OWN,
        "ablation.baseline=false",
        "ablation.targets=['dft', 'atomic', 'orbital']",
        "ablation.weights=[1.0]",
    )
    for s in GROWN_SPLITS
}


def prepare(place: Path, study: str) -> dict[str, str]:
    """Label the sets and teach the networks that a study begins from, once."""
    if study.startswith("grown"):
        words = make_grown(place)
        if study == "grown_delta_hot":
            words["@delta"] = str(place / "grown-delta")
            make_delta(place / "grown", place / "grown-delta")
        kind = study.split("_")[-1]
        distorted = kind in ("hot", "longer")
        if distorted:
            words["@hot"] = make_hot(place)
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
