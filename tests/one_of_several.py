"""``orbq``'s command line as one process of a job: what it packs for updates is written to $PACKED,
with the place of its stage among those that packed, and a batch takes $DELAY seconds, so that a
test can meet the run half way."""

import json
import os
import time

from orbq.cli import main
from orbq.preprocess.pack import Packer

real = Packer.batch
packers: list[Packer] = []  # one for each stage


def batch(packer, items, *epoch):
    if epoch:  # not for validation
        if not any(packer is known for known in packers):
            packers.append(packer)
        with open(os.environ["PACKED"], "a") as packed:
            packed.write(json.dumps([len(packers) - 1, *map(int, items)]) + "\n")
    time.sleep(float(os.environ["DELAY"]))
    return real(packer, items, *epoch)


Packer.batch = batch
main()
