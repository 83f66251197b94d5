"""The training step compiled for a GPU or a TPU that is not there: time, memory, what is exchanged.

    pip install 'jax[cuda13]'; python benchmarks/bench_ahead.py cuda    # an H200; no driver needed
    pip install 'jax[tpu]'; python benchmarks/bench_ahead.py tpu        # TPU v5e

XLA compiles for a device by its description alone. For each of bench_step.py's settings and each
batch size of bench_accelerator.py: CPU seconds to trace and to compile, memory of the program and
its arguments, the number of kernels, and on a TPU operations and bytes as XLA counts them; then the
step that eight devices share, with what they send each other, and an exported potential
(`orbq export`) for 1,000 atoms. Nothing runs, so that no time of a step is told, and XLA does not
try variants of a kernel as it does on a device. Writes results/ahead.jsonl.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

# no device of either kind is looked for; on a TPU host, nor is its job
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_STDERR_LOG_LEVEL": "3"}
# without a device the tiling of matrix products in Triton cannot be chosen: cuBLAS takes them
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"

import jax
import numpy as np
from bench_accelerator import FULL, complexes, make_batch, make_model, versions
from bench_step import SETTINGS
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from study import record

import orbq
from orbq import stablehlo
from orbq.train import DEVICES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ahead.jsonl"
POTENTIAL = HERE / "models" / "acac" / "energy-only"
ATOMS, EDGES = 1000, 20_000  # of the exported potential
SHARED = 8  # devices that share a step
# XLA's description of an H200: limits of a block and a core, cores, bandwidth, memory
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200"
"""
TRANSFERS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_TRANSFER = re.compile(rf"= (.*?) ({'|'.join(TRANSFERS)})(?:-start)?\(")
_KERNEL = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? (fusion|custom-call|dot|scatter|sort|copy)\(")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "bf16": 2, "pred": 1}


def devices_of(platform: str, n: int) -> np.ndarray:
    """``n`` devices that can be compiled for."""
    if platform == "cuda":
        options = {"target_config": H200, "topology": f"1x1x{n}"}
        found = topologies.get_topology_desc(platform="cuda", **options)
    else:
        found = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    return np.array(found.devices[:n])


def transfers(program: str) -> dict[str, dict[str, int]]:
    """By kind of transfer between devices: how many there are, and their bytes."""
    found: dict[str, Counter[str]] = {}
    for shapes, kind in _TRANSFER.findall(program):
        size = 0
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size += _BYTES.get(dtype, 0) * int(np.prod([int(x) for x in shape.split(",") if x]))
        found.setdefault(kind, Counter()).update(number=1, bytes=size)
    return {kind: dict(count) for kind, count in found.items()}


def kernels(program: str) -> int:
    """Launches in one pass through the scheduled program's entry computation."""
    entry = program[program.index("\nENTRY ") :]
    return sum(bool(_KERNEL.match(line)) for line in entry.splitlines())


def ahead(platform: str, setting: str, n: int, shared: bool) -> dict[str, Any]:
    """Compile the training step for batches of ``n`` structures (on each device)."""
    mesh = Mesh(devices_of(platform, SHARED if shared else 1), (DEVICES,))
    batch, neighbors = make_batch(complexes(n))
    model = make_model(setting, {}, neighbors, head=True, mesh=mesh if shared else None)
    state = jax.eval_shape(model.init, jax.random.key(0), batch)
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    def stacked(x: Any) -> jax.ShapeDtypeStruct:
        split = NamedSharding(mesh, PartitionSpec(None, DEVICES))
        return jax.ShapeDtypeStruct((1, SHARED, *x.shape), x.dtype, sharding=split)

    arguments = (
        jax.tree.map(placed, state),
        jax.tree.map(stacked if shared else placed, batch),
        jax.tree.map(placed, model.hyper),
    )
    step = jax.jit(model.step, donate_argnums=0)
    return {
        "devices": int(mesh.size),
        "atoms": len(batch.positions),
        "edges": len(batch.graph.senders),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        **compiled(step, *arguments),
    }


def compiled(function: Any, *arguments: Any) -> dict[str, Any]:
    """What compiling takes and gives."""
    start = time.process_time()
    lowered = function.lower(*arguments)
    traced = time.process_time()
    made = lowered.compile()
    end = time.process_time()
    memory, program = made.memory_analysis(), made.as_text()
    cost = made.cost_analysis() or {}  # of a GPU's programs none is known without it
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "trace_cpu_s": round(traced - start, 2),
        "compile_cpu_s": round(end - traced, 2),
        "memory_mb": round((used - memory.alias_size_in_bytes) / 2**20, 1),
        "kernels": kernels(program),
        "gflop": round(cost["flops"] / 1e9, 2) if cost else None,
        "gbyte": round(cost["bytes accessed"] / 1e9, 3) if cost else None,
        "transfers": transfers(program),
    }


def exported(platform: str) -> dict[str, Any]:
    """Compile the program that `orbq export` writes."""
    run = orbq.load(POTENTIAL)
    mesh = Mesh(devices_of(platform, 1), (DEVICES,))
    whole, sizes = NamedSharding(mesh, PartitionSpec()), {"n": ATOMS, "e": EDGES}
    arguments = [
        jax.ShapeDtypeStruct(
            [sizes.get(x.strip(), 3) for x in shape.split(",") if x],
            dtype or run.config.training.precision,
            sharding=whole,
        )
        for dtype, shape, _ in stablehlo.INPUTS.values()
    ]
    program = stablehlo.lowered(run, None, stablehlo.PLATFORMS)
    found = {"devices": 1, "atoms": ATOMS, "edges": EDGES}
    return found | compiled(jax.jit(program.call), *arguments)


def main() -> None:
    """Compile and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("platform", choices=("cuda", "tpu"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--sizes", nargs="+", type=int, default=FULL.sizes)
    given = parser.parse_args()
    device = devices_of(given.platform, 1)[0].device_kind
    facts = {"device": device, "versions": versions()}
    for setting in given.settings:
        for n, shared in [*((n, False) for n in given.sizes), (given.sizes[-1], True)]:
            what = {"platform": given.platform, "setting": setting, "structures": n}
            what["shared"] = shared
            record(RESULTS, what, ahead(given.platform, setting, n, shared) | facts)
    what = {"platform": given.platform, "setting": "exported"}
    record(RESULTS, what, exported(given.platform) | facts)


if __name__ == "__main__":
    main()
