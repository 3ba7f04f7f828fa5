"""The comparison's statistics and plans."""

import itertools

import pytest

from benchmarks.quality.methods import ABLATIONS, METHODS, Setting
from benchmarks.quality.report import paired_test
from lfq_lightning.plan import Plan, Rule


def test_paired_test_against_all_sign_changes():
    a = [0.31, 0.25, 0.40, 0.22, 0.35, 0.28, 0.30, 0.27]
    b = [0.28, 0.24, 0.36, 0.23, 0.30, 0.27, 0.26, 0.25]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    signs = list(itertools.product((1, -1), repeat=8))
    as_large = sum(
        abs(sum(s * d for s, d in zip(sign, differences, strict=True))) >= sum(differences) - 1e-12 for sign in signs
    )
    mean, p = paired_test(a, b)
    assert mean == pytest.approx(sum(differences) / 8)
    assert p == pytest.approx(as_large / len(signs), abs=0.003)
    assert paired_test(a, a)[1] == 1.0


@pytest.mark.parametrize("name", [*METHODS, *ABLATIONS])
@pytest.mark.parametrize("setting", [Setting(4, -1, False, 200, 8), Setting(2, 32, True, 8, 2)], ids=str)
def test_every_method_is_a_plan(name, setting):
    Plan([Rule(**rule) for rule in {**METHODS, **ABLATIONS}[name](setting)])
