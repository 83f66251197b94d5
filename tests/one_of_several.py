"""``orbq``'s command line as one process of a job: what it packs for updates is written to $PACKED,
and a batch takes $DELAY seconds, so that a test can meet the run half way."""

import json
import os
import time

from orbq.cli import main
from orbq.preprocess.pack import Packer

real = Packer.batch


def batch(packer, items, *epoch):
    if epoch:  # not for validation
        with open(os.environ["PACKED"], "a") as packed:
            packed.write(json.dumps([int(item) for item in items]) + "\n")
    time.sleep(float(os.environ["DELAY"]))
    return real(packer, items, *epoch)


Packer.batch = batch
main()
