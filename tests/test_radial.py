"""The radial basis: what damping does to it, and that runs from before it mean the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orbq.config import parse_config
from orbq.data import architecture_of
from orbq.errors import InputError
from orbq.models.potential import make_potential
from orbq.models.radial import bessel_basis
from orbq.study.plan import fingerprint
from tests.graphs import constants, make_graph, of_name, random_params

DISTANCES = np.linspace(0.5, 4.9, 7)


def test_the_nth_function_is_divided_by_n_to_the_power() -> None:
    with jax.enable_x64(True):
        distances = jnp.asarray(DISTANCES)
        plain, damped = (np.asarray(bessel_basis(distances, 5.0, 6, d)) for d in (0.0, 1.5))
    for n in range(1, 7):
        np.testing.assert_allclose(damped[:, n - 1], plain[:, n - 1] / n**1.5, rtol=1e-12)
    expected = np.sin(3 * np.pi * DISTANCES / 5.0) / (2**0.5 * DISTANCES / 5.0)
    np.testing.assert_allclose(plain[:, 2], expected, rtol=1e-12)


@pytest.mark.parametrize("backbone", ["nequip", "mace", "invariant"])
def test_it_reaches_every_backbone(backbone: str) -> None:
    positions, graph = make_graph([of_name("H2O")])
    energies = []
    for damping in (0.0, 1.0):
        model = {"backbone": backbone, "radial_damping": damping, "n_channels": 4, "cutoff": 3.5}
        architecture = architecture_of(parse_config({"model": model}))
        assert architecture.radial_damping == damping
        potential = make_potential(architecture, constants(()))
        params = random_params(potential, "float32")
        energies.append(np.asarray(potential.apply(params, positions, graph, ())[0]))
    assert np.abs(energies[0] - energies[1]).max() > 1e-4


def test_an_ablation_begun_before_there_was_this_key_goes_on() -> None:
    # as commit 4753fb3 has it, where that of the charge was the default
    plain = parse_config({"training": {"seed": 3}, "data": {"charge_reference": True}})
    assert fingerprint(plain) == "e30b42fb032057a0"
    damped = {"model": {"radial_damping": 1.0}, "data": {"charge_reference": True}}
    assert fingerprint(parse_config({"training": {"seed": 3}, **damped})) != fingerprint(plain)


def test_negative_damping_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.radial_damping"):
        parse_config({"model": {"radial_damping": -1.0}})
