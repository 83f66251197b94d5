"""The text side of the configuration: TOML in and out, overrides, and errors worth reading."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from orbq.errors import InputError

MAX_BYTES = 1_000_000  # a configuration is a page of text; more is some other file
MAX_DEPTH = 4  # data.references.H is the deepest key
REPLACED_WHOLE = ("references",)  # tables that are one value: never merged key by key

Document = dict[str, Any]


class Problem(NamedTuple):
    """One wrong key: its dotted name, what is wrong with it, and the other keys involved."""

    key: str
    text: str
    others: tuple[str, ...] = ()

    def touches(self, keys: Sequence[str]) -> bool:
        """Whether this problem may be a consequence of ``keys`` being wrong."""
        involved = (self.key, *self.others)
        return any(
            k == i or k.startswith(f"{i}.") or i.startswith(f"{k}.") for k in keys for i in involved
        )


def report(source: str, problems: Sequence[Problem]) -> InputError:
    """One error that lists every problem of ``source``."""
    lines = [f"{problem.key}: {problem.text}" for problem in problems]
    if len(lines) == 1:
        return InputError(f"{source}: {lines[0]}")
    return InputError("\n  ".join([f"{source}: {len(lines)} problems", *lines]))


# ---------------------------------------------------------------------------------------- reading


def read_toml(path: Path, seen: tuple[Path, ...] = ()) -> Document:
    """The document of a TOML file, laid over the file that its ``base`` key names.

    Raises InputError for a file that cannot be read, is not TOML, or is its own base.
    """
    if path.resolve() in seen:
        chain = " -> ".join(str(p) for p in (*seen, path.resolve()))
        raise InputError(f"{path}: base files go in a circle: {chain}")
    document = _parse_toml(path)
    base = document.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str) or not base or "\0" in base:
        raise InputError(f"{path}: base: must be the path of a TOML file, is {shown(base)}")
    return merged(read_toml(path.parent / base, (*seen, path.resolve())), document)


def _parse_toml(path: Path) -> Document:
    try:
        if path.exists() and not path.is_file():  # a device has no end, a pipe is waited for
            raise OSError("not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content[:MAX_BYTES].decode()
        if len(content) > MAX_BYTES:
            raise OSError(f"longer than {MAX_BYTES} bytes: not a configuration")
        return tomllib.loads(text)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        raise InputError(f"{path}: no such file{_did_you_mean(near)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def merged(base: Mapping[str, Any], over: Mapping[str, Any], depth: int = MAX_DEPTH) -> Document:
    """``base`` with the keys of ``over`` laid over it, table by table."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        whole = key in REPLACED_WHOLE or depth == 0
        if isinstance(old, dict) and isinstance(value, dict) and not whole:
            out[key] = merged(old, value, depth - 1)
        else:
            out[key] = value
    return out


def overridden(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """``document`` with ``section.key=value`` overrides, and the overrides that make no sense."""
    problems = []
    for text in overrides:
        name, equals, value = (part.strip() for part in text.partition("="))
        keys = name.split(".")
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            problems.append(Problem(shown(text), "an override is written section.key=value"))
            continue
        nested: Any = _override_value(value)
        for depth, key in reversed(list(enumerate(keys))):
            if depth and keys[depth - 1] in REPLACED_WHOLE:  # one entry of it: the others stay
                nested = {**_table_at(document, keys[:depth]), key: nested}
            else:
                nested = {key: nested}
        document = merged(document, nested)
    return document, problems


def _table_at(document: Document, keys: Sequence[str]) -> Document:
    """The table that is there under these keys, empty if there is none."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _override_value(text: str) -> Any:
    """A TOML value; text that is none stands for itself, so that paths need no quotes."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return document["value"] if list(document) == ["value"] else text


# ----------------------------------------------------------------------------------------- errors

_TEXTS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "finite_number": "must be finite",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "model_type": "must be a table of keys",
    "string_too_short": "must not be empty",
    "string_type": "must be text in quotes",
    "string_unicode": "must be text without broken characters",
    "too_long": "may have at most {max_length} entries",
    "tuple_type": "must be a list",
}
_UNION_TAGS = ("<word>", "<table>")


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every error of a validation in the project's words, with the nearest valid name."""
    problems: list[Problem] = []
    for item in error.errors(include_url=False):
        context = item.get("ctx", {})
        conflict = getattr(context.get("error"), "problems", None)
        if conflict is not None:
            problems.extend(conflict)
            continue
        loc = tuple(part for part in item["loc"] if part not in _UNION_TAGS)
        key, value = _dotted(loc), shown(item["input"])
        if item["type"] == "extra_forbidden":
            near = _did_you_mean(_nearest_key(str(loc[-1]), loc[:-1], model))
            problems.append(Problem(key, f"unknown key (value {value}){near}"))
            continue
        text = _TEXTS.get(item["type"], item["msg"]).format(**context)
        near = ""
        if item["type"] == "literal_error":
            text += " or a table" * ("<word>" in item["loc"])
            names = re.findall(r"'([^']*)'", context["expected"])
            near = _did_you_mean(difflib.get_close_matches(str(item["input"]), names, 1))
        problems.append(Problem(key, f"{text}, is {value}{near}"))
    return problems


def without_wrong_keys(document: Mapping[str, Any], error: ValidationError) -> Document:
    """A copy of ``document`` that lacks the keys which ``error`` complains about."""
    kept = merged({}, {k: merged({}, v) if isinstance(v, dict) else v for k, v in document.items()})
    for item in error.errors(include_url=False, include_input=False):
        path = [part for part in item["loc"] if part not in _UNION_TAGS]
        while path and not _removed(kept, path):
            path.pop()
    return kept


def _removed(document: Document, path: Sequence[Any]) -> bool:
    table: Any = document
    for depth, part in enumerate(path):
        if not isinstance(table, dict) or part not in table:
            return False
        if depth == len(path) - 1:
            del table[part]
            return True
        table[part] = dict(table[part]) if isinstance(table[part], dict) else table[part]
        table = table[part]
    return False


def shown(value: Any) -> str:
    """A value as an error message shows it: short, whatever it is."""
    return str(value).lower() if isinstance(value, bool) else reprlib.repr(value)


def _dotted(loc: Sequence[Any]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.lstrip(".") or "configuration"


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {names[0]}?" if names else ""


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all keys of a model, tables before their keys."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += keys_of(field.annotation, f"{prefix}{name}.")
    return keys


def _nearest_key(name: str, table: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """The valid key most like ``name``: first in its own table, then of the same name anywhere."""
    prefix = "".join(f"{part}." for part in table)
    own: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    for key in keys_of(model):
        parent, _, last = key.rpartition(".")
        (own if f"{parent}." == prefix or (not parent and not prefix) else elsewhere)[last] = key
    for names, cutoff in ((own, 0.6), (elsewhere, 0.8)):
        near = difflib.get_close_matches(name.lower(), list(names), 1, cutoff)
        if near:
            return [names[near[0]]]
    return []


# ---------------------------------------------------------------------------------------- writing


def differences(before: Document, now: Document) -> list[str]:
    """The keys in which two documents differ, with both values."""
    a, b = _flat(before), _flat(now)
    different = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    return [f"{key} was {a.get(key)!r}, is {b.get(key)!r}" for key in different]


def _flat(tree: Any, prefix: str = "") -> Document:
    """Nested tables as ``section.key`` -> value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: Document = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def to_toml(document: Mapping[str, Any]) -> str:
    """A nested mapping of text, numbers, booleans, lists and tables as TOML."""
    lines: list[str] = []
    _write_table(document, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{'.'.join(path)}]"]
    for key, value in table.items():
        if not isinstance(value, dict):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(value, (*path, _toml_key(key)), lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
