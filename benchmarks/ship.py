"""Copy a trained run for others: parameters of the best validation, no paths of this machine.

    python benchmarks/ship.py RUN OUT --named runs/acac --dataset data/acac_train
    python benchmarks/ship.py RUN orbq/data/networks/NAME --named NAME --dataset NAME --taught

OUT must not exist. --named and --dataset stand in place of the paths that the run was made with
(one --dataset for the labelled set and one for each further one), --initial in place of the run
that it began from. --taught writes taught.npy, the content hashes of all it was trained on, by
which a run that begins from it tells whether it knows structures that are held out there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

import orbq
from orbq import checkpoint
from orbq.initial import INITIAL, TAUGHT_DIGITS, TAUGHT_FILE, taught_hashes
from orbq.run_files import CHECKPOINTS, RUN_FILE, STATISTICS_FILE, read_description


def ship(run: Path, out: Path, named: str, datasets: list[str], initial: str, taught: bool) -> None:
    """Write ``out``; returns when ``orbq.load`` takes it."""
    described = read_description(run)
    known = [entry["path"] for entry in described["data"]]
    if len(known) != len(datasets):
        raise SystemExit(f"{run} was trained on {len(known)} data sets: name as many by --dataset")
    names = dict(zip(known, datasets, strict=True)) | {described["directory"]: named}
    if INITIAL in described:
        if not initial:
            raise SystemExit(f"{run} began from another run: name that by --initial")
        names[described[INITIAL]["directory"]] = initial
    best = Path(CHECKPOINTS) / checkpoint.BEST
    shutil.copytree(run / best, out / best)
    shutil.copy(run / STATISTICS_FILE, out / STATISTICS_FILE)
    for file in (RUN_FILE, "summary.json", "metrics.jsonl"):
        text = (run / file).read_text(encoding="utf-8")
        for path in sorted(names, key=len, reverse=True):
            text = text.replace(json.dumps(path), json.dumps(names[path]))
        (out / file).write_text(text, encoding="utf-8")
    (out / best / "commit_success.txt").write_text("")  # its text is a path
    checkpoint.relist(out / best)
    if taught:
        hashes = np.concatenate([hashes for _, hashes in taught_hashes(run, described)])
        np.save(out / TAUGHT_FILE, np.unique(hashes.astype(TAUGHT_DIGITS)))
    orbq.load(out)
    if left := [p for p in out.rglob("*") if p.is_file() and str(run).encode() in p.read_bytes()]:
        raise SystemExit(f"{left[0]} still holds the path {run}")


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--named", required=True, help="for the run's directory")
    parser.add_argument(
        "--dataset", required=True, action="append", help="what stands for its data"
    )
    parser.add_argument("--initial", default="", help="for the run it began from, if it did")
    parser.add_argument("--taught", action="store_true", help="write taught.npy")
    given = parser.parse_args()
    if given.out.exists():
        raise SystemExit(f"{given.out} exists")
    ship(given.run, given.out, given.named, given.dataset, given.initial, given.taught)
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
