"""A potential is a pair of pure functions; forces, charges and losses are functions of that pair.

    init(key, positions, graph)             -> params
    apply(params, positions, graph, targets) -> (energy [M] eV, {target: [N, k]})

``graph`` is a ``jraph.GraphsTuple``: nodes ``{"numbers": [N] int32}`` (padding 0), edges
``{"shifts": [E, 3]}`` with r = x[receiver] - x[sender] + shift (padding edges are longer than the
cutoff), globals ``{"total_charge", "spin_multiplicity", "mask"}`` [M], and for stresses ``"cell"``
[M, 3, 3], lattice vectors in rows. Labels have no path in.
Charge heads are computed only for the targets asked for: asking for none never reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float

from orbq import config
from orbq.models.heads import SMALL, Segments, TargetHead
from orbq.models.initial import dense, draw
from orbq.models.layers import Settings
from orbq.models.strain import no_strain, strained, stress_of
from orbq.orbitals import GFN1
from orbq.targets import TARGETS, Statistics

# the configuration's names are those of the modules beside this one, each with its BACKBONE
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    name: import_module(f"orbq.models.{name}").BACKBONE for name in config.BACKBONES
}
Params = Mapping[str, Any]


class Constants(NamedTuple):
    """What a potential knows of its training data, fixed before training.

    elements: atomic numbers it was trained on, ascending. energy_scale: eV, what the energy readout
    is multiplied with. avg_num_neighbors: mean neighbours within the cutoff. statistics: of every
    target that has a head. method: xTB method of the charge labels, which decides what orbitals an
    element has.
    """

    elements: tuple[int, ...]
    energy_scale: float
    avg_num_neighbors: float
    statistics: Mapping[str, Statistics]
    method: str = GFN1


class Architecture(NamedTuple):
    """Structure of the network: another value is another compilation. Units Å.

    species: what the network knows of the elements, "shells" or "free". heads: target ->
    "equivariant" or "invariant" ("energy" for xtb_energy and xtb_forces, which
    share one second energy readout). activations: type of the layers' features, "full" or
    "bfloat16"; geometry, readouts, heads and sums keep the positions' type. kernels: what computes
    messages, "xla" or "cuequivariance"; the parameters are the same. matmul_precision: of matrix
    products, "highest", "high" or "default", whatever JAX is set to around them.
    """

    backbone: str = "nequip"
    species: str = "shells"
    cutoff: float = 5.0
    n_layers: int = 2
    n_channels: int = 32
    lmax: int = 2
    lmax_hidden: int = 1
    product_init: float = 0.2
    n_radial: int = 8
    radial_damping: float = 0.0
    radial_hidden: tuple[int, ...] = (32,)
    readout_hidden: int = 16
    embed_charge: bool = True
    embed_spin: bool = True
    heads: tuple[tuple[str, str], ...] = ()
    activations: str = "full"
    kernels: str = "xla"
    matmul_precision: str = "highest"


class Potential(NamedTuple):
    """The pair of pure functions (module docstring), and the architecture it was made from."""

    init: Callable[..., Params]
    apply: Callable[..., tuple[Array, dict[str, Array]]]
    architecture: Architecture
    constants: Constants

    def __reduce__(self) -> tuple[Callable[..., Potential], tuple[Architecture, Constants]]:
        return make_potential, (self.architecture, self.constants)


class Prediction(NamedTuple):
    """energy [M] eV, forces [N, 3] eV/Å, charges {target: [N, k]}; xtb_* if they have a head.
    stress [M, 3, 3] eV/Å^3 if it was asked for, 0 where there is no cell."""

    energy: Array
    forces: Array
    charges: dict[str, Array]
    stress: Array | None = None


class EnergyReadout(nn.Module):
    """One energy per atom from the scalars of every layer."""

    hidden: int

    @nn.compact
    def __call__(self, scalars: tuple[Array, ...]) -> Float[Array, " N"]:
        total = jnp.zeros(scalars[0].shape[0], scalars[0].dtype)
        for n, s in enumerate(scalars):
            if n == len(scalars) - 1:
                s = jax.nn.silu(dense(self.hidden, "hidden", s.dtype)(s))
            out = dense(1, f"layer{n}", s.dtype, SMALL, bias=False)
            total = total + out(s)[:, 0]
        return total


class _Network(nn.Module):
    architecture: Architecture
    constants: Constants

    @nn.compact
    def __call__(
        self, positions: Array, graph: jraph.GraphsTuple, targets: tuple[str, ...]
    ) -> tuple[Array, dict[str, Array]]:
        arch, const, dtype = self.architecture, self.constants, positions.dtype
        numbers = graph.nodes["numbers"]
        n_structures = graph.n_node.shape[0]
        structure = jnp.repeat(
            jnp.arange(n_structures), graph.n_node, total_repeat_length=numbers.shape[0]
        )
        segments = Segments(structure, n_structures)
        vectors = positions[graph.receivers] - positions[graph.senders] + graph.edges["shifts"]
        species = jnp.asarray(_species_table(const.elements))[numbers]
        total_charge = graph.globals["total_charge"].astype(dtype)
        unpaired = graph.globals["spin_multiplicity"].astype(dtype) - 1
        state = jnp.stack([total_charge * arch.embed_charge, unpaired * arch.embed_spin], axis=-1)
        features = BACKBONES[arch.backbone](
            Settings(
                elements=const.elements,
                species=arch.species,
                cutoff=arch.cutoff,
                n_layers=arch.n_layers,
                n_channels=arch.n_channels,
                lmax=arch.lmax,
                lmax_hidden=min(arch.lmax_hidden, arch.lmax),
                product_init=arch.product_init,
                n_radial=arch.n_radial,
                radial_damping=arch.radial_damping,
                radial_hidden=arch.radial_hidden,
                avg_num_neighbors=const.avg_num_neighbors,
                activations=arch.activations,
                kernels=arch.kernels,
            ),
            name="backbone",
        )(vectors, species, graph.senders, graph.receivers, state[structure])
        features = features._replace(
            scalars=tuple(s.astype(dtype) for s in features.scalars),
            equivariant=features.equivariant.astype(dtype),
        )

        def readout(name: str) -> Array:
            per_atom = EnergyReadout(arch.readout_hidden, name=name)(features.scalars)
            per_atom = jnp.where(numbers > 0, per_atom * const.energy_scale, 0.0)
            return jax.ops.segment_sum(per_atom, structure, n_structures)

        out = {}
        for name in targets:
            if name == "xtb_energy":
                out[name] = readout("xtb_energy")
            else:
                kind = dict(arch.heads)[name]
                head = TargetHead(
                    name, kind, const.statistics[name], const.method, name=f"head_{name}"
                )
                out[name] = head(features, numbers, total_charge, segments)
        return readout("energy"), out


def _species_table(elements: tuple[int, ...]) -> np.ndarray:
    """[119] int32: row of each atomic number in the embeddings; unknown ones share row 0."""
    table = np.zeros(119, np.int32)
    table[list(elements)] = np.arange(len(elements))
    return table


def make_potential(architecture: Architecture, constants: Constants) -> Potential:
    """The potential of an architecture. Raises KeyError for an unknown backbone, head or target."""
    if architecture.backbone not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise KeyError(f"unknown backbone {architecture.backbone!r}; known: {known}")
    for name, kind in architecture.heads:
        if name not in TARGETS or kind not in ("equivariant", "invariant", "energy"):
            raise KeyError(f"unknown target or head kind {name!r}: {kind!r}")
    network = _Network(architecture, constants)
    every_head = head_targets(architecture)

    def init(key: Array, positions: Array, graph: jraph.GraphsTuple) -> Params:
        def shape(x: Array) -> jax.ShapeDtypeStruct:  # parameters depend on shapes alone
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        shapes = jax.tree.map(shape, (positions, graph))
        boxed = jax.eval_shape(
            lambda: network.lazy_init(jax.random.key(0), *shapes, every_head)["params"]
        )
        return draw(key, boxed, positions.dtype)

    def apply(
        params: Params, positions: Array, graph: jraph.GraphsTuple, targets: tuple[str, ...] = ()
    ) -> tuple[Array, dict[str, Array]]:
        with jax.default_matmul_precision(architecture.matmul_precision):  # of derivatives, too
            found: Any = network.apply({"params": params}, positions, graph, targets)
        return found

    return Potential(init, apply, architecture, constants)


def head_targets(architecture: Architecture) -> tuple[str, ...]:
    """Targets that can be asked of ``apply``: xtb_forces follow from the xtb_energy readout."""
    names = {"xtb_energy" if n.startswith("xtb_") else n for n, _ in architecture.heads}
    return tuple(sorted(names))


def node_features(
    potential: Potential,
    params: Params,
    positions: Float[Array, "N 3"],
    graph: jraph.GraphsTuple,
) -> Float[Array, "N C"]:
    """The invariant features of every atom after the last layer, from which its energy is read."""
    network = _Network(potential.architecture, potential.constants)
    with jax.default_matmul_precision(potential.architecture.matmul_precision):
        _, found = network.apply(
            {"params": params},
            positions,
            graph,
            (),
            capture_intermediates=lambda module, _: module.name == "backbone",
            mutable=["intermediates"],
        )
    (features,) = found["intermediates"]["backbone"]["__call__"]
    return jnp.asarray(features.scalars[-1], positions.dtype)


def last_weights(params: Params) -> dict[str, Any]:
    """The weights of the energy readout in which energies are linear."""
    return {name: leaf for name, leaf in params["energy"].items() if name.startswith("layer")}


def readout_features(
    potential: Potential,
    params: Params,
    positions: Float[Array, "N 3"],
    graph: jraph.GraphsTuple,
) -> Float[Array, "S K"]:
    """Derivatives of every structure's energy (eV) with respect to ``last_weights``, leaf by leaf:
    what a linear model of the energy can use of all that the network knows."""

    def energies(last: Any) -> Array:
        readout = {**params["energy"], **last}
        return potential.apply({**params, "energy": readout}, positions, graph)[0]

    found = jax.tree.leaves(jax.jacrev(energies)(last_weights(params)))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in found], axis=1)


def readout_force_features(
    potential: Potential,
    params: Params,
    positions: Float[Array, "N 3"],
    graph: jraph.GraphsTuple,
) -> Float[Array, "N 3 K"]:
    """The same of the forces (eV/Å): minus the derivatives of ``readout_features`` with respect to
    positions, one backward pass for each of the weights."""

    def total(x: Array) -> Array:
        return readout_features(potential, params, x, graph).sum(0)

    found, pullback = jax.vjp(total, positions)
    columns = jax.lax.map(lambda one: pullback(one)[0], jnp.eye(len(found), dtype=found.dtype))
    return -jnp.moveaxis(columns, 0, -1)


def energy_fn(potential: Potential) -> Callable[..., Array]:
    """``(params, positions, graph) -> energy`` (eV, relative to the references), summed over the
    batch's real structures; its ``-jax.grad(..., argnums=1)`` are the forces (eV/Å)."""

    def energy(params: Params, positions: Float[Array, "N 3"], graph: jraph.GraphsTuple) -> Array:
        per_structure, _ = potential.apply(params, positions, graph)
        return jnp.sum(jnp.where(graph.globals["mask"], per_structure, 0.0))

    return energy


def predict(
    potential: Potential,
    params: Params,
    positions: Float[Array, "N 3"],
    graph: jraph.GraphsTuple,
    targets: tuple[str, ...] = (),
) -> Prediction:
    """Energies, forces and the asked-for targets; one forward pass, one backward pass per energy.

    ``targets`` may name ``xtb_energy`` and ``xtb_forces``, read from the second energy readout, and
    ``stress``, for which the graph's globals must have ``cell``.
    """
    wanted = [t for t in targets if t != "stress"]
    heads = tuple(sorted({"xtb_energy" if t.startswith("xtb_") else t for t in wanted}))

    def energies(x: Array, strain: Array | None) -> Any:
        energy, out = potential.apply(params, *strained(x, graph, strain), heads)
        second = out.get("xtb_energy", jnp.zeros((), energy.dtype))
        return (energy.sum(), second.sum()), (energy, out)

    strain = no_strain(graph, positions.dtype) if "stress" in targets else None
    (_, second), pullback, (energy, out) = jax.vjp(energies, positions, strain, has_aux=True)
    one, zero = jnp.ones((), energy.dtype), jnp.zeros((), energy.dtype)
    gradient, along_strain = pullback((one, jnp.zeros_like(second)))
    charges = {name: out[name] for name in heads}
    if "xtb_forces" in targets:
        charges["xtb_forces"] = -pullback((zero, one.astype(second.dtype)))[0]
    stress = None if strain is None else stress_of(along_strain, graph.globals["cell"])
    return Prediction(energy, -gradient, {t: charges[t] for t in wanted}, stress)


def smallest_graph(dtype: Any) -> tuple[Array, jraph.GraphsTuple]:
    """One atom with one edge: enough to know the parameters' shapes."""
    zero = jnp.zeros(1, jnp.int32)
    graph = jraph.GraphsTuple(
        nodes={"numbers": zero},
        edges={"shifts": jnp.ones((1, 3), dtype)},
        senders=zero,
        receivers=zero,
        n_node=zero + 1,
        n_edge=zero + 1,
        globals={
            "total_charge": jnp.zeros(1, dtype),
            "spin_multiplicity": jnp.ones(1, dtype),
            "mask": jnp.ones(1, bool),
        },
    )
    return jnp.zeros((1, 3), dtype), graph
