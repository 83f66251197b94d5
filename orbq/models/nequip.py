"""NequIP-like equivariant message passing.

Each layer sums over neighbours the tensor product of the sender's features with the edge's
spherical harmonics, weighted by learned functions of the distance and of the two species; mixes
channels; adds a residual; and applies gated non-linearities. Batzner et al., Nature Communications
13, 2453 (2022), arXiv:2101.03164.

Features are laid out [N, (lmax + 1)^2, C]: degrees 0..lmax of parity (-1)^l, C channels each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from orbq.elements import COVALENT_RADIUS, descriptors
from orbq.models.initial import dense, fan_in, normal
from orbq.models.radial import bessel_basis, bond_basis, polynomial_cutoff, safe_norm
from orbq.models.tensor_product import edge_tensor_product, paths

MODULATION = 0.1  # variance of what modulates by a factor 1 + x
SPECIES = ("shells", "free")


class Geometry(NamedTuple):
    """What the layers need of the edges.

    harmonics [E, (lmax+1)^2], component normalisation; radial [E, R], zero beyond the cutoff;
    attributes [N, A], what is known of each atom's element; senders, receivers [E].
    """

    harmonics: Array
    radial: Array
    attributes: Array
    senders: Array
    receivers: Array


class Features(NamedTuple):
    """What a backbone hands to the readouts.

    scalars: one [N, C] per layer, from which energies are read. equivariant [N, (lmax+1)^2, C]:
    the features that charge heads read. geometry: for heads that look at the edges again.
    """

    scalars: tuple[Array, ...]
    equivariant: Array
    geometry: Geometry


def degree_slice(l: int) -> slice:
    """Rows of degree l in a feature array."""
    return slice(l * l, (l + 1) ** 2)


def to_irreps_array(features: Float[Array, "N D C"]) -> e3nn.IrrepsArray:
    """Feature array [N, (lmax+1)^2, C] as an e3nn IrrepsArray of Cx0e + Cx1o + Cx2e + ..."""
    n, rows, channels = features.shape
    degrees = range(round(rows**0.5))
    irreps = e3nn.Irreps([(channels, (l, (-1) ** l)) for l in degrees])
    chunks = [jnp.swapaxes(features[:, degree_slice(l)], 1, 2) for l in degrees]
    return e3nn.from_chunks(irreps, chunks, (n,), features.dtype)


class DegreeLinear(nn.Module):
    """Mixes channels within each degree; no bias, unit-variance initialisation."""

    n_channels: int

    @nn.compact
    def __call__(self, features: Float[Array, "N D C"]) -> Float[Array, "N D C2"]:
        _, rows, channels = features.shape
        out = []
        for l in range(round(rows**0.5)):
            weight = self.param(f"l{l}", fan_in(), (channels, self.n_channels))
            part = features[:, degree_slice(l)]
            out.append(part @ weight.astype(features.dtype))
        return jnp.concatenate(out, axis=1)


class SpeciesAttributes(nn.Module):
    """A vector per atom for its element, from which everything element-specific is linear.

    kind "free": learned for each element alone. kind "shells": linear in ``elements.descriptors``,
    plus a smaller free part.
    """

    elements: tuple[int, ...]
    kind: str
    n_attributes: int = 16

    @nn.compact
    def __call__(self, species: Int[Array, " N"], dtype: Any) -> Float[Array, "N A"]:
        shape = (len(self.elements), self.n_attributes)
        known = self.kind == "shells"
        table = self.param("free", normal(0.3 if known else 1.0), shape)
        if known:
            rows = descriptors(self.elements)
            mix = fan_in(0.16)  # rms about 1 in molecules
            weight = self.param("shells", mix, (rows.shape[1], self.n_attributes))
            table = table + jnp.asarray(rows, weight.dtype) @ weight
        return table.astype(dtype)[species]


class RadialWeights(nn.Module):
    """Path weights of every edge from its distance and its two species.

    silu(B W1 * (1 + u(sender) + v(receiver))) W2 with B the cut-off radial basis; no bias, so that
    a message vanishes, with its first two derivatives, at the cutoff.
    """

    n_paths: int
    n_channels: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, geometry: Geometry) -> Float[Array, "E P C"]:
        h = geometry.radial
        dtype = h.dtype
        for n, width in enumerate(self.hidden):
            weight = self.param(f"w{n}", normal(1.0), (h.shape[1], width))
            h = h @ (weight.astype(dtype) / h.shape[1] ** 0.5)
            if n == 0:
                sender, receiver = (
                    dense(width, side, dtype, MODULATION, bias=False)(geometry.attributes)
                    for side in ("sender", "receiver")
                )
                h = h * (1.0 + sender[geometry.senders] + receiver[geometry.receivers])
            h = jax.nn.silu(h) * 1.6  # restores unit variance after silu
        shape = (h.shape[1], self.n_paths * self.n_channels)
        weight = self.param("out", fan_in(), shape)
        return (h @ weight.astype(dtype)).reshape(-1, self.n_paths, self.n_channels)


class Interaction(nn.Module):
    """Messages to the degrees ``l_out``, summed over neighbours and mixed. No non-linearity."""

    l_out: tuple[int, ...]
    lmax_edge: int
    n_channels: int
    radial_hidden: tuple[int, ...]
    avg_num_neighbors: float

    @nn.compact
    def __call__(
        self, features: Float[Array, "N D C"], geometry: Geometry
    ) -> Float[Array, "N D2 C"]:
        n, rows, channels = features.shape
        table = paths(round(rows**0.5) - 1, self.lmax_edge, self.l_out)
        weights = RadialWeights(len(table), channels, self.radial_hidden)(geometry)
        harmonics = geometry.harmonics[:, : (self.lmax_edge + 1) ** 2]
        messages = edge_tensor_product(features[geometry.senders], harmonics, weights, table)
        scale = {
            l: (sum(p.l3 == l for p in table) * self.avg_num_neighbors) ** -0.5 for l in self.l_out
        }
        factor = jnp.array([scale[l] for l in sorted(self.l_out) for _ in range(2 * l + 1)])
        summed = jax.ops.segment_sum(messages, geometry.receivers, n, indices_are_sorted=True)
        return summed * factor.astype(features.dtype)[:, None]


class Layer(nn.Module):
    """Interaction, channel mixing, species-modulated residual, gate."""

    lmax_out: int
    lmax_edge: int
    n_channels: int
    radial_hidden: tuple[int, ...]
    avg_num_neighbors: float

    @nn.compact
    def __call__(
        self, features: Float[Array, "N D C"], geometry: Geometry
    ) -> Float[Array, "N D2 C"]:
        degrees = tuple(range(self.lmax_out + 1))
        rows = (self.lmax_out + 1) ** 2
        summed = Interaction(
            degrees,
            self.lmax_edge,
            self.n_channels,
            self.radial_hidden,
            self.avg_num_neighbors,
        )(features, geometry)
        mixed = DegreeLinear(self.n_channels, name="mix")(summed)
        kept = features[:, :rows]
        width, dtype = kept.shape[-1], kept.dtype
        species = dense(width, "species", dtype, MODULATION, bias=False)(geometry.attributes)
        residual = DegreeLinear(self.n_channels, name="residual")(kept * (1 + species[:, None]))
        mixed = (
            jnp.concatenate(
                [mixed[:, : kept.shape[1]] + residual, mixed[:, kept.shape[1] :]], axis=1
            )
            * 2**-0.5
        )
        return self._gate(mixed)

    def _gate(self, features: Float[Array, "N D C"]) -> Float[Array, "N D C"]:
        scalars = features[:, 0]
        out = [jax.nn.silu(scalars)[:, None] * 1.6]
        if self.lmax_out:
            gates = dense(self.lmax_out * self.n_channels, "gates", scalars.dtype)(scalars)
            gates = 2 * jax.nn.sigmoid(gates).reshape(-1, self.lmax_out, self.n_channels)
            out += [
                features[:, degree_slice(l)] * gates[:, None, l - 1]
                for l in range(1, self.lmax_out + 1)
            ]
        return jnp.concatenate(out, axis=1)


class NequIP(nn.Module):
    """The backbone: species embedding, then ``n_layers`` layers; the last keeps scalars only.

    cutoff in Å. avg_num_neighbors: mean number of neighbours within it, the messages' scale.
    """

    elements: tuple[int, ...]
    cutoff: float
    species: str = "shells"
    n_layers: int = 2
    n_channels: int = 32
    lmax: int = 2
    n_radial: int = 8
    radial_hidden: tuple[int, ...] = (32,)
    avg_num_neighbors: float = 10.0

    @nn.compact
    def __call__(
        self,
        vectors: Float[Array, "E 3"],
        species: Int[Array, " N"],
        senders: Int[Array, " E"],
        receivers: Int[Array, " E"],
        condition: Float[Array, "N K"],
    ) -> Features:
        """vectors: receiver minus sender, Å. condition: per-atom inputs beside the species."""
        dtype = vectors.dtype
        attributes = SpeciesAttributes(self.elements, self.species, name="species")(species, dtype)
        geometry = self.geometry(vectors, species, senders, receivers)._replace(
            attributes=attributes
        )
        embedding = dense(self.n_channels, "embedding", dtype, bias=False)(attributes)
        shift = dense(self.n_channels, "condition", dtype, bias=False)(condition)
        features = (embedding * (1 + shift))[:, None]  # [N, 1, C]
        scalars = []
        for n in range(self.n_layers):
            last = n == self.n_layers - 1
            equivariant = features
            features = Layer(
                0 if last else self.lmax,
                self.lmax,
                self.n_channels,
                self.radial_hidden,
                self.avg_num_neighbors,
                name=f"layer{n}",
            )(features, geometry)
            scalars.append(features[:, 0])
        return Features(tuple(scalars), equivariant, geometry)

    def geometry(
        self, vectors: Array, species: Array, senders: Array, receivers: Array
    ) -> Geometry:
        """Harmonics and radial basis of every edge."""
        distance = safe_norm(vectors)
        unit = vectors / distance[:, None]
        harmonics = e3nn.spherical_harmonics(
            range(self.lmax + 1), e3nn.IrrepsArray("1o", unit), normalize=False
        ).array
        envelope = polynomial_cutoff(distance, self.cutoff)
        radial = bessel_basis(distance, self.cutoff, self.n_radial)
        if self.species == "shells":
            radius = jnp.asarray(COVALENT_RADIUS[list(self.elements)], distance.dtype)[species]
            bonds = bond_basis(distance, radius[senders] + radius[receivers])
            radial = jnp.concatenate([radial, bonds], axis=1)
        return Geometry(harmonics, radial * envelope[:, None], species, senders, receivers)
