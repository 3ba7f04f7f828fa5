"""Stages: what a run goes through, one file each. `STAGES` knows those that a rule can ask for by `match: NAME`."""

from lfq_lightning.registry import Registry
from lfq_lightning.stages.stage import BlockPlan, LaterStage, LayerPlan, ParsedRule, Rule, Stage

STAGES: Registry[LaterStage] = Registry("stage", LaterStage)  # type: ignore[type-abstract]

__all__ = ["STAGES", "BlockPlan", "LaterStage", "LayerPlan", "ParsedRule", "Rule", "Stage"]
