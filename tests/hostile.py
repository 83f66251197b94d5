"""Runs malformed inputs as a user would, in a process where every forbidden act is seen.

    python -m tests.hostile GROUP DIRECTORY

Forbidden: to write outside of ``out``, to start a program, to ask a server, to unpickle, to take
more than the limits below of time or memory. Prints one JSON line per case.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

MEMORY = 6 << 30  # bytes of address space: JAX alone maps more than two
SECONDS, WAITING = 20, 300  # of the processor, and by the clock, for one case
IMPORTED = {
    "structure": ("orbq.preprocess.label", "orbq.preprocess.ase_formats", "ase.io"),
    "configuration": ("orbq.fit", "orbq.commands.train"),
    "dataset": ("orbq.preprocess.summary",),
    "run": ("orbq.annotate", "ase.io"),
}
_FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
_FORBIDDEN |= {"pickle.find_class", "socket.connect", "ctypes.dlopen"}
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what a case does that it must not. allowed: where it may write."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.seen: list[str] = []
        self.on = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {args!r:.200}")
        elif event in _CHANGES or (event == "open" and (args[2] or 0) & _WRITING):
            path = _where(event, args)
            if not path.startswith(self.allowed):
                self.seen.append(f"{event} {path}")


def _where(event: str, args: tuple[Any, ...]) -> str:
    """The file that an event is about."""
    if not isinstance(args[0], str | bytes):  # a descriptor that is open already
        return os.devnull
    path = os.fsdecode(args[0])
    if event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] >= 0:
        path = f"/proc/self/fd/{args[-1]}/{path}"
    return os.path.realpath(path)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory but those in its ``out``."""
    out = directory / "out"
    return {
        str(p): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and out not in p.parents
    }


def command(group: str, arguments: list[str]) -> list[str]:
    """What is typed."""
    return {
        "structure": ["preprocess", *arguments, "--out", "out/set", "--workers", "1"],
        "configuration": ["train", *arguments, "run.directory=out/run"],
        "dataset": ["inspect", "out/set", *arguments],
        "run": ["predict", "out/run", "water.xyz", "--out", "out/predicted.xyz"],
    }[group]


def lay_out(group: str, case: Path, entry: dict[str, Any], place: Path, base: Path | None) -> None:
    """The files of one case in ``place``; those of a data set or run over a good one, in out."""
    from tests.malformed_datasets import ABSENT, restate

    target = place
    place.mkdir()
    (place / "out").mkdir()
    if base is not None:
        target = place / "out" / ("set" if group == "dataset" else "run")
        shutil.copytree(base, target)
        (place / "water.xyz").write_text("3\n\nO 0 0 0.12\nH 0 0.76 -0.47\nH 0 -0.76 -0.47\n")
    if case.is_dir():
        shutil.copytree(case, target, dirs_exist_ok=True)
    for file, key, value in entry["edits"]:
        path = target / file
        if value == "restated":
            restate(target)
        elif not key:
            assert value == ABSENT
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            document = table = json.loads(path.read_text())
            *parents, last = key.split(".")
            for name in parents:
                table = table[name]
            if value == ABSENT:
                del table[last]
            else:
                table[last] = value
            path.write_text(json.dumps(document))


def unpickled(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("unpickled")


def too_long(*args: Any) -> None:
    raise TimeoutError("the case was given too much time")


def main(group: str, directory: Path) -> None:
    """Run every case of a group below ``directory``."""
    from typer.testing import CliRunner

    from orbq.cli import make_app
    from tests.make_malformed import INDEX, PLACE

    watch, app, base = Watch(), make_app(), None
    for module in IMPORTED.get(group, ()):  # not in the time of a case
        import_module(module)
    if group == "dataset":
        from tests.malformed_datasets import make_dataset

        base = make_dataset(directory / "base")
    elif group == "run":
        from tests.tiny_run import random_run, save_run

        base = save_run(random_run(), directory / "base")
    index = json.loads((PLACE / INDEX).read_text())
    warnings.simplefilter("ignore")
    sys.addaudithook(watch)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # no power cut is tested here
    pickle.load = pickle.loads = pickle.Unpickler = unpickled  # type: ignore[assignment,misc]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGPROF, too_long)
    caches = [os.environ[n] for n in ("ORBQ_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")]
    for name, entry in index.items():
        if not name.startswith(f"{group}/"):
            continue
        place = directory / name.split("/")[1]
        lay_out(group, PLACE / name, entry, place, base)
        before = contents(place)
        os.chdir(place)
        watch.allowed = tuple(map(os.path.realpath, (place / "out", *caches, "/dev/null")))
        watch.seen, watch.on = [], True
        signal.alarm(WAITING)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        result = CliRunner().invoke(app, command(group, entry["arguments"]))
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.on = False
        changed = sorted(set(contents(place).items()) ^ set(before.items()))
        wrong = watch.seen + [f"changed {path}" for path, _ in changed]
        print(json.dumps([name, result.exit_code, result.output, wrong]), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
