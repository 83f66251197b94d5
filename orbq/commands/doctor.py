"""``orbq doctor``: what this installation consists of, and whether its parts work."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, util
from pathlib import Path

from rich.text import Text

from orbq import __version__
from orbq.errors import OrbqError
from orbq.output import output
from orbq.units import HARTREE

PACKAGES = (
    "jax jaxlib flax optax e3nn-jax jraph orbax-checkpoint numpy ase tblite matscipy pydantic"
).split()
OPTIONAL = {  # extra -> a module that it brings
    "dask": "distributed",
    "mkl": "mkl",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "explore": "chemiscope",
    "notebooks": "nbclient",
}

# GFN1-xTB energy of H2O at the positions below from a direct call of tblite 0.8.0, accuracy 0.1
WATER = ((0.0, 0.0, 0.1173), (0.0, 0.7572, -0.4692), (0.0, -0.7572, -0.4692))  # Å; O, H, H
WATER_ENERGY = -5.76864058 * HARTREE  # eV
TOLERANCE = 1e-4  # eV; SCF convergence and the printed digits leave 1e-6

NVIDIA = Path("/proc/driver/nvidia/version")  # there is a driver where this is


def doctor() -> None:
    """Show versions, devices and directories, and check that the parts work.

    Ends with exit status 1 and names the part when one does not work.

    \b
    Example:
      orbq doctor
    """
    console = output()
    broken: list[str] = []
    for name, check in CHECKS.items():
        try:
            found = check()
        except Exception as error:
            broken.append(name)
            found = f"BROKEN: {type(error).__name__}: {error}"
        console.print(Text.assemble((f"{name:<14}", "bold"), found))
    if broken:
        raise OrbqError(f"not working: {', '.join(broken)}; reinstall orbq with its dependencies")


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def _machine() -> str:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {available} CPU cores available"


def _versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)


def _extras() -> str:
    found = []
    for extra, module in OPTIONAL.items():
        present = util.find_spec(module) is not None
        found.append(f"{extra} {'yes' if present else 'no'}")
    return ", ".join(found)


def _devices() -> str:
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    counted = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    found = f"{jax.default_backend()}: {', '.join(counted)}"
    if jax.default_backend() == "cpu" and NVIDIA.exists():
        found += "; an NVIDIA GPU is not used: pip install 'orbq[cuda]', and unset JAX_PLATFORMS"
    return found


def _numpy_blas() -> str:
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"


def _label_blas() -> str:
    from orbq.preprocess.blas import BUNDLED, find_blas

    slow = f"{BUNDLED}: install OpenBLAS or orbq[mkl], complexes are then labelled twice as fast"
    return find_blas() or slow


def _tblite() -> str:
    import numpy as np

    from orbq.preprocess.xtb import label
    from orbq.schema import Structure

    structure = Structure(
        numbers=np.array([8, 1, 1]),
        positions=np.array(WATER),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        total_charge=0,
        spin_multiplicity=1,
    )
    deviation = label(structure).energy - WATER_ENERGY
    if not abs(deviation) < TOLERANCE:
        raise OrbqError(f"energy of water is off by {deviation:.2e} eV, limit {TOLERANCE:g} eV")
    return f"labels water; energy as expected to {abs(deviation):.0e} eV"


def _cache() -> str:
    from orbq.cache import DIRECTORY_VARIABLE, cache_directory

    directory = cache_directory()
    files = [path for path in directory.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return f"{directory} ({len(files)} files, {size / 1e6:.1f} MB; ${DIRECTORY_VARIABLE} moves it)"


CHECKS = {
    "orbq": lambda: __version__,
    "python": _python,
    "machine": _machine,
    "packages": _versions,
    "extras": _extras,
    "devices": _devices,
    "numpy's BLAS": _numpy_blas,
    "labels' BLAS": _label_blas,
    "tblite": _tblite,
    "cache": _cache,
}
