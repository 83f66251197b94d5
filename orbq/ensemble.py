"""Several runs as one potential: the mean of their predictions, and its spread.

    ensemble = orbq.Ensemble(["runs/seed0", "runs/seed1", "runs/seed2"])
    for found in ensemble.predict(structures):
        found["energy"], found["energy_std"]                    # eV
    atoms.calc = ensemble.calculator()                          # results["forces_std"] too

The spread is the standard deviation over the members (n - 1 in the denominator), component by
component: of runs that differ in their seeds, an estimate of how far a structure is from the
training data. Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017, section 2.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_changes
from ase.calculators.mixing import AverageCalculator

from orbq.calculator import Calculator
from orbq.errors import InputError
from orbq.inference import BatchPredictor, Predicted, checked_batch_size, predict_members
from orbq.orbitals import SYMBOLS, parts
from orbq.preprocess.read import Reader
from orbq.run import Run, is_one, load, usable
from orbq.schema import Structure

SPREAD = "_std"  # added to a prediction's name


class Ensemble:
    """Runs that predict the same for the same elements.

    runs: two or more, loaded or directories. Their architectures and cutoffs may differ. names:
    what errors call them; None for their directories.

    Raises InputError when there are fewer than two, or when they disagree in the elements they
    know, their charge targets, the xTB method of these, or whether energies were taught.
    """

    def __init__(
        self, runs: Sequence[Run | str | Path], names: Sequence[str] | None = None
    ) -> None:
        if isinstance(runs, str | Path) or len(runs) < 2:
            raise InputError("an ensemble needs two runs or more: give a list of them")
        if names is None:
            names = [f"run {n}" if isinstance(run, Run) else str(run) for n, run in enumerate(runs)]
        self.runs = tuple(run if isinstance(run, Run) else load(run) for run in runs)
        for name, run in zip(names[1:], self.runs[1:], strict=True):
            _check_agreement(names[0], self.runs[0], name, run)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers the runs were trained on."""
        return self.runs[0].elements

    @property
    def targets(self) -> tuple[str, ...]:
        """Charge targets the runs predict."""
        return self.runs[0].targets

    @property
    def taught_energy(self) -> bool:
        """Whether energies or forces taught every member."""
        return all(run.taught_energy for run in self.runs)

    def structure(self, atoms: Atoms | Structure, reader: Reader | None = None) -> Structure:
        """The checked structure of an ``ase.Atoms``, as ``Run.structure``."""
        return self.runs[0].structure(atoms, reader)

    def reference_energy(self, structure: Structure) -> float:
        """The members' mean. Raises InputError where a member knows none, as the run's own does."""
        return float(np.mean([run.reference_energy(structure) for run in self.runs]))

    @overload
    def predict(self, atoms: Atoms | Structure, *, stress: bool = False) -> dict[str, Any]: ...

    @overload
    def predict(
        self, atoms: Iterable[Atoms | Structure], batch_size: int = 16, stress: bool = False
    ) -> Iterator[dict[str, Any]]: ...

    def predict(self, atoms: Any, batch_size: int = 16, stress: bool = False) -> Any:
        """As ``Run.predict``: the means, and ``<name>_std`` beside each of them."""
        predictors = [run.predictor(stress) for run in self.runs]
        if is_one(atoms):
            structure = self.structure(atoms)
            return self._combined([predictor.one(structure) for predictor in predictors])
        return self._predict_many(predictors, atoms, checked_batch_size(atoms, batch_size))

    def _predict_many(
        self, predictors: Sequence[BatchPredictor], many: Iterable[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        for members in predict_members(predictors, usable(self, many), batch_size):
            yield self._combined(members)

    def _combined(self, members: Sequence[Predicted]) -> dict[str, Any]:
        return combined([run.told(one) for run, one in zip(self.runs, members, strict=True)])

    def calculator(self, **options: Any) -> EnsembleCalculator:
        """An ASE calculator; options: those of ``orbq.Calculator``."""
        return EnsembleCalculator([Calculator(run, **options) for run in self.runs])


class EnsembleCalculator(AverageCalculator):
    """ASE's average of calculators, with the spread of every result as ``<name>_std``."""

    name = "orbq ensemble"

    def __init__(self, calcs: Sequence[Calculator]) -> None:
        super().__init__(calcs)
        known = [p for p in calcs[0].implemented_properties if p in self.implemented_properties]
        self.implemented_properties = [*known, *(name + SPREAD for name in known)]

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """As the members': a change of charge or spin in ``atoms.info`` counts too."""
        return list(self.mixer.calcs[0].check_state(atoms, tol))

    def calculate(
        self,
        atoms: Atoms,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute ``properties`` by every member into ``results``."""
        asked = dict.fromkeys(name.removesuffix(SPREAD) for name in properties)
        super().calculate(atoms, tuple(asked), system_changes)
        members = {k: v for k, v in self.results.items() if k.endswith("_contributions")}
        for name, values in members.items():
            self.results[name.replace("_contributions", SPREAD)] = spread(values)


def combined(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and ``<name>_std`` of what all members predict, float64; a float where they have one."""
    out: dict[str, Any] = {}
    for name in members[0]:
        values = np.array([member[name] for member in members], np.float64)
        out[name], out[name + SPREAD] = values.mean(0), spread(values)
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in out.items()}


def spread(values: Any) -> Any:
    """Standard deviation over the first axis, unbiased in the variance."""
    return np.std(np.asarray(values, np.float64), axis=0, ddof=1)


def _check_agreement(first_name: str, first: Run, name: str, run: Run) -> None:
    def described(run: Run) -> dict[str, Any]:
        charges = bool(run.targets)
        return {
            "elements": ", ".join(SYMBOLS[z] for z in run.elements),
            "charge targets": ", ".join(run.targets) or "none",
            "energies": "taught" if run.taught_energy else "not taught",
            "xTB method": parts(run.potential.constants.method)[0] if charges else "none",
        }

    for what, known in described(first).items():
        if (other := described(run)[what]) != known:
            raise InputError(
                f"the runs cannot form an ensemble: {what} of {first_name}: {known}; of {name}: "
                f"{other}. Leave one of them out, or train them on the same data with the same "
                "loss.weights, for example with different training.seed"
            )
