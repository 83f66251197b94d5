"""orbq: equivariant interatomic potentials taught by orbital-resolved semiempirical charges.

The public names below are loaded when first used, so that ``import orbq`` is light: it brings in
neither JAX nor tblite.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from orbq.errors import InputError, OrbqError

if TYPE_CHECKING:
    from orbq.config import Config, load_config

__version__ = "0.1.0"

# public name -> the module that defines it
_LAZY = {
    "Config": "orbq.config",
    "load_config": "orbq.config",
}

__all__ = ["Config", "InputError", "OrbqError", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
