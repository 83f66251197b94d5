"""Invariant message passing, the baseline without directions.

Continuous-filter convolutions: a neighbour's scalars times a learned function of the distance and
of the two species, summed, passed through a dense network, added to what was there. It knows
distances alone. Schütt et al., SchNet, J. Chem. Phys. 148, 241722 (2018), arXiv:1706.08566.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from orbq.models.initial import dense
from orbq.models.layers import MODULATION, Features, Geometry, Interaction, Settings, environment


class Layer(nn.Module):
    """Continuous-filter convolution, dense network modulated by the species, residual."""

    settings: Settings

    @nn.compact
    def __call__(
        self, features: Float[Array, "N 1 C"], geometry: Geometry
    ) -> Float[Array, "N 1 C"]:
        channels, dtype = self.settings.n_channels, features.dtype
        sent = dense(channels, "up", dtype, bias=False)(features)
        summed = Interaction(0, self.settings)(sent, geometry)
        species = dense(channels, "species", dtype, MODULATION, bias=False)(geometry.attributes)
        hidden = jax.nn.silu(dense(channels, "mix", dtype)(summed) * (1 + species[:, None])) * 1.6
        return (features + dense(channels, "out", dtype)(hidden)) * 2**-0.5


class Invariant(nn.Module):
    """The backbone; its features have degree 0 alone, so that its charge heads are invariant."""

    settings: Settings

    @nn.compact
    def __call__(
        self,
        vectors: Float[Array, "E 3"],
        species: Int[Array, " N"],
        senders: Int[Array, " E"],
        receivers: Int[Array, " E"],
        condition: Float[Array, "N K"],
    ) -> Features:
        """As ``layers.environment``."""
        settings = self.settings._replace(lmax=0)
        features, geometry = environment(vectors, species, senders, receivers, condition, settings)
        scalars = []
        for n in range(settings.n_layers):
            features = Layer(settings, name=f"layer{n}")(features, geometry)
            scalars.append(features[:, 0])
        return Features(tuple(scalars), features, geometry)


BACKBONE = Invariant
