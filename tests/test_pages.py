"""What the documents say of the code is true: commands, arrays, messages, links, navigation."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from orbq import cli
from orbq.schema import FIELDS, Field

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHAPTERS = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.md")]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def hooks() -> Any:
    """docs/hooks.py, which mkdocs loads by its path as well."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_has_every_option_and_example(hooks: Any) -> None:
    page = hooks.command_line().replace("\\|", "|")
    sections = dict(re.findall(r"^## orbq (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(cli.COMMANDS)
    group = typer.main.get_command(cli.make_app())
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            wanted = parameter.opts[-1] if parameter.opts[0].startswith("-") else parameter.metavar
            assert (wanted or parameter.name) in sections[name], f"orbq {name}: {parameter.name}"
        assert f"```bash\norbq {name}" in sections[name] or f"\norbq {name}" in sections[name]


def test_links_to_results_lead_there_in_the_repository_and_on_the_site(hooks: Any) -> None:
    for link, on_site in {
        "[a](../benchmarks/RESULTS.md)": "[a](RESULTS.md)",
        "[b](../../benchmarks/results/qm7.md#x)": "[b](../results/qm7.md#x)",
        "[c](../api.md)": "[c](../api.md)",
    }.items():
        assert hooks.on_page_markdown(link) == on_site


def test_links_to_files_of_the_repository_become_words(hooks: Any) -> None:
    text = "[a](docs/a.md), [b](https://b.org), ![c](results/c.png), [d](#d)"
    assert hooks.without_links(text) == "a, [b](https://b.org), ![c](results/c.png), [d](#d)"
    chapters = "[e](results/metals_sloped.md), [f](qm7.md)"
    assert hooks.without_links(chapters) == chapters


def row_of(name: str, field: Field) -> str:
    shape = ", ".join(["A" if field.per == "atom" else "S", *map(str, field.shape)])
    mask = "yes" if field.maskable else ""
    cells = (f"`{name}`", field.per, f"[{shape}]", field.dtype, field.unit, mask, field.doc)
    return f"| {' | '.join(cells)} |"


def test_the_format_lists_every_array() -> None:
    page = (DOCS / "dataset.md").read_text(encoding="utf-8")
    missing = [row for row in (row_of(*item) for item in FIELDS.items()) if row not in page]
    assert missing == []


def fragments() -> Iterator[str]:
    """Pieces of messages in the tables of reasons and messages."""
    page = (DOCS / "failures.md").read_text(encoding="utf-8")
    for heading in ("## Structures", "## Training"):
        section = page.split(heading)[1].split("\n## ")[0]
        for cell in re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE):
            yield from re.findall(r"`([^`]+)`", cell)


def test_the_messages_are_those_of_the_code() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "orbq").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # one text over several lines
    found = list(fragments())
    assert len(found) > 10
    assert [text for text in found if text not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_installation_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z-]+)`", " ".join(re.findall(r"^\|.*", page, re.MULTILINE))))
    assert set(project["optional-dependencies"]) <= named


def test_every_page_is_in_the_navigation() -> None:
    document = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        for child in node if isinstance(node, list) else []:
            yield from leaves(next(iter(child.values())))

    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    made = {"command-line.md", "RESULTS.md", "ARCHITECTURE.md", "CHANGELOG.md"}
    made |= {f"results/{name}" for name in CHAPTERS}
    assert set(leaves(document["nav"])) == written | made


def test_the_figure_comes_from_the_committed_results(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make", DOCS / "figures" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = {path.name for path in module.make(tmp_path)}
    assert made == {path.name for path in (DOCS / "figures").glob("*.png")}, "docs/figures/make.py"
