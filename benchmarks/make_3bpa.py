"""3-(benzyloxy)pyridin-2-amine (3BPA) as benchmarks/study_acac.py --molecule 3bpa wants it.

    python benchmarks/make_3bpa.py train_300K.xyz --work DIRECTORY    # a quarter of an hour

train_300K.xyz (of the BOTNet data sets) has 500 frames at 300 K. 300 of them, taken at random, are
`test`; from the other 200, `train`, come the few that train and 20 that choose the best step. `xtb`
are frames of GFN1-xTB dynamics that `orbq sample` begins at those 200, without DFT. What is there
already is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from tqdm import tqdm

from orbq.preprocess.label import preprocess
from orbq.preprocess.sample import sample

N_TEST = 300


def main() -> None:
    """Split, sample, label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="train_300K.xyz")
    parser.add_argument("--work", type=Path, required=True, help="directory of the three data sets")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    frames = ase.io.read(given.source, ":")
    order = np.random.default_rng(0).permutation(len(frames))
    for name, rows in (("test", order[:N_TEST]), ("train", order[N_TEST:])):
        file = given.work / f"{name}.extxyz"
        if not file.exists():
            ase.io.write(file, [frames[row] for row in sorted(rows)], format="extxyz")
        preprocess([file], given.work / name)
    more = given.work / "xtb.extxyz"
    if not more.exists():
        with tqdm(unit="frame") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            sample([given.work / "train.extxyz"], more, on_progress=show)
    preprocess([more], given.work / "xtb")


if __name__ == "__main__":
    main()
