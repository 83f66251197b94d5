"""The BLAS of the labelling processes: found, preloaded, reported, switched off, refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tblite

from orbq.errors import InputError
from orbq.preprocess import blas
from orbq.preprocess.label import Resources, preprocess
from tests.test_label import molecules

BUNDLED = Path(tblite.__file__).parents[1] / "tblite.libs"


@pytest.fixture
def environment_with_mkl(tmp_path, monkeypatch):
    """A Python environment that holds a library where the wheel of MKL has its own.

    It is tblite's LAPACK, which has the plain names as well and is always there.
    """
    (real,) = BUNDLED.glob("liblapack*")
    libraries = tmp_path / "environment" / "lib"
    libraries.mkdir(parents=True)
    (libraries / "libmkl_rt.so.3").symlink_to(real)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(BUNDLED))  # it needs a neighbour
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setattr(blas, "_DIRECTORIES", ())
    blas.find_blas.cache_clear()
    yield libraries / "libmkl_rt.so.3"
    blas.find_blas.cache_clear()


@pytest.mark.skipif(not BUNDLED.is_dir(), reason="tblite is not from a wheel")
def test_a_library_of_the_environment_is_found_used_and_reported(environment_with_mkl, tmp_path):
    assert blas.find_blas("auto") == str(environment_with_mkl)
    assert blas.find_blas("off") is None
    made = {
        mode: preprocess(molecules(), tmp_path / mode, resources=Resources(1, None, 60.0, mode))
        for mode in ("auto", "off")
    }
    assert made["auto"].manifest["blas"] == [environment_with_mkl.resolve().name]
    assert made["off"].manifest["blas"] == [blas.BUNDLED]
    difference = np.abs(np.asarray(made["auto"]["onsite"]) - made["off"]["onsite"])
    assert difference.max() < 1e-10  # the order of summation


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_what_is_no_blas_is_refused(tmp_path, content):
    path = tmp_path / "libopenblas.so.0"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"libopenblas\.so\.0: not a library with plain BLAS"):
        blas.find_blas(str(path))


def test_the_library_in_use_says_its_name_and_version():
    """With the one found here, if there is one; a process without it names tblite's own."""
    found = blas.find_blas("auto")
    code = "from orbq.preprocess.blas import loaded_blas; print(loaded_blas())"
    for path in {found, None}:
        told = subprocess.run(
            [sys.executable, "-c", code],
            env=blas.environment(path),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        assert told == blas.BUNDLED if path is None else told[0].isalpha() and "(" in told
