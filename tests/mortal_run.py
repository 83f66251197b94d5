"""``python mortal_run.py CONFIG.json SEED``: one training run in ten lives, each ended by SIGKILL.

Five end by the clock, some moments after a random update; five within the writing of a checkpoint,
after a random one of its file operations, of which half is done. One line of JSON for each life.
The lives are forked from a process that has imported everything and has not started JAX yet.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from orbq import checkpoint, fit
from orbq.config import Config, config_from_json


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def report_updates(pipe: int) -> None:
    """One byte into the pipe for every update that is packed."""
    real = fit.to_batch

    def told(packed: Any) -> Any:
        os.write(pipe, b".")
        return real(packed)

    fit.to_batch = told


def end_within_a_save(left: int) -> None:
    """End at the file operation number ``left`` of ``checkpoint.save``: those that write leave half
    of what they should, those that move or remove have not begun."""

    def counted(real: Callable[..., Any], half: Callable[..., None]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                half(*args)
                end()
            return real(*args, **options)

        return operation

    def nothing(*args: Any) -> None: ...

    def half_of_the_files(checkpointer: Any, directory: Path, tree: Any) -> None:
        write_arrays(checkpointer, directory, tree)
        checkpointer.wait_until_finished()
        for path in sorted(p for p in directory.rglob("*") if p.is_file())[::2]:
            path.unlink()

    def half_of_the_text(path: Path, text: str) -> None:
        path.with_name(path.name + ".tmp").write_text(text[: len(text) // 2])

    class Operations:
        rmtree = staticmethod(counted(shutil.rmtree, nothing))

    write_arrays = ocp.StandardCheckpointer.save
    ocp.StandardCheckpointer.save = counted(write_arrays, half_of_the_files)
    checkpoint.write_atomically = counted(checkpoint.write_atomically, half_of_the_text)
    Path.rename = counted(Path.rename, nothing)
    checkpoint.shutil = Operations


def live(config: Config, rng: random.Random, in_a_save: bool) -> dict[str, Any]:
    """One life; how it ended and what it left."""
    n_updates, delay, n_operations = rng.randint(3, 9), rng.uniform(0, 0.1), rng.randint(1, 16)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        if in_a_save:
            end_within_a_save(n_operations)
        else:
            report_updates(writer)
        fit.fit(config)
        os._exit(0)
    os.close(writer)
    if not in_a_save:
        for _ in range(n_updates):
            os.read(reader, 1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    directory = Path(config.run.directory) / "checkpoints"
    return {
        "in_a_save": in_a_save,
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "whole": [path.name for path in checkpoint.resumable(directory)],
        "half": sorted(p.name for p in directory.glob("*.*")),
    }


def main() -> None:
    config = config_from_json(Path(sys.argv[1]).read_text())
    rng = random.Random(int(sys.argv[2]))
    for life in range(10):
        print(json.dumps(live(config, rng, in_a_save=life % 2 == 1)), flush=True)


if __name__ == "__main__":
    main()
