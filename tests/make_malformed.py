"""Makes tests/malformed/: inputs that must be refused with a message, never with a traceback.

    python -m tests.make_malformed

Every case is a directory of small files and an entry in cases.json with the command that is given
it and what its message must say. Deterministic: the same bytes on every machine. A case of the
group ``dataset`` or ``run`` is laid over a good data set or run that the tests make.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.malformed_config import archives, configurations
from tests.malformed_datasets import datasets
from tests.malformed_runs import runs
from tests.malformed_structures import structures

PLACE = Path(__file__).parent / "malformed"
INDEX = "cases.json"


class Case(NamedTuple):
    """One malformed input.

    group, name: its directory. files: path in it -> content. arguments: of the command. said: what
    the message must match. edits: (JSON file, key as "a.b", value) of the good data set or run that
    the files are laid over; ``ABSENT`` takes the key or file away.
    """

    group: str
    name: str
    files: Mapping[str, str | bytes]
    arguments: list[str]
    said: str
    edits: Sequence[list[Any]] = ()


def cases() -> list[Case]:
    """Every case, in order."""
    found = [Case("structure", *entry) for entry in structures()]
    for name, (text, overrides, said) in configurations().items():
        found.append(Case("configuration", name, {"a.toml": text}, ["a.toml", *overrides], said))
    for name, (files, edits, said) in datasets().items():
        found.append(Case("dataset", name, files, ["--cutoff", "5"], said, edits))
    for name, (files, edits, said) in runs().items():
        found.append(Case("run", name, files, [], said, edits))
    for name, (data, said) in archives().items():
        found.append(Case("archive", name, {"qm7.tar.gz": data}, [], said))
    return found


def write(place: Path) -> None:
    """Make the directory anew."""
    shutil.rmtree(place, ignore_errors=True)
    index = {}
    for case in cases():
        index[f"{case.group}/{case.name}"] = {
            "arguments": case.arguments,
            "said": case.said,
            "edits": list(case.edits),
        }
        for name, content in case.files.items():
            path = place / case.group / case.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in index.items())
    (place / INDEX).write_text(f"{{\n{lines}\n}}\n", encoding="ascii")


if __name__ == "__main__":
    write(PLACE)
    print(f"{len(cases())} cases in {PLACE}")
