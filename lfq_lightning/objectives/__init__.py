"""Objectives: one file each. `OBJECTIVES` knows them by name."""

from lfq_lightning.objectives.divergence_objective import DivergenceObjective
from lfq_lightning.objectives.objective import Objective
from lfq_lightning.objectives.soft_target_objective import SoftTargetObjective
from lfq_lightning.registry import Registry

OBJECTIVES: Registry[Objective] = Registry("objective", Objective)  # type: ignore[type-abstract]

__all__ = ["OBJECTIVES", "DivergenceObjective", "Objective", "SoftTargetObjective"]
