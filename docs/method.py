"""The method on one page: blocks calibrated one after another, the last one by its logits, as a plain PyTorch loop.

    python docs/method.py MODEL_FOLDER TEXT_FILE

It uses the parts that `lfq run` uses, and neither Lightning nor the scheduler; a test compares the two bit for bit.
Not here: precision other than fp32, several processes, AWQ's folds, resuming, activations that do not fit in memory.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lfq_lightning.calibration.activation_cache import ActivationCache
from lfq_lightning.calibration.block_module import BlockModule
from lfq_lightning.calibration.calibration_block import CalibrationBlock
from lfq_lightning.calibration.final_block_module import FinalBlockModule
from lfq_lightning.calibration.solve import solve
from lfq_lightning.calibration.stream_store import StreamStore
from lfq_lightning.data import CalibrationData
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.formats.compressed_tensors import CompressedTensors
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import Plan, Rule

CPU = torch.device("cpu")
ALONE = Ranks(CPU)
FLEXROUND = {"name": "flexround", "bits": 3, "group_size": 16, "init": "gptq"}
RULES = [
    Rule("last", FLEXROUND, objective="logit_ce", steps=50, batch_size=4),
    Rule("all", {"name": "gptq", "bits": 3, "group_size": 16}),
]


def calibrate(model: str, rules: list[Rule], data: CalibrationData) -> dict[str, Tensor]:
    """Return the packed tensors of every quantised layer of a model, as they stand in its shards."""
    checkpoint = open_checkpoint(model)
    skeleton = ModelSkeleton(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        store = StreamStore(CPU, Path(folder), 0, 10**10)
        # Two streams of hidden states for each split: the teacher's (full precision) and the student's (quantised).
        train, held_out = splits = [
            ActivationCache(name, map(skeleton.embed, tokens.input_ids[:, None]), skeleton.width, tokens, ALONE, store)
            for name, tokens in zip(("train", "held_out"), data.token_sets(checkpoint, CPU), strict=True)
        ]
        packed: dict[str, Tensor] = {}
        for plan in Plan(rules).resolve(skeleton):
            block, objective = skeleton.block(plan.indices), plan.objective.build()
            module: CalibrationBlock = BlockModule(block, objective, plan)
            if objective.logit_space:  # LFQ: through the frozen norm and LM head
                module = FinalBlockModule(block, objective, plan, skeleton.head(torch.float32))

            with torch.no_grad():  # 1. the teacher runs; what the objective needs of it is kept
                for split in splits:
                    split.advance_teacher(block, CPU)
                    split.set_target(lambda h, module=module: _target(module, h), CPU)
                # 2. closed-form quantizers solve on the student stream
                inputs = lambda half: train.student_batches(CPU, half)  # noqa: E731
                solutions = solve(block, plan.layers, inputs, checkpoint.dtype, inputs, ALONE, {})

            for name, solution in solutions.items():  # 3. learned ones begin where those ended, and train
                learned = plan.layers[name].learned
                if learned is not None:
                    block.train_linear(name, learned.build(solution.latent, solution.quantized))
            shipped = {name: solution.quantized for name, solution in solutions.items()}
            if plan.learned:
                order = data.seed * 1_000_003 + plan.index
                _train(module, train, held_out, order)
                shipped |= block.ship()

            for name, quantized in shipped.items():  # 4. what ships is packed, and the student stream moves on with it
                packed |= CompressedTensors().pack(name, quantized)
            with torch.no_grad():
                for split in splits:
                    split.advance_student(block, CPU)
    return packed


def _target(module: CalibrationBlock, hidden: Tensor) -> dict[str, Tensor]:
    return module.objective.target(module.objective.view(hidden, module.head), module.head)


def _train(module: CalibrationBlock, train: ActivationCache, held_out: ActivationCache, order: int) -> None:
    """Adam with a cosine to zero; the step with the least held-out loss is kept, the start included."""
    plan = module.plan
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=plan.lr, eps=1e-15, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=plan.steps)
    best, kept = _held_out_loss(module, held_out), [parameter.detach().clone() for parameter in parameters]
    for step, batch in enumerate(train.shuffled(plan.batch_size, plan.steps, order)):
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
        cosine.step()
        if (step + 1) % max(1, plan.steps // 4) == 0 and (loss := _held_out_loss(module, held_out)) < best:
            best, kept = loss, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def _held_out_loss(module: CalibrationBlock, held_out: ActivationCache) -> float:
    losses = [
        (module.validation_step(batch), batch["mask"].sum()) for batch in held_out.in_order(module.plan.batch_size)
    ]
    return float(sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses))


if __name__ == "__main__":
    text = CalibrationData(sys.argv[2], num_samples=32, seq_len=128, num_held_out=8)
    for name, tensor in calibrate(sys.argv[1], RULES, text).items():
        print(f"{name:60} {tuple(tensor.shape)} {tensor.dtype}")
