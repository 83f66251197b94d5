"""``training.kernels``: cuequivariance computes what ``tensor_product`` does, here by plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import TINY, constants, make_graph, quick_jit, random_params, three
from tiny_run import random_run, save_run

import orbq
from orbq.config import parse_config
from orbq.data import architecture_of
from orbq.errors import InputError
from orbq.models.potential import make_potential, predict
from orbq.stablehlo import lowered
from orbq.study.plan import fingerprint

pytest.importorskip("cuequivariance_jax", reason="needs cuequivariance-jax, of the extra dev")
ROUNDING = 1e-10  # of float64, relative to the largest
CUE = parse_config({"training": {"kernels": "cuequivariance"}})


def values(backbone: str, kernels: str):
    """Energies, forces, and the gradient of a loss of the forces by all parameters, which takes
    every derivative that training does; of two sets of parameters at once."""
    architecture = TINY._replace(backbone=backbone, kernels=kernels)
    potential = make_potential(architecture, constants(()))
    positions, graph = make_graph(three())
    found = [random_params(potential, seed=seed) for seed in (0, 1)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    def loss(params):
        energy, forces = predict(potential, params, positions, graph)[:2]
        return (forces**2).sum(), (energy, forces)

    return quick_jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(params)


@pytest.mark.parametrize("backbone", ["nequip", "mace", "invariant"])
def test_both_kernels_compute_the_same(backbone):
    with jax.enable_x64(True):
        ours, theirs = (values(backbone, kernels) for kernels in ("xla", "cuequivariance"))
        names = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(ours)]
        for name, a, b in zip(names, *map(jax.tree.leaves, (ours, theirs)), strict=True):
            largest = float(jnp.abs(a).max())
            np.testing.assert_allclose(b, a, rtol=0, atol=ROUNDING * largest, err_msg=name)


def test_without_a_gpu_plain_kernels_are_used_and_said_so():
    with pytest.warns(UserWarning, match=r"kernels = 'cuequivariance' is not available \(JAX runs"):
        assert architecture_of(CUE).kernels == "xla"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("orbq.models.fused.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'orbq\[cuequivariance\]'"):
        architecture_of(CUE)


def with_cuequivariance(run):
    """The run as if it had been trained with these kernels."""
    architecture = run.potential.architecture._replace(kernels="cuequivariance")
    potential = make_potential(architecture, run.potential.constants)
    return orbq.Run(potential, run.params, run.config, run.references, run.info)


def test_a_run_trained_with_them_is_loaded_without(tmp_path):
    run = with_cuequivariance(random_run(()))
    loaded = orbq.load(save_run(run, tmp_path / "run"))
    assert loaded.potential.architecture.kernels == "xla"


def test_an_exported_program_holds_none():
    run = random_run(())
    runs = (run, with_cuequivariance(run))
    texts = [lowered(r, None, ["cpu", "cuda"]).mlir_module() for r in runs]
    assert texts[0] == texts[1]


def test_half_precision_is_refused_beside_them():
    """Sums over neighbours would lose what float32 keeps of them."""
    training = {"kernels": "cuequivariance", "activations": "bfloat16"}
    with pytest.raises(InputError, match=r"training\.activations.*needs training\.kernels = 'xla'"):
        parse_config({"training": training})


def test_an_ablation_begun_before_there_was_this_key_goes_on():
    config = parse_config({"training": {"seed": 3}})
    assert fingerprint(config) != fingerprint(CUE)
    # as commit 4753fb3 has it, where that of the charge was the default
    before = parse_config({"training": {"seed": 3}, "data": {"charge_reference": True}})
    assert fingerprint(before) == "e30b42fb032057a0"
