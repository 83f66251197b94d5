"""Making potentials: initial parameters, their precision, names that are refused."""

from __future__ import annotations

import jax
import jraph
import numpy as np
import pytest
from graphs import (
    ELEMENTS,
    TINY,
    Size,
    constants,
    heads,
    make_graph,
    of_name,
    quick_jit,
    split_heads,
    three,
)

from orbq import config
from orbq.models.heads import n_parameters
from orbq.models.potential import BACKBONES, Potential, make_potential

SIZE = Size(nodes=24, edges=160, structures=5)

backbones = pytest.mark.parametrize("backbone", BACKBONES)


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def potential_of(backbone: str) -> Potential:
    """One head of every kind."""
    architecture = TINY._replace(backbone=backbone, heads=heads("equivariant"))
    return make_potential(architecture, constants())


def test_the_configuration_names_every_backbone():
    assert tuple(BACKBONES) == config.BACKBONES


# --------------------------------------------------------------------------- initial parameters


@backbones
def test_heads_leave_the_initial_backbone_untouched(backbone):
    small = TINY._replace(backbone=backbone, n_layers=1)  # initialising is slow to compile
    inputs, targets, initial = make_graph(three(), SIZE), ("atomic", "xtb_energy"), []
    for some in (heads("invariant", targets), ()):
        potential = make_potential(small._replace(heads=some), constants(targets))
        initial.append(quick_jit(potential.init)(jax.random.key(7), *inputs))
    kept, auxiliary = split_heads(initial[0])
    jax.tree.map(np.testing.assert_array_equal, kept, dict(initial[1]))
    assert n_parameters(auxiliary) > 0
    assert not split_heads(initial[1])[1]


@backbones
def test_initial_parameters_do_not_depend_on_the_batch(backbone):
    init, key = jax.jit(potential_of(backbone).init), jax.random.key(7)
    texts = {init.lower(key, *make_graph(batch)).as_text() for batch in (three(), [of_name("H2O")])}
    assert len(texts) == 1  # one program, and it does not even take the batch


@backbones
def test_parameters_take_the_precision_of_the_positions(backbone):
    """Else the first update in float64 changes their type, and the step is compiled twice."""
    potential, found = potential_of(backbone), {}
    for double in (True, False):
        with jax.enable_x64(double):
            inputs = make_graph([of_name("H2O")])
            shapes = jax.eval_shape(potential.init, jax.random.key(0), *inputs)
        found[double] = {leaf.dtype.name for leaf in jax.tree.leaves(shapes)}
    assert found == {True: {"float64"}, False: {"float32"}}


# --------------------------------------------------------------------------- what is refused


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match="nequip"):
        make_potential(TINY._replace(backbone="nequipp"), constants())
    with pytest.raises(KeyError, match="orbitals"):
        make_potential(TINY._replace(heads=(("orbitals", "equivariant"),)), constants())
    with pytest.raises(KeyError, match="covariant"):
        make_potential(TINY._replace(heads=(("orbital", "covariant"),)), constants())


def test_graph_builder_pads_as_jraph_does():
    """The builder of these tests against jraph's own padding."""
    positions, graph = make_graph(three())
    whole = graph._replace(nodes={**graph.nodes, "positions": positions})
    padded = jraph.pad_with_graphs(whole, *SIZE)
    ours_positions, ours = make_graph(three(), SIZE)
    np.testing.assert_array_equal(padded.n_node, ours.n_node)
    np.testing.assert_array_equal(padded.n_edge, ours.n_edge)
    np.testing.assert_array_equal(padded.nodes["positions"], ours_positions)
    real = int(graph.n_edge.sum())
    np.testing.assert_array_equal(padded.senders[:real], ours.senders[:real])
    assert (np.diff(ours.receivers) >= 0).all()
    assert set(np.concatenate([m.numbers for m in three()])) == set(ELEMENTS)


@pytest.mark.parametrize("backbone", ["nequip", "mace"])
def test_one_layer_is_enough_for_a_head_with_directions(backbone):
    architecture = TINY._replace(
        backbone=backbone, n_layers=1, heads=heads("equivariant", ("density",))
    )
    potential = make_potential(architecture, constants(("density",)))
    positions, graph = make_graph(three(), SIZE)
    params = quick_jit(potential.init)(jax.random.key(0), positions, graph)
    _, out = quick_jit(potential.apply, static_argnums=3)(params, positions, graph, ("density",))
    directed = np.asarray(out["density"])[:, 4:]  # behind s, s', p and d of degree 0
    mean = np.asarray(potential.constants.statistics["density"].mean)[graph.nodes["numbers"], 4:]
    real = np.asarray(graph.nodes["numbers"]) > 0
    assert np.abs(directed - mean)[real].max() > 1e-4
