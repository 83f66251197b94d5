"""Whether a JSON file has the form it was written in: told by the key, before anything uses it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# A form is a type; a tuple of the words allowed; [form] a list of it; {str: form} a mapping with
# any keys; {"key": form, ...} one with at least these keys.
Form = Any
_NAMES = {
    dict: "a table",
    list: "a list",
    str: "text",
    int: "a whole number",
    bool: "true or false",
}


def read_json(path: Path, form: Form) -> Any:
    """The document of a JSON file. Raises ValueError with what is wrong with it, OSError."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("not a file")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if reason := wrong(document, form):
        raise ValueError(reason)
    return document


def wrong(value: Any, form: Form, key: str = "") -> str | None:
    """The first difference between ``value`` and its form, None if there is none."""
    if isinstance(form, tuple):
        return None if value in form else f"{key} must be one of {', '.join(map(str, form))}"
    if form is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and math.isfinite(value) else f"{key} must be a finite number"
    kind: Any = form if isinstance(form, type) else type(form)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        return f"{key or 'it'} must be {_NAMES.get(kind, kind.__name__)}"
    if isinstance(form, list):
        parts = [(f"{key}[{i}]", item, form[0]) for i, item in enumerate(value)]
    elif isinstance(form, dict) and str in form:
        parts = [(_under(key, name), item, form[str]) for name, item in value.items()]
    elif isinstance(form, dict):
        if missing := [name for name in form if name not in value]:
            return f"{_under(key, missing[0])} is missing"
        parts = [(_under(key, name), value[name], form[name]) for name in form]
    else:
        return None
    return next((reason for name, item, f in parts if (reason := wrong(item, f, name))), None)


def _under(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)
