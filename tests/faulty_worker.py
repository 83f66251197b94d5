"""A labelling process where some structures abort, crash, hang, or use up memory.

Those whose first atom has one of the x coordinates below, in Å.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from pathlib import Path

from orbq.preprocess import worker, xtb

ABORT, CRASH, HANG, MEMORY, ONCE, KILLED = 100.0, 101.0, 102.0, 103.0, 104.0, 105.0


real = xtb.singlepoint


def singlepoint(structure, *how):
    fault = round(float(structure.positions[0, 0]))
    if fault == ABORT:
        os.abort()
    if fault == CRASH:
        ctypes.string_at(0)
    if fault == HANG:
        time.sleep(1000)
    if fault == MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
        _ = b"x" * (1 << 33)
    if fault == KILLED:  # as Linux ends a process when there is no memory left
        os.kill(os.getpid(), signal.SIGKILL)
    marker = Path(os.environ.get("ORBQ_TEST_MARKER", "/nonexistent"))
    if fault == ONCE and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(structure, *how)


if __name__ == "__main__":
    xtb.singlepoint = singlepoint
    worker.serve()
