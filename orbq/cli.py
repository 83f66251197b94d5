"""The command line: which commands exist, and how a failure is told.

Exit status 0: done; 1: failed; 2: bad input or configuration; 130: interrupted. A failure is one
message on stderr; its traceback is shown with ``--debug`` only.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from orbq import __version__
from orbq.errors import NO_ROOM, OrbqError

# command -> module; the function there has the command's name. In the order of --help.
COMMANDS = {
    "demo": "orbq.commands.demo",
    "fetch": "orbq.commands.fetch",
    "sample": "orbq.commands.sample",
    "methods": "orbq.commands.methods",
    "preprocess": "orbq.commands.preprocess",
    "inspect": "orbq.commands.inspect",
    "verify": "orbq.commands.verify",
    "train": "orbq.commands.train",
    "ablate": "orbq.commands.ablate",
    "evaluate": "orbq.commands.evaluate",
    "plot": "orbq.commands.plot",
    "predict": "orbq.commands.predict",
    "export": "orbq.commands.export",
    "embed": "orbq.commands.embed",
    "doctor": "orbq.commands.doctor",
}

INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells report it
INTERRUPTED = "What was finished before is kept; run the same command again to go on."

_HELP = """Train interatomic potentials on energies, forces and orbital-resolved xTB charges.

Units are eV, Å and e. Each command explains itself: orbq COMMAND --help.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = [_at_home(text) for text in given]
    debug = "--debug" in given  # before or after the command, as one types it
    make_app(debug)([text for text in given if text != "--debug"], prog_name="orbq")
    raise SystemExit(0)


def _at_home(text: str) -> str:
    """``--out=~/here``, in which shells leave the home alone."""
    option, equals, value = text.partition("=")
    if not (option.startswith("--") and value.startswith("~")):
        return text
    return option + equals + os.path.expanduser(value)


def make_app(debug: bool = False) -> typer.Typer:
    """The command line with every command of ``COMMANDS``."""
    app = typer.Typer(
        help=_HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help texts hold brackets, and their line breaks matter
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_global_options)
    for name, module_name in COMMANDS.items():
        module = import_module(module_name)
        interrupted = getattr(module, "INTERRUPTED", INTERRUPTED)
        app.command(name)(guarded(getattr(module, name), debug, interrupted))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orbq {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure.")
    ] = False,
) -> None:
    """The options that stand before a command; ``main`` has acted on ``debug`` already."""


def guarded(
    command: Callable[..., None], debug: bool = False, interrupted: str = INTERRUPTED
) -> Callable[..., None]:
    """``command`` with its failures told in one message and turned into an exit status.

    interrupted: what Ctrl-C leaves behind and how to go on; a command's module may define its own
    as ``INTERRUPTED``.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise _failed("interrupted", interrupted, INTERRUPTED_STATUS, debug) from None
        except OrbqError as error:
            raise _failed("error", str(error), error.exit_status, debug) from None
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # handled by typer
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise _unforeseen(error, debug) from None
            where = f"{error.filename}: " if error.filename else ""
            text = f"{where}no room left on the disk ({error.strerror}): make room and run the "
            text += "same command again"
            raise _failed("error", text, OrbqError.exit_status, debug) from None
        except Exception as error:
            raise _unforeseen(error, debug) from None

    return run


def _unforeseen(error: Exception, debug: bool) -> typer.Exit:
    text = f"{type(error).__name__}: {error}"
    if not debug:
        text += "\nThis was not foreseen; --debug shows where it happened."
    return _failed("failed", text, OrbqError.exit_status, debug)


def _failed(kind: str, message: str, status: int, debug: bool) -> typer.Exit:
    if debug:
        traceback.print_exc()
    text = Text.assemble((f"{kind}: ", "bold red"), message)  # never read as markup
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
    return typer.Exit(status)


if __name__ == "__main__":
    main()
