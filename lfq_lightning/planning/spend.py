"""Spend a budget on options of many things, where it saves the most."""

from collections.abc import Sequence


def spend(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """Return which option each thing takes, for a small sum of losses at a sum of costs within the budget.

    From the cheapest options on, the step that saves the most loss for what it adds is taken while it fits. None if
    the cheapest do not fit.

    Args:
        costs: of each thing its options'.
        losses: likewise.
    """
    chosen = [min(range(len(options)), key=lambda number: (options[number], number)) for options in costs]
    room = budget - sum(options[number] for options, number in zip(costs, chosen, strict=True))
    if room < 0:
        return None
    while True:
        steps = [
            ((losses[thing][now] - losses[thing][other]) / max(1, cost - costs[thing][now]), thing, other)
            for thing, now in enumerate(chosen)
            for other, cost in enumerate(costs[thing])
            if cost - costs[thing][now] <= room and losses[thing][other] < losses[thing][now]
        ]
        if not steps:
            return chosen
        _, thing, other = max(steps)
        room -= costs[thing][other] - costs[thing][chosen[thing]]
        chosen[thing] = other
