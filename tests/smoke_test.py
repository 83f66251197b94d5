"""Is the installed package whole? Run by ``make package`` with the interpreter of a fresh
environment that has nothing but orbq's wheel, in an empty directory outside of the checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
WANTED = ("py.typed", "data/tmc.extxyz.gz", "data/tmc_unlabelled.extxyz.gz", "data/demo.toml")
CONFIG = """
[data]
dataset = "few"
split = "within"
validation_fraction = 0.2
test_fraction = 0.3

[model]
n_channels = 4
n_layers = 1
radial_hidden = [4]

[loss.weights]
onsite = 1.0

[training]
n_steps = 4
warmup_steps = 1
validate_every = 2
batch_size = 4
"""


def orbq(*arguments: str) -> str:
    """What ``orbq ARGUMENTS`` prints; ends this process when it fails."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTHON")}
    environment.update(JAX_PLATFORMS="cpu", ORBQ_CACHE_DIR=str(Path.cwd() / "cache"))
    command = [str(Path(sys.executable).with_name("orbq")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"orbq {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


def check(right: bool, what: str) -> None:
    """End this process with a message unless ``right``."""
    if not right:
        sys.exit(f"the wheel is wrong: {what}")


def check_files() -> None:
    """The wheel holds the package, all of it, and nothing else."""
    import orbq

    place = Path(orbq.__file__).resolve().parent
    check(CHECKOUT not in place.parents, f"orbq comes from the checkout, {place}")
    check(not list(Path.cwd().iterdir()), "the directory is not empty")
    files = [str(path) for path in metadata.files("orbq") or []]
    package = {name.removeprefix("orbq/") for name in files if name.startswith("orbq/")}
    sources = CHECKOUT / "orbq"
    networks = (path for path in (sources / "data" / "networks").rglob("*") if path.is_file())
    modules = {str(path.relative_to(sources)) for path in (*sources.rglob("*.py"), *networks)}
    check(not (lost := {*modules, *WANTED} - package), f"without {sorted(lost)}")
    check(not (alien := {n for n in files if n.endswith((".so", ".pyd"))}), f"{alien} is not pure")
    top = {name.split("/")[0] for name in files if not name.startswith("..")}
    check(top == {"orbq", f"orbq-{orbq.__version__}.dist-info"}, f"holds {sorted(top)}")
    check(metadata.version("orbq") == orbq.__version__, "two versions")


def check_work() -> None:
    """Help, the embedded data, labels, training, prediction."""
    check("preprocess" in orbq("--help"), "orbq --help names no command")
    check("labels water" in orbq("doctor"), "orbq doctor checks no labels")
    import ase.io
    import numpy as np

    import orbq as package

    check(package.load("gfn1-metals").targets == ("onsite",), "the embedded network is no run")
    atoms = [a for a in ase.io.read(package.embedded("tmc"), ":") if a.info["metal"] == "none"]
    ase.io.write("few.extxyz", atoms[:30])
    orbq("preprocess", "few.extxyz", "--out", "few")
    Path("few.toml").write_text(CONFIG, encoding="utf-8")
    orbq("train", "few.toml")
    orbq("predict", "runs/few", "few.extxyz", "--out", "out.extxyz", "--charges")
    predicted = ase.io.read("out.extxyz", ":")
    check(len(predicted) == 30, f"{len(predicted)} structures predicted of 30")
    check(all(np.isfinite(a.get_forces()).all() for a in predicted), "forces are not finite")
    found = {path.name for path in Path.cwd().iterdir()}
    left = {"few.extxyz", "few", "few.toml", "runs", "out.extxyz", "cache"}
    check(found == left, f"left behind: {sorted(found - left)}")


if __name__ == "__main__":
    check_files()
    check_work()
    versions = f"Python {sys.version.split()[0]}, orbq {metadata.version('orbq')}"
    print(f"the wheel works from an empty directory: {versions}")
