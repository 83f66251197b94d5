"""Exported potentials, run where there is no orbq, Flax, e3nn-jax or ASE."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
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
from orbq import stablehlo, standalone
from orbq.cli import make_app
from orbq.errors import InputError
from orbq.inference import atomic_charges
from orbq.preprocess import check, read
from orbq.preprocess.neighbors import neighbor_list
from orbq.schema import Structure
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
    upwards = [False, False, True]
    water = {"numbers": [8, 1, 1], "positions": [[0, 0, 0.1], [0, 0.8, -0.5], [0, -0.8, -0.5]]}
    turned = {"numbers": [8, 1], "positions": [[0, 0], [0, 0], [0, 1]]}
    box, small = (9 * np.eye(3)).tolist(), (1e-3 * np.eye(3)).tolist()
    sloping = [[9, 0, 0], [9, 0.2, 0], [0, 0, 9]]
    boundless = [[9, 0, 0], [0, np.inf, 0], [0, 0, 9]]
    crystal = water | {"cell": box, "pbc": True}
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
            {"numbers": [1], "positions": [[0, 0, 0]], "cell": thin, "pbc": upwards},
            "the cell is 0.35 Å thin, at least 0.4 Å needed: is it in Å?",
        ),
        (
            {"numbers": [8, 1], "positions": [[0, 0, 0], [0, 0, 8.7]], "cell": box, "pbc": upwards},
            "atoms 0 and 1 are 0.300 Å apart",
        ),
        (
            {"numbers": [8, 1], "positions": [[0, 0, 0], [0, np.nan, 1]]},
            "the position of atom 1 is not finite: [0.0, nan, 1.0]",
        ),
        (crystal | {"cell": small}, "the cell is 0.001 Å thin, at least 0.4 Å needed"),
        (crystal | {"cell": sloping}, "the cell is 0.2 Å thin"),
        (crystal | {"cell": boundless}, "cell is not finite: [[9.0, 0.0, 0.0], [0.0, inf, 0.0]"),
        (crystal | {"cell": [9, 9, 9]}, "cell has shape (3,): (3, 3) needed"),
        (crystal | {"cell": "cubic"}, "cell is 'cubic': lattice vectors needed"),
        (crystal | {"cell": (2e9 * np.eye(3)).tolist()}, "a vector of 2e+09 Å: at most 1e+09 Å"),
        (
            crystal | {"cell": (2e3 * np.eye(3)).tolist()},
            "the cell spans 8e+09 Å^3: at most 1e+09 Å^3",
        ),
        (crystal | {"pbc": "TTF"}, "pbc is 'TTF': one or three of True and False needed"),
        (crystal | {"pbc": [True, False]}, "pbc is [True, False]: one or three"),
        (water | {"numbers": ["O", "H", "H"]}, "numbers is ['O', 'H', 'H']: atomic numbers needed"),
        (
            water | {"numbers": [8, 1.5, 1]},
            "numbers of atom 1 is 1.5: a whole atomic number",
        ),
        (water | {"numbers": [8, 1, 1e300]}, "numbers of atom 2 is 1e+300: a whole"),
        (water | {"numbers": [[8, 1, 1]]}, "numbers has shape (1, 3): (n,) needed"),
        ({"numbers": [], "positions": []}, "numbers has no atoms: at least one needed"),
        (turned, "positions has shape (3, 2): (2, 3) needed for 2 atoms"),
        (water | {"numbers": [8, 1]}, "positions has shape (3, 3): (2, 3) needed for 2 atoms"),
        (water | {"positions": [0.0] * 9}, "positions has shape (9,): (3, 3) needed"),
        (water | {"positions": [["a", "b", "c"]] * 3}, "coordinates in Å needed"),
        (
            {"numbers": [8, 1], "positions": [[0, 0, 0], [0, 0, 1e10]]},
            "up to 1e+10 Å from the origin",
        ),
        (water | {"charge": 0.5}, "charge is 0.5: it must be a whole number"),
        (water | {"charge": [0, 1]}, "charge is [0.0, 1.0]: it must be a whole number"),
        (water | {"charge": 50}, "charge +50 is above the 8 valence electrons: at most +8"),
        (crystal | {"charge": 9}, "charge +9 is above the 8 valence electrons"),
        (
            water | {"charge": -50},
            "charge -50 makes 58 valence electrons, more than 8 orbitals hold: at least -8",
        ),
        (water | {"charge": np.nan}, "charge is nan: it must be a whole number"),
        (
            water | {"spin_multiplicity": 0},
            "spin_multiplicity is 0: 2S + 1 is a whole number, at least 1",
        ),
        (crystal | {"spin_multiplicity": 0}, "spin_multiplicity is 0"),
        (water | {"spin_multiplicity": 1.5}, "spin_multiplicity is 1.5: it must be a whole number"),
        (
            water | {"spin_multiplicity": 2},
            "spin_multiplicity 2 does not fit 10 electrons (charge +0): an even number needs",
        ),
        (
            water | {"charge": 1, "spin_multiplicity": 1},
            "spin_multiplicity 1 does not fit 9 electrons (charge +1): an odd number needs an even",
        ),
        (
            water | {"spin_multiplicity": 11},
            "electrons (charge +0) in 8 orbitals: at most 9",
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


def test_the_loader_knows_the_limits_of_orbq():
    assert standalone.MIN_DISTANCE == check.MIN_DISTANCE
    assert standalone.MIN_HEIGHT == check.MIN_HEIGHT
    assert standalone.MAX_VOLUME == check.MAX_VOLUME
    assert standalone.MAX_INTEGER == read.MAX_INTEGER


@pytest.mark.parametrize("pbc", [False, True, (True, True, False)])
def test_charges_and_multiplicities_are_those_of_orbq(pbc):
    """Every one that orbq refuses is refused, and no other."""
    run = random_run((), elements=(1, 8, 22, 66))
    potential = object.__new__(standalone.Potential)
    potential.manifest = json.loads(json.dumps(stablehlo.manifest(run, None, ["cpu"])))
    periodic = np.broadcast_to(pbc, 3)
    for z in map(np.array, ([8, 1, 1], [22], [22, 8], [1], [66])):
        for charge, spin in itertools.product(range(-20, 20), range(14)):
            x, cell = 3.0 * np.eye(3)[: len(z)], 9.0 * np.eye(3)
            reason = check.check_predicted(Structure(z, x, cell, periodic, charge, spin))
            with pytest.raises(ValueError) if reason else nullcontext():
                assert potential.multiplicity(z, charge, spin, bool(periodic.any())) == spin


@pytest.mark.parametrize("axes", [[0], [0, 2], [0, 1, 2]])
def test_cells_are_refused_before_neighbours_are_looked_for(axes, monkeypatch):
    periodic = np.isin(range(3), axes)
    monkeypatch.setattr(standalone.itertools, "product", lambda *_: pytest.fail("looked for"))
    for height in (1e-310, 1e-9, 1e-3, 0.399):
        cell = np.where(np.arange(3) == axes[0], height, 9.0)[:, None] * np.eye(3)
        with pytest.raises(ValueError, match=r"the cell is .* Å thin, at least 0\.4 Å|independent"):
            edges(np.zeros((1, 3)), 4.0, cell, periodic)
    for value in (np.nan, np.inf, 1e200):
        with pytest.raises(ValueError, match=r"cell is not finite|has a vector of 1e\+200"):
            edges(np.zeros((1, 3)), 4.0, np.full((3, 3), value), periodic)


def test_open_directions_need_no_lattice_vector():
    x = np.zeros((1, 3))
    slab = edges(x, 4.0, np.diag([3.0, 3.0, 0.0]), (True, True, False))
    assert len(slab[0]) == 4
    assert len(edges(x, 4.0, np.diag([0.41, 9.0, 9.0]), (True, False, False))[0]) == 18


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


@pytest.mark.parametrize("pbc", [True, (True, True, False)])
def test_atoms_that_have_left_the_cell_by_far_cost_no_digits(exported, pbc):
    model = standalone.load(exported)
    cell, x = np.diag([7.0, 8.0, 9.0]), molecule("CH3OH").positions
    numbers = molecule("CH3OH").numbers
    here = model(numbers, x, cell, pbc)
    steps = np.random.default_rng(0).integers(-40_000, 40_001, (len(x), 3))
    there = model(numbers, x + steps * np.broadcast_to(pbc, 3) @ cell, cell, pbc)
    # float64 keeps 1e-10 Å at 1e6 Å; float32 sums of the network the rest
    assert there["energy"] == pytest.approx(here["energy"], abs=1e-4)
    np.testing.assert_allclose(there["forces"], here["forces"], atol=1e-4)


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
