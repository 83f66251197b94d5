"""Runs of the script that made the embedded data sets: resuming, failures, the command line.

None of these tests needs PySCF: where a whole run is made, a harmonic well stands for the DFT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms

from orbq.errors import InputError, OrbqError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import make_tmc
from tmc import archive, dft, filter, generate, sampling, species

# --------------------------------------------------------------------------- the run


def _options(out: Path, **changes: object) -> generate.Options:
    options = generate.Options(
        out=out, seed=3000, per_metal=1, metals=species.METALS, passes=2, hours=1.0,
        limit=10**6, force=False,
    )  # fmt: skip
    return options._replace(**changes)


class Well:
    """Harmonic wells in place of DFT: near each first structure, with charges that sum up.

    Interrupts (KeyboardInterrupt) at the call with the number ``stop``.
    """

    def __init__(self, stop: int = -1) -> None:
        self.calls, self.stop = 0, stop

    def __call__(
        self, atoms: Atoms, charge: int, density: np.ndarray | None = None
    ) -> dft.DFTLabels:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        rigid = 0.1 * (atoms.positions - atoms.positions.mean(0))
        energy = 0.5 * 0.1 * float(((atoms.positions - atoms.positions.mean(0)) ** 2).sum())
        even = np.full(len(atoms), charge / len(atoms))
        return dft.DFTLabels(energy, -rigid, even, even, np.zeros(3), 3.0, np.eye(2))


def _run(monkeypatch: pytest.MonkeyPatch, well: Well, options: generate.Options) -> None:
    monkeypatch.setattr(generate, "label", well)
    monkeypatch.setattr(generate, "require_pyscf", lambda: None)
    monkeypatch.setattr(generate, "level_of_theory", lambda: "harmonic well")
    generate.generate(options)


def test_an_interrupted_run_continues_to_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def options(out: str) -> generate.Options:
        return _options(tmp_path / out, metals=("Ag", "Cu"), limit=2)

    whole = Well()
    _run(monkeypatch, whole, options("whole"))
    for stop in (0, 2, 1, -1):
        try:
            _run(monkeypatch, Well(stop), options("parts"))
        except KeyboardInterrupt:
            with open(tmp_path / "parts" / "raw.extxyz", "a") as file:
                file.write("5\nProperties=species:S:1:pos:R:3 cut sho")
            with open(tmp_path / "parts" / "log.jsonl", "a") as file:
                file.write('{"group": "A')
    runs = [filter.read_frames([tmp_path / out]) for out in ("whole", "parts")]
    assert len(runs[0]) == whole.calls == 8
    for was, now in zip(*runs, strict=True):
        assert (was.info["group"], was.info["geometry"]) == (
            now.info["group"],
            now.info["geometry"],
        )
        # a continued run starts from positions and forces read back with eight decimals
        np.testing.assert_allclose(now.positions, was.positions, atol=1e-6)
        assert now.info["energy"] == pytest.approx(was.info["energy"], abs=1e-6)
    output = capsys.readouterr().out
    assert "dropped 12 bytes" in output and "left" in output

    text, again = (tmp_path / "parts" / "raw.extxyz").read_text(), Well()
    _run(monkeypatch, again, options("parts"))
    assert again.calls == 0
    assert (tmp_path / "parts" / "raw.extxyz").read_text() == text


def test_a_failed_structure_is_logged_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fragile(Well):
        def __call__(self, atoms: Atoms, *rest: object) -> dft.DFTLabels:
            if "Ag" in atoms.get_chemical_symbols():
                raise sampling.RejectedError("gap 0.10 eV")
            return super().__call__(atoms, *rest)

    _run(monkeypatch, Fragile(), _options(tmp_path, metals=("Ag", "Cu"), limit=2, passes=1))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    silver = [(e["geom"], e["ok"], e["why"]) for e in log if e["group"].startswith("Ag")]
    assert silver == [("relaxed", False, "gap 0.10 eV"), ("failed", False, "species skipped")]
    assert [e["geom"] for e in log if e["ok"]] == ["relaxed", "corrected"]


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "_append", full)
    with pytest.raises(OSError, match="No space left"):
        _run(monkeypatch, Well(), _options(tmp_path, metals=("Ag",), limit=1))


def test_structures_only_makes_two_frames_and_resumes(tmp_path: Path) -> None:
    options = _options(tmp_path, metals=("Cu", "Ag"), limit=2)
    generate.generate_geometries(options._replace(limit=1))
    generate.generate_geometries(options)
    frames = filter.read_frames([tmp_path], labelled=False)
    assert [f.info["geometry"] for f in frames] == ["relaxed", "rattled"] * 2
    text = (tmp_path / "unlabelled.extxyz").read_text()
    generate.generate_geometries(options)
    assert (tmp_path / "unlabelled.extxyz").read_text() == text


def test_a_directory_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        archive.Archive(tmp_path),
        pytest.raises(InputError, match="another process is writing here"),
    ):
        archive.Archive(tmp_path)
    with archive.Archive(tmp_path):
        pass


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("raw.extxyz", "1\nProperties=species:S:1:pos:R:3\nH 0 0 0\nnonsense\n", "line 4"),
        ("log.jsonl", '{"group": "a", "geom": "b"}\nnonsense\n', "line 2"),
    ],
)
def test_damage_in_the_middle_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        archive.Archive(tmp_path)


def test_damaged_geometries_are_named(tmp_path: Path) -> None:
    with archive.Archive(tmp_path) as run:
        (tmp_path / "geoms" / "x.json").write_text('{"relaxed": 3}')
        with pytest.raises(InputError, match="delete it and rerun"):
            run.load_geometries("x")


# --------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "2027"], "--seed 2027 is spoken for"),
        (["--metals", "Ti,Xx"], "'Xx' not among Sc, Ti"),
        (["filter", "absent", "--out", "x"], "absent: no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyscf", SimpleNamespace())
    assert make_tmc.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--per-metal", "0"], ["--hours", "nan"], ["--passes", "3"], ["--seed", "-1"]]
)
def test_bad_options_exit_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        make_tmc.main(arguments)
    assert exit_info.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_missing_pyscf_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyscf", None)
    assert make_tmc.main(["--out", str(tmp_path / "run")]) == OrbqError.exit_status
    assert "pip install 'orbq[make-data]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_force_allows_a_reserved_seed_and_its_species(tmp_path: Path) -> None:
    options = _options(tmp_path, seed=2026, per_metal=14, force=True)
    assert len(generate.planned_species(options)) == 533


def test_filter_command_refuses_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.generate_geometries(_options(tmp_path / "run", metals=("Ag",), limit=1))
    command = [
        "filter", str(tmp_path / "run"), "--structures-only", "--out", str(tmp_path / "set.v1")
    ]  # fmt: skip
    assert make_tmc.main(command) == 0
    data = (tmp_path / "set.v1.extxyz.gz").read_bytes()
    assert make_tmc.main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert make_tmc.main([*command, "--force"]) == 0
    assert (tmp_path / "set.v1.extxyz.gz").read_bytes() == data


def test_filter_leaves_out_what_is_known(tmp_path: Path) -> None:
    """A run that goes on is written as what is new since it was written first."""
    run = tmp_path / "run"
    outs = [tmp_path / name for name in ("first", "rest")]
    generate.generate_geometries(_options(run, metals=("Ag",), limit=1))
    assert make_tmc.main(["filter", str(run), "--structures-only", "--out", str(outs[0])]) == 0
    generate.generate_geometries(_options(run, metals=("Ag", "Cu"), limit=3))
    first = f"{outs[0]}.extxyz.gz"
    more = ["filter", str(run), "--structures-only", "--known", first, "--out", str(outs[1])]
    assert make_tmc.main(more) == 0
    groups = [
        {frame.info["group"] for frame in filter.read_frames([Path(f"{out}.extxyz.gz")], False)}
        for out in outs
    ]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        make_tmc.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for word in ("--seed", "filter", "2026, 2027 and 2030", "make-data", "raw.extxyz"):
        assert word in text
