"""A run as a self-contained StableHLO program that needs neither orbq nor Flax nor e3nn-jax.

    orbq.export("runs/mine", "my-potential", charges=True)

writes a directory of three files: ``potential.bin`` (``jax.export``; parameters inside, symbolic
numbers of atoms and edges, one program for CPU, CUDA and TPU), ``manifest.json`` and
``potential.py``, a loader with its own neighbour list that imports JAX and NumPy only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array

from orbq import __version__, standalone
from orbq.annotate import charge_target
from orbq.errors import InputError
from orbq.models.potential import make_potential, predict
from orbq.orbitals import SYMBOLS, shells
from orbq.preprocess.links import make_directory
from orbq.preprocess.store import write_atomically
from orbq.run import Run, load, require_energy
from orbq.targets import TARGETS

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LOADER = "potential.py"
INPUTS = {  # name: dtype (None: the precision), shape, meaning
    "positions": (None, "n, 3", "Å"),
    "numbers": ("int32", "n", "atomic numbers"),
    "shifts": (None, "e, 3", "Å; r = x[receiver] - x[sender] + shift, padding beyond the cutoff"),
    "senders": ("int32", "e", "atoms"),
    "receivers": ("int32", "e", "atoms, ascending"),
    "charge": (None, "", "total charge, e"),
    "spin_multiplicity": (None, "", "1 for a singlet"),
}
OUTPUTS = {
    "energy": ("", "eV, without the reference energies"),
    "forces": ("n, 3", "eV/Å"),
    "charges": ("n", "e; they sum to the total charge"),
}


def export(
    run: Run | str | Path,
    out: str | Path,
    charges: bool = False,
    platforms: str | Sequence[str] = PLATFORMS,
    overwrite: bool = False,
) -> Path:
    """Write the directory ``out`` and return it.

    charges: also atomic charges, from the first of the run's charge targets. platforms: what the
    program is lowered for, of PLATFORMS. overwrite: replace an existing ``out``.

    Raises InputError for a path that is no run, an unknown platform, an ``out`` that exists, or
    charges of a run without a charge target, or a run that was taught no energies.
    """
    run = run if isinstance(run, Run) else load(run)
    require_energy(run)
    out = Path(out)
    platforms = (platforms,) if isinstance(platforms, str) else platforms
    if unknown := [name for name in platforms if name not in PLATFORMS] or not platforms:
        raise InputError(f"platforms {unknown}: give one or more of {', '.join(PLATFORMS)}")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} exists: name another one, or replace it with --overwrite")
    if out.exists() and not (out / standalone.MANIFEST).is_file():
        raise InputError(f"--out {out} is not an exported potential: it will not be replaced")
    target = charge_target(run) if charges else None
    make_directory(out.parent, "--out")
    program = lowered(run, target, platforms).serialize()
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    (temporary / standalone.PROGRAM).write_bytes(program)
    shutil.copyfile(standalone.__file__, temporary / LOADER)
    described = manifest(run, target, platforms)
    write_atomically(temporary / standalone.MANIFEST, json.dumps(described, indent=1))
    if out.exists():
        shutil.rmtree(out)
    temporary.replace(out)
    return out


def lowered(run: Run, target: str | None, platforms: Sequence[str]) -> jax.export.Exported:
    """The run's program with symbolic numbers of atoms n and edges e. target: of the charges."""
    n, e = jax.export.symbolic_shape("n, e")
    precision = _precision(run)

    def spec(dtype: str | None, shape: str) -> jax.ShapeDtypeStruct:
        symbols = {"n": n, "e": e, "3": 3}
        dims = tuple(symbols[s.strip()] for s in shape.split(",") if s.strip())
        return jax.ShapeDtypeStruct(dims, np.dtype(dtype or precision))

    inputs = [spec(dtype, shape) for dtype, shape, _ in INPUTS.values()]
    return jax.export.export(jax.jit(_program(run, target)), platforms=list(platforms))(*inputs)


def _program(run: Run, target: str | None) -> Callable[..., tuple[Array, ...]]:
    targets = (target,) if target else ()
    params = jax.tree.map(lambda p: jnp.asarray(p, _precision(run)), run.params)
    architecture = run.potential.architecture._replace(kernels="xla")  # for any platform
    potential = make_potential(architecture, run.potential.constants)

    def program(
        positions: Array,
        numbers: Array,
        shifts: Array,
        senders: Array,
        receivers: Array,
        charge: Array,
        spin_multiplicity: Array,
    ) -> tuple[Array, ...]:
        graph = jraph.GraphsTuple(
            nodes={"numbers": numbers},
            edges={"shifts": shifts},
            senders=senders,
            receivers=receivers,
            n_node=jnp.array([numbers.shape[0]]),
            n_edge=jnp.array([senders.shape[0]]),
            globals={
                "total_charge": charge[None],
                "spin_multiplicity": spin_multiplicity[None],
                "mask": jnp.ones(1, bool),
            },
        )
        out = predict(potential, params, positions, graph, targets)
        if target is None:
            return out.energy[0], out.forces
        weights = jnp.asarray(TARGETS[target].charge, positions.dtype)
        return (
            out.energy[0],
            out.forces,
            jnp.matmul(out.charges[target], weights, precision="highest"),
        )

    return program


def manifest(run: Run, target: str | None, platforms: Sequence[str]) -> dict[str, Any]:
    """What the loader and its reader need to know; JSON. shells: valence electrons and orbitals of
    each element, which bound charges and multiplicities as ``check`` does."""
    references = run.references.get("energy")
    known = [z for z in run.elements if references is None or references.known[z]]
    energies = {z: 0.0 if references is None else float(references.element[z]) for z in known}
    precision = _precision(run)
    names = [name for name in OUTPUTS if target or name != "charges"]
    table = shells()
    return {
        "format_version": standalone.FORMAT_VERSION,
        "made_with": {"orbq": __version__, "jax": version("jax")},
        "platforms": list(platforms),
        "precision": precision,
        "cutoff": run.potential.architecture.cutoff,
        "elements": {z: SYMBOLS[z] for z in known},
        "references": {
            "element": energies,
            "charge": 0.0 if references is None else references.charge,
        },
        "shells": {z: [int(table.valence[z]), int(table.slot_mask[z].sum())] for z in known},
        "charge_target": target,
        "inputs": {
            name: {"dtype": dtype or precision, "shape": f"[{shape}]", "meaning": meaning}
            for name, (dtype, shape, meaning) in INPUTS.items()
        },
        "outputs": {
            name: {"dtype": precision, "shape": f"[{OUTPUTS[name][0]}]", "unit": OUTPUTS[name][1]}
            for name in names
        },
    }


def _precision(run: Run) -> str:
    return str(jax.dtypes.canonicalize_dtype(run.config.training.precision))
