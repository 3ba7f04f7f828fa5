"""Stage: a passage of a run over the model, and the nouns of a plan: Rule, LayerPlan, BlockPlan."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from lfq_lightning.errors import UserError
from lfq_lightning.grids import Grid
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives import Objective
from lfq_lightning.quantizers import ClosedFormQuantizer, DenseQuantizer, LearnedQuantizer
from lfq_lightning.registry import Plugin


@dataclass
class Rule:
    """One line of the plan, as YAML gives it.

    Args:
        match: `last`, `all`, a block index, a glob on full layer names (`*.down_proj`), or a list of globs; or the name
            of a stage, such as `whole`: once all blocks are done, all of them together are trained from what they would
            ship as. `embeddings` and `head` are solved first, in closed form, and all blocks are calibrated with them;
            gptq of a head sees what enters it in full precision. Where the two are one tensor, either word means both.
        quantizer: a name, or `{name, bits, group_size, symmetric, …}` with the quantizer's own options; 4 bits, per
            output channel and symmetric if not said; or `{name, grid, …}` with the grid of a format. A learned
            quantizer also takes `init`, a closed-form one. With `match: whole` a learned one, without these: the grids
            are there.
        objective: a name, or `{name, …}`; what a learned quantizer minimises, and what every block reports. A list of
            them, each with a `weight`, is their weighted sum.
        steps: optimisation steps of a learned quantizer.
        lr: peak learning rate; 2e-3 for adam, 1 / steps for sign_sgd if not said.
        batch_size: sequences per step.
        optimizer: `adam` with a cosine to 0, `adamw8bit` (the same with a state of 8 bits, through bitsandbytes), or
            `sign_sgd` with a line to 0; the quantizer's own if not said.
        final_blocks: with `match: last`, how many of the last blocks are trained together as one.
        activation_checkpointing: run each decoder layer again in the backward pass instead of keeping its activations.
    """

    match: int | str | list[str]
    quantizer: str | dict[str, Any]
    objective: str | dict[str, Any] | list[dict[str, Any]] = "mse"
    steps: int = 200
    lr: float | None = None
    batch_size: int = 8
    optimizer: str | None = None
    final_blocks: int = 1
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """What one linear layer gets: a closed-form solution, and maybe training that starts from it."""

    scheme: Grid
    closed_form: Plugin[ClosedFormQuantizer] | Plugin[DenseQuantizer]
    learned: Plugin[LearnedQuantizer] | None

    @property
    def needs_reference(self) -> bool:
        cls = self.closed_form.cls
        return issubclass(cls, ClosedFormQuantizer) and cls.needs_reference(self.closed_form.options)


@dataclass(frozen=True)
class BlockPlan:
    """What one block gets. `layers` maps full names; a linear layer not in it stays as it is.

    Args:
        stage: the stage that it belongs to.
        index: its place in the run.
        indices: the decoder layers in it; one, or the last few as one block, or all once more.
    """

    stage: "Stage"
    index: int
    indices: range
    layers: dict[str, LayerPlan]
    objective: Plugin[Objective]
    steps: int
    lr: float
    batch_size: int
    optimizer: str
    activation_checkpointing: bool

    @property
    def solved(self) -> dict[str, LayerPlan]:
        """The layers that are solved in closed form; none in a stage whose codes are there."""
        return {} if self.stage.from_shards else self.layers

    @property
    def learned(self) -> bool:
        return any(layer.learned for layer in self.layers.values())

    @property
    def needs_reference(self) -> bool:
        return any(layer.needs_reference for layer in self.solved.values())

    @property
    def logit_space(self) -> bool:
        return self.objective.build().logit_space


@dataclass(frozen=True)
class ParsedRule:
    """A rule, checked, with everything that it leaves to defaults filled in; `where` names it in messages."""

    stage: "Stage"
    rule: Rule
    layer: LayerPlan
    objective: Plugin[Objective]
    optimizer: str
    lr: float
    where: str

    @property
    def training(self) -> tuple[Any, ...]:
        """What rules that train one block must agree on."""
        rule = self.rule
        return self.objective, rule.steps, self.lr, rule.batch_size, self.optimizer, rule.activation_checkpointing

    def plan(self, index: int, indices: range, layers: dict[str, LayerPlan], skeleton: ModelSkeleton) -> BlockPlan:
        """Return a block's plan by this rule. Raises UserError for an objective that the model's head cannot have."""
        if self.objective.build().linear_head_only and skeleton.logit_terms[1] is not None:
            raise UserError(
                f"{self.where}: objective {self.objective.name} cannot do with this model's soft-capped logits; use "
                "logit_ce."
            )
        objective, steps, lr, batch_size, optimizer, checkpointing = self.training
        return BlockPlan(self.stage, index, indices, layers, objective, steps, lr, batch_size, optimizer, checkpointing)


class Stage(ABC):
    """What is the same for all blocks of a stage.

    Attributes:
        paper: the source of its method.
        title: what people call its blocks; None if each goes by its own name.
        teacher_runs: the full-precision stream runs through each block; if not, it stands behind them already.
        from_shards: blocks start from the codes that are on disk, and the student stream from the embeddings; if not,
            from full-precision weights, which closed-form quantizers solve.
        replaces_shards: its shards are written beside those of the same blocks, and take their place when the run ends.
    """

    paper: ClassVar[str]
    title: ClassVar[str | None] = None
    teacher_runs: ClassVar[bool]
    from_shards: ClassVar[bool]
    replaces_shards: ClassVar[bool]

    def __repr__(self) -> str:  # stands in fingerprints
        return f"{type(self).__name__}()"


class LaterStage(Stage, ABC):
    """A stage that one rule asks for, by `match: NAME`; it ends a run."""

    @abstractmethod
    def check(self, rule: Rule, layer: LayerPlan) -> None:
        """Raise UserError for a rule that the stage cannot follow."""

    @abstractmethod
    def plan(self, rule: ParsedRule, skeleton: ModelSkeleton, before: list[BlockPlan]) -> BlockPlan:
        """Return the plan of its block, after those of the blocks before. Raises UserError if there is none."""
