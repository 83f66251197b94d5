"""Make a DFT data set of closed-shell transition-metal complexes and small molecules.

    python benchmarks/make_tmc.py --out runs/tmc --seed 3000 --per-metal 40
    python benchmarks/make_tmc.py filter runs/tmc --out tmc_3000

For every species: an idealised structure, its GFN2-xTB minimum, and there PBE/def2-SVP energy,
forces, atomic charges (Mulliken, Löwdin), dipole and gap with PySCF; then a step to the DFT minimum
("corrected"), and in the second pass a thermal and a stretched structure around it. About 7 CPU
seconds a structure, on one core. Units: eV, Å, e.

The run can be killed at any moment: the same command continues it, and a larger --per-metal,
--limit or --passes extends it. To use several cores, give each process its own --out and its own
--metals, and name all the directories to `filter`. In --out appear

    raw.extxyz          labelled structures, appended one by one
    log.jsonl           every attempt, kept or rejected, with the reason
    geoms/              geometries before DFT
    unlabelled.extxyz   with --structures-only: two GFN2-xTB geometries per complex, no DFT

Seeds 2026, 2027 and 2030 are spoken for: the embedded data sets and a blind test are drawn from
them. They are refused without --force, and the species they draw are left out of every other seed
(seed 3000 would otherwise repeat two fifths of them). Use seeds from 3000 up.

The DFT labels need PySCF: pip install 'orbq[make-data]'.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PySCF start their thread pools

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from orbq.errors import InputError, OrbqError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "filter":
            _filter(options)
        else:
            _generate(options)
    except OrbqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary + "\n" + rest, formatter_class=style)
    add = parser.add_argument
    add(
        "--out", type=Path, default=Path("runs/tmc"), metavar="DIR", help="run directory (runs/tmc)"
    )
    add("--seed", type=_number(0), default=3000, help="what is drawn (3000)")
    add("--per-metal", type=_number(1), default=14, metavar="N", help="complexes of a metal (14)")
    add("--metals", metavar="Ti,Zr,...", help="only these (all 30 of Sc-Zn, Y-Cd, La, Hf-Hg)")
    add("--passes", type=int, choices=(1, 2), default=2, help="1: without md, stretched (2)")
    add("--hours", type=_hours, default=math.inf, metavar="H", help="stop after this long")
    add("--limit", type=_number(1), default=sys.maxsize, metavar="N", help="the first N species")
    add("--structures-only", action="store_true", help="GFN2-xTB geometries, no DFT, no PySCF")
    text = "leave out the species of these data sets"
    add("--known", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    add("--force", action="store_true", help="allow a reserved seed and reserved species")
    commands = parser.add_subparsers(dest="command", title="afterwards")
    description = "Check, deduplicate, round and compress the structures of runs."
    filters = commands.add_parser("filter", help="make a data set of runs", description=description)
    add = filters.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE", help="run directory or extxyz(.gz) file")
    text = "leave out the species of these data sets: what is new since they were written"
    add("--known", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    add("--out", required=True, metavar="STEM", help="writes STEM.extxyz.gz, STEM_stats.json")
    add("--structures-only", action="store_true", help="the geometries without DFT")
    add("--force", action="store_true", help="replace existing output")
    return parser


def _number(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from {minimum} up")
        return int(text)

    return number


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not hours > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of hours above 0")
    return hours


def _generate(given: argparse.Namespace) -> None:
    from tmc.generate import Options, generate, generate_geometries
    from tmc.species import METALS

    metals = METALS if given.metals is None else tuple(given.metals.split(","))
    options = Options(
        out=given.out,
        seed=given.seed,
        per_metal=given.per_metal,
        metals=metals,
        passes=given.passes,
        hours=given.hours,
        limit=given.limit,
        force=given.force,
        known=_known(given),
    )
    (generate_geometries if given.structures_only else generate)(options)


def _known(given: argparse.Namespace) -> frozenset[str]:
    """The species of --known."""
    from tmc.filter import read_frames

    known = read_frames(given.known, not given.structures_only) if given.known else []
    return frozenset(frame.info["group"] for frame in known)


def _filter(given: argparse.Namespace) -> None:
    from tmc.filter import filter_labelled, filter_unlabelled, read_frames, save
    from tmc.report import statistics

    stem = Path(given.out)
    data, stats = (stem.with_name(stem.name + end) for end in (".extxyz.gz", "_stats.json"))
    if data.exists() and not given.force:
        raise InputError(f"{data}: exists; choose another --out, or --force to replace it")
    frames = read_frames(given.sources, labelled=not given.structures_only)
    filtered = (filter_unlabelled if given.structures_only else filter_labelled)(frames)
    known = _known(given)
    new = [frame for frame in filtered.frames if frame.info["group"] not in known]
    filtered = filtered._replace(frames=new)
    print(f"{len(frames)} structures read, {len(filtered.frames)} kept")
    for reason, count in sorted(filtered.dropped.items()):
        print(f"  dropped {count}: {reason}")
    if not filtered.frames:
        raise InputError(f"nothing is left of {', '.join(map(str, given.sources))}")
    if not given.structures_only:
        report = statistics(filtered)
        stats.write_text(json.dumps(report, indent=1) + "\n")
        _print_report(report)
    print(f"wrote {data}, {save(filtered.frames, data) / 1e6:.2f} MB")


def _print_report(report: dict) -> None:
    print(
        f"{report['structures']} structures of {report['groups']} groups; "
        f"{report['tm_structures']} of {report['tm_groups']} complexes of {report['metals']} metals"
    )
    for key, value in report.items():
        if isinstance(value, float):
            print(f"  {key} {value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
