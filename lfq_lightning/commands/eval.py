"""`lfq eval MODEL … --text FILE --tasks gsm8k …`: what was lost: texts, long answers, lm-eval's tasks; paired tests."""

import argparse
import importlib.util
from pathlib import Path

from lfq_lightning.commands.command_line import MODEL_DIR, check_positive, log_to_stderr, parser
from lfq_lightning.errors import UserError


def eval_parser() -> argparse.ArgumentParser:
    """Return the options of `lfq eval`."""
    ours = parser("eval", "Measure packed models against full precision, and each against the first; paired tests.")
    ours.add_argument("models", metavar="MODEL", nargs="+", help=MODEL_DIR)
    ours.add_argument("--reference", help="the full-precision model; what the first model was made from if not given")
    ours.add_argument(
        "--text", nargs="+", default=[], help="a .txt, .jsonl or hub name[:subset]: KL, agreement, perplexity"
    )
    ours.add_argument("--seq-len", type=int, help="tokens of a text's window; 2048, or as far as it reads")
    ours.add_argument("--windows", type=int, help="the first windows only, of each text")
    ours.add_argument("--prompts", type=Path, help="a .txt or .jsonl of prompts for greedy answers; a few of our own")
    ours.add_argument("--new-tokens", type=int, default=256, help="longest greedy answer; 0 asks for none (256)")
    ours.add_argument("--tasks", nargs="+", default=[], help="of lm-eval: gsm8k, ifeval, …; needs the extra eval")
    ours.add_argument("--data-dir", type=Path, help="local copies of the tasks' data; the hub if not given")
    ours.add_argument("--num-fewshot", type=int, help="solved examples before a question; the task's own if not given")
    ours.add_argument("--limit", type=int, help="the first examples only, of each task")
    ours.add_argument("--task-tokens", type=int, help="longest answer in a task; the task's own if not given")
    ours.add_argument("--draws", type=int, default=0, help="sampled answers per question: avg@n and pass@k (greedy)")
    ours.add_argument("--temperature", type=float, default=0.6, help="of sampled answers (0.6)")
    ours.add_argument("--top-p", type=float, default=0.95, help="of sampled answers (0.95)")
    ours.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True, help="use the chat template")
    ours.add_argument("--batch-size", type=int, help="of tasks; found by the memory there is if not given")
    ours.add_argument("--packed", action="store_true", help="keep layers packed in memory, at the kernels' precision")
    ours.add_argument("--output", type=Path, help="for answers and results; MODEL_DIR/evaluation if not given")
    return ours


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = eval_parser().parse_args(arguments)
    check_positive(options, "seq_len", "windows", "limit", "task_tokens", "batch_size")
    if (
        min(options.new_tokens, options.draws, options.num_fewshot or 0) < 0
        or not options.temperature > 0
        or not 0 < options.top_p <= 1
    ):
        raise UserError(
            "--new-tokens, --draws and --num-fewshot must not be negative, --temperature positive, --top-p in (0, 1]."
        )
    if not (options.text or options.new_tokens or options.tasks):
        raise UserError("nothing to measure; give --text, --tasks, or --new-tokens above 0.")
    from lfq_lightning.evaluation.drift import Drift
    from lfq_lightning.evaluation.evaluate_models import evaluate_models, print_results, reference_of
    from lfq_lightning.evaluation.score import Measure
    from lfq_lightning.evaluation.text_loss import TextLoss
    from lfq_lightning.file_names import EVALUATION

    log_to_stderr()
    measures: list[Measure] = []
    if options.text:
        measures.append(TextLoss(options.text, options.seq_len, options.windows))
    if options.new_tokens:
        measures.append(Drift(options.prompts, options.new_tokens))
    if options.tasks:
        _check_installed("lm_eval", "--tasks", "eval")
        from lfq_lightning.evaluation.task_scores import Sampling, TaskScores

        sampling = Sampling(options.draws, options.temperature, options.top_p)
        measures.append(
            TaskScores(
                options.tasks,
                options.data_dir,
                options.num_fewshot,
                options.limit,
                options.task_tokens,
                options.chat,
                sampling,
                options.batch_size,
            )
        )
    output = options.output or Path(options.models[0]) / EVALUATION
    reference = options.reference or reference_of(options.models[0])
    print_results(evaluate_models(options.models, reference, measures, output, options.packed))
    print(f"all values: {output / 'evaluation.json'}")


def _check_installed(module: str, option: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{option} needs more packages: pip install 'lfq-lightning[{extra}]'.")
