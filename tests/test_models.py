"""Every backbone with every target's head: symmetry, conservation, smoothness, independence."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import (
    CUTOFF,
    TINY,
    Molecule,
    Size,
    complex_cation,
    constants,
    heads,
    make_graph,
    moved,
    of_name,
    permuted,
    quick_jit,
    random_params,
    random_rotation,
    representation,
    split_heads,
    three,
    together,
)

from orbq import orbitals
from orbq.models.potential import (
    BACKBONES,
    Potential,
    Prediction,
    energy_fn,
    make_potential,
    predict,
)
from orbq.targets import CHARGE_TARGETS, TARGETS

# e3nn's and orbq's rotation matrices, sums over edges in another order: float64 rounding of numbers
# of order 1 to 10 through two layers
ROUNDING = 1e-10
SIZE = Size(nodes=24, edges=160, structures=5)
ALL = tuple(TARGETS)
PER_ATOM = tuple(n for n in ALL if not n.startswith("xtb_"))
IRREPS = ("density", "onsite")  # targets scored on irreps

backbones = pytest.mark.parametrize("backbone", BACKBONES)
both_kinds = pytest.mark.parametrize("kind", ["equivariant", "invariant"])


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


class Model(NamedTuple):
    """A potential with one head of a kind for every target, parameters of order 1, and its
    compiled prediction of everything."""

    potential: Potential
    params: Any
    predict: Any

    def __call__(self, molecules: list[Molecule], size: Size | None = SIZE) -> Prediction:
        return jax.device_get(self.predict(self.params, *make_graph(molecules, size)))


@lru_cache
def model(backbone: str, kind: str = "equivariant", targets: tuple[str, ...] = ALL) -> Model:
    architecture = TINY._replace(backbone=backbone, heads=heads(kind, targets))
    potential = make_potential(architecture, constants(targets))
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"

    def everything(params, positions, graph):
        return predict(potential, params, positions, graph, targets)

    def values(params, positions, graph):
        energy, out = potential.apply(params, positions, graph, PER_ATOM)
        return Prediction(energy, jnp.zeros_like(positions), out)

    # the invariant heads differ in nothing but their values: no need to compile their forces
    function = everything if kind == "equivariant" else values
    return Model(potential, random_params(potential, dtype), quick_jit(function))


@lru_cache
def force_model(backbone: str) -> Any:
    """The compiled energies and forces of ``model(backbone)``, with no head asked for."""
    potential = model(backbone).potential
    return quick_jit(lambda p, x, g: predict(potential, p, x, g))


def atoms(value: np.ndarray, molecules: list[Molecule]) -> np.ndarray:
    """The rows of real atoms."""
    return value[: sum(len(m.numbers) for m in molecules)]


# --------------------------------------------------------------------------- symmetry


@backbones
@pytest.mark.parametrize("improper", [False, True])
def test_rotation_and_inversion(backbone, improper):
    run, rotation = model(backbone), random_rotation(5, improper)
    before = run(three())
    after = run([moved(m, rotation) for m in three()])
    np.testing.assert_allclose(after.energy, before.energy, atol=ROUNDING)
    np.testing.assert_allclose(after.forces, before.forces @ rotation.T, atol=ROUNDING)
    for name in ALL:
        new, old = after.charges[name], before.charges[name]
        if name == "xtb_forces":
            old = old @ rotation.T
        elif name in IRREPS:
            old = old @ representation(TARGETS[name].irreps, rotation).T
        elif name == "orbital":
            continue  # the ten charges are no representation: next test
        np.testing.assert_allclose(new, old, atol=ROUNDING, err_msg=name)
    assert np.abs(before.energy[:3]).min() > 0.1
    assert np.abs(before.forces[:5]).max() > 0.1


def frame_residual(run: Model) -> float:
    """How far the orbital charges in twelve frames are from those of one set of 23 irreps."""
    rotations = [random_rotation(seed) for seed in range(12)]
    charges = [
        atoms(run([moved(m, r) for m in three()]).charges["orbital"], three()) for r in rotations
    ]
    rows = [
        orbitals.orbital_from_density() @ representation(orbitals.DENSITY_IRREPS, r)
        for r in rotations
    ]
    known, matrix = np.stack(charges, 1), np.concatenate(rows)  # [n, 12, 10], [120, 23]
    known = known.reshape(len(known), -1).T
    irreps = np.linalg.lstsq(matrix, known, rcond=None)[0]
    return float(np.abs(matrix @ irreps - known).max())


@backbones
def test_orbital_charges_are_those_of_rotated_irreps(backbone):
    assert frame_residual(model(backbone)) < ROUNDING


@backbones
def test_invariant_orbital_charges_are_those_of_no_irreps(backbone):
    """The baseline's defect, and the proof that the test above can fail."""
    assert frame_residual(model(backbone, "invariant")) > 0.01


@backbones
@pytest.mark.parametrize("improper", [False, True])
def test_columns_of_invariant_heads_do_not_change(backbone, improper):
    run, rotation = model(backbone, "invariant"), random_rotation(5, improper)
    before, after = run(three()), run([moved(m, rotation) for m in three()])
    for name in PER_ATOM:
        np.testing.assert_allclose(after.charges[name], before.charges[name], atol=ROUNDING)
        assert np.ptp(before.charges[name], axis=0).max() > 0.01


@pytest.mark.parametrize("backbone", [b for b in BACKBONES if b != "invariant"])
def test_every_degree_of_the_equivariant_heads_is_alive(backbone):
    """Also those that the backbone does not carry, as 4e and 2o."""
    charges = model(backbone)(three()).charges["onsite"]
    palladium = charges[6]  # the only atom here with every component but s'
    for c in orbitals.COMPONENTS:
        if "s'" not in c.name:
            assert np.abs(palladium[c.columns]).max() > 1e-5, c.name


@backbones
def test_translation(backbone):
    run = model(backbone)
    before, after = run(three()), run([moved(m, shift=(3.0, -7.0, 11.0)) for m in three()])
    same(before, after)


@backbones
def test_permutation(backbone):
    run, rng = model(backbone), np.random.default_rng(0)
    orders = [rng.permutation(len(m.numbers)) for m in three()]
    before = run(three())
    after = run([permuted(m, order) for m, order in zip(three(), orders, strict=True)])
    starts = np.cumsum([0, *(len(o) for o in orders)])
    order = np.concatenate([s + o for s, o in zip(starts, orders, strict=False)])
    n = len(order)
    np.testing.assert_allclose(after.energy, before.energy, atol=ROUNDING)
    np.testing.assert_allclose(after.forces[:n], before.forces[order], atol=ROUNDING)
    for name in (*PER_ATOM, "xtb_forces"):
        np.testing.assert_allclose(
            after.charges[name][:n], before.charges[name][order], atol=ROUNDING
        )


def same(a: Prediction, b: Prediction, atol: float = ROUNDING) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


# --------------------------------------------------------------------------- batches


@backbones
@both_kinds
def test_composition_of_the_batch(backbone, kind):
    run = model(backbone, kind)
    whole = run(three())
    turned = run([three()[k] for k in (2, 0, 1)])
    np.testing.assert_allclose(turned.energy[:3], whole.energy[[2, 0, 1]], atol=ROUNDING)
    starts = np.cumsum([0, *(len(m.numbers) for m in three())])
    for k, single in enumerate(three()):
        alone, rows = run([single]), slice(starts[k], starts[k + 1])
        np.testing.assert_allclose(alone.energy[0], whole.energy[k], atol=ROUNDING)
        np.testing.assert_allclose(atoms(alone.forces, [single]), whole.forces[rows], atol=ROUNDING)
        for name in PER_ATOM:
            np.testing.assert_allclose(
                atoms(alone.charges[name], [single]), whole.charges[name][rows], atol=ROUNDING
            )


@backbones
def test_padding(backbone):
    """In float32, as in training; the limit is a few roundings (6e-8) of sums of some ten terms."""
    targets = ("onsite", "atomic", "xtb_forces")
    with jax.enable_x64(False):
        run = model(backbone, targets=targets)
        small, large = run(three()), run(three(), Size(40, 300, 9))
    n = sum(len(m.numbers) for m in three())
    assert small.energy.dtype == np.float32
    pairs = {"energy": (small.energy[:3], large.energy[:3])}
    pairs["forces"] = (small.forces[:n], large.forces[:n])
    pairs |= {name: (small.charges[name][:n], large.charges[name][:n]) for name in targets}
    for name, (a, b) in pairs.items():
        assert np.abs(a - b).max() < 1e-6 * np.abs(a).max(), name
    for out, total in ((small, SIZE.nodes), (large, 40)):
        assert out.forces.shape == (total, 3)
        assert not out.forces[n:].any()
        assert not out.energy[3:].any()
        for name in targets:
            assert not out.charges[name][n:].any(), name


# --------------------------------------------------------------------------- physics


@backbones
def test_forces_against_finite_differences(backbone):
    run = model(backbone)
    positions, graph = make_graph(three(), SIZE)
    n, step = sum(len(m.numbers) for m in three()), 1e-4  # Å: truncation h^2 and rounding eps/h
    out = run.predict(run.params, positions, graph)

    def energies(x):
        found = run.predict(run.params, jnp.asarray(x), graph)
        return np.array([found.energy.sum(), found.charges["xtb_energy"].sum()])

    numerical = np.zeros((2, n, 3))
    for atom, axis in np.ndindex(n, 3):
        d = np.zeros(positions.shape)
        d[atom, axis] = step
        numerical[:, atom, axis] = -(energies(positions + d) - energies(positions - d)) / (2 * step)
    for found, expected in zip((out.forces, out.charges["xtb_forces"]), numerical, strict=True):
        error = np.linalg.norm(found[:n] - expected) / np.linalg.norm(expected)
        assert error < 1e-6


@backbones
@both_kinds
def test_charges_add_up_to_the_total_charge(backbone, kind):
    charged = [of_name("CH3OH", -2), complex_cation(), of_name("O2", spin_multiplicity=3)]
    out = model(backbone, kind)(charged)
    starts = np.cumsum([0, *(len(m.numbers) for m in charged)])
    for name in CHARGE_TARGETS:
        charge = out.charges[name] @ TARGETS[name].charge
        for k, molecule in enumerate(charged):
            total = charge[starts[k] : starts[k + 1]].sum()
            assert total == pytest.approx(molecule.total_charge, abs=1e-12), name


@backbones
def test_absent_columns_are_exactly_zero(backbone):
    out, numbers = model(backbone)(three()), np.concatenate([m.numbers for m in three()])
    for name in PER_ATOM:
        absent = ~TARGETS[name].elements(orbitals.GFN1)[numbers]
        assert not atoms(out.charges[name], three())[absent].any(), name


@backbones
def test_energies_of_far_molecules_add_up(backbone):
    """Neutral singlets: the total charge and the spin are properties of the whole structure."""
    run = model(backbone)
    pair = [of_name("CH3OH"), moved(of_name("H2O"), shift=(50.0, 0, 0))]
    apart, joint = run(pair), run([together(pair)])
    assert joint.energy[0] == pytest.approx(apart.energy[:2].sum(), abs=ROUNDING)
    np.testing.assert_allclose(joint.forces, apart.forces, atol=ROUNDING)
    joint_xtb, apart_xtb = joint.charges["xtb_energy"], apart.charges["xtb_energy"]
    assert joint_xtb[0] == pytest.approx(apart_xtb[:2].sum(), abs=ROUNDING)


@backbones
def test_smooth_at_the_cutoff(backbone):
    """A third atom crosses the cutoff of another: energy and forces join smoothly (the envelope and
    its first two derivatives vanish there, so that the force falls as the square of the gap)."""
    run = model(backbone)
    numbers, near = np.array([8, 6, 17]), np.array([[0, 0, 0], [1.3, 0, 0], [-2.0, 0.5, 0]])

    def at(distance):
        far = near.copy()
        far[2] = [1.3, 0, distance]
        return run([Molecule(numbers, far)])

    outside, close = at(CUTOFF + 1e-9), at(CUTOFF - 0.5)
    assert np.abs(close.energy - outside.energy).max() > 1e-6  # inside, the neighbour is felt
    for gap in (1e-2, 1e-3):
        inside = at(CUTOFF - gap)
        x = gap / CUTOFF
        assert np.abs(inside.energy - outside.energy).max() < 1e2 * x**3
        assert np.abs(inside.forces - outside.forces).max() < 1e3 * x**2


@backbones
def test_isolated_atom(backbone):
    run, alone = model(backbone), Molecule(np.array([46]), np.zeros((1, 3)))
    padded = run([alone])
    assert np.isfinite(padded.energy).all()
    assert not padded.forces.any()
    assert padded.charges["orbital"][0].sum() == pytest.approx(0.0, abs=1e-12)
    positions, graph = make_graph([alone])  # no padding: arrays of no edges
    assert graph.senders.shape == (0,)
    bare = force_model(backbone)(run.params, positions, graph)
    assert bare.energy[0] == pytest.approx(padded.energy[0], abs=ROUNDING)
    assert not bare.forces.any()


@backbones
def test_charge_and_spin_change_the_energy(backbone):
    run, neutral = model(backbone), of_name("CH3OH")
    cation, triplet = neutral._replace(total_charge=1), neutral._replace(spin_multiplicity=3)
    energy = run([neutral, cation, triplet]).energy
    assert abs(energy[1] - energy[0]) > 1e-3
    assert abs(energy[2] - energy[0]) > 1e-3


@backbones
def test_hessian_vector_product(backbone):
    """Forward over reverse, against central differences of the forces."""
    run, energy = model(backbone), energy_fn(model(backbone).potential)
    positions, graph = make_graph(three(), SIZE)
    direction = np.zeros(positions.shape)
    direction[:13] = np.random.default_rng(0).normal(size=(13, 3))

    params = jax.tree.map(jnp.asarray, run.params)

    @quick_jit
    def product(x, v):
        def gradient(y):
            return jax.grad(energy, argnums=1)(params, y, graph)

        return jax.jvp(gradient, (x,), (v,))[1]

    found, step = product(positions, jnp.asarray(direction)), 1e-4
    ahead, behind = (
        run.predict(run.params, positions + s * step * direction, graph).forces for s in (1, -1)
    )
    expected = -(ahead - behind) / (2 * step)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


# --------------------------------------------------------------------------- energy alone


@backbones
def test_energy_alone_never_reads_a_head(backbone):
    run, inputs = model(backbone), make_graph(three(), SIZE)
    kept, auxiliary = split_heads(run.params)
    assert len(auxiliary) == len(PER_ATOM) + 1
    spoilt = {**kept, **jax.tree.map(lambda p: np.full_like(p, np.nan), auxiliary)}
    before, after = (force_model(backbone)(p, *inputs) for p in (run.params, spoilt))
    np.testing.assert_array_equal(before.energy, after.energy)
    np.testing.assert_array_equal(before.forces, after.forces)
    same(before._replace(charges={}), run(three())._replace(charges={}))
