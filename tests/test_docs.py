"""Every code block of the README and the documents does what its page says.

A page is a session in an empty directory that has what the README takes for granted (structure
files in ``data/`` and ``new.xyz``, ``configs/``, a trained run): its blocks run in their order.

    bash, python    run; they must succeed
    toml, diff      a titled block is the file of that name; a diff is applied to a copy of orbq
    text            output, not run; after a block titled "fails" it must be the message
    bash, python with one of the titles ``ELSEWHERE``: checked (commands, options, targets, extras
                    and public names exist), not run

Training is cut short and the network made small by overrides that are added to `orbq train`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import typer

from orbq import cli
from orbq.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?[^\n]*\n'
    r"(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
# where a block that the tests cannot run belongs
ELSEWHERE = (
    "in a checkout",
    "on a cluster",
    "on a GPU",
    "on a TPU",
    "from the network",
    "in your shell",
    "for hours",
)
FAILS = "fails"
SMALL = [
    *("model.n_channels=4", "model.n_layers=1", "model.radial_hidden=[4]", "model.n_radial=4"),
    *("training.n_steps=2", "training.warmup_steps=1", "training.validate_every=2"),
    *("training.checkpoint_every=2", "training.batch_size=4", "data.split=within"),
]


class Block(NamedTuple):
    """One fenced block: its language, title ("" if none) and text; line: where it begins."""

    language: str
    title: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(line[indent:] for line in match["text"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"], match["title"] or "", body, line))
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a stray ```"
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}
CHANGES_CODE = {
    page for page, blocks in BLOCKS.items() if any(b.language == "diff" for b in blocks)
}


def commands_of(text: str) -> Iterator[str]:
    """The commands of a bash block, without comments, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


# --------------------------------------------------------------------------- the blocks run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted."""
    import ase.io
    from tiny_run import complexes, random_run, save_run

    place = tmp_path_factory.mktemp("prepared")
    *structures, new = complexes(33, {1, 6, 7, 8, 22})
    (place / "data").mkdir()
    ase.io.write(place / "data" / "first.extxyz", structures[:20])
    ase.io.write(place / "data" / "second.extxyz", structures[20:])
    ase.io.write(place / "new.xyz", new, format="extxyz")
    save_run(random_run(["onsite"], n_layers=1), place / "runs" / "demo" / "multitask-seed0")
    with contextlib.chdir(place):  # labelled once; the pages' own commands find it finished
        status, out = in_process(
            ["preprocess", *expanded("data/*.extxyz"), "--out", "datasets/mine"]
        )
    assert status == 0, out
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_in_their_order(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tmp_path, own_copy=page in CHANGES_CODE)
    if any(block.language in ("bash", "python") for block in BLOCKS[page]):
        shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS[page]:
        try:
            session.run(block)
        except (Exception, SystemExit) as error:
            name = page.relative_to(ROOT)
            raise AssertionError(f"{name}, line {block.line}:\n{block.text}\n{error}") from error


class Session:
    """Runs the blocks of one page in one directory."""

    def __init__(self, place: Path, own_copy: bool) -> None:
        self.place, self.own_copy = place, own_copy
        self.names: dict[str, Any] = {"__name__": "__page__"}
        self.message = ""
        for name in ("configs", "orbq"):
            if own_copy:
                shutil.copytree(ROOT / name, place / name)
            else:
                (place / name).symlink_to(ROOT / name)

    def run(self, block: Block) -> None:
        if block.language == "diff":
            self.change(block)
        elif block.language == "toml" or block.title.endswith(".py"):
            assert block.title, "a file without a name: give the block a title"
            self.write(block)
        elif block.title in ELSEWHERE:
            assert block.language in ("bash", "python")
            CHECKS[block.language](block.text)
        elif block.language == "bash":
            assert block.title in ("", FAILS), f"unknown title {block.title!r}"
            for command in commands_of(block.text):
                self.bash(command, fails=block.title == FAILS)
        elif block.language == "python":
            assert not block.title
            self.python(block.text)
        else:
            assert block.language == "text", f"a block of unknown language {block.language!r}"
            self.compare(block.text)

    def write(self, block: Block) -> None:
        if block.text.startswith("--8<--"):
            assert (ROOT / words_of(block.text)[1]).is_file()
            return
        path = self.place / block.title
        assert self.own_copy or Path(block.title).parts[0] not in ("orbq", "configs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        if block.language == "toml" and not self.own_copy:
            load_config(path)

    def change(self, block: Block) -> None:
        """Replace lines of a file: those with "-" by those with "+"; others must be there."""
        path = self.place / block.title
        lines = block.text.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in "- ")
        new = "".join(line[1:] for line in lines if line[0] in "+ ")
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{block.title} holds this {text.count(old)} times:\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")

    def bash(self, command: str, fails: bool) -> None:
        words = words_of(command)
        if words[:2] == ["orbq", "train"]:
            words += SMALL
        if words[0] == "orbq" and not self.own_copy and "|" not in words and ">" not in words:
            status, out = in_process([w for word in words[1:] for w in expanded(word)])
        else:
            line = shlex.join(words) if words[:2] == ["orbq", "train"] else command
            status, out = self.in_shell(line)
        assert (status != 0) == fails, f"exit status {status} of {command}\n{out}"
        self.message = out if fails else ""

    def python(self, text: str) -> None:
        if self.own_copy:
            status, out = self.in_shell(shlex.join([sys.executable, "-c", text]))
            assert status == 0, out
        else:
            exec(compile(text, "page", "exec"), self.names)

    def in_shell(self, line: str) -> tuple[int, str]:
        orbq = f'orbq() {{ {shlex.quote(sys.executable)} -m orbq.cli "$@"; }}\n'
        environment = {**os.environ, "PYTHONPATH": str(self.place)}
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{orbq}{line}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def compare(self, text: str) -> None:
        """Output after a block that fails is its message, to the letter."""
        if self.message:
            flat = " ".join(self.message.split())
            assert " ".join(text.split()) in flat, f"the message is:\n{self.message}"
            self.message = ""


def in_process(arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of ``orbq ARGUMENTS``, without the start-up of a process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue()


def expanded(word: str) -> list[str]:
    """A pattern as the shell would expand it."""
    found = sorted(map(str, Path().glob(word))) if "*" in word else []
    return found or [word]


# --------------------------------------------------------------------------- what is not run


def check_bash(text: str) -> None:
    """Commands, options, targets and extras in a block that cannot run here exist."""
    from importlib import metadata

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = metadata.metadata("orbq").get_all("Provides-Extra")
    for command in commands_of(text):
        words = words_of(command)
        for call in calls_of(words):
            check_orbq(call)
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= set(targets), command
        for extra in re.findall(r"\[([a-z,-]+)\]", command) if "pip" in words else []:
            assert set(extra.split(",")) <= set(extras), f"no extra {extra}: {command}"


def calls_of(words: list[str]) -> Iterator[list[str]]:
    """The arguments of every ``orbq``, also of one in a quoted command for another machine."""
    for i, word in enumerate(words):
        if " orbq " in word or "/orbq " in word:
            yield from calls_of(shlex.split(word))
        elif Path(word).name == "orbq" and not words[i - 1].endswith("cd"):
            yield words[i + 1 :]


def check_orbq(words: list[str]) -> None:
    """``orbq WORDS`` would be understood: its command, options and overrides exist."""
    if not words or words[0].startswith("-"):
        return
    group = typer.main.get_command(cli.make_app())
    stop = next((i for i, w in enumerate(words) if w in (">", "|", "&&", "2>&1", "&", ";")), None)
    name, *arguments = words[:stop]
    command = group.commands[name]  # type: ignore[attr-defined]
    if "--help" not in arguments:
        context = command.make_context(name, list(arguments))
        if overrides := context.params.get("overrides"):
            path = ROOT / context.params["config"]
            load_config(path if path.is_file() else ROOT / "configs" / "base.toml", overrides)


def check_python(text: str) -> None:
    """A block that cannot run here is Python, and the public names in it exist."""
    import orbq

    compile(text, "page", "exec")
    for name in re.findall(r"\borbq\.(\w+)", text):
        assert hasattr(orbq, name), name


CHECKS = {"bash": check_bash, "python": check_python}


def examples_of(command: str) -> list[str]:
    """The examples in the help of a command."""
    group = typer.main.get_command(cli.make_app())
    text = group.commands[command].help or ""  # type: ignore[attr-defined]
    _, _, examples = text.partition("Example")
    return [line.strip() for line in examples.splitlines() if " orbq " in f" {line.strip()} "]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_examples_of_every_help_text_are_valid(command: str) -> None:
    examples = examples_of(command)
    assert any(words_of(e)[:2] == ["orbq", command] for e in examples), f"orbq {command} --help"
    for example in examples:
        try:
            check_bash(example)
        except (click.ClickException, AssertionError, KeyError) as error:
            raise AssertionError(f"orbq {command} --help: {example}: {error!r}") from error


@pytest.mark.parametrize(
    "wrong",
    [
        "orbq trian x.toml",
        "orbq train",
        "orbq train x.toml --resumee",
        "orbq train x.toml training.seeds=3",
        "ssh node 'cd orbq && .venv/bin/orbq train x.toml --resumee'",
        "make tset",
        "pip install 'orbq[gpu]'",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    with pytest.raises(Exception):  # noqa: B017  (each in the way of what reads it)
        check_bash(wrong)
