"""What mkdocs does for this site beyond converting docs/*.md.

Pages made from the code or kept elsewhere: the command line, the notebooks, the results, the
architecture, the changes. LaTeX becomes MathML here, which browsers draw by themselves: the site
holds no script for it and fetches none.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import click
import typer

from orbq.cli import make_app

ROOT = Path(__file__).resolve().parents[1]
COMMAND_LINE = "command-line.md"
ELSEWHERE = ("ARCHITECTURE.md", "CHANGELOG.md", "benchmarks/RESULTS.md")
CHAPTERS = "benchmarks/results/*.md"  # of RESULTS.md
FIGURES = "benchmarks/results/*.png"  # what they show
REPOSITORY_LINK = re.compile(
    r"(?<!!)\[([^\]]+)\]\((?!https?:|#|(?:results/)?[a-z0-9_]+\.md\))[^)]+\)"  # chapters stay
)

RESULTS_LINK = re.compile(r"\]\(\.\./((?:\.\./)*)benchmarks/((?:results/)?[A-Za-z0-9_]+\.md)")

# --------------------------------------------------------------------------- pages


def notebooks() -> list[Path]:
    """The tutorials, in the order of their names."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def chapters() -> list[Path]:
    """The chapters of the results."""
    return sorted(ROOT.glob(CHAPTERS))


def on_config(config: Any) -> Any:
    """Put the notebooks that exist into the navigation, after the installation."""
    if found := notebooks():
        config.nav.insert(2, {"Tutorials": [f"notebooks/{path.name}" for path in found]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files of docs/."""
    from mkdocs.structure.files import File

    def add(name: str, **content: Any) -> None:
        files.append(File.generated(config, name, **content))

    add(COMMAND_LINE, content=command_line())
    for path in map(ROOT.joinpath, ELSEWHERE):
        add(path.name, content=without_links(path.read_text(encoding="utf-8")))
    for path in chapters():
        add(f"results/{path.name}", content=without_links(path.read_text(encoding="utf-8")))
    for path in sorted(ROOT.glob(FIGURES)):
        add(f"results/{path.name}", abs_src_path=str(path))
    for path in notebooks():  # as files of the repository: their plugin asks for the folder
        name = str(path.relative_to(ROOT))
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


on_files.mkdocs_priority = 100  # type: ignore[attr-defined]  # before the plugin of the notebooks


def without_links(text: str) -> str:
    """Markdown whose links to files of the repository are plain words; figures and chapters of the
    results stay."""
    return REPOSITORY_LINK.sub(r"\1", text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the results, which lead to files of the repository, lead to pages of the site."""
    return RESULTS_LINK.sub(r"](\1\2", markdown)


# --------------------------------------------------------------------------- the command line


def command_line() -> str:
    """The page of all commands, as Markdown."""
    group = typer.main.get_command(make_app())
    context = click.Context(group, info_name="orbq")
    parts = ["# Command line", prose(group.help or ""), options_table(group, context)]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = click.Context(command, info_name=name, parent=context)
        usage = command.collect_usage_pieces(inner)
        parts += [f"## orbq {name}", f"`orbq {name} {' '.join(usage)}`", prose(command.help or "")]
        parts.append(options_table(command, inner))
    return "\n\n".join(part for part in parts if part) + "\n"


def prose(text: str) -> str:
    """A command's help: paragraphs, and what click leaves as it is as blocks."""
    out = []
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.removeprefix("\b").strip("\n").splitlines()
        if lines and lines[0].rstrip(":") in ("Example", "Examples"):
            out.append("```bash\n" + "\n".join(line.strip() for line in lines[1:]) + "\n```")
        elif paragraph.startswith("\b"):
            out.append("```text\n" + "\n".join(lines) + "\n```")
        else:
            out.append(html.escape(" ".join(line.strip() for line in lines), quote=False))
    return "\n\n".join(out)


def options_table(command: Any, context: Any) -> str:
    """Arguments and options of a command with what they mean, as a table."""
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            name, meaning = (cell.replace("|", "\\|") for cell in record)
            rows.append(f"| <code>{html.escape(name)}</code> | {html.escape(meaning)} |")
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) if rows else ""


# --------------------------------------------------------------------------- mathematics

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    r"""Replace ``\(...\)`` and ``\[...\]`` by MathML."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    tag, inner = match[1], html.unescape(match[2]).strip()
    display = "block" if tag == "div" else "inline"
    return f'<{tag} class="arithmatex">{convert(inner[2:-2].strip(), display=display)}</{tag}>'
