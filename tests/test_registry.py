"""The registry is strict, and foreign plugins come in by file."""

import os
import subprocess
import sys

import pytest

from lfq_lightning.errors import UserError
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.registry import Registry, load_plugin_file

PLUGIN = '''
from lfq_lightning.objectives import OBJECTIVES, Objective

@OBJECTIVES.register
class Mine(Objective):
    """A test's own."""
    paper = "none"
    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__()
        self.power = power
    def token_loss(self, hidden, target, head):
        return (hidden - target["hidden"]).abs().pow(self.power).mean(-1)
'''


def registered(source, tmp_path, name):
    file = tmp_path / f"{name}.py"
    file.write_text(source)
    load_plugin_file(file)


def test_a_file_is_a_plugin(tmp_path):
    registered(PLUGIN, tmp_path, "my_own_objective")
    assert "my_own_objective" in OBJECTIVES.names()
    assert OBJECTIVES.parse({"name": "my_own_objective", "power": 1}).build().power == 1.0
    assert OBJECTIVES.options("my_own_objective") == {"power": 2.0}
    with pytest.raises(UserError, match="did you mean 'power'"):
        OBJECTIVES.parse({"name": "my_own_objective", "powr": 1})
    with pytest.raises(UserError, match="power"):
        OBJECTIVES.parse({"name": "my_own_objective", "power": "high"})
    load_plugin_file(tmp_path / "my_own_objective.py")  # a second time changes nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace('paper = "none"', "pass"), "paper"),
        (lambda s: s.replace("Mine(Objective)", "Mine"), "subclass of Objective"),
        (lambda s: s.replace("token_loss", "tokens_loss"), "concrete subclass"),
    ],
)
def test_misfits(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        registered(change(PLUGIN), tmp_path, f"misfit_{abs(hash(message))}")


def test_names_are_taken_once(tmp_path):
    with pytest.raises(UserError, match="taken by another module"):
        registered(PLUGIN, tmp_path, "json")
    own = Registry("objective", Objective)
    own._loaded = True
    own.register(OBJECTIVES.get("mse"))
    with pytest.raises(UserError, match="defined twice"):
        own.register(OBJECTIVES.get("mse"))


def test_missing_file_and_link(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_plugin_file(tmp_path / "none.py")
    cls = type("Twin", (OBJECTIVES.get("mse"),), {"__doc__": "d", "paper": "p", "__module__": "objectives.mse"})
    sys.modules["objectives.mse"] = sys.modules["lfq_lightning.objectives.mse"]
    with pytest.raises(UserError, match="import it as lfq_lightning"):
        OBJECTIVES.register(cls)
    del sys.modules["objectives.mse"]


def test_entry_points(tmp_path):
    """An installed distribution with an entry point in our group is known by name."""
    (tmp_path / "their_objective.py").write_text(PLUGIN)
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lfq_lightning.objectives]\ntheir_objective = their_objective\n")
    code = "from lfq_lightning.objectives import OBJECTIVES; print(OBJECTIVES.names())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "their_objective" in printed.stdout
