"""A fast BLAS for tblite's processes.

tblite's wheel brings the reference BLAS under the plain names (``dgemm_``). A library with the same
names that is loaded before it takes its place: GFN1-xTB is then about twice as fast, with
populations that agree to 1e-13. It must be chosen before a process starts (LD_PRELOAD), so it is
given to the labelling processes and to nothing else.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from orbq.errors import InputError

BUNDLED = "tblite's own"
MODES = ("auto", "off")
# Sonames with plain symbols, best first. BLAS names without LAPACK are left out: tblite's wheel
# takes both from one family. Serial builds go first, since each process has one thread.
_NAMES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so.3")
_DIRECTORIES = (
    *(
        f"/usr/lib/{arch}/openblas-{kind}"
        for arch in ("x86_64-linux-gnu", "aarch64-linux-gnu")
        for kind in ("serial", "pthread", "openmp")
    ),
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"),
    *("/opt/intel/oneapi/mkl/latest/lib", "/opt/intel/oneapi/mkl/latest/lib/intel64"),
)


@cache
def find_blas(mode: str = "auto") -> str | None:
    """Path of the library to preload, or None for tblite's own.

    mode: "auto" (the best one found on this machine), "off", or the path of a library.
    Raises InputError when the path is not a library that can take the place of tblite's BLAS.
    """
    if mode == "off" or (mode == "auto" and not sys.platform.startswith("linux")):
        return None
    if mode != "auto":
        if not Path(mode).is_file() or not _works(mode):
            raise InputError(
                f"--blas {mode}: not a library with plain BLAS and LAPACK names (dgemm_, dsyevd_); "
                "use 'auto', 'off', or the path of such a library"
            )
        return mode
    return next((path for path in _candidates() if _works(path)), None)


def _candidates() -> list[str]:
    prefixes = [Path(sys.prefix) / "lib", *map(Path, _DIRECTORIES)]
    return [str(d / name) for name in _NAMES for d in prefixes if (d / name).is_file()]


def _works(path: str) -> bool:
    """Whether a fresh process can load the library and finds the plain names in it."""
    code = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); "
        "[getattr(lib, name) for name in ('dgemm_', 'dsymm_', 'dsygvd_', 'dsyevd_', 'dgetrf_')]"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, path], capture_output=True, timeout=60, check=False
    )
    return done.returncode == 0


def environment(blas: str | None) -> dict[str, str]:
    """Environment of a labelling process: one thread, and the BLAS preloaded."""
    env = dict(os.environ)
    threads = ("OMP", "OPENBLAS", "MKL", "BLIS", "GOTO")
    env.update({f"{name}_NUM_THREADS": "1" for name in threads})
    env |= {"MKL_THREADING_LAYER": "SEQUENTIAL", "MKL_INTERFACE_LAYER": "LP64"}
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH", "")]))
    if blas:
        env["LD_PRELOAD"] = os.pathsep.join(filter(None, [blas, env.get("LD_PRELOAD", "")]))
    return env


def loaded_blas() -> str:
    """Name of the BLAS that was preloaded into this process, or BUNDLED."""
    path = os.environ.get("LD_PRELOAD", "").split(os.pathsep)[0]
    real = os.path.realpath(path)
    if not path or real not in Path("/proc/self/maps").read_text():
        return BUNDLED
    told = _version(ctypes.CDLL(path))
    return f"{told} ({os.path.basename(real)})" if told else os.path.basename(real)


def _version(library: ctypes.CDLL) -> str:
    """Name and version that the library states of itself, as "OpenBLAS 0.3.21"; "" if neither."""
    if hasattr(library, "openblas_get_config"):
        library.openblas_get_config.restype = ctypes.c_char_p
        return " ".join(library.openblas_get_config().decode().split()[:2])
    if hasattr(library, "MKL_Get_Version_String"):
        text = ctypes.create_string_buffer(200)
        library.MKL_Get_Version_String(text, len(text))
        found = re.search(r"Version ([\d.]+)", text.value.decode())
        return f"MKL {found[1]}" if found else "MKL"
    return ""
