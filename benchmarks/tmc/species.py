"""Which species are made: closed-shell mononuclear complexes, small molecules, free ligands.

A complex is drawn from the recipes of its metal (``recipes.toml``: oxidation state, coordination
polyhedron, ligand pools); large ones are drawn less often, because PBE/def2-SVP grows steeply with
the number of basis functions. A seed determines the list, and a longer list begins with a shorter
one for every metal, so that a run can always be extended.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase.build import molecule
from ase.collections import g2
from ase.data import atomic_numbers

METALS = tuple(
    "Sc Ti V Cr Mn Fe Co Ni Cu Zn Y Zr Nb Mo Tc Ru Rh Pd Ag Cd La Hf Ta W Re Os Ir Pt Au Hg".split()
)
GROUP_OF = {metal: 3 + i % 10 for i, metal in enumerate(METALS)}  # periodic-table group, 3 to 12
RESERVED_SEEDS = (2026, 2027, 2030)  # the embedded sets and a blind test are drawn from these ...
RESERVED_PER_METAL = 64  # ... as far as this many complexes of each metal

MAX_DRAWS = 4000  # per metal
MAX_CHARGE = 2  # absolute total charge of a complex, e
DOUBLY_CHARGED_SHARE = 0.3  # of the drawn complexes of charge +-2 that are kept
SIZE_LIMIT, SIZE_DECAY = 95, 35  # basis functions: all kept up to the first, then exp(-excess/35)
BASIS_FUNCTIONS = {"H": 5, "P": 18, "S": 18, "Cl": 18, "Br": 32}  # def2-SVP; 14 for C, N, O, F
METAL_BASIS_FUNCTIONS = 32
ORGANIC_ELEMENTS = frozenset("H C N O F P S Cl".split())
TRIPLETS = frozenset(("O2", "SO", "S2", "CH2_s3B1d", "NH", "Si2", "O3"))  # or near-degenerate
FREE_LIGANDS = tuple("CS NO CN CNH NCO NCS N3 CCH CH3 CF3 OH SH NH2 NO2 OMe Cp".split())

Composition = tuple[str, int, tuple[str, ...]]


class Ligand(NamedTuple):
    """An idealised ligand: donors first, centred on the origin, +z away from the metal.

    charge: formal charge (e). symbols: [n]. positions: [n, 3] Å. hapticity: number of donors.
    shift: change of the metal-donor distance (Å).
    """

    charge: int
    symbols: tuple[str, ...]
    positions: np.ndarray
    hapticity: int
    shift: float


class Recipe(NamedTuple):
    """A class of closed-shell complexes; the fields are those of ``recipes.toml``."""

    metals: tuple[str, ...]
    oxidation_state: int
    geometry: str
    fixed: tuple[str, ...]
    anionic: tuple[int, tuple[str, ...]]
    neutral: tuple[int, tuple[str, ...]]
    weight: float


class Species(NamedTuple):
    """One species. ``group`` names it in the data set and in splits.

    metal: element symbol, or "none". charge: total charge (e). geometry: coordination polyhedron,
    "" without a metal. ligands: names, in the order of the polyhedron's sites; a free ligand has
    one. oxidation_state: of the metal, None without one. molecule: name in ASE's G2 collection.
    """

    group: str
    metal: str
    charge: int
    geometry: str = ""
    ligands: tuple[str, ...] = ()
    oxidation_state: int | None = None
    molecule: str = ""

    @property
    def composition(self) -> Composition:
        """What makes two species the same one: metal, charge, and ligands in any arrangement."""
        return self.metal, self.charge, tuple(sorted(self.ligands)) or (self.molecule,)


def species_list(
    per_metal: int,
    metals: tuple[str, ...],
    seed: int,
    exclude: frozenset[Composition] = frozenset(),
) -> list[Species]:
    """The species of a seed: ``per_metal`` complexes of each metal, and the organic ones.

    Metals take turns and every seventh entry is organic, so that any first part of the list is
    balanced. ``exclude`` leaves compositions out and draws on, up to ``per_metal``; what else is
    drawn, and its order, stay the same.
    """
    columns = [_complexes(metal, per_metal, seed, exclude) for metal in metals]
    complexes = [c[i] for i in range(per_metal) for c in columns if i < len(c)]
    organic = [s for s in _organic(seed) if s.composition not in exclude]
    out: list[Species] = []
    for i, species in enumerate(complexes):
        out.append(species)
        if i % 6 == 5 and organic:
            out.append(organic.pop())
    return out + organic


@cache
def reserved_compositions() -> frozenset[Composition]:
    """Everything that the reserved seeds draw: the embedded sets and the blind test."""
    return frozenset(
        species.composition
        for seed in RESERVED_SEEDS
        for species in species_list(RESERVED_PER_METAL, METALS, seed)
    )


@cache
def ligands() -> dict[str, Ligand]:
    """The ligands of ``ligands.toml`` by name."""
    return {name: _ligand(entry) for name, entry in _load("ligands.toml").items()}


@cache
def recipes() -> tuple[Recipe, ...]:
    """The recipes of ``recipes.toml``, with pools written out as ligand names."""
    data = _load("recipes.toml")
    pools = {name: words.split() for name, words in data["pools"].items()}

    def choice(entry: list) -> tuple[int, tuple[str, ...]]:
        n, words = entry
        return n, tuple(name for word in words.split() for name in pools.get(word, [word]))

    return tuple(
        Recipe(
            tuple(r["metals"].split()),
            r["ox"],
            r["geometry"],
            tuple(r.get("fixed", "").split()),
            choice(r.get("x", [0, ""])),
            choice(r.get("l", [0, ""])),
            float(r["weight"]),
        )
        for r in data["recipes"]
    )


@cache
def _recipes_of(metal: str) -> tuple[list[Recipe], np.ndarray]:
    own = [r for r in recipes() if metal in r.metals]
    weights = np.array([r.weight for r in own])
    return own, weights / weights.sum()


def _load(name: str) -> dict:
    with open(Path(__file__).with_name(name), "rb") as file:
        return tomllib.load(file)


def _ligand(entry: dict) -> Ligand:
    rows = [(symbol, tuple(xyz)) for symbol, *xyz in entry.get("atoms", [])]
    for symbol, n, radius, z in entry.get("rings", []):
        angles = 2 * np.pi * np.arange(n) / n
        rows += [(symbol, (radius * np.cos(a), radius * np.sin(a), z)) for a in angles]
    return Ligand(
        entry["charge"],
        tuple(symbol for symbol, _ in rows),
        np.array([xyz for _, xyz in rows], float),
        entry.get("hapticity", 1),
        entry.get("shift", 0.0),
    )


def _draw(metal: str, rng: np.random.Generator) -> tuple[Recipe, list[str]]:
    """One recipe of ``metal`` by weight, and its ligands: fixed, then anionic, then neutral."""
    own, probabilities = _recipes_of(metal)
    recipe = own[rng.choice(len(own), p=probabilities)]
    names = list(recipe.fixed)
    for n, pool in (recipe.anionic, recipe.neutral):
        if n:
            kinds = rng.choice(pool, min(2, len(pool)), replace=False)
            names += rng.choice(kinds, n).tolist()
    return recipe, names


def _complexes(
    metal: str, per_metal: int, seed: int, exclude: frozenset[Composition]
) -> list[Species]:
    rng = np.random.default_rng([seed, atomic_numbers[metal]])
    seen: set[Composition] = set()
    out: list[Species] = []
    for _ in range(MAX_DRAWS):
        if len(out) == per_metal:
            break
        recipe, names = _draw(metal, rng)
        species = _complex(metal, recipe, names)
        if species.composition in seen or not _accepted(species, rng):
            continue
        seen.add(species.composition)
        if species.composition not in exclude:
            out.append(species)
    return out


def _complex(metal: str, recipe: Recipe, names: list[str]) -> Species:
    charge = recipe.oxidation_state + sum(ligands()[name].charge for name in names)
    counts = "_".join(f"{name}x{names.count(name)}" for name in sorted(set(names)))
    group = f"{metal}_{recipe.geometry}_{counts}_q{charge:+d}"
    return Species(group, metal, charge, recipe.geometry, tuple(names), recipe.oxidation_state)


def _accepted(species: Species, rng: np.random.Generator) -> bool:
    """Whether a drawn complex is kept; the order of the random numbers is part of the definition.

    A charge beyond MAX_CHARGE or a diatomic is dropped; of the doubly charged a share is kept; the
    size is preferred to be small.
    """
    if abs(species.charge) > MAX_CHARGE:
        return False
    if abs(species.charge) == MAX_CHARGE and rng.random() > DOUBLY_CHARGED_SHARE:
        return False
    symbols = [s for name in species.ligands for s in ligands()[name].symbols]
    if len(symbols) < 2:
        return False
    size = METAL_BASIS_FUNCTIONS + sum(BASIS_FUNCTIONS.get(s, 14) for s in symbols)
    return bool(rng.random() <= np.exp(-(size - SIZE_LIMIT) / SIZE_DECAY))


def _organic(seed: int) -> list[Species]:
    """Closed-shell G2 molecules of 2 to 12 atoms, and the free ligands that G2 lacks, shuffled."""
    out = []
    for name in g2.names:
        atoms = molecule(name)
        inside = set(atoms.get_chemical_symbols()) <= ORGANIC_ELEMENTS and 1 < len(atoms) < 13
        if inside and atoms.numbers.sum() % 2 == 0 and name not in TRIPLETS:
            out.append(Species("org_" + name, "none", 0, molecule=name))
    for name in FREE_LIGANDS:
        out.append(Species("lig_" + name, "none", ligands()[name].charge, ligands=(name,)))
    return [out[i] for i in np.random.default_rng(seed).permutation(len(out))]
