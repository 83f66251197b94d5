"""A trained run as an ASE calculator: energy, forces, stress, atomic charges, dipole moment.

    atoms.calc = orbq.Calculator("runs/mine")
    atoms.get_potential_energy(), atoms.get_forces()

Made for dynamics: neighbours are kept with a skin and searched anew only when an atom has moved by
half of it or the cell has changed, and the arrays are padded to a capacity that grows by steps, so
that a trajectory runs through one compiled program, or of a crystal, whose shells of neighbours
come within the cutoff all at once, through a few. Units: eV, Å, eV/Å, eV/Å^3, e, e Å.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes

from orbq.capacity import padded
from orbq.compiled import Counted
from orbq.errors import InputError
from orbq.inference import atomic_charges, voigt
from orbq.models.potential import predict
from orbq.preprocess import tmqm
from orbq.preprocess.neighbors import NeighborList, neighbor_list
from orbq.preprocess.read import DEFAULT_NAMES, values_of
from orbq.run import Run, load, require_energy
from orbq.run_files import read_description, run_directory
from orbq.schema import Structure
from orbq.targets import CHARGE_TARGETS

IMPLEMENTED = ("energy", "free_energy", "forces", "stress")
FROM_CHARGES = ("charges", "dipole")
DTYPES = ("float32", "float64")
PARAMETERS = ("run", "dtype", "skin", "charge_target")


class Calculator(AseCalculator):
    """ASE calculator of a run.

    run: a loaded run or its directory. dtype: "float32" or "float64" of the calculation; None for
    the precision the run was trained in. skin: Å by which the neighbour list reaches beyond the
    cutoff; results do not depend on it. charge_target: which of the run's charge targets the
    atomic charges are summed from; None for the first.

    The total charge and the spin multiplicity are read from ``atoms.info`` (``charge``,
    ``spin_multiplicity``) as ``Run.structure`` does; a change of them is noticed. Charges are
    computed only when asked for, the stress from the first time it is asked for on. The dipole
    moment is that of the atomic charges as points, about the centre of mass (which matters only
    for an ion), of structures that are not periodic. Calculators can be pickled, and those of
    one loaded run share what is compiled, and the capacities it was compiled for: each image of a
    path may have its own. One calculator is for one thread, as ASE's are: give each thread its own.

    Raises InputError for what is no run, an unknown dtype, a skin that is no number or negative,
    or a charge target that the run lacks.
    """

    implemented_properties = [*IMPLEMENTED, *FROM_CHARGES]  # noqa: RUF012 (ASE's own form)
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012
    name = "orbq"

    def __init__(
        self,
        run: Run | str | Path,
        dtype: str | None = None,
        skin: float = 0.5,
        charge_target: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(run, Run):
            run = _loaded(run, dtype)
        self.run = run
        self.dtype = _checked_dtype(dtype or self.run.config.training.precision)
        self.charge_target = _charge_target(self.run, charge_target)
        known = IMPLEMENTED if self.run.taught_energy else ()
        self.implemented_properties = [*known, *(FROM_CHARGES if self.charge_target else ())]
        self.neighbors = SkinNeighbors(self.run.potential.architecture.cutoff, skin)
        self._compiled_before = self._compilations()
        self._with_stress = False
        self._place_parameters()

    def _place_parameters(self) -> None:
        with self._precision():
            self.params = jax.tree.map(lambda p: jnp.asarray(p, self.dtype), self.run.params)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "params"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compiled_before = self._compilations()
        self._place_parameters()

    def _compilations(self) -> int:
        return sum(program.compilations for program in self.run.programs.values())

    @property
    def compilations(self) -> int:
        """How often a program of the run, which all its calculators share, was compiled since this
        calculator was made."""
        return self._compilations() - self._compiled_before

    # ------------------------------------------------------------------ what ASE calls

    def set(self, **changes: Any) -> dict[str, Any]:
        """Raises InputError: what a calculator computes with is fixed when it is made."""
        unknown = [name for name in changes if name not in PARAMETERS]
        if unknown:
            raise InputError(
                f"{', '.join(unknown)}: no parameter of orbq.Calculator, which has "
                f"{', '.join(PARAMETERS)}; none can be changed: make a new calculator"
            )
        if changes:
            raise InputError(
                f"{', '.join(changes)} of a calculator cannot be changed: make a new one, "
                "orbq.Calculator(run, ...), which compiles nothing that the run has compiled"
            )
        return {}

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation: also charge and spin in ``atoms.info``."""
        changes = list(super().check_state(atoms, tol))
        if self.atoms is not None and _state(atoms) != _state(self.atoms):
            changes.append("info")
        return changes

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """As ASE's. Raises PropertyNotImplementedError with the reason, where there is one."""
        self._require([name])
        return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute ``properties`` of ``atoms`` into ``results``.

        Raises InputError for a structure that the run cannot take, PropertyNotImplementedError for
        charges without a charge target, energies that were never taught, the stress of a structure
        that is not a crystal, or the dipole moment of a periodic one.
        """
        self._require(properties)
        super().calculate(atoms, properties, system_changes)
        if system_changes:  # called by hand, it has not been reset: nothing of another structure
            self.results = {}
        assert self.atoms is not None  # super() has set it
        structure = self.run.structure(self.atoms)
        wanted = set(properties)
        if "dipole" in wanted and structure.pbc.any():
            raise PropertyNotImplementedError(
                "the dipole moment of a periodic structure depends on where its cell is cut: set "
                "atoms.pbc = False if it is a molecule"
            )
        if wanted & set(FROM_CHARGES):
            self._charges(structure)
        crystal = bool(structure.pbc.all())
        if "stress" in wanted and not crystal:
            raise PropertyNotImplementedError(
                f"stress needs a structure that is periodic in all directions, pbc is "
                f"{structure.pbc.tolist()}"
            )
        if wanted - set(FROM_CHARGES):
            self._with_stress = crystal and (self._with_stress or "stress" in wanted)
            self._energy(structure)

    # ------------------------------------------------------------------ calculations

    def _require(self, properties: Sequence[str]) -> None:
        """Raise PropertyNotImplementedError for what the run was not trained to give."""
        if self.charge_target is None and not set(FROM_CHARGES).isdisjoint(properties):
            raise PropertyNotImplementedError(
                "this run was trained without a charge target: charges need one of "
                f"loss.weights.{{{', '.join(CHARGE_TARGETS)}}} above 0 in training"
            )
        if not set(IMPLEMENTED).isdisjoint(properties):
            try:
                require_energy(self.run)
            except InputError as error:
                raise PropertyNotImplementedError(str(error)) from error

    def _energy(self, structure: Structure) -> None:
        name = "stress" if self._with_stress else "forces"
        energy, forces, *stress = self._call(name, structure)
        total = float(energy[0]) + self.run.reference_energy(structure)
        self.results.update(
            energy=total,
            free_energy=total,
            forces=np.asarray(forces, np.float64)[: len(structure.numbers)],
        )
        if stress:
            self.results["stress"] = voigt(stress[0][0])

    def _charges(self, structure: Structure) -> None:
        assert self.charge_target is not None  # _require has seen to it
        values = np.asarray(self._call("charges", structure), np.float64)
        charges = atomic_charges(self.charge_target, values)[: len(structure.numbers)]
        self.results["charges"] = charges
        if not structure.pbc.any():
            assert self.atoms is not None  # set by ``calculate``
            centre = self.atoms.get_center_of_mass()
            self.results["dipole"] = charges @ (structure.positions - centre)

    def _call(self, name: str, structure: Structure) -> Any:
        edges = self.neighbors.of(structure)
        known = self.run.capacities[name, self.dtype.name]
        capacity = known.holding(len(structure.numbers), len(edges.senders))
        cutoff = self.run.potential.architecture.cutoff
        inputs = padded(structure, edges, capacity, cutoff, self.dtype)
        with self._precision():
            return jax.device_get(self.program(name)(self.params, *inputs))

    def program(self, name: str) -> Callable[..., Any]:
        """The compiled ``(params, *padded(...)) -> arrays`` of "forces", "stress" or "charges"."""
        place = name, (self.charge_target or "") * (name == "charges")
        if place not in self.run.programs:
            self.run.programs[place] = self._program(*place)
        return self.run.programs[place]

    def _program(self, name: str, target: str) -> Counted:
        potential = self.run.potential

        def program(params: Any, positions: Any, graph: jraph.GraphsTuple, cell: Any) -> Any:
            if name == "charges":
                return potential.apply(params, positions, graph, (target,))[1][target]
            if name == "stress":
                graph = graph._replace(globals={**graph.globals, "cell": cell})
                out = predict(potential, params, positions, graph, ("stress",))
                return out.energy, out.forces, out.stress
            out = predict(potential, params, positions, graph)
            return out.energy, out.forces

        return Counted(program)

    def _precision(self) -> AbstractContextManager[Any]:
        return jax.enable_x64(True) if self.dtype == np.float64 else nullcontext()


def _loaded(run: str | Path, dtype: str | None) -> Run:
    """The run of a directory, in float64 if it was trained and is to be computed so."""
    if not isinstance(run, str | Path):
        several = hasattr(run, "runs")  # an ensemble, whose module imports this one
        remedy = "ensemble.calculator() makes its calculator, and " if several else ""
        raise InputError(
            f"{reprlib.repr(run)} is no run: {remedy}orbq.Calculator takes a run that orbq.load "
            "gives, or its directory"
        )
    trained = read_description(run_directory(run))["config"]["training"]["precision"]
    wide = np.float64 in (_checked_dtype(trained), _checked_dtype(dtype or trained))
    with jax.enable_x64(True) if wide else nullcontext():
        return load(run)


def _checked_dtype(name: str) -> np.dtype:
    if str(name) not in DTYPES and name not in (np.float32, np.float64):
        raise InputError(f"dtype {name!r}: give one of {', '.join(DTYPES)}")
    return np.dtype(name)


def _charge_target(run: Run, wanted: str | None) -> str | None:
    present = [name for name in CHARGE_TARGETS if name in run.targets]
    if wanted is not None and wanted not in present:
        raise InputError(
            f"charge_target {wanted!r}: this run predicts {', '.join(present) or 'no charges'}"
        )
    return wanted or next(iter(present), None)


def _state(atoms: Atoms) -> tuple[str, ...]:
    """All in ``info`` that charge and multiplicity may be read from."""
    names = (*DEFAULT_NAMES["charge"], *DEFAULT_NAMES["spin"], *tmqm.STATE)
    values = values_of(atoms.info)
    return tuple(repr(values.get(name)) for name in names)


# --------------------------------------------------------------------------- neighbours


class SkinNeighbors:
    """Edges of a moving structure; searched anew when an atom has moved by half the skin.

    cutoff, skin: Å. n_searches: how often neighbours were searched.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        if not (isinstance(skin, int | float | np.number) and np.isfinite(skin) and skin >= 0):
            raise InputError(f"skin {skin!r} Å: it must be a number, 0 or positive")
        self.cutoff, self.skin, self.n_searches = cutoff, skin, 0
        self._at: Structure | None = None
        self._wide = NeighborList(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 3)))

    def of(self, structure: Structure) -> NeighborList:
        """Edges within the cutoff, as ``neighbor_list`` gives them."""
        x = structure.positions
        if not self._covers(structure):
            reach = self.cutoff + self.skin
            self._wide = neighbor_list(x, reach, structure.cell, structure.pbc)
            self._at = structure
            self.n_searches += 1
        senders, receivers, shifts = self._wide
        vectors = x[receivers] - x[senders] + shifts
        near = np.einsum("ei,ei->e", vectors, vectors) < self.cutoff**2
        return NeighborList(senders[near], receivers[near], shifts[near])

    def _covers(self, structure: Structure) -> bool:
        """Whether no pair can have come within the cutoff that the list does not hold."""
        at = self._at
        if (
            at is None
            or at.positions.shape != structure.positions.shape
            or not np.array_equal(at.cell, structure.cell)
            or not np.array_equal(at.pbc, structure.pbc)
        ):
            return False
        moved = structure.positions - at.positions
        return bool((np.einsum("ni,ni->n", moved, moved) <= (self.skin / 2) ** 2).all())
