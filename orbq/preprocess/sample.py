"""Structures for labels alone: xTB dynamics at several temperatures, from the structures at hand.

What a network learns of them by the labels of xTB spares reference calculations. Every trajectory
is Langevin dynamics of its own (ASE's, of steps of 1 fs: frames are wanted, not exact motion); its
forces come from the supervised processes that label (``supervise``), so that what ends such a
process ends one trajectory at most.

Each frame is kept as it comes in ``OUT.partial`` (``trajectory``): a sample that was stopped goes
on, and is the one it would have been.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.io import iread
from ase.io.extxyz import write_xyz

from orbq.errors import InputError, told_when_full
from orbq.orbitals import METHODS
from orbq.preprocess import comment, store
from orbq.preprocess.check import check
from orbq.preprocess.frames import find_sources
from orbq.preprocess.links import make_directory, refuse_links
from orbq.preprocess.read import FIRST_FOUND, Failure, Keys, Reader
from orbq.preprocess.schedule import Resources, check_resources, open_pool
from orbq.preprocess.text import OPENERS
from orbq.preprocess.trajectory import TIMESTEP, Ended, Sampling, Trajectory
from orbq.schema import Structure

SETTINGS = "settings.json"
PARTIAL = ".partial"
MADE_BY = "sample"  # key of each frame: the call that made it
MAX_TEMPERATURE = 10_000.0  # K
DEFAULTS, HERE = Sampling(), Resources()


class Sampled(NamedTuple):
    """frames, trajectories: written. starts: structures that could begin one; left_out: those that
    could not. ended: trajectories that ended early."""

    frames: int
    trajectories: int
    starts: int
    left_out: list[Failure]
    ended: list[Ended]


def sample(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    sampling: Sampling = DEFAULTS,
    keys: Keys = FIRST_FOUND,
    resources: Resources = HERE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sampled:
    """Write the frames of trajectories that begin at structures of the files, in extxyz.

    inputs: a file that ASE reads, or several. Their structures are taken at random, none twice
    before all were taken once. out: an extxyz file, also compressed; it holds geometries, total
    charges, spin multiplicities and groups, no labels. on_progress(frames, of how many). What is
    there of an interrupted call is gone on with, and what the same call has finished is kept as it
    is (its trajectories that ended early are not told again).

    A trajectory ends before its last frame where xTB has no trustworthy result, or where the
    structure falls into pieces further than 5 Å apart; it keeps the frames before.

    Raises InputError for a setting out of range, for ``out`` that is another file or no extxyz, for
    input without a usable structure, and when no trajectory reaches its first frame.
    """
    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    out = Path(out)
    _check_settings(sampling)
    check_resources(resources)
    _check_out(out)
    reader = Reader(find_sources(inputs), keys)
    starts, left_out = _starts(reader, sampling.method)
    identity = _identity(reader, sampling)
    place = out.with_name(out.name + PARTIAL)
    if out.exists():
        made = _finished(out, identity)
        shutil.rmtree(place, ignore_errors=True)  # of a call that was killed before it did so
        return Sampled(*made, len(starts), left_out, [])
    with told_when_full(out), _workspace(place, identity):
        trajectories = _trajectories(starts, reader, sampling, place)
        _run_all(trajectories, sampling, resources, on_progress)
        ended = [found for one in trajectories if (found := one.ended())]
        frames = [one.n_frames() for one in trajectories]
        _write(out, trajectories, _digest(identity))
        shutil.rmtree(place)
    return Sampled(sum(frames), sum(map(bool, frames)), len(starts), left_out, ended)


def _check_settings(sampling: Sampling) -> None:
    for name in ("trajectories", "frames"):
        if getattr(sampling, name) < 1:
            raise InputError(f"--{name} {getattr(sampling, name)}: at least 1 is needed")
    if not sampling.temperatures:
        raise InputError("--temperature: at least one is needed")
    for kelvin in sampling.temperatures:
        if not 0 < kelvin <= MAX_TEMPERATURE:
            raise InputError(f"--temperature {kelvin:g}: above 0, at most {MAX_TEMPERATURE:g} K")
    if not TIMESTEP <= sampling.every < math.inf:
        raise InputError(f"--every {sampling.every:g}: at least a step of {TIMESTEP:g} fs")
    if not 0 <= sampling.before < math.inf:
        raise InputError(f"--before {sampling.before:g}: at least 0 fs")
    for name in ("every", "before"):
        if (time := getattr(sampling, name)) % TIMESTEP:
            raise InputError(
                f"--{name} {time:g}: a multiple of the step of {TIMESTEP:g} fs is needed"
            )
    if sampling.seed < 0:
        raise InputError(f"--seed {sampling.seed}: at least 0")
    if sampling.method not in METHODS:
        raise InputError(f"--method {sampling.method!r}: one of {', '.join(METHODS)}")


def _check_out(out: Path) -> None:
    bare = out.with_suffix("") if out.suffix in OPENERS else out
    if bare.suffix not in (".extxyz", ".xyz"):
        raise InputError(f"--out {out}: name a file that ends in .extxyz (or .extxyz.gz)")


def _frames_of(out: Path) -> Iterator[Atoms]:
    found: Iterator[Atoms] = iread(str(out), index=":", do_not_split_by_at_sign=True)
    return found


def _finished(out: Path, identity: dict[str, Any]) -> tuple[int, int]:
    """Frames and trajectories of a sample that this very call has made before."""
    try:
        found = [(frame.info[MADE_BY], frame.info["trajectory"]) for frame in _frames_of(out)]
    except Exception:  # whatever a file of others, or a damaged one, may raise: it is not ours
        found = []
    if {made_by for made_by, _ in found} != {_digest(identity)}:
        raise InputError(
            f"--out {out} exists and is not what this command makes: name another file, or take it "
            "away"
        )
    return len(found), len({number for _, number in found})


def _digest(identity: dict[str, Any]) -> str:
    """Tells samples apart; not all of digits, which extxyz would read as a number."""
    text = json.dumps(identity, sort_keys=True).encode()
    return f"orbq-{hashlib.sha256(text).hexdigest()[:16]}"


def _starts(reader: Reader, method: str) -> tuple[list[Structure], list[Failure]]:
    starts: list[Structure] = []
    left_out: list[Failure] = []
    for item in reader:
        if isinstance(item, Failure):
            left_out.append(item)
            continue
        bare = item._replace(energy=None, forces=None, stress=None, dft_charges=None)
        if reason := check(bare, method):
            number, frame = item.source
            left_out.append(Failure(reader.sources[number].name, frame, reason))
        else:
            starts.append(bare)
    if not starts:
        told = f"; {left_out[0].reason}" if left_out else ""
        names = ", ".join(source.name for source in reader.sources[:3])
        raise InputError(f"{names}: no structure that a trajectory could begin from{told}")
    return starts, left_out


def _identity(reader: Reader, sampling: Sampling) -> dict[str, Any]:
    return {
        "input": [source.sha256 for source in reader.sources],
        "keys": {name: key for name, key in reader.keys._asdict().items() if key},
        **sampling._asdict(),
        "temperatures": list(sampling.temperatures),
    }


@contextmanager
def _workspace(place: Path, identity: dict[str, Any]) -> Iterator[None]:
    """The directory of what is finished, ours alone; that of another sample is refused."""
    refuse_links(place, "--out")
    make_directory(place, "--out")
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another process is writing to {place}: wait for it") from error
        settings = place / SETTINGS
        if settings.exists():
            _check_same(settings, identity)
        else:
            store.write_atomically(settings, json.dumps(identity, indent=1))
        yield


def _check_same(settings: Path, identity: dict[str, Any]) -> None:
    place = settings.parent
    try:
        there = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{settings} cannot be read ({error}): take {place} away") from error
    if there != identity:
        differ = [k for k in identity if not isinstance(there, dict) or there.get(k) != identity[k]]
        raise InputError(
            f"{place} holds a part of another sample ({', '.join(differ)} differ): give the same "
            "command to go on with it, take it away, or choose another --out"
        )


def _trajectories(
    starts: Sequence[Structure], reader: Reader, sampling: Sampling, place: Path
) -> list[Trajectory]:
    order = np.random.default_rng(sampling.seed).permutation(len(starts))
    kelvins = sampling.temperatures
    found = []
    for i in range(sampling.trajectories):
        turn, position = divmod(i, len(starts))
        start = starts[order[position]]
        number, frame = start.source
        name = f"{reader.sources[number].name} frame {frame}"
        kelvin = kelvins[(i + turn) % len(kelvins)]  # another one each time a structure comes again
        found.append(Trajectory(i, kelvin, start, name, place / f"{i:06d}.frames"))
    return found


def _run_all(
    trajectories: Sequence[Trajectory],
    sampling: Sampling,
    resources: Resources,
    on_progress: Callable[[int, int], None],
) -> None:
    total = sampling.frames * len(trajectories)
    done = 0
    lock = threading.Lock()

    def count(frames: int = 1) -> None:
        nonlocal done
        with lock:
            done += frames
            on_progress(done, total)

    def run(one: Trajectory) -> None:
        count(one.n_frames())
        if one.ended() is None:
            one.run(sampling, resources, count)
        count(sampling.frames - one.n_frames())  # those that will never come

    with open_pool(resources) as pool:
        for future in as_completed([pool.executor.submit(run, one) for one in trajectories]):
            future.result()


def _write(out: Path, trajectories: Sequence[Trajectory], made_by: str) -> None:
    """All frames, complete or not at all."""
    if not any(one.n_frames() for one in trajectories):
        told = "; ".join(found.reason for one in trajectories[:3] if (found := one.ended()))
        raise InputError(f"no trajectory reached its first frame: {told}")
    partial = trajectories[0].path.with_name("joined")
    with OPENERS.get(out.suffix, open)(partial, "wt", encoding="utf-8") as file:
        for atoms in _frames(trajectories):
            atoms.info[MADE_BY] = made_by
            if "group" in atoms.info:
                atoms.info["group"] = comment.as_value(atoms.info["group"])
            write_xyz(file, [atoms])
    partial.replace(out)


def _frames(trajectories: Sequence[Trajectory]) -> Iterator[Atoms]:
    for one in trajectories:
        for n, (positions, _) in enumerate(one.frames()):
            atoms = one.atoms(positions)
            atoms.info |= {"temperature": one.temperature, "trajectory": one.number, "frame": n}
            yield atoms
