"""Where a training step's time goes, and how far that is from what one core can do.

XLA's profiler says how long each operation of the compiled program took; the program's text says
which part of the network it comes from, and how many floating-point operations and bytes it needs.
An operation fused out of several parts counts for the part of its last operation. The limit of a
phase is the larger of its operations over the peak of a matrix product and its bytes over the
memory's bandwidth, both measured here, on the same core, in the same minute. Bytes are those of
operands and results; what stays in the caches is faster than that limit.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
ARITHMETIC = set(
    "add subtract multiply divide maximum minimum negate abs power exponential log tanh sine "
    "cosine rsqrt sqrt logistic exponential-minus-one log-plus-one".split()
)
CONTAINERS = {"call", "while", "conditional", "tuple", "parameter", "get-tuple-element", "constant"}
PHASES: tuple[tuple[str, str], ...] = (  # the first pattern found in an operation's name decides
    ("charge head", r"/head_|/xtb_energy/"),
    ("readout", r"/energy/"),
    ("edges: tensor product", r"/Interaction_\d+/jit\(_form\)"),
    ("edges: radial network", r"/RadialWeights_\d+/"),
    ("edges: gather and sum", r"/Interaction_\d+/"),
    ("atoms: products", r"/products/"),
    ("atoms: linear maps, gates", r"/layer\d+/"),
    ("embedding, radial basis, harmonics", r"_Network"),
    ("loss, optimiser", r""),
)
DIRECTIONS: tuple[tuple[str, str], ...] = (
    ("gradient", r"transpose\(jvp\((jvp|transpose)|transpose\(jvp\(\)"),
    ("forces", r"transpose\("),
    ("energy", r"_Network"),
    ("other", r""),
)
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"(pred|bf16|[sfu]\d+)\[([\d,]*)\]")


class Operation(NamedTuple):
    """One instruction. kind: opcode. source: where in the network it comes from. flops, bytes."""

    kind: str
    source: str
    flops: float
    bytes: float


class Limits(NamedTuple):
    """What one core can do: flops and bytes per second."""

    flops: float
    bandwidth: float


def _elements(shape: str) -> list[tuple[int, int]]:
    """(number, bytes) of each array in a shape, which may be a tuple's."""
    found = []
    for kind, dims in SHAPE.findall(shape):
        number = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
        found.append((number, number * SIZES.get(kind, 4)))
    return found


def operations(text: str) -> dict[str, Operation]:
    """Every instruction of a compiled program, by name."""
    rows: list[tuple[str, str, str, str, str]] = []  # computation, name, shape, opcode, rest
    computation = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            computation = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        elif match := LINE.match(line):
            rows.append((computation, *match.groups()))
    shape_of = {name: shape for _, name, shape, _, _ in rows}
    inner: dict[str, float] = defaultdict(float)  # flops of each computation
    own: dict[str, float] = {}
    for computation, name, shape, kind, rest in rows:
        own[name] = _flops(shape, kind, rest, shape_of)
        inner[computation] += own[name]
    out = {}
    for _, name, shape, kind, rest in rows:
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        flops = inner[called[1]] if kind == "fusion" and called else own[name]
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        size = sum(b for s in (shape, *(shape_of.get(o, "") for o in operands))
                   for _, b in _elements(s))  # fmt: skip
        source = re.search(r'op_name="([^"]*)"', rest)
        out[name] = Operation(kind, source[1] if source else "", flops, size)
    return out


def _flops(shape: str, kind: str, rest: str, shape_of: dict[str, str]) -> float:
    number = sum(n for n, _ in _elements(shape))
    operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
    if kind == "dot" and operands:
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        found = SHAPE.search(shape_of.get(operands[0], ""))
        if contracted and found:
            dims = [int(d) for d in found[2].split(",") if d]
            axes = [int(a) for a in contracted[1].split(",") if a]
            return 2.0 * number * float(np.prod([dims[a] for a in axes]))
    if kind == "reduce" and operands:
        return float(sum(n for n, _ in _elements(shape_of.get(operands[0], ""))))
    return float(number) if kind in ARITHMETIC else 0.0


def durations(run: Callable[[], Any], n_runs: int) -> dict[str, float]:
    """Seconds that each operation of a program takes in one run, medians over the runs."""
    import jax

    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(n_runs):
        once: dict[str, float] = defaultdict(float)
        with tempfile.TemporaryDirectory() as scratch:
            with jax.profiler.trace(scratch):
                jax.block_until_ready(run())
            (file,) = Path(scratch).rglob("*.xplane.pb")
            planes = jax.profiler.ProfileData.from_file(str(file)).planes
            for event in (e for p in planes for line in p.lines for e in line.events):
                if "hlo_op" in dict(event.stats) and not event.name.startswith("end: "):
                    once[event.name] += 1e-9 * event.duration_ns
        for name, seconds in once.items():
            found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def _first(table: Iterable[tuple[str, str]], source: str) -> str:
    return next(name for name, pattern in table if re.search(pattern, source))


def share_of_phases(text: str, seconds: dict[str, float], limits: Limits) -> list[dict[str, Any]]:
    """One row per phase: its share of the step, how that divides, flops, bytes, and its limit."""
    known = operations(text)
    rows: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, spent in seconds.items():
        op = known.get(name)
        if op is None or op.kind in CONTAINERS:
            continue
        row = rows[_first(PHASES, op.source)]
        row["ms"] += 1e3 * spent
        row[f"{_first(DIRECTIONS, op.source)}_ms"] += 1e3 * spent
        row["gflop"] += 1e-9 * op.flops
        row["gbyte"] += 1e-9 * op.bytes
        row["limit_ms"] += 1e3 * max(op.flops / limits.flops, op.bytes / limits.bandwidth)
    total = sum(row["ms"] for row in rows.values())
    order = [name for name, _ in PHASES if name in rows]
    return [
        {"phase": n, "share": round(rows[n]["ms"] / total, 4)}
        | {key: round(value, 3) for key, value in sorted(rows[n].items())}
        for n in order
    ]


def machine_limits() -> Limits:
    """Peak of a float32 matrix product and bandwidth of a copy, by CPU time of this core."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(1024, 1024)).astype(np.float32)
    big = np.zeros(1 << 25, np.float32)  # 128 MiB, beyond the caches
    target = np.empty_like(big)
    product = min(_cpu_seconds(lambda: a @ a) for _ in range(5))
    copy = min(_cpu_seconds(lambda: np.copyto(target, big)) for _ in range(5))
    return Limits(2 * 1024**3 / product, 2 * big.nbytes / copy)


def _cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def show(rows: list[dict[str, Any]], limits: Limits) -> None:
    """The table as text."""
    peak, bandwidth = 1e-9 * limits.flops, 1e-9 * limits.bandwidth
    print(f"one core: {peak:.0f} GFLOP/s in a matrix product, {bandwidth:.1f} GB/s in a copy")
    head = ("phase", "share", "ms", "energy", "forces", "gradient", "GFLOP", "GB", "limit")
    print("{:36}{:>7}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}{:>8}".format(*head))
    for r in rows:
        parts = [r.get(f"{d}_ms", 0.0) for d in ("energy", "forces", "gradient")]
        print(
            f"{r['phase']:36}{r['share']:7.1%}{r['ms']:8.1f}"
            f"{parts[0]:8.1f}{parts[1]:8.1f}{parts[2]:9.1f}"
            f"{r.get('gflop', 0):8.2f}{r.get('gbyte', 0):8.2f}{r['limit_ms'] / r['ms']:8.0%}"
        )
