"""Sample efficiency on QM7: what each auxiliary target does to the energy error.

    python benchmarks/study_qm7.py STUDY --work DIRECTORY [--only NAME ...] [--part 0/2]

STUDY is a key of ``STUDIES``: a set of named ablations (``orbq ablate``) over benchmarks/qm7.toml.
Each goes on where it was stopped; two processes may share a study by ``--part``. ``report`` as the
second argument prints the tables and writes benchmarks/results/qm7_<STUDY>.jsonl.

``search`` to ``search3`` choose a network for energies alone, on split 0. Everything reported as a
result is of split 1, whose test molecules took no part in them: ``networks`` chooses each arm's
network and learning rate there, by validation, on subsets 0 and 1; ``curves`` (learning curves),
``longest`` (for four times as long), ``targets`` (other targets and controls, of
400 molecules), ``weights``, ``first_*`` (after pre-training on labels alone) and ``delta`` train on
other subsets; ``first_search`` and ``first_rates`` on 0 and 1.
"""

from __future__ import annotations

from pathlib import Path

from qm7_data import CONFIG, METHODS, WIDE, make_data, make_others, pretrained
from study import main

# Baseline search: two subsets of 200 molecules, each with both learning rates. `onsite` goes along
# so that the arms may differ in what is best for them.
_SEARCH = (
    "ablation.targets=['onsite']",
    "ablation.weights=[0.0, 20.0]",
    "ablation.seeds=[0, 1]",
    "ablation.subset_seeds=[0, 1]",
    "ablation.n_train=[200]",
    "ablation.learning_rates=[2e-3, 5e-3]",
)

_CLOSE = (*_SEARCH, "model.cutoff=4.0")
_CLOSER = (*_SEARCH, "model.cutoff=3.0")

# split 1: layers and cutoff of the networks that both arms may choose from
NETWORKS = {"near": (2, 3.0), "far": (2, 5.0), "deep": (3, 4.0), "deep_far": (3, 5.0)}
_STEPS = {100: 3000, 200: 3000, 400: 4000, 800: 6000, 1600: 8000, 4000: 16000}


def _fresh(n: int, network: str) -> tuple[str, ...]:
    n_layers, cutoff = NETWORKS[network]
    return (
        "data.split_seed=1",
        "model.backbone=mace",
        f"model.n_layers={n_layers}",
        f"model.cutoff={cutoff}",
        "ablation.targets=['onsite']",
        f"ablation.n_train=[{n}]",
        f"training.n_steps={_STEPS[n]}",
    )


STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    "search": {
        "base": _SEARCH,
        "mace": (*_SEARCH, "model.backbone=mace"),
        "free": (*_SEARCH, "model.species=free"),
        "channels64": (*_SEARCH, "model.n_channels=64"),
        "layers3": (*_SEARCH, "model.n_layers=3"),
        "lmax1": (
            *_SEARCH[:1],
            "ablation.weights=[0.0]",
            *_SEARCH[2:],
            "model.lmax=1",
            "model.head=invariant",
            "ablation.targets=['atomic']",
        ),
        "decay": (*_SEARCH, "training.weight_decay=0.1"),
        "batch10": (*_SEARCH, "training.batch_size=10"),
        "cutoff4": (*_SEARCH, "model.cutoff=4.0"),
        "peratom": (*_SEARCH, "loss.energy_per=atom"),
        "mae": (*_SEARCH, "loss.kind=mae"),
        "long": (*_SEARCH, "training.n_steps=9000", "training.validate_every=750"),
        "ema999": (*_SEARCH, "training.ema_decay=0.999"),
    },
    # what helped, together, from the cutoff that helped most
    "search2": {
        "mae": (*_CLOSE, "loss.kind=mae"),
        "mace": (*_CLOSE, "model.backbone=mace"),
        "layers3": (*_CLOSE, "model.n_layers=3"),
        "mace_mae": (*_CLOSE, "model.backbone=mace", "loss.kind=mae"),
        "cutoff3": (*_CLOSE, "model.cutoff=3.0"),
        "cutoff3.5": (*_CLOSE, "model.cutoff=3.5"),
        "free": (*_CLOSE, "model.species=free"),
        "readout64": (*_CLOSE, "model.readout_hidden=64"),
        "radial4": (*_CLOSE, "model.n_radial=4"),
        "channels16": (*_CLOSE, "model.n_channels=16"),
        "layers4": (*_CLOSE, "model.cutoff=3.0", "model.n_layers=4"),
        "mace64": (*_CLOSE, "model.backbone=mace", "model.n_channels=64"),
    },
    # closer still
    "search3": {
        "mae": (*_CLOSER, "loss.kind=mae"),
        "mace": (*_CLOSER, "model.backbone=mace"),
        "layers3": (*_CLOSER, "model.n_layers=3"),
        "cutoff2.5": (*_CLOSER, "model.cutoff=2.5"),
    },
    # at 400 without what was not the best of either arm at 100
    "networks": {
        f"{name}-{n}": (
            *_fresh(n, name),
            "ablation.weights=[0.0, 8.0]",
            "ablation.seeds=[0, 1]",
            "ablation.subset_seeds=[0, 1]",
            f"ablation.learning_rates={rates}",
        )
        for n, names, rates in (
            (100, ("near", "far", "deep", "deep_far"), [2e-3, 5e-3]),
            (400, ("near", "deep", "deep_far"), [5e-3]),
        )
        for name in names
    },
}

# what ``networks`` chose, by the mean validation error of each arm: network, learning rate
CHOSEN = {
    "energy-only": {100: ("near", 5e-3), 400: ("near", 5e-3)},
    "onsite": {100: ("near", 5e-3), 400: ("deep", 5e-3)},
}
# networks taught by labels
PRETRAINED = {
    "both": 2,
    "forces": 2,
    "longer": 2,
    "mean": 2,
    "gfn2": 1,
    "wide": 1,
    "charges": 1,
    "energies": 1,
}
REPLICATES = ("ablation.seeds=[2, 3, 4, 5]", "ablation.subset_seeds=[2, 2, 3, 3]")


def _chosen(arm: str, n: int) -> tuple[str, ...]:
    network, rate = CHOSEN[arm][100 if n < 400 else 400]
    return (*_fresh(n, network), *REPLICATES, f"training.learning_rate={rate}")


def _own(n: int, target: str, *changes: str) -> tuple[str, ...]:
    """Labels of the same molecules as the energies, in the network of the on-site arm."""
    return (
        *_chosen("onsite", n),
        "ablation.baseline=false",
        f"ablation.targets=['{target}']",
        "ablation.weights=[8.0]",
        *changes,
    )


def _first(n: int, kind: str, replicate: int) -> tuple[str, ...]:
    """GFN1 labels of all training molecules before the energies of n; one run."""
    return (
        *_fresh(n, "deep_far"),
        f"ablation.seeds=[{(2, 3, 4, 5)[replicate]}]",
        f"ablation.subset_seeds=[{(2, 2, 3, 3)[replicate]}]",
        f"training.initial='@{kind}{replicate % PRETRAINED[kind]}'",
        "training.learning_rate=1e-3",
        *FINE[kind],
    )


FINE = {
    "both": (
        "ablation.baseline=false",
        "ablation.targets=['onsite+xtb_energy']",
        "ablation.weights=[20.0]",
        "loss.weights.xtb_energy=1.0",
    ),
    "charges": ("ablation.baseline=false", "ablation.weights=[20.0]"),
    "energies": (
        "ablation.baseline=false",
        "ablation.targets=['xtb_energy']",
        "ablation.weights=[1.0]",
    ),
}
SIZES = (100, 200, 400, 800, 1600, 4000)

STUDIES["curves"] = {
    **{f"base-{n}": (*_chosen("energy-only", n), "ablation.weights=[0.0]") for n in SIZES},
    **{f"onsite-{n}": _own(n, "onsite") for n in SIZES},
}
# four times the steps for both arms, and for energies alone then the larger network, too
_PAIRS = {
    subset: (f"ablation.seeds={seeds}", f"ablation.subset_seeds=[{subset}, {subset}]")
    for subset, seeds in ((2, [2, 3]), (3, [4, 5]))
}
STUDIES["longest"] = {
    f"{name}-{n}-{subset}": (*arm, *pair, f"training.n_steps={4 * _STEPS[n]}")
    for n in (4000, 1600, 800, 400, 200, 100)
    for subset, pair in _PAIRS.items()
    for name, arm in (
        ("onsite", _own(n, "onsite")),
        ("base", (*_chosen("energy-only", n), "ablation.weights=[0.0]")),
        ("base_deep", (*_chosen("onsite", n), "ablation.weights=[0.0]")),
    )
}
# and twice the channels, by seed; of 4,000 molecules four times, one run
STUDIES["longest"] |= {
    f"{name}-{n}-{seed}": (
        *arm,
        f"ablation.seeds=[{seed}]",
        f"ablation.subset_seeds=[{2 if seed < 4 else 3}]",
        f"model.n_channels={channels}",
        f"training.n_steps={4 * _STEPS[n]}",
    )
    for n, size, channels, seeds in (
        (4000, "wide", 64, (2, 3, 4, 5)),
        (4000, "wider", 128, (2,)),
        (1600, "wide", 64, (2, 3, 4, 5)),
    )
    for seed in seeds
    for name, arm in (
        (f"onsite_{size}", _own(n, "onsite")),
        (f"base_{size}", (*_chosen("onsite", n), "ablation.weights=[0.0]")),
    )
}
STUDIES["targets"] = {
    target: _own(400, target) for target in ("density", "orbital", "shell", "atomic")
} | {
    "xtb_energy": _own(400, "xtb_energy", "ablation.weights=[1.0]"),
    "onsite+xtb_energy": _own(400, "onsite+xtb_energy", "loss.weights.xtb_energy=1.0"),
    "invariant": _own(400, "orbital", "model.head=invariant"),
    "random": _own(400, "onsite", "data.dataset='@random'"),
}
# the weight of the on-site loss, in the network of that arm
STUDIES["weights"] = {
    "onsite-400": _own(
        400,
        "onsite",
        "ablation.weights=[0.0, 0.5, 2.0, 8.0, 32.0, 128.0]",
        "ablation.seeds=[2, 4]",
        "ablation.subset_seeds=[2, 3]",
        "ablation.baseline=true",
    )
}
# and where charges of the same molecules bring most; by validation, against 8 of ``longest``
STUDIES["weights"] |= {
    f"onsite_wide-4000-{weight}": (
        *_own(4000, "onsite", f"ablation.weights=[{weight}.0]"),
        "ablation.seeds=[2]",
        "ablation.subset_seeds=[2]",
        "model.n_channels=64",
        f"training.n_steps={4 * _STEPS[4000]}",
    )
    for weight in (2, 32)
}
FINE["forces"] = FINE["longer"] = FINE["mean"] = FINE["gfn2"] = FINE["both"]
FINE["wide"] = (*FINE["both"], *WIDE)
# how to learn energies after labels: by validation, N = 100, on subsets 0 and 1
_KEPT = ("data.unlabelled=['@rest']", "training.unlabelled_share=0.5", "training.batch_size=10")
_LAYERS = ("backbone/species", "backbone/embedding", *(f"backbone/layer{n}" for n in range(3)))
STUDIES["first_search"] = {
    name: (
        *_first(100, "both", 0),
        "ablation.seeds=[0, 1]",
        "ablation.subset_seeds=[0, 1]",
        "ablation.learning_rates=[1e-3, 2e-3]",
        *changes,
    )
    for name, changes in {
        "first": (),
        "kept": _KEPT,  # as many molecules without energies in each batch, against forgetting
        "frozen2": (f"training.frozen={list(_LAYERS[:4])}",),
        "frozen3": (f"training.frozen={list(_LAYERS)}",),
        "decay": ("training.weight_decay=0.2",),
    }.items()
}
# the learning rate after mean energies, by validation on subsets 0 and 1, in twice the steps
STUDIES["first_rates"] = {
    f"rates-{n}": (
        *_first(n, "mean", 0),
        "ablation.seeds=[0, 1]",
        "ablation.subset_seeds=[0, 1]",
        "ablation.learning_rates=[2.5e-4, 5e-4, 1e-3, 2e-3]",
        f"training.n_steps={2 * _STEPS[n]}",
    )
    for n in (100, 200)
}
# how large the products of a MACE-like network are before training; by validation
STUDIES["starts"] = {
    f"{network}-{n}-{start}": (
        *_fresh(n, network),
        "ablation.weights=[0.0, 8.0]",
        "ablation.seeds=[0, 1, 2, 3]",
        "ablation.subset_seeds=[0, 1, 0, 1]",
        "ablation.learning_rates=[5e-3]",
        f"model.product_init={start}",
    )
    for network in ("near", "deep")
    for n in (400, 100)
    for start in (1.0, 0.2)
}
# smoother radial functions, which helped with acetylacetone
STUDIES["damped"] = {
    f"damped-{n}": (
        *_chosen("energy-only", n),
        "ablation.weights=[0.0]",
        "model.radial_damping=1.0",
    )
    for n in (100, 400)
}
# what knowing GFN1 energies exactly would bring: what DFT adds to them is learnt, after charges
STUDIES["delta"] = {
    f"delta-{n}-{replicate}": (*_first(n, "charges", replicate), "data.dataset='@delta'")
    for replicate in (0, 2)
    for n in (100, 200, 400)
}
_SIZES_FIRST = {"both": SIZES[:4], "forces": SIZES[:3], "longer": SIZES[:3], "mean": SIZES}
for _kind in (kind for kind in FINE if kind != "wide"):
    STUDIES[f"first_{_kind}"] = {
        f"{_kind}-{n}-{replicate}": _first(n, _kind, replicate)
        for replicate in (range(4) if PRETRAINED[_kind] == 2 else (0, 2))
        for n in _SIZES_FIRST.get(_kind, (100, 400))
    }
# and for four times the steps, as ``longest``: how far the many go
STUDIES["first_longest"] = {
    f"longest-{n}-{replicate}": (
        *_first(n, "mean", replicate),
        f"training.n_steps={4 * _STEPS[n]}",
    )
    for n in (4000, 1600, 800, 400, 200, 100)
    for replicate in range(4)
}
# the same in the larger network that charges of the same molecules want
STUDIES["first_wide"] = {
    f"wide-{n}-{replicate}": (
        *_first(n, "wide", replicate),
        f"training.n_steps={4 * _STEPS[n]}",
    )
    for n in (4000, 1600, 400)
    for replicate in range(4)
}
# references and energy readout fitted together first, by the networks taught for longer
STUDIES["first_taught"] = {
    name.replace("longer", "taught"): (*changes, "data.references=taught")
    for name, changes in STUDIES["first_longer"].items()
}


def prepare(place: Path, study: str) -> dict[str, str]:
    """The data of a study, and the networks that it begins from."""
    words = make_data(place, 0 if study.startswith("search") else 1)
    if study.startswith("first_") or study == "delta":
        others = {
            "first_search": "both",
            "first_taught": "longer",
            "first_longest": "mean",
            "first_rates": "mean",
            "delta": "charges",
        }
        kind = others.get(study, study.split("_")[-1])
        labels = "mean" if kind == "wide" else kind
        if labels in METHODS:
            words |= make_others(place, 1, labels)
        for seed in range(PRETRAINED[kind]):
            words[f"@{kind}{seed}"] = pretrained(place, words["@rest"], kind, seed)
    return words


if __name__ == "__main__":
    main(
        __doc__.splitlines()[0],
        STUDIES,
        CONFIG,
        "qm7",
        ("kcal/mol", 43.364),
        prepare,
    )
