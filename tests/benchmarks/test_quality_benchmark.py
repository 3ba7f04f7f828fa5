"""The comparison's plans."""

import pytest

from benchmarks.quality.methods import ABLATIONS, METHODS, Setting
from lfq_lightning.plan import Plan, Rule


@pytest.mark.parametrize("name", [*METHODS, *ABLATIONS])
@pytest.mark.parametrize(
    "setting", [Setting(4, -1, False, 200, 8, (120, 85, 8)), Setting(2, 32, True, 8, 2, (5, 3, 2))], ids=str
)
def test_every_method_is_a_plan(name, setting):
    Plan([Rule(**rule) for rule in {**METHODS, **ABLATIONS}[name](setting)])
