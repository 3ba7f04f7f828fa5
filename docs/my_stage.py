"""Ship everything once more: a stage of one's own."""

from lfq_lightning.stages import STAGES, LaterStage, LayerPlan


@STAGES.register
class OnceMore(LaterStage):
    """All blocks as one, from the codes that are on disk, with nothing trained: what ships is what was there."""

    paper = "an example"
    title = "the whole model, once more"
    teacher_runs = False
    from_shards = True
    replaces_shards = True

    def check(self, rule, layer):
        """Any rule will do."""

    def plan(self, rule, skeleton, before):
        layers = {
            name: LayerPlan(layer.scheme, layer.closed_form, None)
            for plan in before
            for name, layer in plan.layers.items()
        }
        return rule.plan(len(before), range(len(skeleton)), layers, skeleton)
