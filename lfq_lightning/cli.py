"""The command line: `lfq COMMAND …`, and `lightning run` for `lfq run`."""

import argparse
import importlib.util
import sys
from pathlib import Path

from lfq_lightning import __version__
from lfq_lightning.commands.ending import prepare_streams, run_to_its_end, use_utf8
from lfq_lightning.errors import UserError
from lfq_lightning.quant_scheme import QuantScheme

_HELP = """usage: lfq COMMAND …

  lfq run --config FILE.yaml [--key.path value …]   quantise a model; --print_config prints every key
  lfq plan --config FILE.yaml [--model MODEL] [--gpus 8x80GB] [--nodes 2]
                                                    memory, disk, work and time of a run; needs no weights
  lfq data --config FILE.yaml                       what its calibration data look like
  lfq sensitivity MODEL --dataset TEXT --average-bits 3.5
                                                    rank layers by what they lose; propose a plan of mixed widths
  lfq eval MODEL_DIR … --text FILE --tasks gsm8k …  what was lost: texts, long answers, lm-eval's tasks; paired tests
  lfq report RUN … [--output FILE.html]             a page about a run, or several side by side
  lfq list                                          every objective, quantizer, callback and format with its options
  lfq generate MODEL_DIR "PROMPT"                   let a packed model answer
  lfq chat MODEL_DIR                                talk with it
  lfq inspect MODEL_DIR                             schemes, sizes, and which engines load it
  lfq export MODEL_DIR --format gptq --output DIR   the same model for another engine; nothing is calibrated again
  lfq bench MODEL_DIR                               tokens per second and memory against the dense model
  lfq --version

`lightning run …` is `lfq run …`. `lfq COMMAND --help` says more."""

_MODEL_DIR = "a packed model: output folder of `lfq run` or `lfq export`, or another tool's"


def main(argv: list[str] | None = None) -> None:
    """Run a command. What goes wrong is printed as one sentence, with an exit code."""
    if argv is None:
        use_utf8(sys.argv[1:])
        prepare_streams()
    run_to_its_end(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def lightning_main() -> None:
    """The `lightning` command: `run` is ours, every other word goes to lightning-sdk if that is installed."""
    if sys.argv[1:2] == ["run"]:
        main()
    elif importlib.util.find_spec("lightning_sdk") is not None:
        from lightning_sdk.cli.entrypoint import main_cli

        main_cli()
    else:
        print(f"lightning run comes from lfq_lightning; install lightning-sdk for the rest.\n\n{_HELP}")
        sys.exit(0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_HELP)
    elif arguments[0] == "--version":
        print(f"lfq_lightning {__version__}")
    elif arguments[0] == "run":
        from lfq_lightning.run import run

        run(arguments)
    elif arguments[0] == "list":
        _parser("list", "Print every objective, quantizer and callback.").parse_args(arguments[1:])
        from lfq_lightning.commands.plugin_list import print_plugins

        print_plugins()
    elif arguments[0] in _PARSED:
        _PARSED[arguments[0]](arguments[1:])
    else:
        from lfq_lightning.registry import did_you_mean

        raise UserError(f"unknown command {arguments[0]!r}: {did_you_mean(arguments[0], ['run', 'list', *_PARSED])}")


def _generate(arguments: list[str]) -> None:
    parser = _parser("generate", "Print a packed model's greedy answer.")
    parser.add_argument("model_dir", help=_MODEL_DIR)
    parser.add_argument("prompt", help="what to say to the model; goes through its chat template if it has one")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="longest answer (default: 100)")
    given = parser.parse_args(arguments)
    _check_positive(given, "max_new_tokens")
    from lfq_lightning.ops.path import best_device
    from lfq_lightning.packed.generate import answer
    from lfq_lightning.packed.load_model import load

    _log_to_stderr()
    model, tokenizer = load(given.model_dir, device=best_device())
    answer(model, tokenizer, [{"role": "user", "content": given.prompt}], given.max_new_tokens, stream=True)


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("lfq_lightning").setLevel(logging.INFO)


def _chat(arguments: list[str]) -> None:
    parser = _parser("chat", "Talk with a packed model; an empty line ends it.")
    parser.add_argument("model_dir", help=_MODEL_DIR)
    parser.add_argument("--max-new-tokens", type=int, default=300, help="longest answer (default: 300)")
    given = parser.parse_args(arguments)
    _check_positive(given, "max_new_tokens")
    from lfq_lightning.commands.chat import chat

    _log_to_stderr()
    chat(given.model_dir, given.max_new_tokens)


def _inspect(arguments: list[str]) -> None:
    parser = _parser("inspect", "Print each layer's scheme and size, and which engines load the model.")
    parser.add_argument("model_dir", help=_MODEL_DIR)
    given = parser.parse_args(arguments)
    from lfq_lightning.commands.inspect_folder import inspect_folder

    inspect_folder(given.model_dir)


def _export(arguments: list[str]) -> None:
    parser = _parser("export", "Write a packed model in another format; nothing is calibrated again.")
    parser.add_argument("model_dir", help=_MODEL_DIR)
    parser.add_argument("--format", required=True, help="gguf, or one of those that `lfq list` shows")
    parser.add_argument("--output", required=True, help="new folder, or for gguf a new file")
    given = parser.parse_args(arguments)
    if given.format == "gguf":
        from lfq_lightning.packed.gguf_export import export_gguf

        print(export_gguf(given.model_dir, given.output))
    else:
        from lfq_lightning.packed.export import export

        print(export(given.model_dir, given.format, given.output))


def _bench(arguments: list[str]) -> None:
    parser = _parser("bench", "Measure prefill, decode and memory of a packed model and of the same one dense.")
    parser.add_argument("model_dir", help=_MODEL_DIR)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="random tokens to read (128)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to write (64)")
    given = parser.parse_args(arguments)
    _check_positive(given, "prompt_tokens", "new_tokens")
    from lfq_lightning.commands.decode_speed import bench

    bench(given.model_dir, given.prompt_tokens, given.new_tokens)


def _sensitivity(arguments: list[str]) -> None:
    parser = _parser("sensitivity", "Rank layers by the KL of quantising each alone, and propose mixed widths.")
    parser.add_argument("model", help="a Hugging Face folder, a hub id, or a .gguf file")
    parser.add_argument("--dataset", required=True, help="a .txt, a .jsonl or a hub name")
    parser.add_argument("--average-bits", type=float, required=True, help="bits per weight, scales not counted")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="widths to choose from (2 3 4)")
    parser.add_argument("--group-size", type=int, default=-1, help="-1 is per output channel (the default)")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--num-samples", type=int, default=8, help="sequences to measure on (8)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence (256)")
    parser.add_argument("--output", type=Path, help="write the plan to this YAML too")
    given = parser.parse_args(arguments)
    from lfq_lightning.commands.sensitivity_report import sensitivity_report

    sensitivity_report(
        given.model,
        given.dataset,
        given.average_bits,
        [QuantScheme(bits, given.group_size, given.symmetric) for bits in sorted(set(given.bits))],
        given.num_samples,
        given.seq_len,
        given.output,
    )


def _plan(arguments: list[str]) -> None:
    parser = _parser("plan", "Print what a run will hold, write and compute, and whether it fits; needs no weights.")
    parser.add_argument("--config", required=True, help="the run's YAML; more of its keys may follow, as for `lfq run`")
    parser.add_argument("--model", help="another model: a folder, a config.json, or a hub id")
    parser.add_argument("--gpus", help="GPUs of each node, as 8x80GB; this machine's CPU if not given")
    parser.add_argument("--nodes", type=int, default=1, help="how many nodes (1)")
    parser.add_argument("--tflops", type=float, help="bf16 TFLOP/s that each GPU sustains")
    given, more = parser.parse_known_args(arguments)
    from lfq_lightning.planning.plan_run import parse_machine, plan_config, print_plan
    from lfq_lightning.run import read_config

    named = ["--model.checkpoint", given.model] if given.model else []
    config = read_config(["run", "--config", given.config, *more, *named, "--output", "planned"])
    machine = parse_machine(given.gpus, given.nodes, given.tflops, config.trainer.precision)
    if not print_plan(config.model.checkpoint, plan_config(config, machine), machine):
        sys.exit(1)


def eval_parser() -> argparse.ArgumentParser:
    """Return the options of `lfq eval`."""
    parser = _parser("eval", "Measure packed models against full precision, and each against the first; paired tests.")
    parser.add_argument("models", nargs="+", help=_MODEL_DIR)
    parser.add_argument("--reference", help="the full-precision model; what the first model was made from if not given")
    parser.add_argument(
        "--text", nargs="+", default=[], help="a .txt, .jsonl or hub name[:subset]: KL, agreement, perplexity"
    )
    parser.add_argument("--seq-len", type=int, help="tokens of a text's window; 2048, or as far as it reads")
    parser.add_argument("--windows", type=int, help="the first windows only, of each text")
    parser.add_argument("--prompts", type=Path, help="a .txt or .jsonl of prompts for greedy answers; a few of our own")
    parser.add_argument("--new-tokens", type=int, default=256, help="longest greedy answer; 0 asks for none (256)")
    parser.add_argument("--tasks", nargs="+", default=[], help="of lm-eval: gsm8k, ifeval, …; needs the extra eval")
    parser.add_argument("--data-dir", type=Path, help="local copies of the tasks' data; the hub if not given")
    parser.add_argument(
        "--num-fewshot", type=int, help="solved examples before a question; the task's own if not given"
    )
    parser.add_argument("--limit", type=int, help="the first examples only, of each task")
    parser.add_argument("--task-tokens", type=int, help="longest answer in a task; the task's own if not given")
    parser.add_argument("--draws", type=int, default=0, help="sampled answers per question: avg@n and pass@k (greedy)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of sampled answers (0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of sampled answers (0.95)")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True, help="use the chat template")
    parser.add_argument("--batch-size", type=int, help="of tasks; found by the memory there is if not given")
    parser.add_argument("--packed", action="store_true", help="keep layers packed in memory, at the kernels' precision")
    parser.add_argument("--output", type=Path, help="for answers and results; MODEL_DIR/evaluation if not given")
    return parser


def _eval(arguments: list[str]) -> None:
    given = eval_parser().parse_args(arguments)
    _check_positive(given, "seq_len", "windows", "limit", "task_tokens", "batch_size")
    if (
        min(given.new_tokens, given.draws, given.num_fewshot or 0) < 0
        or not given.temperature > 0
        or not 0 < given.top_p <= 1
    ):
        raise UserError(
            "--new-tokens, --draws and --num-fewshot must not be negative, --temperature positive, --top-p in (0, 1]."
        )
    if not (given.text or given.new_tokens or given.tasks):
        raise UserError("nothing to measure; give --text, --tasks, or --new-tokens above 0.")
    from lfq_lightning.evaluation.drift import Drift
    from lfq_lightning.evaluation.evaluate_models import evaluate_models, print_results, reference_of
    from lfq_lightning.evaluation.score import Measure
    from lfq_lightning.evaluation.text_loss import TextLoss
    from lfq_lightning.file_names import EVALUATION

    _log_to_stderr()
    measures: list[Measure] = []
    if given.text:
        measures.append(TextLoss(given.text, given.seq_len, given.windows))
    if given.new_tokens:
        measures.append(Drift(given.prompts, given.new_tokens))
    if given.tasks:
        _check_installed("lm_eval", "--tasks", "eval")
        from lfq_lightning.evaluation.task_scores import Sampling, TaskScores

        sampling = Sampling(given.draws, given.temperature, given.top_p)
        measures.append(
            TaskScores(
                given.tasks,
                given.data_dir,
                given.num_fewshot,
                given.limit,
                given.task_tokens,
                given.chat,
                sampling,
                given.batch_size,
            )
        )
    output = given.output or Path(given.models[0]) / EVALUATION
    reference = given.reference or reference_of(given.models[0])
    print_results(evaluate_models(given.models, reference, measures, output, given.packed))
    print(f"all values: {output / 'evaluation.json'}")


def _check_installed(module: str, option: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{option} needs more packages: pip install 'lfq-lightning[{extra}]'.")


def _report(arguments: list[str]) -> None:
    parser = _parser("report", "Write a page about a finished run, or about several side by side.")
    parser.add_argument("runs", nargs="+", help="output folders of `lfq run`")
    parser.add_argument("--output", type=Path, help="the page; RUN/report.html, or comparison.html for several")
    given = parser.parse_args(arguments)
    from lfq_lightning.file_names import REPORT
    from lfq_lightning.report.write_report import write_report

    alone = Path(given.runs[0]) / REPORT if len(given.runs) == 1 else Path("comparison.html")
    print(write_report(given.runs, given.output or alone))


def _data(arguments: list[str]) -> None:
    parser = _parser("data", "Make a run's calibration data and print what they look like.")
    parser.add_argument("--config", required=True, help="the run's YAML; more of its keys may follow, as for `lfq run`")
    parser.add_argument("--examples", type=int, default=3, help="sequences to print (3)")
    given, more = parser.parse_known_args(arguments)
    from lfq_lightning.commands.data_report import print_data
    from lfq_lightning.data import CalibrationData
    from lfq_lightning.ops.path import best_device
    from lfq_lightning.run import read_config

    _log_to_stderr()
    config = read_config(["run", "--config", given.config, *more, "--output", "planned"])
    device = best_device()
    print_data(config.model.checkpoint, CalibrationData(**config.data.as_dict()), device, given.examples)


_PARSED = {
    "data": _data,
    "report": _report,
    "eval": _eval,
    "plan": _plan,
    "sensitivity": _sensitivity,
    "generate": _generate,
    "chat": _chat,
    "inspect": _inspect,
    "export": _export,
    "bench": _bench,
}


def _check_positive(given: argparse.Namespace, *names: str) -> None:
    for name in names:
        if vars(given)[name] is not None and vars(given)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"lfq {command}", description=description)
