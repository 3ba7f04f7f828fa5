"""The whole model as one block, trained once more from what it would ship as."""

from typing import final

from lfq_lightning.errors import UserError
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.quantizers import DenseQuantizer
from lfq_lightning.stages import STAGES, BlockPlan, LaterStage, LayerPlan, ParsedRule, Rule

_KNOWN_THEN = {"bits", "group_size", "symmetric", "init"}


@final
@STAGES.register
class Whole(LaterStage):
    """All blocks as one, through norm and head: their grids are trained once more, from the codes that would ship."""

    paper = "end-to-end training of quantisation parameters: EfficientQAT (arXiv 2407.11062), section 3.3"
    title = "the whole model"
    teacher_runs = False
    from_shards = True
    replaces_shards = True

    def check(self, rule: Rule, layer: LayerPlan) -> None:
        if isinstance(rule.quantizer, dict) and _KNOWN_THEN & set(rule.quantizer):
            raise UserError(
                "match whole starts from the codes and grids that are there; leave bits, group_size, "
                "symmetric and init to the other rules."
            )
        if layer.learned is None or layer.learned.cls.learns_positions:
            raise UserError(
                "match whole trains what codes and grids tell of a weight, not where it lay between two levels; use "
                "`scales`, `block_ap` or `flexround`."
            )

    def plan(self, rule: ParsedRule, skeleton: ModelSkeleton, before: list[BlockPlan]) -> BlockPlan:
        learned = rule.layer.learned
        assert learned is not None, "the rule has been checked"
        layers = {
            name: LayerPlan(layer.scheme, layer.closed_form, learned)
            for plan in before
            for name, layer in plan.layers.items()
            if not issubclass(layer.closed_form.cls, DenseQuantizer)
        }
        if not layers:
            raise UserError(f"{rule.where}: match whole trains what other rules have quantised, and none does.")
        try:
            for layer in layers.values():
                learned.cls.check(layer.scheme, learned.options)
        except UserError as error:
            raise UserError(f"{rule.where}: {error}") from error
        return rule.plan(len(before), range(len(skeleton)), layers, skeleton)
