"""The labelling stage: values, masks, failures, continuation, and processes that die."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule

from orbq import orbitals
from orbq.errors import InputError, OrbqError
from orbq.preprocess import schedule, xtb
from orbq.preprocess.frames import find_sources, read_frames
from orbq.preprocess.label import Progress, Recipe, Resources, preprocess
from orbq.preprocess.neighbor_cache import neighbors
from orbq.preprocess.read import Keys, read_structures

ONE = Resources(workers=1)
TWO = Resources(workers=2)
NAMES = ("H2O", "CH4", "NH3", "C6H6", "CH3OH", "SO2", "H2CO", "C2H6", "N2", "CO2")


def molecules(repeat: int = 1) -> list:
    rng = np.random.default_rng(1)
    out = []
    for k in range(repeat):
        for name in NAMES:
            atoms = molecule(name)
            atoms.positions += 0.02 * rng.normal(size=atoms.positions.shape)
            atoms.info.update(energy=-float(k), group=name)
            out.append(atoms)
    return out


def fingerprint(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a data set."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_stored_labels_are_those_of_single_calls(tmp_path):
    frames = [frame.atoms for frame in read_frames(find_sources(["tmc"])[0])][::20]
    ase.io.write(tmp_path / "some.extxyz", frames)
    dataset = preprocess([tmp_path / "some.extxyz"], tmp_path / "set", resources=TWO)
    structures = list(read_structures([tmp_path / "some.extxyz"]))
    assert len(dataset) == len(structures) == 39
    for i in range(0, 39, 3):
        label, rows = xtb.label(structures[i]), dataset.structure_slice(i)
        # a preloaded BLAS sums in another order
        np.testing.assert_allclose(dataset["onsite"][rows], label.onsite, atol=1e-10)
        np.testing.assert_allclose(dataset["xtb_forces"][rows], label.forces, atol=1e-8)
        assert dataset["xtb_energy"][i] == pytest.approx(label.energy, abs=1e-8)
        np.testing.assert_array_equal(dataset["positions"][rows], structures[i].positions)
    charges = orbitals.atomic_charges(np.asarray(dataset["onsite"]))
    total = np.add.reduceat(charges, dataset.offsets[:-1])
    np.testing.assert_allclose(total, dataset["total_charge"], atol=1e-9)
    assert dataset.manifest["counts"]["labels"]["dft_charges"] == 39
    assert dataset.manifest["keys"]["energy"] == {"energy": 39}


def test_unwrapped_atoms_of_a_crystal_are_stored_in_its_cell(tmp_path):
    """As after long diffusion: the same labels, neighbours and distances in float32 as at home."""
    home = bulk("Si", cubic=True)
    home.positions += 0.05 * np.random.default_rng(0).normal(size=(8, 3))
    away = home.copy()
    steps = np.random.default_rng(1).integers(-40_000, 40_001, (8, 3))
    away.positions += steps @ home.cell.array
    ase.io.write(tmp_path / "two.extxyz", [home, away])
    data = preprocess([tmp_path / "two.extxyz"], tmp_path / "set", resources=ONE)
    there = np.asarray(data["positions"][8:])
    assert np.abs(there).max() < 10
    near = neighbors(data, 5.0)
    n = near.offsets[1]
    assert near.offsets[2] == 2 * n
    distances = [
        np.linalg.norm(
            data["positions"][rows][near.receivers[edges]]
            - data["positions"][rows][near.senders[edges]]
            + near.images[edges] @ home.cell.array,
            axis=1,
        )
        for rows, edges in ((slice(8), slice(n)), (slice(8, 16), slice(n, 2 * n)))
    ]
    # the file has eight decimals, of 2e5 Å
    np.testing.assert_allclose(*map(np.sort, distances), atol=1e-7)
    assert data["xtb_energy"][1] == pytest.approx(data["xtb_energy"][0], abs=1e-6)


def test_result_does_not_depend_on_the_number_of_processes(tmp_path):
    one = preprocess(molecules(3), tmp_path / "one", resources=ONE)
    two = preprocess(molecules(3), tmp_path / "two", resources=TWO)
    assert fingerprint(one.path) == fingerprint(two.path)
    for name, stated in one.manifest["arrays"].items():
        assert fingerprint(one.path)[f"{name}.npy"] == stated["sha256"]
    assert not (one.path / ".job").exists()


def test_failures_are_listed_and_masked(tmp_path):
    good, small, twins = molecules()[:1], molecule("CH4"), molecule("N2")
    small.set_cell([5, 5, 5])
    small.pbc = True
    small.info["energy"] = -9.0
    twins.positions[:] = 0.0
    dataset = preprocess([twins, *good, small], tmp_path / "set", resources=ONE)
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset.mask("onsite"), [True, False])
    np.testing.assert_array_equal(dataset.mask("energy"), [True, True])
    assert dataset["energy"][1] == -9.0
    assert not dataset["onsite"][dataset.structure_slice(1)].any()
    assert not dataset["xtb_forces"][dataset.structure_slice(1)].any()
    entries = list(dataset.failures())
    assert [(e["frame"], e["kind"]) for e in entries] == [(0, "rejected"), (2, "labels missing")]
    assert "0.000 Å apart" in entries[0]["reason"]
    assert "cell height 5.00 Å below 10 Å" in entries[1]["reason"]
    counts = dataset.manifest["counts"]
    assert (counts["rejected"], counts["without_xtb"]) == (1, 1)


def test_the_same_job_is_recognised_and_another_refused(tmp_path):
    out = tmp_path / "set"
    first = preprocess(molecules(), out, resources=ONE)
    before = fingerprint(out)
    assert len(preprocess(molecules(), out, resources=TWO)) == len(first)
    assert fingerprint(out) == before
    with pytest.raises(InputError, match="its method is different"):
        preprocess(molecules(), out, Recipe("GFN2-xTB"), ONE)
    with pytest.raises(InputError, match="its input is different"):
        preprocess(molecules()[1:], out, resources=ONE)
    with pytest.raises(InputError, match="its keys is different"):
        preprocess(molecules(), out, Recipe(keys=Keys(energy="energy")), ONE)


@pytest.mark.parametrize("method", orbitals.METHODS)
def test_methods_by_name(tmp_path, method):
    dataset = preprocess(molecules()[:2], tmp_path / "set", Recipe(method), ONE)
    assert dataset.method == method
    structure = next(iter(read_structures_of(molecules()[:1])))
    expected = xtb.label(structure, method).onsite
    np.testing.assert_allclose(dataset["onsite"][:3], expected, atol=1e-8)


def read_structures_of(atoms):
    from orbq.preprocess.frames import Source
    from orbq.preprocess.read import Reader

    return Reader([Source("memory", Path(), "")], atoms=atoms)


def test_an_unknown_method_is_named(tmp_path):
    with pytest.raises(InputError, match="unknown xTB method 'PM6'; known: GFN1-xTB"):
        preprocess(molecules(), tmp_path / "set", Recipe("PM6"), ONE)


def test_progress_counts_structures_and_failures(tmp_path):
    seen: list[Progress] = []
    twins = molecule("N2")
    twins.positions[:] = 0.0
    preprocess([*molecules(2), twins], tmp_path / "set", resources=ONE, on_progress=seen.append)
    assert list(dict.fromkeys(p.phase for p in seen)) == ["read", "label", "store", "done"]
    assert seen[-1] == Progress("done", 20, 20, 1.0, 1, 0)
    shares = [p.share for p in seen if p.phase == "label"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_chunks_shrink_towards_the_end_and_the_largest_come_first():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 100, 3000)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    numbers = rng.choice([1, 6, 8, 26], offsets[-1])
    cost = schedule.costs(numbers, offsets, "GFN1-xTB")
    n_orbitals = np.array([2, 4, 9, 9])  # H, O, Fe and the Fe of the next line
    assert schedule.costs(np.array([1, 8, 26, 26]), np.array([0, 2, 4]), "GFN1-xTB") == (
        pytest.approx(1.5e-3 + 1.6e-7 * np.array([n_orbitals[:2].sum(), 18.0]) ** 2.6)
    )
    order, bounds, chunk = schedule.plan(cost)
    assert sorted(order) == list(range(3000))
    assert np.all(np.diff(cost[order]) <= 0)
    np.testing.assert_allclose(chunk, np.add.reduceat(cost[order], bounds[:-1]))
    left = np.cumsum(chunk[::-1])[::-1]  # when a chunk begins, itself included
    limit = np.clip(left * schedule.PART, schedule.SHORTEST, schedule.LONGEST)
    assert np.all((chunk <= limit) | (np.diff(bounds) == 1))
    whole = slice(0, -1)  # the last one is a rest
    assert np.all(chunk[whole] + cost[order[bounds[1:-1]]] > limit[whole])
    assert chunk[-10:].max() < 0.2 * chunk[0]
    alone = schedule.plan(np.array([1.0, 500.0, 1.0]))
    np.testing.assert_array_equal(alone[0], [1, 0, 2])
    np.testing.assert_array_equal(alone[1], [0, 1, 2, 3])


def test_a_job_holds_tens_of_bytes_a_structure(tmp_path):
    """Its plan and ledger; inputs and labels are on the disk."""
    import tracemalloc

    from orbq.preprocess.job import Ledger, Workspace
    from orbq.preprocess.wire import Message

    n = 100_000
    numbers, offsets = np.ones(n, np.int32), np.arange(n + 1)
    work = Workspace(tmp_path / "set")
    work.acquire()
    tracemalloc.start()
    try:
        chunks = schedule.plan(schedule.costs(numbers, offsets, "GFN1-xTB"))
        ledger = Ledger(work, offsets, chunks)
        for chunk in range(len(chunks.cost)):
            m = len(chunks.members(chunk))
            shapes = {"onsite": (m, 47), "xtb_forces": (m, 3), "xtb_energy": (m,)}
            arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
            ledger.record(chunk, Message(arrays, {"failures": [], "notes": [], "blas": []}))
        ledger.commit()
        del arrays
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        work.release()
    ledger.finish()
    ledger.close()
    assert kept < 48 * n  # order and energy of 8 bytes, whether it is labelled: 1, chunks: few
    assert peak < 200 * n  # sorting by cost


def test_two_jobs_do_not_share_a_directory(tmp_path):
    from orbq.preprocess.job import Workspace

    held = Workspace(tmp_path / "set")
    held.acquire()
    try:
        with pytest.raises(InputError, match="another process is writing"):
            preprocess(molecules(), tmp_path / "set", resources=ONE)
    finally:
        held.release()
    assert len(preprocess(molecules(), tmp_path / "set", resources=ONE)) == 10


def test_a_job_that_another_process_has_just_finished_is_not_begun_again(tmp_path, monkeypatch):
    """Between a look for the manifest and the lock: the finished arrays are not touched."""
    from orbq.preprocess.job import Workspace

    out, acquire = tmp_path / "set", Workspace.acquire

    def late(work):
        monkeypatch.setattr(Workspace, "acquire", acquire)
        preprocess(molecules(), out, resources=ONE)
        acquire(work)

    monkeypatch.setattr(Workspace, "acquire", late)
    monkeypatch.setattr("orbq.preprocess.label._read", _only_once(monkeypatch))
    assert len(preprocess(molecules(), out, resources=ONE)) == 10
    assert not (out / ".job").exists()
    assert len(preprocess(molecules(), out, resources=ONE)) == 10


def _only_once(monkeypatch):
    from orbq.preprocess import label

    real = label._read

    def read(*arguments):
        monkeypatch.setattr(label, "_read", lambda *again: pytest.fail("it is read again"))
        return real(*arguments)

    return read


def test_a_full_disk_is_told_and_the_job_goes_on(tmp_path, monkeypatch):
    from orbq.preprocess import job

    expected = fingerprint(preprocess(molecules(2), tmp_path / "whole", resources=ONE).path)
    real, written = job.os.pwrite, []

    def full(descriptor, data, position):
        written.append(len(data))
        if len(written) > 40:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, position)

    monkeypatch.setattr(job.os, "pwrite", full)
    with pytest.raises(OrbqError, match=r"no room left.*same command again"):
        preprocess(molecules(2), tmp_path / "set", resources=ONE)
    monkeypatch.setattr(job.os, "pwrite", real)
    assert fingerprint(preprocess(molecules(2), tmp_path / "set", resources=ONE).path) == expected


def test_manifest_says_what_was_done(tmp_path):
    manifest = preprocess(molecules()[:2], tmp_path / "set", resources=ONE).manifest
    assert json.loads((tmp_path / "set" / "manifest.json").read_text()) == manifest
    assert manifest["units"]["forces"] == "eV/Å"
    assert manifest["tblite_version"] == xtb.version()
    assert manifest["settings"]["accuracy"] == 0.1
    assert manifest["sources"][0]["name"] == "atoms in memory"
    assert len(manifest["blas"]) == 1


def test_names_and_modules_of_the_working_directory_are_harmless(tmp_path, monkeypatch):
    """A file whose name is not UTF-8, with a structure that is left out, beside a user's scripts
    called like modules that the labelling processes import."""
    monkeypatch.chdir(tmp_path)
    for name in ("random.py", "select.py"):
        Path(name).write_text("raise SystemExit('a script of the user')\n")
    name = b"caf\xe9.xyz".decode(errors="surrogateescape")
    Path(name).write_text("1\n\nHe 0 0 0\n1\ncharge=9\nHe 0 0 0\n")
    made = preprocess(name, "out", resources=Resources(workers=1))
    assert len(made) == 1 and made.mask("xtb_energy").all()
    (failure,) = (Path("out") / "failures.jsonl").read_text().splitlines()
    assert json.loads(failure)["file"] == name


@pytest.mark.parametrize("height", [-1.0, float("nan")])
def test_a_cell_height_that_is_none_is_refused(tmp_path, height):
    recipe = Recipe(settings=xtb.Settings(min_height=height))
    with pytest.raises(InputError, match="must be 0 or more"):
        preprocess(molecule("H2O"), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file/sub.* cannot be made"):
        preprocess(molecule("H2O"), tmp_path / "file" / "sub")
