"""The frontier's plans, its chart and its table."""

from xml.etree import ElementTree

import pytest

from benchmarks.frontier import BUDGETS, CLOSED, _picture, _points, _shares, _table, plan_of
from lfq_lightning.plan import Plan, Rule


def row(method, seed, seconds, kl):
    numbers = {"kl": str(kl), "kl_other": "2.0", "top1_agreement": "0.5", "cpu_seconds": str(seconds)}
    return {"model": "m", "setting": "w3g96", "method": method, "seed": str(seed), **numbers}


ROWS = [row("recipe x2", 1, 16, 0.1), row("recipe x1", 1, 6, 0.3), row("recipe x1", 2, 10, 0.5)]
ROWS += [row("autoround 200", 1, 12, 0.4)]


@pytest.mark.parametrize("method", [*CLOSED, *BUDGETS])
@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (3, 96)])
def test_every_method_is_a_plan(method, bits, group_size):
    Plan([Rule(**rule) for rule in plan_of(method, bits, group_size)])


def test_a_budget_is_a_number_of_steps():
    steps = [rule["steps"] for rule in plan_of("recipe x2", 4, -1)]
    assert steps == [170, 240]


def test_points_are_means_over_seeds_in_the_order_of_time():
    assert _points(ROWS, "recipe") == [(3.0, 0.4), (4.0, 0.1)]


def test_the_chart_has_a_panel_a_setting_and_a_dot_a_method():
    drawing = ElementTree.fromstring(_picture({"m, W3g96": ROWS, "m, W4": ROWS[:1]}))
    panels = drawing.findall("{http://www.w3.org/2000/svg}svg")
    dots = [len([part for part in panel.iter() if part.get("class") == "point"]) for panel in panels]
    assert dots == [3, 1]


def test_the_table_has_means_and_the_number_of_seeds():
    lines = _table(ROWS, ("model", "method")).splitlines()
    assert lines[0] == "| model | method | seeds | KL to FP | KL, other domain | top-1 | CPU seconds |"
    assert "| m | recipe x1 | 2 | 0.400 | 2.00 | 0.500 | 8 |" in lines


def test_shares_are_of_the_seeds_that_both_have():
    lines = _shares([*ROWS, row("autoround 200", 3, 1000, 1.0)]).splitlines()
    assert lines[0] == "| method | m w3g96 |"
    assert lines[2:] == ["| recipe x1 | 0.75 in 0.50 |", "| recipe x2 | 0.25 in 1.33 |"]
