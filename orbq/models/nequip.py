"""NequIP-like equivariant message passing.

Each layer sums over neighbours the tensor product of the sender's features with the edge's
spherical harmonics, weighted by learned functions of the distance and of the two species; mixes
channels; adds a residual; and applies gated non-linearities. Batzner et al., Nature Communications
13, 2453 (2022), arXiv:2101.03164.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from orbq.models.initial import dense
from orbq.models.layers import (
    MODULATION,
    DegreeLinear,
    Features,
    Geometry,
    Interaction,
    Settings,
    degree_slice,
    environment,
)


class Layer(nn.Module):
    """Interaction, channel mixing, species-modulated residual, gate."""

    lmax_out: int
    settings: Settings

    @nn.compact
    def __call__(
        self, features: Float[Array, "N D C"], geometry: Geometry
    ) -> Float[Array, "N D2 C"]:
        rows, channels = (self.lmax_out + 1) ** 2, self.settings.n_channels
        summed = Interaction(self.lmax_out, self.settings)(features, geometry)
        mixed = DegreeLinear(channels, name="mix")(summed)
        kept = features[:, :rows]
        width, dtype = kept.shape[-1], kept.dtype
        species = dense(width, "species", dtype, MODULATION, bias=False)(geometry.attributes)
        residual = DegreeLinear(channels, name="residual")(kept * (1 + species[:, None]))
        mixed = (
            jnp.concatenate(
                [mixed[:, : kept.shape[1]] + residual, mixed[:, kept.shape[1] :]], axis=1
            )
            * 2**-0.5
        )
        return self._gate(mixed)

    def _gate(self, features: Float[Array, "N D C"]) -> Float[Array, "N D C"]:
        scalars, channels = features[:, 0], self.settings.n_channels
        out = [jax.nn.silu(scalars)[:, None] * 1.6]
        if self.lmax_out:
            gates = dense(self.lmax_out * channels, "gates", scalars.dtype)(scalars)
            gates = 2 * jax.nn.sigmoid(gates).reshape(-1, self.lmax_out, channels)
            out += [
                features[:, degree_slice(l)] * gates[:, None, l - 1]
                for l in range(1, self.lmax_out + 1)
            ]
        return jnp.concatenate(out, axis=1)


class NequIP(nn.Module):
    """The backbone: species embedding, then ``n_layers`` layers. Energies are read from scalars, so
    that the last layer keeps these alone and heads read what it is made from; a single layer, which
    is made from scalars, keeps all degrees for them."""

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
        settings = self.settings
        features, geometry = environment(vectors, species, senders, receivers, condition, settings)
        scalars = []
        for n in range(settings.n_layers):
            scalars_only = 0 < n == settings.n_layers - 1
            layer = Layer(0 if scalars_only else settings.lmax, settings, name=f"layer{n}")
            features = layer(features, geometry)
            scalars.append(features[:, 0])
            if not scalars_only:
                equivariant = features
        return Features(tuple(scalars), equivariant, geometry)


BACKBONE = NequIP
