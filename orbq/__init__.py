"""orbq: equivariant interatomic potentials taught by orbital-resolved semiempirical charges.

The public names below are loaded when first used, so that ``import orbq`` is light: it brings in
neither JAX nor tblite.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from orbq.errors import InputError, OrbqError

if TYPE_CHECKING:
    from orbq.calculator import Calculator
    from orbq.config import Config, load_config, parse_config
    from orbq.datasets import open_dataset
    from orbq.ensemble import Ensemble
    from orbq.fit import fit as run_training
    from orbq.jaxmd import jax_md
    from orbq.preprocess.frames import embedded_path as embedded
    from orbq.preprocess.label import preprocess as label
    from orbq.preprocess.nearest import nearest_methods
    from orbq.preprocess.sample import sample
    from orbq.preprocess.store import Dataset
    from orbq.preprocess.trajectory import Sampling
    from orbq.run import Run, load
    from orbq.stablehlo import export
    from orbq.study import run_ablation

__version__ = "0.1.0"

# public name -> (module, name there). The labelling stage is called ``label`` here, and training
# ``run_training``, because ``orbq.preprocess`` and ``orbq.fit`` are what they live in.
_LAZY = {
    "Calculator": ("orbq.calculator", "Calculator"),
    "Config": ("orbq.config", "Config"),
    "Dataset": ("orbq.preprocess.store", "Dataset"),
    "Ensemble": ("orbq.ensemble", "Ensemble"),
    "Run": ("orbq.run", "Run"),
    "Sampling": ("orbq.preprocess.trajectory", "Sampling"),
    "export": ("orbq.stablehlo", "export"),
    "jax_md": ("orbq.jaxmd", "jax_md"),
    "embedded": ("orbq.preprocess.frames", "embedded_path"),
    "label": ("orbq.preprocess.label", "preprocess"),
    "load": ("orbq.run", "load"),
    "load_config": ("orbq.config", "load_config"),
    "nearest_methods": ("orbq.preprocess.nearest", "nearest_methods"),
    "open_dataset": ("orbq.datasets", "open_dataset"),
    "parse_config": ("orbq.config", "parse_config"),
    "run_ablation": ("orbq.study", "run_ablation"),
    "run_training": ("orbq.fit", "fit"),
    "sample": ("orbq.preprocess.sample", "sample"),
}

__all__ = [
    "Calculator",
    "Config",
    "Dataset",
    "Ensemble",
    "InputError",
    "OrbqError",
    "Run",
    "Sampling",
    "__version__",
    "embedded",
    "export",
    "jax_md",
    "label",
    "load",
    "load_config",
    "nearest_methods",
    "open_dataset",
    "parse_config",
    "run_ablation",
    "run_training",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
