"""Coverage-guided fuzzing with Atheris; no part of `make test`: it runs until it is stopped.

    make fuzz ARGS="structures -max_total_time=600"
    python -m tests.fuzz configurations -max_total_time=60

What follows the target (structures, configurations, datasets, runs) goes to libFuzzer. The
malformed cases of tests/malformed are where it begins; an input that ends in anything but a message
is kept as crash-* in the present directory: add it to the cases.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["orbq", "ase.io", "ase.db", "numpy.lib"]):
    import ase.io.extxyz
    import ase.io.trajectory  # noqa: F401
    import numpy as np

    from orbq import run_form
    from orbq.config import config_from_json, load_config
    from orbq.errors import OrbqError
    from orbq.preprocess.check import check
    from orbq.preprocess.read import Failure, read_structures
    from orbq.preprocess.store import Dataset, array_file, array_names
    from orbq.preprocess.summary import summarise

from tests.make_malformed import PLACE
from tests.malformed_datasets import make_dataset

NAMES = ("a.extxyz", "a.xyz.gz", "a.traj", "a.json", "a.db", "a.xyz.xz", "a.cif", "POSCAR")
PLACES: list[tempfile.TemporaryDirectory[str]] = []


def place() -> Path:
    """A directory that goes with the process."""
    PLACES.append(tempfile.TemporaryDirectory())
    return Path(PLACES[-1].name)


def structures() -> Callable[[bytes], None]:
    """The first byte says what the file is called."""
    directory = place()

    def read(data: bytes) -> None:
        path = directory / NAMES[data[0] % len(NAMES)]
        path.write_bytes(data[1:])
        for item in read_structures([path]):
            if not isinstance(item, Failure):
                check(item)

    return read


def configurations() -> Callable[[bytes], None]:
    """The file, and after a zero byte the overrides."""
    path = place() / "a.toml"

    def read(data: bytes) -> None:
        text, _, rest = data.partition(b"\0")
        path.write_bytes(text)
        load_config(path, rest.decode(errors="replace").splitlines())

    return read


def datasets() -> Callable[[bytes], None]:
    """The first byte says which file of a good data set is replaced."""
    good = make_dataset(place() / "set")
    files = [array_file(good, name) for name in array_names()]
    files += [good / "manifest.json", good / "failures.jsonl"]
    kept = [path.read_bytes() for path in files]

    def read(data: bytes) -> None:
        which = data[0] % len(files)
        files[which].write_bytes(data[1:])
        try:
            summarise(Dataset.open(good))
        finally:
            files[which].write_bytes(kept[which])

    return read


def runs() -> Callable[[bytes], None]:
    """The first byte says whether it is run.json or the statistics."""
    path = place() / "statistics.npz"

    def read(data: bytes) -> None:
        if data[0] % 2:
            path.write_bytes(data[1:])
            try:
                run_form.read_statistics(path, [["onsite", "equivariant"]])
            except ValueError:
                return
        try:
            info = json.loads(data[1:])
        except (ValueError, RecursionError):
            return
        if isinstance(info, dict):
            run_form.fault(info, config_from_json(json.dumps(info.get("config")), "run.json"))

    return read


TARGETS = {f.__name__: f for f in (structures, configurations, datasets, runs)}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(
            f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} [LIBFUZZER OPTION...]"
        )
    name = sys.argv.pop(1)
    target = TARGETS[name]()
    seeds = place()
    for number, path in enumerate(sorted((PLACE / name.removesuffix("s")).rglob("*"))):
        if path.is_file():
            first = b"" if name == "configurations" else bytes([number % 256])
            (seeds / str(number)).write_bytes(first + path.read_bytes())
    warnings.simplefilter("ignore")
    logging.disable()
    np.seterr(all="ignore")

    def once(data: bytes) -> None:
        if data:
            try:
                target(data)
            except OrbqError as error:
                if not str(error):
                    raise AssertionError("a failure without a message") from error

    atheris.Setup(
        [sys.argv[0], str(seeds), "-timeout=30", "-rss_limit_mb=4096", *sys.argv[1:]], once
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
