"""Layers that several backbones share: edge geometry, species, radial weights, interaction.

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
from orbq.models.fused import summed_messages
from orbq.models.initial import dense, fan_in, normal
from orbq.models.radial import bessel_basis, bond_basis, polynomial_cutoff, safe_norm
from orbq.models.tensor_product import edge_tensor_product, paths

MODULATION = 0.1  # variance of what modulates by a factor 1 + x


class Geometry(NamedTuple):
    """What the layers need of the edges.

    harmonics [E, (lmax+1)^2], component normalisation; radial [E, R], zero beyond the cutoff;
    attributes [N, A], what is known of each atom's element, in the type of the activations;
    senders, receivers [E].
    """

    harmonics: Array
    radial: Array
    attributes: Array
    senders: Array
    receivers: Array


class Settings(NamedTuple):
    """What backbones are built from; each takes what it knows.

    elements: atomic numbers, ascending. species: what is known of them, "shells" or "free".
    cutoff: Å. lmax: highest degree of features and harmonics; lmax_hidden: of the node features
    between the layers of a backbone that builds its degrees in each layer anew; product_init: how
    large its products are at the start. n_radial: basis
    functions; radial_damping: the n-th of them is divided by n to this power; radial_hidden: widths
    of the radial network. avg_num_neighbors: mean neighbours within the cutoff, the scale of
    messages. activations: type of the layers' features and matrix products, "full" (that of the
    positions) or "bfloat16". kernels: what computes messages, "xla" or "cuequivariance".
    """

    elements: tuple[int, ...]
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
    avg_num_neighbors: float = 10.0
    activations: str = "full"
    kernels: str = "xla"


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
        dtype = geometry.attributes.dtype
        h = geometry.radial.astype(dtype)
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
    """Messages to the degrees 0..lmax_out, summed over neighbours. No non-linearity."""

    lmax_out: int
    settings: Settings

    @nn.compact
    def __call__(
        self, features: Float[Array, "N D C"], geometry: Geometry
    ) -> Float[Array, "N D2 C"]:
        n, rows, channels = features.shape
        degrees = range(self.lmax_out + 1)
        table = paths(round(rows**0.5) - 1, self.settings.lmax, degrees)
        weights = RadialWeights(len(table), channels, self.settings.radial_hidden)(geometry)
        harmonics = geometry.harmonics
        neighbors = self.settings.avg_num_neighbors
        scale = [(sum(p.l3 == l for p in table) * neighbors) ** -0.5 for l in degrees]
        factor = jnp.array([scale[l] for l in degrees for _ in range(2 * l + 1)])
        senders, receivers = geometry.senders, geometry.receivers
        if self.settings.kernels == "cuequivariance":
            summed = summed_messages(features, harmonics, weights, senders, receivers, table)
        else:
            messages = edge_tensor_product(features[senders], harmonics, weights, table)
            wide = messages.astype(jnp.promote_types(messages.dtype, jnp.float32))
            summed = jax.ops.segment_sum(wide, receivers, n, indices_are_sorted=True)
        return (summed * factor.astype(summed.dtype)[:, None]).astype(features.dtype)


def environment(
    vectors: Float[Array, "E 3"],
    species: Int[Array, " N"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    condition: Float[Array, "N K"],
    settings: Settings,
) -> tuple[Float[Array, "N 1 C"], Geometry]:
    """What every backbone begins with: scalar features of the atoms, geometry of the edges.

    To be called in a module's compact method, which then owns the parameters. vectors: receiver
    minus sender, Å. condition: per-atom inputs beside the species.
    """
    full, elements = vectors.dtype, settings.elements
    dtype = full if settings.activations == "full" else jnp.dtype(settings.activations)
    attributes = SpeciesAttributes(elements, settings.species, name="species")(species, dtype)
    embedding = dense(settings.n_channels, "embedding", dtype, bias=False)(attributes)
    shift = dense(settings.n_channels, "condition", dtype, bias=False)(condition)
    distance = safe_norm(vectors)
    unit = vectors / distance[:, None]
    harmonics = e3nn.spherical_harmonics(
        range(settings.lmax + 1), e3nn.IrrepsArray("1o", unit), normalize=False
    ).array
    envelope = polynomial_cutoff(distance, settings.cutoff)
    radial = bessel_basis(distance, settings.cutoff, settings.n_radial, settings.radial_damping)
    if settings.species == "shells":
        radius = jnp.asarray(COVALENT_RADIUS[list(elements)], full)[species]
        bonds = bond_basis(distance, radius[senders] + radius[receivers])
        radial = jnp.concatenate([radial, bonds], axis=1)
    geometry = Geometry(harmonics, radial * envelope[:, None], attributes, senders, receivers)
    return (embedding * (1 + shift))[:, None], geometry
