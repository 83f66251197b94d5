"""mlip's training step and inference on the batches of bench_accelerator.py, by its public API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlip.data import ChemicalSystem, DatasetInfo
from mlip.graph import Graph
from mlip.graph.batching_helpers import batch_graphs, pad_with_graphs
from mlip.models import ForceField, Mace, Nequip

CHANNELS, LMAX = 64, {"mace": 1, "nequip-1": 1, "nequip-2": 2}


class Program(NamedTuple):
    """step(state, graph) -> state and loss, infer(params, graph), and what they begin with."""

    step: Callable[..., Any]
    infer: Callable[..., Any]
    state: Any
    graph: Any


def network(setting: str, info: DatasetInfo) -> Any:
    """A setting of ../shared/peers/bench_mlip.py."""
    if setting == "mace":
        return Mace(
            Mace.Config(
                num_layers=2,
                num_channels=CHANNELS,
                l_max=2,
                node_symmetry=LMAX[setting],
                correlation=3,
                readout_irreps=("16x0e", "0e"),
                num_rbf=8,
                radial_mlp_hidden=[64, 64, 64],
            ),
            info,
        )
    degrees = range(LMAX[setting] + 1)
    irreps = " + ".join(f"{CHANNELS}x{l}{'o' if l % 2 else 'e'}" for l in degrees)
    config = Nequip.Config(
        num_layers=3,
        target_irreps=irreps,
        l_max=LMAX[setting],
        num_rbf=8,
        radial_mlp_hidden=[64, 64],
    )
    return Nequip(config, info)


def make_program(
    setting: str, structures: list[tuple[np.ndarray, np.ndarray]], cutoff: float, neighbors: float
) -> Program:
    """``structures``: (numbers, positions). Random labels, no padding; Adam."""
    elements = sorted({int(z) for numbers, _ in structures for z in numbers})
    info = DatasetInfo(
        atomic_energies_map=dict.fromkeys(elements, 0.0),
        graph_cutoff_angstrom=cutoff,
        avg_num_neighbors=neighbors,
        avg_r_min_angstrom=1.0,
    )
    field = ForceField.from_mlip_network(network(setting, info))
    rng = np.random.default_rng(0)
    graphs = [
        Graph.from_chemical_system(
            ChemicalSystem(
                atomic_numbers=numbers,
                positions=positions,
                energy=float(rng.normal()),
                forces=rng.normal(size=positions.shape),
            ),
            cutoff,
        )
        for numbers, positions in structures
    ]

    def single(x: Any) -> Any:
        return x.astype(np.float32) if getattr(x, "dtype", None) == np.float64 else x

    graph = batch_graphs(graphs)
    sizes = int(graph.n_node.sum()) + 1, int(graph.n_edge.sum()) + 1, len(graphs) + 1
    graph = pad_with_graphs(graph, *sizes)  # what is added is empty
    graph = jax.device_put(jax.tree.map(single, graph))
    adam = optax.adam(1e-3)

    def loss(params: Any, graph: Any) -> Any:
        out = field.predictor.apply(params, graph)
        energy = (out.globals.energy - graph.globals.energy) / jnp.maximum(graph.n_node, 1)
        forces = out.nodes.forces - graph.nodes.forces
        real = len(graphs), sum(len(numbers) for numbers, _ in structures)
        return jnp.sum(energy**2) / real[0] + 10.0 * jnp.sum(forces**2) / (3 * real[1])

    def step(state: Any, graph: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(state[0], graph)
        updates, moments = adam.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), moments), value

    def infer(params: Any, graph: Any) -> Any:
        out = field.predictor.apply(params, graph)
        return out.globals.energy, out.nodes.forces

    return Program(step, infer, (field.params, adam.init(field.params)), graph)
