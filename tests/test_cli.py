"""The command line: exit statuses, one message per failure, tracebacks on request only."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import typer

import orbq
from orbq import cli
from orbq.errors import InputError, OrbqError

COMMAND_FILES = {path.stem for path in (Path(cli.__file__).parent / "commands").glob("[!_]*.py")}


def run(monkeypatch: pytest.MonkeyPatch, command: object, *arguments: str) -> int:
    """Exit status of ``orbq trial ARGUMENTS``, where ``command`` is the function behind it."""
    module = type(sys)("orbq_trial")
    module.trial = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orbq_trial", module)
    monkeypatch.setattr(cli, "COMMANDS", {"trial": "orbq_trial"})
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def raising(error: BaseException) -> object:
    def trial() -> None:
        raise error

    return trial


@pytest.mark.parametrize(
    "error, status, told",
    [
        (OrbqError("the job failed"), 1, "error: the job failed\n"),
        (InputError("a.toml: [model] [/x] is wrong"), 2, "error: a.toml: [model] [/x] is wrong\n"),
        (KeyboardInterrupt(), 130, f"interrupted: {cli.INTERRUPTED}\n"),
        (ZeroDivisionError("x / 0"), 1, "failed: ZeroDivisionError: x / 0\n"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), 1, "error: a/b: no room left on the disk"),
        (OSError(errno.EIO, "Input/output error"), 1, "This was not foreseen"),
        (typer.Exit(7), 7, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_failures_are_one_message_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    told: str,
) -> None:
    assert run(monkeypatch, raising(error), "trial") == status
    out, err = capsys.readouterr()
    assert told in err
    assert out == "" and "Traceback" not in err


@pytest.mark.parametrize("arguments", [("--debug", "trial"), ("trial", "--debug")])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, raising(InputError("wrong")), *arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "error: wrong\n" in err


def test_long_messages_are_not_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/".join(["directory"] * 60)
    run(monkeypatch, raising(InputError(f"{path}: no such file")), "trial")
    assert path in capsys.readouterr().err


def test_the_home_is_found_in_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells leave the ~ of ``--out=~/here`` alone."""
    found = {}

    def trial(out: Path = Path("x"), rest: str = "") -> None:
        found.update(out=out, rest=rest)

    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(monkeypatch, trial, "trial", "--out=~/here", "--rest=a~/b") == 0
    assert found == {"out": tmp_path / "here", "rest": "a~/b"}


def test_success_is_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, lambda: None, "trial") == 0


@pytest.mark.parametrize(
    "arguments, status, told",
    [
        (["--version"], 0, f"orbq {orbq.__version__}"),
        (["--help"], 0, "Commands:"),
        (["-h"], 0, "Commands:"),
        ([], 2, "Commands:"),
        (["docter"], 2, "doctor"),
        (["--nonsense"], 2, "--nonsense"),
        (["doctor", "surplus"], 2, "surplus"),
    ],
    ids=str,
)
def test_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert ended.value.code == status
    assert told in captured.out + captured.err
    assert "Traceback" not in captured.err


def test_every_command_is_registered_and_teaches_by_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {
        name for name in COMMAND_FILES if hasattr(import_module(f"orbq.commands.{name}"), name)
    }
    assert found == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        assert f"  orbq {name}" in capsys.readouterr().out


def test_doctor_checks_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    for part in (orbq.__version__, "jax ", "cpu", "labels water", "BLAS"):
        assert part in out


def test_doctor_names_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from orbq.commands import doctor

    monkeypatch.setattr(doctor, "WATER_ENERGY", doctor.WATER_ENERGY + 1.0)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert "off by -1.00e+00 eV, limit 0.0001 eV" in out and "not working: tblite" in err


def test_interrupt_of_a_real_process() -> None:
    code = (
        "import sys, time; from orbq import cli; m = type(sys)('slow');"
        "m.slow = lambda: (print('started', flush=True), time.sleep(60));"
        "sys.modules['slow'] = m; cli.COMMANDS = {'slow': 'slow'}; cli.main(['slow'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("interrupted: ") and "Traceback" not in err


def test_public_names_load_when_used() -> None:
    for name in orbq.__all__:
        value = getattr(orbq, name)
        assert not isinstance(value, type(orbq)), f"{name} is hidden by a module of that name"
    assert set(orbq._LAZY) <= set(orbq.__all__) <= set(dir(orbq))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = orbq.nonsense
