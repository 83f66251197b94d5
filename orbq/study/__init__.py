"""Ablations: many runs planned, trained as few programs, recorded and reported.

from orbq.study import run_ablation
run_ablation(load_config("configs/ablate_charge.toml"))
"""

from orbq.study.run import run_ablation

__all__ = ["run_ablation"]
