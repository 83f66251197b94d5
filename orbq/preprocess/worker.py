"""The labelling process: takes chunks of structures on stdin, returns their labels on stdout.

It is a process of its own, started with its own environment, because xTB may abort, hang or run out
of memory: then this process ends and nothing else does. It keeps no state between structures.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from orbq.orbitals import N_ONSITE
from orbq.preprocess import wire, xtb
from orbq.preprocess.blas import loaded_blas
from orbq.preprocess.sane import LabelError
from orbq.preprocess.wire import IDLE, POSITION
from orbq.schema import Labels


def serve() -> None:
    """Answer requests until stdin ends.

    argv[1]: descriptor of a small file, shared with the parent, where the index of the structure
    under way is kept, so that the parent knows which one ended this process.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever tblite prints goes to stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _offer_to_memory_killer()
    position = mmap.mmap(int(sys.argv[1]), POSITION.size)
    blas = loaded_blas()
    note = {"tblite": xtb.version(), "blas": blas}
    wire.send(replies, wire.pack(wire.Message({}, note)))
    parent = os.getppid()
    while (data := wire.receive(requests)) is not None:
        reply = _answer(wire.unpack(data), position, parent)
        reply.note["blas"] = [blas]
        position[:] = POSITION.pack(IDLE)
        try:
            wire.send(replies, wire.pack(reply))
        except BrokenPipeError:
            break
    os._exit(0)  # without destructors of libraries, which have nothing left to say


def _offer_to_memory_killer() -> None:
    """Where memory runs out, let Linux end this process rather than the job."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _answer(request: wire.Message, position: mmap.mmap, parent: int) -> wire.Message:
    """Labels of a chunk; the clock ends this process where one structure exceeds the time limit.

    The alarm's default action is taken by the kernel, so it works inside compiled code as well.
    """
    settings, timeout = xtb.Settings(**request.note["settings"]), request.note["timeout"] or 0.0

    def begin(i: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        position[:] = POSITION.pack(i)
        signal.setitimer(signal.ITIMER_REAL, timeout)

    labels = xtb.label_many(
        wire.structures(request.arrays), request.note["method"], settings, begin
    )
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    sizes = np.diff(request.arrays["offsets"]).tolist()
    failures = [(i, str(e)) for i, e in enumerate(labels) if isinstance(e, LabelError)]
    notes = [(i, x.note) for i, x in enumerate(labels) if isinstance(x, Labels) and x.note]
    return wire.Message(_join(labels, sizes), {"failures": failures, "notes": notes})


def _join(labels: list[Labels | LabelError], sizes: list[int]) -> dict[str, Any]:
    def rows(name: str, width: int) -> np.ndarray:
        return np.concatenate(
            [
                getattr(found, name) if isinstance(found, Labels) else np.zeros((n, width))
                for found, n in zip(labels, sizes, strict=True)
            ]
        )

    return {
        "onsite": rows("onsite", N_ONSITE),
        "xtb_forces": rows("forces", 3),
        "xtb_energy": np.array([x.energy if isinstance(x, Labels) else 0.0 for x in labels]),
        "labelled": np.array([isinstance(x, Labels) for x in labels]),
    }


if __name__ == "__main__":
    serve()
