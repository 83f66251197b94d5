"""Names in comment lines of extxyz: ASE makes numbers and truths of ``007``, ``1e5`` and ``F``."""

from __future__ import annotations

import json
from typing import Any

JSON = "_JSON "  # ASE reads what follows as JSON
_CLOSING = {"'": "'", '"': '"', "{": "}", "[": "]"}


def texts(line: str) -> dict[str, str]:
    """The values of a comment line as they are written, split as ASE splits them; no bare words."""
    pairs, closing, escaped = [[""]], "", False
    for char in line.strip():
        if escaped:
            pairs[-1][-1] += char
            escaped = False
        elif char == "\\":
            escaped = True
        elif closing:
            if char == closing:
                closing = ""
            else:
                pairs[-1][-1] += char
        elif char in _CLOSING:
            closing = _CLOSING[char]
        elif char.isspace():
            if pairs[-1][-1]:
                pairs.append([""])
        elif char == "=":
            if pairs[-1] == [""]:
                pairs.pop()
            pairs[-1].append("")
        else:
            pairs[-1][-1] += char
    found: dict[str, str | None] = {}
    for key, *parts in pairs:
        found[key] = "=".join(parts) if parts else None
    return {key: text for key, text in found.items() if text is not None}


def as_value(name: str) -> str:
    """What to have ASE write so that it reads the name itself, and no number or truth: the name
    where that will do, otherwise JSON."""
    plain, quoted = (text.replace("\\", "\\\\") for text in (name, JSON + json.dumps(name)))
    return plain if name.isprintable() and _read_back(plain) == name else quoted


def _read_back(value: str) -> Any:
    from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict

    try:
        found = key_val_str_to_dict(key_val_dict_to_str({"name": value, "next": "word"}))
    except ValueError:  # what begins like JSON and is none
        return None
    return found["name"] if isinstance(found.get("name"), str) else None
