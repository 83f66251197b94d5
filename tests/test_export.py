"""Exported potentials, run where there is no orbq, Flax, e3nn-jax or ASE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import ase
import jax.export
import numpy as np
import pytest
from ase.build import bulk, molecule
from tiny_run import random_run, save_run
from typer.testing import CliRunner

import orbq
from orbq import standalone
from orbq.cli import make_app
from orbq.errors import InputError
from orbq.inference import atomic_charges
from orbq.preprocess import check
from orbq.preprocess.neighbors import neighbor_list
from orbq.stablehlo import lowered
from orbq.standalone import PROGRAM, edges, padded

# what the loader may find: JAX, what JAX needs, and what jax.export reads and writes with
PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers")
ALONE = """
import importlib.util, json, sys
import numpy as np
for name in ("orbq", "flax", "e3nn_jax", "jraph", "ase", "matscipy", "jaxtyping"):
    assert importlib.util.find_spec(name) is None, name
sys.path.insert(0, sys.argv[1])
import potential
model = potential.load()
out = []
for given in json.loads(sys.stdin.read()):
    found = model(**given)
    out.append({name: np.asarray(value).tolist() for name, value in found.items()})
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def run() -> orbq.Run:
    return random_run(("onsite",), n_layers=1)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return orbq.export(run, tmp_path_factory.mktemp("out") / "potential", charges=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with nothing but PACKAGES."""
    folder = tmp_path_factory.mktemp("packages")
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).parent
        (folder / name).symlink_to(source)
        if (libraries := source.with_name(f"{name}.libs")).is_dir():
            (folder / libraries.name).symlink_to(libraries)
    return folder


def alone(packages: Path, code: str, *arguments: object, text: str = "") -> str:
    """Run ``code`` in an isolated interpreter that sees the standard library and ``packages``."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(packages)!r})" + code]
        + [str(a) for a in arguments],
        input=text,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def structures() -> list[ase.Atoms]:
    ion = molecule("CH3CH2OH")
    ion.info["charge"] = 1
    crystal = bulk("TiO", "rocksalt", a=4.2, cubic=True)
    rng = np.random.default_rng(0)
    crystal.set_cell(crystal.cell.array + 0.2 * rng.normal(size=(3, 3)), scale_atoms=True)
    slab = molecule("CH4", cell=(3.0, 3.5, 20.0), pbc=(True, True, False))
    found = [ion, crystal, slab, ase.Atoms("H")]
    for atoms in found:
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
    return found


def test_equals_the_run_without_orbq(run, exported, packages):
    given = [
        {
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "cell": atoms.cell.array.tolist(),
            "pbc": atoms.pbc.tolist(),
            "charge": atoms.info.get("charge", 0),
        }
        for atoms in structures()
    ]
    found = json.loads(alone(packages, ALONE, exported, text=json.dumps(given)))
    for atoms, exact in zip(structures(), found, strict=True):
        expected = run.predict(atoms)
        charges = atomic_charges("onsite", expected["onsite"])
        # float32, summed in another order
        assert exact["energy"] == pytest.approx(expected["energy"], abs=1e-5)
        np.testing.assert_allclose(exact["forces"], expected["forces"], atol=1e-5)
        np.testing.assert_allclose(exact["charges"], charges, atol=1e-5)
        assert np.sum(exact["charges"]) == pytest.approx(atoms.info.get("charge", 0), abs=1e-5)


def test_what_the_loader_refuses(exported, packages):
    near, thin = [[0, 0, 0], [0, 0, 0.3]], np.diag([9, 9, 0.35]).tolist()
    refused = [
        ({"numbers": [79], "positions": [[1, 0, 0]]}, "no energy for Z = [79]"),
        (
            {"numbers": [8, 1], "positions": np.eye(3)[:2].tolist(), "pbc": True},
            "pbc [True, True, True] needs independent lattice vectors",
        ),
        (
            {"numbers": [8, 1], "positions": near},
            "atoms 0 and 1 are 0.300 Å apart: at least 0.4 Å needed",
        ),
        (
            {"numbers": [1], "positions": [[0, 0, 0]], "cell": thin, "pbc": [False, False, True]},
            "atoms 0 and 0 are 0.350 Å apart",
        ),
        (
            {"numbers": [8, 1], "positions": [[0, 0, 0], [0, np.nan, 1]]},
            "the position of atom 1 is not finite: [0.0, nan, 1.0]",
        ),
    ]
    code = ALONE.replace("json.loads(sys.stdin.read())", "[]") + (
        "\nfor given in json.loads(sys.stdin.read()):\n"
        "    try:\n"
        "        model(**given)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    found = alone(packages, code, exported, text=json.dumps([given for given, _ in refused]))
    for (_, message), line in zip(refused, found.splitlines()[1:], strict=True):
        assert message in line


def test_the_loader_knows_how_near_atoms_may_be():
    assert standalone.MIN_DISTANCE == check.MIN_DISTANCE


def test_no_custom_call_is_left():
    """The tensor product's primitive is lowered to plain StableHLO, for every platform."""
    program = lowered(random_run(("onsite",)), "onsite", ["cpu", "cuda", "rocm", "tpu"])
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
    text = program.mlir_module()
    calls = {line.split("custom_call @")[1].split("(")[0] for line in text.splitlines()
             if "custom_call @" in line}  # fmt: skip
    # of the symbolic sizes: JAX resolves them when a call says what n and e are
    assert calls <= {"shape_assertion", "stablehlo.dynamic_reduce_window"}
    assert [str(a) for a in program.out_avals] == ["float32[]", "float32[n,3]", "float32[n]"]


def test_read_as_the_manifest_says(run, exported):
    """Without the loader: the arrays in the order of the manifest's inputs."""
    manifest = json.loads((exported / "manifest.json").read_text())
    program = jax.export.deserialize(bytearray((exported / PROGRAM).read_bytes()))
    positions, graph = run.graph(molecule("CH3OH"))
    arrays = {
        "positions": positions,
        "numbers": graph.nodes["numbers"],
        "shifts": graph.edges["shifts"],
        "senders": graph.senders,
        "receivers": graph.receivers,
        "charge": np.float32(0),
        "spin_multiplicity": np.float32(1),
    }
    assert set(arrays) == set(manifest["inputs"])
    out = program.call(*(arrays[name] for name in manifest["inputs"]))
    found = dict(zip(manifest["outputs"], out, strict=True))
    expected = run.predict(molecule("CH3OH"))
    references = manifest["references"]["element"]
    total = float(found["energy"]) + sum(references[str(z)] for z in molecule("CH3OH").numbers)
    assert total == pytest.approx(expected["energy"], abs=1e-4)
    np.testing.assert_allclose(found["forces"], expected["forces"], atol=1e-5)
    assert manifest["elements"]["22"] == "Ti" and manifest["cutoff"] == 4.0


@pytest.mark.parametrize("pbc", [False, True, (True, False, True)])
def test_edges_are_those_of_orbq(pbc):
    rng = np.random.default_rng(1)
    cell = 3.5 * np.eye(3) + 0.4 * rng.normal(size=(3, 3))
    x = rng.uniform(-6, 9, (8, 3))  # also outside the cell
    periodic = np.broadcast_to(pbc, 3)
    mine = edges(x, 4.0, cell, periodic)
    theirs = neighbor_list(x, 4.0, cell, periodic)
    for one, other in zip(map(rounded, (mine, theirs)), map(rounded, (theirs, mine)), strict=True):
        assert one == other
    assert len(mine[0]) == len(theirs.senders)
    assert (np.diff(mine[1]) >= 0).all()


def rounded(found) -> set[tuple[float, ...]]:
    senders, receivers, shifts = found
    return {(s, r, *v) for s, r, v in zip(senders, receivers, shifts.round(6) + 0.0, strict=True)}


def test_few_sizes_of_edges():
    sizes = set()
    for n in range(1024):
        pairs = np.zeros(n, np.int32)
        senders, receivers, shifts = padded(pairs, pairs, np.zeros((n, 3)), 5, 4.0)
        assert len(senders) == len(receivers) == len(shifts) > n
        assert (receivers[n:] == 4).all() and (shifts[n:, 0] == 8.0).all()
        sizes.add(len(senders))
    assert len(sizes) <= 8 * 16


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), [str(a) for a in arguments])
    return result.exit_code, result.output


def test_command(tmp_path):
    stored = save_run(random_run((), lmax=0, n_layers=1), tmp_path / "run")
    status, text = command("export", stored, "--platform", "cpu")
    assert status == 0 and "manifest.json, potential.bin, potential.py" in text, text
    assert sorted(p.name for p in (stored / "export").iterdir()) == [
        "manifest.json", "potential.bin", "potential.py"]  # fmt: skip
    status, text = command("export", stored, "--platform", "cpu")
    assert status == 2 and "--overwrite" in text
    status, text = command("export", stored, "--out", tmp_path / "a", "--charges")
    assert status == 2 and "predicts no charges" in text and not (tmp_path / "a").exists()
    status, text = command("export", stored, "--out", tmp_path / "a", "--platform", "abacus")
    assert status == 2 and "cpu, cuda, rocm, tpu" in text


def test_a_platform_may_be_named_alone(run, tmp_path):
    with pytest.raises(InputError, match=r"platforms \['gpu'\]: give one or more of cpu"):
        orbq.export(run, tmp_path / "out", platforms="gpu")


def test_a_place_that_cannot_be_is_told_before_anything_is_compiled(run, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(InputError, match=r"--out .*file is a file: name another"):
        orbq.export(run, tmp_path / "file" / "potential")


def test_other_directories_are_not_replaced(run, tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(InputError, match="will not be replaced"):
        orbq.export(run, tmp_path, overwrite=True)
