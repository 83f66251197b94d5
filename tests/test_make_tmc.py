"""The script that made the embedded data sets: what a seed draws, structures, the filter.

None of these tests needs PySCF.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase import Atoms

from orbq.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from tmc import build, filter, generate, report, sampling, species  # noqa: E402 (path set above)

DATA = ROOT / "orbq" / "data"
ORIGINAL = Path(__file__).parents[2] / "shared" / "data" / "make_tmc.py"
WATER_COMPLEX = species.Species("Zn_lin_OH2x2_q+2", "Zn", 2, "lin", ("OH2", "OH2"), 2)


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


# --------------------------------------------------------------------------- species


@pytest.mark.parametrize(
    ("seed", "digest"),
    [  # of the lists that the embedded sets were made from
        (2026, "ee4f8fff3c28338e437cd1b7f553655ff7bdd6e7ebf88c1b72c3923b77261dca"),
        (2027, "ffdfbabeb0afa9017aa3825cc5878b4073e13f79c44f7ef3ff796566ccc23825"),
    ],
)
def test_a_seed_draws_what_it_always_drew(seed: int, digest: str) -> None:
    groups = [s.group for s in species.species_list(14, species.METALS, seed)]
    assert len(groups) == 533
    assert hashlib.sha256("\n".join(groups).encode()).hexdigest() == digest


def test_drawn_complexes_are_closed_shell_and_fill_their_polyhedron() -> None:
    for s in species.species_list(20, species.METALS, 2026):
        atoms = build.idealise(s, _rng(1)).atoms
        assert (atoms.numbers.sum() - s.charge) % 2 == 0, s.group
        assert abs(s.charge) <= species.MAX_CHARGE, s.group
        if s.geometry:
            assert len(s.ligands) == len(build.SITES[s.geometry]), s.group


def test_every_recipe_fills_its_polyhedron_with_known_ligands() -> None:
    for r in species.recipes():
        n = len(r.fixed) + r.anionic[0] + r.neutral[0]
        assert n == len(build.SITES[r.geometry]), r
        assert {*r.fixed, *r.anionic[1], *r.neutral[1]} <= set(species.ligands()), r
        assert set(r.metals) <= set(species.METALS) and r.weight > 0, r


def test_a_longer_list_begins_with_the_shorter_one_for_every_metal() -> None:
    short = species.species_list(5, species.METALS, 3000)
    long = species.species_list(9, species.METALS, 3000)
    for metal in species.METALS:
        first = [s for s in short if s.metal == metal]
        assert first == [s for s in long if s.metal == metal][: len(first)]


def test_exclusion_skips_and_draws_on() -> None:
    metals = ("Fe", "Zn")
    everything = species.species_list(30, metals, 3000)
    exclude = frozenset(s.composition for s in everything[:8])
    some = species.species_list(10, metals, 3000, exclude)
    for metal in metals:
        want = [s for s in everything if s.metal == metal and s.composition not in exclude]
        assert [s for s in some if s.metal == metal] == want[:10]


def _embedded(name: str) -> list[Atoms]:
    return filter.read_frames([DATA / name], labelled="unlabelled" not in name)


@pytest.fixture(scope="module")
def labelled() -> list[Atoms]:
    return _embedded("tmc.extxyz.gz")


@pytest.fixture(scope="module")
def unlabelled() -> list[Atoms]:
    return _embedded("tmc_unlabelled.extxyz.gz")


def test_new_seeds_share_nothing_with_the_embedded_sets(
    labelled: list[Atoms], unlabelled: list[Atoms], tmp_path: Path
) -> None:
    reserved = {
        s.group
        for seed in species.RESERVED_SEEDS
        for s in species.species_list(species.RESERVED_PER_METAL, species.METALS, seed)
    }
    assert {f.info["group"] for f in labelled + unlabelled} <= reserved
    options = generate.Options(
        out=tmp_path, seed=3000, per_metal=40, metals=species.METALS, passes=2, hours=1.0,
        limit=10**6, force=False,
    )  # fmt: skip
    new = generate.planned_species(options)
    assert Counter(s.metal for s in new) == dict.fromkeys(species.METALS, 40)
    assert not {s.group for s in new} & reserved
    assert not {s.composition for s in new} & species.reserved_compositions()
    known = frozenset(s.group for s in new[::3])  # made before
    left = generate.planned_species(options._replace(known=known))
    assert left == [s for s in new if s.group not in known] and len(left) == len(new) - len(known)


# --------------------------------------------------------------------------- structures


def _original() -> ModuleType:
    if not ORIGINAL.exists():
        pytest.skip(f"{ORIGINAL.name}, which made the embedded sets, is not here")
    spec = importlib.util.spec_from_file_location("original_make_tmc", ORIGINAL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [2026, 2027])
def test_species_and_idealised_structures_equal_those_of_the_original(seed: int) -> None:
    original = _original()
    old, new = (
        original.species(10, original.METALS, seed),
        species.species_list(10, species.METALS, seed),
    )
    assert [s["group"] for s in old] == [s.group for s in new]
    for was, now in zip(old, new, strict=True):
        if "ligs" not in was:
            continue
        key = zlib.crc32(now.group.encode())
        atoms, donors = original.build(was["metal"], was["geo"], was["ligs"], _rng(7, key))
        ideal = build.idealise(now, _rng(7, key))
        # bit for bit: the relaxation is chaotic enough to lead a rounding error elsewhere
        np.testing.assert_array_equal(ideal.atoms.positions, atoms.positions)
        np.testing.assert_array_equal(ideal.atoms.numbers, atoms.numbers)
        np.testing.assert_array_equal(ideal.ligand, atoms.arrays["lig"])
        assert list(ideal.donors) == donors


def test_idealised_structures_are_faultless() -> None:
    for s in species.species_list(10, species.METALS, 2027):
        ideal = build.idealise(s, _rng(3))
        assert build.fault(ideal.atoms, ideal, 0.0) == "", s.group


@pytest.mark.parametrize(
    ("moved", "by", "why"),
    [
        ([], (0, 0, 0), ""),
        ([1, 2, 3], (0, 0, 1), "ligand dissociated"),
        ([1, 2, 3], (0, 0, -1.0), "overlap"),
        ([2], (0, 0, 0.8), "ligand bond broken"),
    ],
)
def test_fault_names_what_happened(moved: list[int], by: tuple, why: str) -> None:
    ideal = build.idealise(WATER_COMPLEX, _rng(0))
    atoms = ideal.atoms.copy()
    outward = np.sign(atoms.positions[1, 2])
    atoms.positions[moved] += outward * np.array(by)
    assert build.fault(atoms, ideal, 0.0) == why


def test_fault_sees_a_new_bond_between_ligands() -> None:
    ideal = build.idealise(WATER_COMPLEX, _rng(0))
    atoms = ideal.atoms.copy()
    bond = atoms.positions[2] - atoms.positions[1]  # a hydrogen of the first water, to the second
    atoms.positions[5] = atoms.positions[1] - bond
    assert build.fault(atoms, ideal, 9.0) == "new bond"


def test_relaxation_reproduces_embedded_geometries(unlabelled: list[Atoms]) -> None:
    wanted = {(f.info["group"], f.info["geometry"]): f for f in unlabelled}
    drawn = species.species_list(20, ("Ag", "Hg"), 2030)
    small = [s for s in drawn if (s.group, "relaxed") in wanted and len(s.ligands) == 2][:3]
    assert small
    for s in small:
        for frame in generate._unlabelled(s):
            embedded = wanted[s.group, str(frame.info["geometry"])]
            # rounded to 1e-4 Å; the rest is for another BLAS on the way to the minimum
            np.testing.assert_allclose(frame.positions, embedded.positions, atol=2e-3)


def test_biased_forces_are_the_gradient_of_the_biased_energy() -> None:
    atoms = build.idealise(species.Species("org_H2O", "none", 0, molecule="H2O"), _rng(0)).atoms
    bias = _rng(1).normal(scale=0.5, size=(3, 3))
    origin = atoms.positions + 0.05

    def energy(positions: np.ndarray) -> float:
        moved = Atoms(atoms.numbers, positions, calculator=_biased())
        return moved.get_potential_energy()

    def _biased() -> sampling.BiasedXTB:
        return sampling.BiasedXTB(0, bias, origin, 6.0)

    atoms.calc = _biased()
    step = np.zeros((3, 3))
    step[2, 1] = 1e-3
    numeric = -(energy(atoms.positions + step) - energy(atoms.positions - step)) / 2e-3
    # central differences: third derivatives of 100 eV/Å^3 leave 2e-5 eV/Å
    assert atoms.get_forces()[2, 1] == pytest.approx(numeric, abs=1e-3)


def test_line_minimum_is_exact_for_a_quadratic() -> None:
    centre, stiffness = np.array([[0.3, 0.0, 0.0]]), 2.0

    def point(x: float) -> sampling.Point:
        positions = np.array([[x, 0.0, 0.0]])
        d = positions - centre
        return sampling.Point(positions, 0.5 * stiffness * float((d * d).sum()), -stiffness * d)

    assert sampling.line_minimum(point(0.0), point(0.5)) == pytest.approx(0.6)  # on the grid


# --------------------------------------------------------------------------- the filter


def test_the_embedded_sets_are_fixed_points_of_the_filter(
    labelled: list[Atoms], unlabelled: list[Atoms], tmp_path: Path
) -> None:
    cases = (
        ("tmc.extxyz.gz", filter.filter_labelled(_copy(labelled))),
        ("tmc_unlabelled.extxyz.gz", filter.filter_unlabelled(_copy(unlabelled))),
    )
    for name, filtered in cases:
        assert not filtered.dropped
        filter.save(filtered.frames, tmp_path / name)
        # the text, not the compressed bytes: those may differ between versions of zlib
        written = gzip.decompress((tmp_path / name).read_bytes())
        assert written == gzip.decompress((DATA / name).read_bytes())


def _copy(frames: list[Atoms]) -> list[Atoms]:
    return [f.copy() for f in frames]


def test_saving_is_deterministic(labelled: list[Atoms], tmp_path: Path) -> None:
    sizes = [filter.save(labelled[:5], tmp_path / name) for name in ("a.gz", "b.gz")]
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert sizes[0] == sizes[1] == (tmp_path / "a.gz").stat().st_size


def _flaw(frame: Atoms, kind: str) -> None:
    if kind == "charge sum":
        frame.arrays["dft_mulliken"][0] += 2e-3
    elif kind == "gap":
        frame.info["homo_lumo_gap"] = 0.49
    elif kind == "state jump":
        frame.info["energy"] += 0.6
    elif kind == "duplicate":
        frame.info["group"] += "_again"
        frame.rotate(40, "x")
        frame.arrays["forces"] = frame.arrays["forces"] @ frame.arrays["forces"].T[:, :3] * 0


@pytest.mark.parametrize("kind", ["charge sum", "gap", "state jump", "duplicate", "repeated key"])
def test_each_flaw_is_dropped_for_its_reason(labelled: list[Atoms], kind: str) -> None:
    group = next(
        f.info["group"]
        for f, m in zip(labelled, filter.state_mismatch(labelled), strict=True)
        if np.isfinite(m)
    )
    frames = _copy([f for f in labelled if f.info["group"] == group])
    assert not filter.filter_labelled(_copy(frames)).dropped
    bad = frames[-1].copy()
    _flaw(bad, kind)
    suspects = [*frames, bad] if kind in ("duplicate", "repeated key") else [*frames[:-1], bad]
    filtered = filter.filter_labelled(suspects)
    assert filtered.dropped == {kind: 1}
    assert len(filtered.frames) == len(suspects) - 1


def test_state_mismatch_is_the_trapezoid_rule(labelled: list[Atoms]) -> None:
    minimum = labelled[0].copy()
    near, far = minimum.copy(), minimum.copy()
    for frame, distance in ((near, 0.1), (far, 0.2)):
        frame.info["geometry"] = f"moved {distance}"
        frame.positions[0, 2] += distance
    work = near.arrays["forces"][0, 2] * 0.1  # the forces of both are those of the minimum
    near.info["energy"] += 0.25 - work
    mismatch = filter.state_mismatch([minimum, near, far])
    assert np.isnan(mismatch[[0, 2]]).all()
    assert mismatch[1] == pytest.approx(0.25)


def test_statistics_count_and_fit(labelled: list[Atoms], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "KERNEL_GRID", [(0.01, 0.1)])  # one of twelve, for speed
    stats = report.statistics(filter.Filtered(labelled, Counter(), np.zeros(0)))
    assert (stats["structures"], stats["groups"]) == (770, 355)
    assert (stats["tm_structures"], stats["tm_groups"], stats["metals"]) == (667, 305, 30)
    # the figures of the data set's README
    assert stats["linear_residual_std_eV"] == pytest.approx(2.137, abs=0.005)
    assert stats["gfn1_residual_correlation"] == pytest.approx(0.827, abs=0.005)
    assert stats["cv_linear_mae_eV"] == pytest.approx(1.85, abs=0.3)  # by the folds
    json.dumps(stats)


def test_a_frame_without_labels_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bare.extxyz"
    path.write_text("1\nProperties=species:S:1:pos:R:3 charge=0\nH 0 0 0\n")
    with pytest.raises(InputError, match=r"bare\.extxyz, frame 0: lacks group, .*forces"):
        filter.read_frames([path])
