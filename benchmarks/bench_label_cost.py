"""What a label costs: DFT against GFN1-xTB, CPU time on the same structures.

    python benchmarks/bench_label_cost.py [--n 8]       # two minutes; needs orbq[make-data]

Random structures of benchmarks/data/tmc_3000.extxyz.gz, one after the other on one core: energy,
forces and charges from PBE/def2-SVP (tmc.dft.label), and all GFN1-xTB labels (xtb.label, with the
BLAS of tblite's wheel). Appends to results/label_cost.jsonl.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PySCF start their thread pools

import argparse
import json
import time
from pathlib import Path

import ase.io
import numpy as np
from tmc.dft import label as dft_label

from orbq.preprocess import xtb
from orbq.preprocess.read import read_structures
from orbq.schema import Structure
from orbq.study.run import provenance

HERE = Path(__file__).parent
SOURCE = HERE / "data" / "tmc_3000.extxyz.gz"
RESULTS = HERE / "results" / "label_cost.jsonl"


def main() -> None:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--n", type=int, default=8, help="structures")
    given = parser.parse_args()
    frames = ase.io.read(SOURCE, ":")
    structures = [s for s in read_structures([str(SOURCE)]) if isinstance(s, Structure)]
    xtb.label(structures[0])  # imports
    seconds: dict[str, list[float]] = {"dft": [], "gfn1": []}
    for i in np.random.default_rng(0).choice(len(frames), given.n, replace=False):
        begin = time.process_time()
        dft_label(frames[i], int(frames[i].info["charge"]))
        middle = time.process_time()
        xtb.label(structures[i])
        seconds["dft"].append(middle - begin)
        seconds["gfn1"].append(time.process_time() - middle)
    means = {name: float(np.mean(each)) for name, each in seconds.items()}
    found = {"n": given.n, "mean_s": means, "ratio": means["dft"] / means["gfn1"]}
    print(json.dumps(found))
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(json.dumps(found | {"each_s": seconds, "provenance": provenance()}) + "\n")


if __name__ == "__main__":
    main()
