"""The same update on one device, on eight, and in two processes; runs that change between them.

One reference: updates of eight batches, which one device takes in turns. Every other arrangement
must give its loss curve to float32 rounding.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import (
    Listener,
    config_of,
    copy_of,
    label,
    records,
    settings_put_back,
)

from orbq import checkpoint, devices
from orbq.commands.train import train
from orbq.config import Config, load_config
from orbq.data import make_packer, prepare, to_batch
from orbq.errors import InputError, OrbqError
from orbq.fit import fit
from orbq.models.potential import make_potential
from orbq.stages import make_stages
from orbq.train import make_init, make_train_step

ROOT = Path(__file__).parents[1]
PARTS, PRETRAIN, STEPS = 8, 2, 6
# float32 sums in another order (1e-7), which Adam's division by the gradient's size enlarges where
# that is small, over six steps
ROUNDING = 2e-4


pytestmark = pytest.mark.usefixtures("own_settings_of_jax")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(tmp_path_factory.mktemp("distributed"))


def shared_config(data: Path, directory: Path, **training: Any) -> Config:
    """Updates of eight batches, about sixteen structures, with two steps of pre-training."""
    settings = {
        "batch_size": 16,
        "batches_per_update": PARTS,
        "n_steps": STEPS,
        "pretrain_steps": PRETRAIN,
        "validate_every": 1,
        "checkpoint_every": 2,
    }
    return config_of(data, directory, training={**settings, **training})


@pytest.fixture(scope="module")
def one_device(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listener]:
    directory, listener = tmp_path_factory.mktemp("runs") / "one", Listener()
    with settings_put_back():
        fit(shared_config(data, directory), reporter=listener)
    return directory, listener


def curve(directory: Path) -> dict[tuple[str, int], list[float]]:
    """Loss and its terms, gradient norm and validation errors at every step."""
    return {
        (r["stage"], r["step"]): [v for k, v in sorted(r.items()) if k.startswith(("train/", "v"))]
        for r in records(directory)
    }


def assert_same_curve(directory: Path, reference: Path, n_steps: int | None = None) -> None:
    found, expected = curve(directory), curve(reference)
    keys = list(expected)[:n_steps]
    assert list(found)[: len(keys)] == keys
    for key in keys:
        np.testing.assert_allclose(found[key], expected[key], rtol=ROUNDING, err_msg=str(key))


def stopped_early(run: Path, directory: Path) -> Path:
    """A copy of a run as if it had been killed after its checkpoint in the middle."""
    copy_of(run, directory)
    newest, _ = checkpoint.resumable(directory / "checkpoints")
    shutil.rmtree(newest)
    return directory


ON_EIGHT = """
import sys
from pathlib import Path
from orbq.config import config_from_json
from orbq.fit import fit
for path in sys.argv[1:]:
    summary = fit(config_from_json(Path(path).read_text()))
    print(summary["devices"], summary["compilations"])
"""


def test_eight_devices_are_one_and_take_over_its_run(data, one_device, tmp_path):
    """A fresh run, and the reference gone on with from a checkpoint of one device."""
    reference, listener = one_device
    assert listener.facts["devices"].startswith("1 x")
    stopped_early(reference, tmp_path / "resumed")
    paths = []
    for name in ("fresh", "resumed"):
        path = tmp_path / f"{name}.json"
        path.write_text(shared_config(data, tmp_path / name).model_dump_json())
        paths.append(path)
    flags = f"--xla_force_host_platform_device_count={PARTS}"
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, *paths],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 x cpu") == 2
    assert "'pretrain': 1, 'train': 1, 'evaluate': 1" in done.stdout
    for name in ("fresh", "resumed"):
        assert_same_curve(tmp_path / name, reference)


def start_two(config: Path, tmp_path: Path, slurm: bool = False) -> list[subprocess.Popen[str]]:
    """The command line in two processes on the loopback; slurm: what that sets says who is who."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).with_name("one_of_several.py"), "train", config]
    told = (
        ["--distributed"] if slurm else ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    )
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job["JAX_COORDINATOR_PORT"] = str(port)
    return [
        subprocess.Popen(
            [*command, *told, *([] if slurm else ["--process", str(n)])],
            env={
                **os.environ,
                **({**job, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} if slurm else {}),
                "PACKED": str(tmp_path / f"packed{n}"),
                "DELAY": "0.5",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]


def packed_by_stage(written: Path) -> dict[int, list[list[int]]]:
    """Batches of each stage in the order of packing, which is ahead of the updates: how many were
    packed for updates that a stage no longer made differs between processes."""
    stages: dict[int, list[list[int]]] = {}
    for line in written.read_text().splitlines():
        stage, *items = json.loads(line)
        stages.setdefault(stage, []).append(items)
    return stages


def test_two_processes_share_a_run_and_are_preempted_together(data, one_device, tmp_path):
    """Each packs its own part; SIGTERM to either checkpoints and ends both; one goes on alone."""
    reference, run = one_device[0], tmp_path / "run"
    config = shared_config(data, run)
    (tmp_path / "run.toml").write_text(config.model_dump_toml())
    processes = start_two(tmp_path / "run.toml", tmp_path)
    try:
        metrics = run / "metrics.jsonl"
        while all(p.poll() is None for p in processes):
            if metrics.exists() and len(metrics.read_text().splitlines()) >= 4:
                processes[1].send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        told = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [143, 143], told
    assert all(re.search(r"stopped by SIGTERM at step \d", text) for text in told)
    n_steps = len(records(run))
    assert 4 <= n_steps < STEPS + PRETRAIN
    assert_same_curve(run, reference, n_steps)
    packed = [packed_by_stage(tmp_path / f"packed{n}") for n in range(2)]
    for stage, n_updates in enumerate((PRETRAIN, n_steps - PRETRAIN)):
        for update in range(n_updates):  # four batches each, no structure twice
            rows = slice(update * PARTS // 2, (update + 1) * PARTS // 2)
            batches = [own[stage][rows] for own in packed]
            assert [len(own) for own in batches] == [PARTS // 2] * 2
            mine = [[item for batch in own for item in batch] for own in batches]
            assert all(mine) and len({*mine[0], *mine[1]}) == len(mine[0]) + len(mine[1])
    fit(config)  # in this process alone
    assert_same_curve(run, reference)


def test_two_processes_begin_with_the_network_of_another_run(data, one_device, tmp_path):
    """``training.initial``, and references by its network: as one process does alone."""
    reference = one_device[0]
    settings = {"initial": str(reference), "pretrain_steps": 0, "n_steps": 2}

    def shared(directory):
        config = shared_config(data, directory, **settings)
        chosen = config.data.model_copy(update={"references": "taught"})
        return config.model_copy(update={"data": chosen})

    config = shared(tmp_path / "two")
    (tmp_path / "run.toml").write_text(config.model_dump_toml())
    processes = start_two(tmp_path / "run.toml", tmp_path)
    told = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], told
    fit(shared(tmp_path / "one"))
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    first = curve(tmp_path / "two")["train", 1]
    assert first != pytest.approx(curve(reference)["train", 1], rel=1e-2)


def test_processes_are_told_why_another_refused(data, tmp_path):
    """Not a hang: what stops the main process stops all of them, with its message. (As a SLURM job,
    whose processes find each other by themselves.)"""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("42")
    (tmp_path / "run.toml").write_text(shared_config(data, tmp_path / "run").model_dump_toml())
    processes = start_two(tmp_path / "run.toml", tmp_path, slurm=True)
    told = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [2, 2], told
    assert all("not empty and holds no run" in text for text in told)


def test_any_failure_of_the_main_process_is_told_to_the_others(monkeypatch):
    """Also one that was not foreseen: they would wait for minutes, and end with another message."""
    said = []
    monkeypatch.setattr(devices.jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "_said", said.append)

    def fail():
        raise PermissionError(13, "Permission denied", "runs")

    with pytest.raises(PermissionError):
        devices.main_first(fail)
    assert said == ["PermissionError: [Errno 13] Permission denied: 'runs'"]


def test_a_lost_process_is_told(monkeypatch):
    """What those that are left see of it, on CPUs; alone, the same words mean something else."""
    words = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:13202"
    for n, kind in ((2, OrbqError), (1, jax.errors.JaxRuntimeError)):
        monkeypatch.setattr(devices.jax, "process_count", lambda n=n: n)
        with pytest.raises(kind, match="Gloo") as told, devices.told_when_a_process_is_lost():
            raise jax.errors.JaxRuntimeError(words)
        assert ("another process of the job was lost" in str(told.value)) == (n == 2)


# --------------------------------------------------------------------------- accumulation


def test_batches_in_turns_give_the_gradient_of_one_big_batch(data, tmp_path):
    """The loss is that of all structures together, however they are divided and padded."""
    config = shared_config(data, tmp_path)
    big, small = prepare(config, 1), prepare(config, PARTS)
    items = np.arange(PARTS)
    layout = devices.choose(PARTS)
    assert layout.mesh is not None and layout.n_devices == 1
    hyper = make_stages(config, big)[-1].hyper
    potential = make_potential(big.architecture, big.constants)
    found = []
    for data_of, mesh, parts in ((big, None, [items]), (small, layout.mesh, items[:, None])):
        packer = make_packer(data_of, data_of.pools["teaching"], config)
        batches = [to_batch(packer.batch(part)) for part in parts]
        state = jax.jit(make_init(potential))(jax.random.key(0), batches[0])
        step = jax.jit(make_train_step(potential, data_of.spec, mesh))
        batch = batches[0] if mesh is None else devices.spread(layout, batches)
        found.append(jax.device_get(step(state, batch, hyper)))
    (one, metrics), (turns, same) = found
    for name, value in metrics.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-5, err_msg=name)  # float32 sums
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one.optimizer.mu))
    for a, b in zip(*(jax.tree.leaves(s.optimizer.mu) for s in (one, turns)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * size)


# --------------------------------------------------------------------------- too few, too small


@pytest.mark.parametrize(
    ("gpus", "tasks", "local", "more", "own"),
    [
        ("0,1,2,3", 8, 3, {}, [3]),  # two nodes, a task for each GPU
        ("0,1,2,3", 2, 0, {}, [0, 1, 2, 3]),  # a task for each node
        ("0,1,2,3", 4, 1, {}, [2, 3]),
        ("0", 8, 3, {"SLURM_GPUS_PER_TASK": "1"}, [0]),  # each sees its own alone
        ("0,1", 4, 1, {"SLURM_GPUS_PER_TASK": "2"}, [0, 1]),
        ("", 8, 3, {}, None),
    ],
)
def test_gpus_of_a_slurm_task(gpus, tasks, local, more, own):
    job = {"SLURM_NTASKS": str(tasks), "SLURM_LOCALID": str(local), "SLURM_STEP_NUM_NODES": "2"}
    assert devices.own_gpus({"CUDA_VISIBLE_DEVICES": gpus, **job, **more}) == own
    assert devices.own_gpus({"CUDA_VISIBLE_DEVICES": gpus}) is None


def test_devices_that_cannot_share_an_update(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * 2)
    with pytest.raises(InputError, match=r"start fewer .*batches_per_update a multiple of 2"):
        devices.choose(3)
    with pytest.raises(InputError, match="begun so: go on with fewer processes"):
        devices.choose(1, begun=True)


def test_a_batch_size_below_the_parts_is_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"batch_size = 4 .* into the 8 batches"):
        fit(shared_config(data, tmp_path / "run", batch_size=4))


def test_memory_that_is_too_small_ends_with_advice(data, tmp_path, monkeypatch):
    """XLA's own failure to allocate, from within a step, on a machine of less than 64 TiB."""

    def hungry(*_: Any) -> Any:
        return lambda state, batch, hyper: (state, {"loss": jnp.zeros(2**44, jnp.float32)})

    monkeypatch.setattr("orbq.fit.make_train_step", hungry)
    config = config_of(data, tmp_path / "run")
    with pytest.raises(OrbqError, match=r"RESOURCE_EXHAUSTED|[Oo]ut of memory") as told:
        fit(config)
    for advice in (r"training\.batches_per_update \(now 1\)", r"lower training\.batch_size"):
        assert re.search(advice, str(told.value))
    assert told.value.exit_status == 1


# --------------------------------------------------------------------------- compiled programs


COMPILES = """
import sys
import jax, jax.numpy as jnp
from orbq import cache
from orbq.compiled import configure_jax
from orbq.config import parse_config
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
cache.MIN_COMPILE_SECONDS = 0.0
configure_jax(parse_config({"training": {"compilation_cache": False}} if sys.argv[1:] else {}))
jax.jit(lambda x: jnp.linalg.norm(jnp.tanh(x) @ x))(jnp.ones((7, 7)))
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_second_start_finds_the_compiled_programs(tmp_path):
    """By default; not if the configuration says no."""
    unset = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}

    def hits(*arguments: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", COMPILES, *arguments],
            env={**unset, "ORBQ_CACHE_DIR": str(tmp_path)},
            check=True,
            capture_output=True,
            text=True,
        )
        return int(done.stdout)

    assert [hits(), hits("off")] == [0, 0]
    assert hits() >= 1


# --------------------------------------------------------------------------- what README teaches


def test_the_commands_of_the_readme_are_understood():
    """Those of its section on devices: every option and every key exists."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## One GPU, eight, a cluster") :].split("\n## ")[0]
    commands = re.findall(r"orbq train mine\.toml *([^\"\n]*)", section)
    options = {f"--{name}" for name in inspect.signature(train).parameters}
    assert len(commands) == 5
    for command in commands:
        words = [word for word in shlex.split(command) if word.startswith("--") or "=" in word]
        assert {word for word in words if word.startswith("--")} <= options
        load_config(ROOT / "configs" / "base.toml", [w for w in words if not w.startswith("--")])
    load_config(ROOT / "configs" / "base.toml", re.findall(r"`(training\.\w+=[^`]+)`", section))
