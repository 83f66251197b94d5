"""A trained run on disk, and what one does with it: energies, forces, charges of structures.

run = orbq.load("runs/mine")
positions, graph = run.graph(atoms)
forces = -jax.grad(run.energy, argnums=1)(run.params, positions, graph)    # [N, 3] eV/Å
"""

from __future__ import annotations

import json
import reprlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array

from orbq import checkpoint
from orbq.capacity import Capacities
from orbq.compiled import Counted, available_dtype
from orbq.config import Config
from orbq.errors import InputError, OrbqError
from orbq.models.potential import Params, Potential, energy_fn, make_potential, smallest_graph
from orbq.orbitals import SYMBOLS
from orbq.preprocess.check import check_predicted
from orbq.preprocess.flat import folded, near_origin
from orbq.preprocess.frames import Frame, Source
from orbq.preprocess.neighbors import neighbor_list
from orbq.preprocess.read import DEFAULT_NAMES, Failure, Reader
from orbq.preprocess.references import References
from orbq.preprocess.store import Dataset
from orbq.run_files import (
    CHECKPOINTS,
    RUN_FILE,
    STATISTICS_FILE,
    read_description,
    run_directory,
    stored_architecture,
    stored_config,
    stored_constants,
)
from orbq.run_form import fault
from orbq.schema import Structure

if TYPE_CHECKING:
    from ase import Atoms

    from orbq.inference import BatchPredictor, Predicted
    from orbq.scores import Evaluation

# what a Run compiles when it is used
_COMPILED = ("energy", "batches", "_stress_batches", "programs", "capacities")
# what building a potential of an edited run.json raises
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OSError)


class Run:
    """A trained potential with its parameters, configuration and data manifest.

    potential: the pure functions. params: averaged parameters of the best validation. config: as
    trained. references: the energies that were taken out before training, eV. info: run.json.
    """

    def __init__(
        self,
        potential: Potential,
        params: Params,
        config: Config,
        references: Mapping[str, References],
        info: Mapping[str, Any],
    ) -> None:
        self.potential, self.params, self.config = potential, params, config
        self.references, self.info = references, info
        self._warned: set[tuple[str, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """To be pickled: nothing that is compiled, and parameters as NumPy arrays, which stay
        float64 where JAX is not told to use it."""
        kept = {k: v for k, v in vars(self).items() if k not in _COMPILED}
        return {**kept, "params": jax.device_get(self.params)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self  # nothing of it changes

    @cached_property
    def programs(self) -> dict[tuple[str, str], Counted]:
        """The compiled programs that its calculators share, by what they compute."""
        return {}

    @cached_property
    def capacities(self) -> Mapping[tuple[str, str], Capacities]:
        """The sizes that these are compiled for, by what they compute and in which precision."""
        return defaultdict(Capacities)

    @cached_property
    def energy(self) -> Any:
        """The compiled ``(params, positions, graph) -> energy`` (eV, without references), which
        ``jax.grad`` takes. Raises InputError for a run that was taught none (``taught_energy``)."""
        require_energy(self)
        return jax.jit(energy_fn(self.potential))

    @property
    def targets(self) -> tuple[str, ...]:
        """Charge targets this run can predict."""
        return tuple(n for n, _ in self.potential.architecture.heads if not n.startswith("xtb_"))

    def graph(self, atoms: Atoms | Structure, dtype: Any = None) -> tuple[Array, jraph.GraphsTuple]:
        """Positions [N, 3] (Å) and graph of one structure, without padding.

        ``charge`` and ``spin_multiplicity`` are read from ``atoms.info`` (default: neutral; lowest
        spin of the electron count; any is taken of a periodic structure). dtype: "float32" or
        "float64"; None for the precision the run was trained in, or float32 where JAX has no other.
        Raises InputError for an element the run was not trained on, an unknown dtype, or float64
        where JAX has none.
        """
        structure = self.structure(atoms)
        if dtype is None:
            dtype = jax.dtypes.canonicalize_dtype(self.config.training.precision)
        dtype = available_dtype(dtype)
        cutoff = self.potential.architecture.cutoff
        edges = neighbor_list(structure.positions, cutoff, structure.cell, structure.pbc)
        n = len(structure.numbers)
        graph = jraph.GraphsTuple(
            nodes={"numbers": jnp.asarray(structure.numbers, jnp.int32)},
            edges={"shifts": jnp.asarray(edges.shifts, dtype)},
            senders=jnp.asarray(edges.senders, jnp.int32),
            receivers=jnp.asarray(edges.receivers, jnp.int32),
            n_node=jnp.array([n], jnp.int32),
            n_edge=jnp.array([len(edges.senders)], jnp.int32),
            globals={
                "total_charge": jnp.array([structure.total_charge], dtype),
                "spin_multiplicity": jnp.array([structure.spin_multiplicity], dtype),
                "mask": jnp.array([True]),
            },
        )
        return jnp.asarray(near_origin(structure.positions, np.array([n])), dtype), graph

    def structure(self, atoms: Atoms | Structure, reader: Reader | None = None) -> Structure:
        """The checked structure of an ``ase.Atoms``; atoms that have left the cell by far are in it
        again. reader: what finds charge and spin; None: under the usual names."""
        if isinstance(atoms, Structure):
            structure = atoms
        elif not is_one(atoms):
            raise InputError(f"{reprlib.repr(atoms)} is no structure: give an ase.Atoms")
        else:
            reader = reader or Reader([Source("atoms", Path(), "")], labels=False)
            found = reader.structure(Frame(0, atoms), 0)
            if isinstance(found, Failure):
                raise InputError(f"the structure cannot be used: {found.reason}")
            structure = found
            self._warn_of_initial(atoms, structure)
        unknown = sorted(set(structure.numbers.tolist()) - set(self.elements))
        if unknown:
            raise InputError(
                f"element {', '.join(map(_symbol, unknown))} was not in the training data "
                f"of this run, which knows {', '.join(SYMBOLS[z] for z in self.elements)}"
            )
        if reason := check_predicted(structure):
            raise InputError(f"the structure cannot be used: {reason}")
        self._warn_of_state(structure)
        x, cell, pbc = structure.positions, structure.cell, structure.pbc
        return structure._replace(positions=folded(x, cell, pbc))

    def _warn_of_state(self, structure: Structure) -> None:
        """Once for every total charge and multiplicity that no training structure had."""
        states, crystal = self.info.get("states", {}), bool(structure.pbc.any())
        spin_matters = self.potential.architecture.embed_spin or not crystal
        for name in ("total_charge", "spin_multiplicity")[: 1 + spin_matters]:
            value, seen = int(getattr(structure, name)), states.get(name)
            if seen and value not in seen and (name, value) not in self._warned:
                self._warned.add((name, value))
                warnings.warn(
                    f"no training structure had a {name.replace('_', ' ')} of {value} (but "
                    f"{', '.join(map(str, seen))}): the network does not know what it changes"
                    + (f"; atoms.info[{name!r}] sets it" if crystal else ""),
                    stacklevel=3,
                )

    def _warn_of_initial(self, atoms: Atoms, structure: Structure) -> None:
        """Once each, where ASE's initial charges or magnetic moments speak of another state."""
        spin = self.potential.architecture.embed_spin and not structure.pbc.any()
        for field, key, array, least in (
            ("charge", "charge", "initial_charges", 0),
            ("spin", "spin_multiplicity", "initial_magmoms", 1),
        )[: 1 + spin]:
            values = atoms.arrays.get(array, np.zeros(0))
            told = least + round(float(np.sum(values))) if np.ndim(values) == 1 else least
            taken = structure.spin_multiplicity if least else structure.total_charge
            given = any(name in atoms.info for name in DEFAULT_NAMES[field])
            if told in (least, taken) or given or (array, told) in self._warned:
                continue
            self._warned.add((array, told))
            warnings.warn(
                f"the atoms' {array} add up to a {key.replace('_', ' ')} of {told}, but {taken} is "
                f"taken: atoms.info[{key!r}] sets it",
                stacklevel=3,
            )

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers the run was trained on."""
        return self.potential.constants.elements

    def reference_energy(self, structure: Structure, label: str = "energy") -> float:
        """What is added to the network's ``label`` ("energy" or "xtb_energy"), eV (float64).

        Raises InputError for an element whose reference energy is not known: one that only
        structures without this label taught.
        """
        if label not in self.references:
            return 0.0
        references = self.references[label]
        unknown = sorted({z for z in structure.numbers.tolist() if not references.known[z]})
        if unknown:
            raise InputError(
                f"no {label} can be predicted for {', '.join(SYMBOLS[z] for z in unknown)}: no "
                f"training structure with it had {label}; give data.references for it and train "
                "again"
            )
        return float(references.of(structure.numbers, structure.total_charge))

    @cached_property
    def batches(self) -> BatchPredictor:
        """The compiled program that ``predict`` sends structures through."""
        from orbq.inference import BatchPredictor

        return BatchPredictor(self, self.targets)

    @cached_property
    def _stress_batches(self) -> BatchPredictor:
        from orbq.inference import BatchPredictor

        return BatchPredictor(self, (*self.targets, "stress"))

    def predictor(self, stress: bool = False) -> BatchPredictor:
        """The one that ``predict`` uses. Raises InputError for the stress of a run that was taught
        neither energies nor forces."""
        if stress:
            require_energy(self)
        return self._stress_batches if stress else self.batches

    @overload
    def predict(self, atoms: Atoms | Structure, *, stress: bool = False) -> dict[str, Any]: ...

    @overload
    def predict(
        self, atoms: Iterable[Atoms | Structure], batch_size: int = 16, stress: bool = False
    ) -> Iterator[dict[str, Any]]: ...

    def predict(self, atoms: Any, batch_size: int = 16, stress: bool = False) -> Any:
        """Total energy (eV, with references), forces [N, 3] (eV/Å) and charge targets [N, k]; with
        ``stress`` that of structures that are periodic in three directions, too: [6] eV/Å^3, xx,
        yy, zz, yz, xz, xy.

        atoms: one structure, for one dict; or a list or any other iterable of them, for an iterator
        of dicts in the same order. Structures are taken as results are asked for, in batches of one
        shape with ``batch_size`` structures on average: a stream of any length needs constant
        memory. A single one is padded to a shape that is kept, so that a loop over structures of
        one kind compiles once or twice. Without energy and forces where neither was taught
        (``taught_energy``). Raises InputError for a structure that the run cannot take, naming its
        place, and for the stress of a run that was taught neither energies nor forces.
        """
        predictor = self.predictor(stress)
        if not is_one(atoms):
            from orbq.inference import checked_batch_size

            return self._predict_many(predictor, atoms, checked_batch_size(atoms, batch_size))
        return self.told(predictor.one(self.structure(atoms)))

    def evaluate(self, dataset: Dataset | str | Path, split: str | None = None) -> Evaluation:
        """Predictions beside the labels of a data set, with their errors.

        dataset: open, or its directory, or the name of an embedded one. split: "train",
        "validation", "test" or "all"; None for "test" if the run was trained on this data set, else
        "all". Raises InputError for a part that is not there and when nothing can be compared.
        """
        from orbq.datasets import open_dataset
        from orbq.evaluate import evaluate, split_rows

        data = dataset if isinstance(dataset, Dataset) else open_dataset(str(dataset))
        return evaluate(self, data, split_rows(self, data, split)[1])

    def _predict_many(
        self, predictor: BatchPredictor, many: Iterable[Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        from orbq.inference import predict_structures

        for found in predict_structures(predictor, usable(self, many), batch_size):
            yield self.told(found)

    def told(self, found: Predicted) -> dict[str, Any]:
        """What ``predict`` gives of it."""
        from orbq.inference import voigt

        out = self.known({"energy": found.energy, "forces": found.forces, **found.targets})
        return {name: voigt(out[name]) if name == "stress" else out[name] for name in out}

    @property
    def taught_energy(self) -> bool:
        """Whether reference energies or forces taught it. A run on xTB labels alone, as the
        embedded "gfn1-metals", has a readout for them that means nothing yet."""
        weights = self.config.loss.weights
        return weights.energy > 0 or weights.forces > 0

    def known(self, predicted: dict[str, Any]) -> dict[str, Any]:
        """``predicted`` without the energy and forces that were never taught."""
        unknown = () if self.taught_energy else ("energy", "forces")
        return {name: value for name, value in predicted.items() if name not in unknown}


def is_one(atoms: Any) -> bool:
    """Whether this is one structure, not several."""
    from ase import Atoms

    return isinstance(atoms, Atoms | Structure)


def require_energy(run: Any) -> None:
    """Raise InputError for a run (or an ensemble) whose readout of energies was never taught."""
    if not run.taught_energy:
        raise InputError(
            "the run was taught neither energies nor forces, only xTB labels: ask for its charges "
            "(orbq predict --charges), or train one with loss.weights.energy above 0"
        )


def usable(run: Any, many: Iterable[Atoms | Structure]) -> Iterator[Structure]:
    """The checked structures. Raises InputError naming the first that ``run`` cannot take."""
    for place, atoms in enumerate(many):
        try:
            structure = run.structure(atoms)
            run.reference_energy(structure)
        except InputError as error:
            raise InputError(f"structure {place}: {error}") from error
        yield structure


def _symbol(z: int) -> str:
    return SYMBOLS[z] if 0 < z < len(SYMBOLS) else f"Z = {z}"


def load(path: str | Path) -> Run:
    """Load a trained run: its potential with the parameters of the best validation.

    path: its directory, or the name of an embedded one.

    A run that was trained in float64 is computed in float32, with a warning, unless JAX is told to
    use float64 before: ``jax.config.update("jax_enable_x64", True)``.

    Raises InputError when ``path`` is no run or has no complete checkpoint yet, OrbqError when its
    files are damaged.
    """
    directory = run_directory(path)
    info = read_description(directory)
    config = stored_config(directory, info)
    try:
        if reason := fault(info, config):
            raise ValueError(reason)
        constants = stored_constants(directory, info)
        potential = make_potential(stored_architecture(info["architecture"]), constants)
        references = {n: References.from_json(json.dumps(t)) for n, t in info["references"].items()}
    except (*_DAMAGED, InputError) as error:
        raise OrbqError(
            f"{directory}: {RUN_FILE} or {STATISTICS_FILE} is damaged ({type(error).__name__}: "
            f"{error}); copy the run again, or train again"
        ) from error
    best = checkpoint.recover(directory / CHECKPOINTS / checkpoint.BEST)
    if not best.is_dir():
        raise InputError(
            f"{directory} has no validated parameters yet; let `orbq train` reach its first "
            "validation (training.validate_every)"
        )
    wanted = config.training.precision
    if wanted != str(dtype := jax.dtypes.canonicalize_dtype(wanted)):
        warnings.warn(
            f"{directory} was trained in {wanted} and is computed in {dtype}; for {wanted} call "
            'jax.config.update("jax_enable_x64", True) before loading it',
            stacklevel=2,
        )
    template = jax.eval_shape(potential.init, jax.random.key(0), *smallest_graph(dtype))
    params, _ = checkpoint.restore(best, {"params": template})
    return Run(potential, params["params"], config, references, info)
