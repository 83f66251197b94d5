"""The network before training: forces of the order of what they are to become, at any depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orbq.models.initial import Drawn, draw
from orbq.models.potential import Architecture, make_potential, predict
from tests.graphs import constants, make_graph, of_name, quick_jit

MOLECULES = [of_name(name) for name in ("CH3CH2OH", "C6H6", "CH3COCl")]


@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize(("backbone", "most"), [("nequip", 10.0), ("mace", 3.0)])
def test_forces_at_the_start_do_not_grow_with_depth(
    backbone: str, most: float, n_layers: int
) -> None:
    """Of molecules rattled by 0.1 Å, whose own forces are some eV/Å; products that begin as large
    as the features have 4 with one layer, 1e4 with two, 1e13 with four."""
    architecture = Architecture(
        backbone=backbone, n_layers=n_layers, n_channels=16, lmax=2, cutoff=5.0
    )
    positions, graph = make_graph(MOLECULES, cutoff=5.0)
    known = constants(())._replace(
        energy_scale=1.0, avg_num_neighbors=len(graph.senders) / len(positions)
    )
    potential = make_potential(architecture, known)
    params = jax.vmap(lambda key: potential.init(key, positions, graph))(
        jax.random.split(jax.random.key(0), 4)
    )
    forces = quick_jit(
        jax.vmap(lambda p: predict(potential, p, positions, graph).forces, in_axes=0)
    )(params)
    sizes = np.sqrt(np.mean(np.square(forces), axis=(1, 2)))
    assert np.all((sizes > 0.01) & (sizes < most)), sizes


def test_a_parameter_is_drawn_with_a_spread_for_each_row() -> None:
    zeros = jnp.zeros((3, 4000))
    drawn = draw(
        jax.random.key(0),
        {"a": {"rows": Drawn(zeros, ((1.0,), (0.2,), (0.0,))), "all": Drawn(zeros, 0.5)}},
        jnp.float32,
    )["a"]
    np.testing.assert_allclose(np.std(drawn["rows"], axis=1), [1.0, 0.2, 0.0], rtol=0.05)
    np.testing.assert_allclose(np.std(drawn["all"]), 0.5, rtol=0.02)
