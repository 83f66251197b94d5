"""From a configuration to everything a training run needs: pools, budget, constants, batches.

This is where NumPy meets JAX: the packer's arrays become ``Batch``es of ``jraph.GraphsTuple``s.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jraph
import numpy as np

from orbq.config import Config, check_against
from orbq.config import Training as TrainingConfig
from orbq.data_rules import (
    check_no_leak,
    check_one_method,
    require_edges,
    require_elements,
    require_validation,
    warn_of_groups,
    warn_of_parity,
    warn_of_share,
)
from orbq.datasets import open_dataset
from orbq.errors import InputError
from orbq.losses import Batch, LossSpec
from orbq.models.fused import unavailable
from orbq.models.potential import Architecture, Constants
from orbq.preprocess.pack import Budget, PackedBatch, Packer, measure_budget
from orbq.preprocess.plan import choose_budget, epoch_items, mean_size
from orbq.preprocess.pool import Part, Pool
from orbq.preprocess.references import Fit, References, fit_of, fit_pool_references, pool_elements
from orbq.preprocess.store import Dataset
from orbq.scales import component_scales, energy_scale, energy_scales, label_statistics
from orbq.schema import FIELDS
from orbq.splits import split
from orbq.targets import MAIN_TERMS, TARGETS

if TYPE_CHECKING:
    from orbq.initial import Initial

DFT_FIELDS = ("energy", "forces", "stress", "dft_charges")  # never used of charge-only structures
PER_ATOM = tuple(n for n in TARGETS if not n.startswith("xtb_"))  # normalised per element and shell
_TOLERATED = 4 / 3  # of batches that hold more or fewer structures than asked for


class TrainingData(NamedTuple):
    """Everything that follows from the data and the configuration before the first update.

    pools: "train", "validation", "test"; an empty part is absent. If charge-only structures are
    named, also "unlabelled" and "teaching" (train, then unlabelled). references: per energy label
    that is trained on; energy_fit: what they leave of the training energies. spec, constants,
    architecture: structure of loss and network.
    budget: padded size of every batch. labels: field -> labelled training structures. initial: what
    training begins from, None for drawn parameters.
    """

    pools: Mapping[str, Pool]
    references: Mapping[str, References]
    energy_fit: Fit | None
    spec: LossSpec
    constants: Constants
    architecture: Architecture
    budget: Budget
    labels: Mapping[str, int]
    datasets: tuple[Dataset, ...]
    initial: Initial | None = None


def architecture_of(config: Config) -> Architecture:
    """The network's structure: heads for every auxiliary target with a positive weight."""
    model = config.model
    heads = []
    for name in config.loss.weights.auxiliary():
        kind = "energy" if name.startswith("xtb_") else model.head
        heads.append((name, kind))
    return Architecture(
        backbone=model.backbone,
        species=model.species,
        cutoff=model.cutoff,
        n_layers=model.n_layers,
        n_channels=model.n_channels,
        lmax=model.lmax,
        lmax_hidden=model.lmax_hidden,
        product_init=model.product_init,
        n_radial=model.n_radial,
        radial_damping=model.radial_damping,
        radial_hidden=model.radial_hidden,
        readout_hidden=model.readout_hidden,
        embed_charge=model.embed_charge,
        embed_spin=model.embed_spin,
        heads=tuple(heads),
        activations=config.training.activations,
        kernels=_kernels(config),
        matmul_precision=config.training.matmul_precision,
    )


def _kernels(config: Config) -> str:
    """training.kernels, or "xla", which computes the same, where they are not available."""
    wanted = config.training.kernels
    if wanted != "xla" and (reason := unavailable()):
        text = f"training.kernels = {wanted!r} is not available ({reason}): 'xla' computes the same"
        warnings.warn(text, stacklevel=2)
        return "xla"
    return wanted


def split_of(config: Config, dataset: Dataset) -> dict[str, np.ndarray]:
    """Structures of each part; the training part cut to ``data.n_train`` if that is not 0."""
    data = config.data
    fractions = (data.validation_fraction, data.test_fraction)
    parts = split(dataset["group"], dataset["content_hash"], data.split, fractions, data.split_seed)
    if data.n_train:
        available = len(parts["train"])
        if data.n_train > available:
            raise InputError(
                f"data.n_train = {data.n_train}, but the training split of {data.dataset!r} has "
                f"{available} structures: lower it, or label more"
            )
        order = np.random.default_rng([data.subset_seed, 1]).permutation(available)
        parts["train"] = np.sort(parts["train"][order[: data.n_train]])
    if not len(parts["train"]) or not len(parts["validation"]):
        sizes = {name: len(rows) for name, rows in parts.items()}
        raise InputError(f"the split {data.split!r} of {data.dataset!r} leaves {sizes}; change it")
    return parts


def prepare(
    config: Config,
    n_batches: int = 1,
    taught: Callable[[Pool], References] | None = None,
    known: Mapping[str, References] | None = None,
) -> TrainingData:
    """Open, split, check and measure the data of a configuration.

    n_batches: packed batches of an update, which together hold training.batch_size structures.
    taught: gives the reference energies by a network, of the training structures, if
    data.references = "taught"; without it they are fitted without the network. known: reference
    energies that are not fitted, of "energy", "xtb_energy" or both.

    Raises InputError for data that cannot serve it: a missing label, a leak, an unknown element.
    """
    if n_batches > config.training.batch_size:
        raise InputError(
            f"training.batch_size = {config.training.batch_size} structures cannot be divided into "
            f"the {n_batches} batches of an update (training.batches_per_update; 0 is one for each "
            "device): raise the batch size"
        )
    dataset = open_dataset(config.data.dataset)
    unlabelled = [open_dataset(name) for name in config.data.unlabelled]
    check_one_method(dataset, unlabelled)
    parts, cutoff = split_of(config, dataset), config.model.cutoff
    pools = {n: Pool([Part(dataset, rows)], cutoff) for n, rows in parts.items() if len(rows)}
    teaching = pools["train"]
    if config.model.embed_spin:
        warn_of_parity(pools["train"])
    check_no_leak(dataset, parts, unlabelled)
    if config.data.split == "group":
        warn_of_groups(dataset, parts, unlabelled)
    if unlabelled:
        pools["unlabelled"] = Pool([Part(d, None, DFT_FIELDS) for d in unlabelled], cutoff)
        teaching = Pool([*teaching.parts, *pools["unlabelled"].parts], cutoff)
        pools["teaching"] = teaching
        warn_of_share(len(pools["train"]), len(pools["unlabelled"]), config.training)
    labels = {f: int(teaching.labelled(f).sum()) for f in FIELDS}
    check_against(config, labels, config.data.dataset)
    weights = config.loss.weights
    terms = tuple(n for n in MAIN_TERMS if getattr(weights, n) > 0)
    terms += tuple(weights.auxiliary())
    require_validation(pools["validation"], terms)
    stats = {n: label_statistics(n, teaching) for n in terms if n in PER_ATOM}
    fits = _fit_references(config, pools["train"], teaching, terms, taught, known or {})
    elements = pool_elements(teaching)
    require_elements(pools, elements, {n: f.references for n, f in fits.items()})
    components = component_scales(terms, teaching)
    train = pools["train"]
    require_edges(train)
    neighbors = config.model.avg_num_neighbors or train.n_edges.sum() / train.n_nodes.sum()
    constants = Constants(
        elements=tuple(int(z) for z in elements),
        energy_scale=energy_scale(energy_scales(fits) | components, float(train.n_nodes.mean())),
        avg_num_neighbors=max(float(neighbors), 1.0),
        statistics=stats,
        method=dataset.method,
    )
    loss = config.loss
    return TrainingData(
        pools=pools,
        references={n: f.references for n, f in fits.items()},
        energy_fit=fits.get("energy"),
        spec=LossSpec(
            terms,
            loss.kind,
            loss.huber_delta,
            loss.energy_per,
            energy_scales(fits, loss.energy_per) | components,
            stats,
        ),
        constants=constants,
        architecture=architecture_of(config),
        budget=_budget(pools, config.training, n_batches),
        labels=labels,
        datasets=(dataset, *unlabelled),
    )


def _fit_references(
    config: Config,
    train: Pool,
    teaching: Pool,
    terms: tuple[str, ...],
    taught: Callable[[Pool], References] | None,
    known: Mapping[str, References],
) -> dict[str, Fit]:
    """References of the energies trained on; the reference energy's from ``train`` alone."""
    wanted = config.data.references
    given = None if isinstance(wanted, str) else wanted
    guided = wanted == "guided"
    charge = config.data.charge_reference
    fits = {}
    if "xtb_energy" in terms or guided:
        xtb = known.get("xtb_energy")
        if xtb and xtb.known[pool_elements(teaching)].all():  # else ``initial`` refuses the element
            fits["xtb_energy"] = fit_of(teaching, xtb, "xtb_energy")
        else:
            fits["xtb_energy"] = fit_pool_references(teaching, "xtb_energy", fit_charge=charge)
    if "energy" in terms and "energy" in known:
        fits["energy"] = fit_of(train, known["energy"])
    elif "energy" in terms and wanted == "taught" and taught:
        fits["energy"] = fit_of(train, taught(train))
    elif "energy" in terms:
        guide = ("xtb_energy", fits["xtb_energy"].references) if guided else None
        fits["energy"] = fit_pool_references(train, "energy", given, charge, guide)
    return {name: fits[name] for name in terms if name in fits}


def _budget(pools: Mapping[str, Pool], training: TrainingConfig, n_batches: int) -> Budget:
    """One size for every program of a run, large enough for all: measured on all that is taught,
    or, if batches of the main stage would then be far from training.batch_size, on what that stage
    draws."""
    batch_size = training.batch_size / n_batches
    teaching = pools.get("teaching", pools["train"])
    budget = measure_budget(teaching, batch_size)
    if teaching is not pools["train"]:
        drawn = epoch_items(teaching, len(pools["train"]), training.unlabelled_share, 0, 0)
        sizes = teaching.n_nodes[drawn], teaching.n_edges[drawn]
        held = mean_size(*sizes, budget) / batch_size
        if not 1 / _TOLERATED < held < _TOLERATED:
            budget = choose_budget(*sizes, batch_size)
    for pool in pools.values():
        largest = (int(pool.n_nodes.max()) + 1, int(pool.n_edges.max()) + 1, 2)
        budget = Budget(*(max(a, b) for a, b in zip(budget, largest, strict=True)))
    return budget


# --------------------------------------------------------------------------- batches


def make_packer(data: TrainingData, pool: Pool, config: Config) -> Packer:
    """Packer of a pool with every label of the loss; it rotates the batches of a named epoch."""
    return Packer(
        pool,
        data.budget,
        targets=data.spec.terms,
        references=data.references,
        seed=config.training.seed,
        dtype=np.dtype(config.training.precision),
        rotate=config.training.rotate,
    )


def to_batch(packed: PackedBatch, with_cell: bool = False) -> Batch:
    """The packer's arrays as positions, graph and targets.

    with_cell: whether the graph has the lattice vectors, as it has where stresses are fitted.
    """
    with_cell = with_cell or "stress" in packed.targets
    graph = jraph.GraphsTuple(
        nodes={"numbers": packed.numbers},
        edges={"shifts": packed.shifts},
        senders=packed.senders,
        receivers=packed.receivers,
        n_node=packed.n_node,
        n_edge=packed.n_edge,
        globals={
            "total_charge": packed.total_charge,
            "spin_multiplicity": packed.spin_multiplicity,
            "mask": packed.mask,
            **({"cell": packed.cell} if with_cell else {}),
        },
    )
    return Batch(packed.positions, graph, packed.targets)
