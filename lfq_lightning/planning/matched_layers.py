"""Which rule of a plan each layer falls to."""

from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import OUTER, matches
from lfq_lightning.stages import Rule


def matched_layers(rules: list[Rule], skeleton: ModelSkeleton) -> list[dict[str, tuple[int, int]]]:
    """Return for each rule the layers that it is the first to match, by full name with their shapes (O, I).

    Embeddings and head are among them.
    """
    taken: list[dict[str, tuple[int, int]]] = [{} for _ in rules]
    for number, rule in enumerate(rules):
        if rule.match in OUTER:
            name = skeleton.outer_layers[str(rule.match)]
            if all(name not in names for names in taken):
                taken[number][name] = skeleton.outer_shape(name)
    for index in range(len(skeleton)):
        last = index == len(skeleton) - 1
        for name, shape in skeleton.linear_shapes(index).items():
            first = (n for n, r in enumerate(rules) if r.match not in OUTER and matches(r.match, name, index, last))
            winner = next(first, None)
            if winner is not None:
                taken[winner][name] = shape
    return taken
