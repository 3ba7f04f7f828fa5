"""The comparison: models x settings x methods x seeds, one row of a CSV each; a finished cell is never rerun.

    python -m benchmarks.quality --model stories15m=STORIES15M --settings w4 w4g96 w3g96 w2g32 \\
        --calibration tinystories.txt --other wikitext2-valid.txt --work runs/quality --peer-python PEER/bin/python

PEER is an environment with `torch` and `auto-round==0.16.1` and nothing of ours. All methods see the same tokens: ours
train on them but for the last few, which choose the best step; AutoRound, which chooses by its training loss, trains on
all of them. A method that differs from another in its last block only (`…+lfq`) takes over the other's blocks, whose
seconds count for both. Held-out text comes from the rest of the calibration text's domain and from another one.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.quality.measure import Reference, full_precision, quantised, reference_on
from benchmarks.quality.methods import ABLATIONS, METHODS, RECIPE, Plan, Setting
from benchmarks.rows import append, finished
from lfq_lightning.data import CalibrationData
from lfq_lightning.models.checkpoints import open_checkpoint

RESULTS = Path(__file__).parents[1] / "results" / "quality.csv"
PEERS = {"autoround": 1, "autoround-best": 5}  # times the setting's steps
_STARTER = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[2:]).pid, 0)
open(sys.argv[1], "w").write(str(usage.ru_maxrss * 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""
SEQUENCES = 136
SELECTION = 8
SELECTION_AT_THE_END = 2  # where only the start and the end are compared, and no steps between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="NAME=CHECKPOINT")
    parser.add_argument("--calibration", type=Path, required=True, help="a .txt; its last part is held out")
    parser.add_argument("--held-out-share", type=float, default=0.1, help="how much of it (0.1)")
    parser.add_argument("--other", type=Path, required=True, help="a .txt of another domain")
    parser.add_argument("--settings", nargs="+", required=True, help="such as w4 w3g96 w2g32; asymmetric")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *PEERS, *ABLATIONS], default=[*METHODS, *PEERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="calibration sequences, selection included")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    helped = "of `recipe`: steps a block, steps on the last, batch size"
    parser.add_argument("--recipe", type=int, nargs=3, default=[120, 85, 8], help=helped)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--work", type=Path, required=True, help="a folder for what lies between")
    parser.add_argument("--shared", action="store_true", help="other work runs beside: leave the seconds out")
    parser.add_argument("--peer-python", help="interpreter of the peer's environment")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(given)
    for seed in given.seeds:
        for setting in given.settings:
            for method in given.methods:
                if method in PEERS and not given.peer_python:
                    continue
                if method == "nf4" and setting != "w4":  # it has one grid
                    continue
                matrix.fill(setting, method, seed)


class Matrix:
    """The cells of one model."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.name, _, self.checkpoint = given.model.partition("=")
        self.calibration, self.held_out = split_text(given.calibration, given.held_out_share, given.work)

    @cached_property
    def reference(self) -> Reference:
        return reference_on(self.checkpoint, self.held_out, self.given.other, self.given.seq_len)

    def fill(self, label: str, method: str, seed: int) -> None:
        """Run one cell and append its row, unless the row is there."""
        given, setting = self.given, _setting(label, self.given)
        names = {"model": self.name, "setting": label, "method": method, "seed": str(seed), "steps": str(given.steps)}
        if finished(names, RESULTS):
            return
        folder = given.work / "-".join(names.values())
        data = {"dataset": str(self.calibration), "seq_len": given.seq_len, "seed": seed}
        at_the_end = method == RECIPE  # soft rounding is worth checking only once it has hardened
        selection = SELECTION_AT_THE_END if at_the_end else SELECTION
        data |= {"num_samples": given.sequences - selection, "num_held_out": selection}
        if method in PEERS:
            versions = versions_beside(given.peer_python, ("torch", "transformers", "auto-round"))
            command = self._peer(write_tokens(self.checkpoint, data, folder), folder, setting, PEERS[method], seed)
        else:
            versions = versions_beside(sys.executable, ("torch", "transformers", "lightning", "lfq-lightning"))
            command = self._ours(data, folder, {**METHODS, **ABLATIONS}[method](setting), seed, at_the_end)
        base = given.work / "-".join((names | {"method": method.partition("+")[0]}).values())
        if base != folder and (base / "config.json").exists():
            command += ["--reuse", str(base)]
        seconds, peak_bytes = _timed(command, folder.with_suffix(".log"))
        seconds += _seconds_taken_over(folder, base)
        measured = self.reference.measure(quantised(folder))
        per_sequence = " ".join(f"{value:.6g}" for value in measured.pop("kl_per_sequence"))
        row = names | {key: f"{value:.6g}" for key, value in measured.items()}
        row |= {"seconds": "" if given.shared else f"{seconds:.1f}", "peak_rss_gb": f"{peak_bytes / 1e9:.3f}"}
        row["threads"] = str(torch.get_num_threads())
        append(RESULTS, row | {"versions": versions, "kl_per_sequence": per_sequence})
        print(
            *(row[key] for key in ("model", "setting", "method", "seed", "kl", "top1_agreement", "seconds")), flush=True
        )

    def _ours(self, data: dict[str, Any], folder: Path, plan: Plan, seed: int, at_the_end: bool) -> list[str]:
        config = {"seed_everything": seed, "model": {"checkpoint": self.checkpoint}, "data": data, "plan": plan}
        if at_the_end:
            config["trainer"] = {"val_check_interval": 1.0}
        return run_command(config, folder)

    def _peer(self, tokens: Path, folder: Path, setting: Setting, times: int, seed: int) -> list[str]:
        script = Path(__file__).parent / "peer_auto_round.py"
        command = [self.given.peer_python, script, dense_folder(self.checkpoint, self.given.work), tokens, folder]
        command += ["--bits", setting.bits, "--group-size", setting.group_size, "--steps", times * setting.steps]
        return [str(word) for word in [*command, "--batch-size", setting.batch_size, "--seed", seed]]


def _setting(label: str, given: argparse.Namespace) -> Setting:
    bits, _, group = label.removeprefix("w").partition("g")
    size = int(group) if group else -1
    return Setting(int(bits), size, False, given.steps, given.batch_size, tuple(given.recipe))


def run_command(config: dict[str, Any], folder: Path) -> list[str]:
    """Write a run's config beside its folder; return the command that makes the run."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps({**config, "output": str(folder)}))
    return [sys.executable, "-m", "lfq_lightning", "run", "--config", str(file), "--overwrite", "true"]


def split_text(text: Path, share: float, work: Path) -> tuple[Path, Path]:
    """Write the text as documents of many windows, its last `share` apart; return both files."""
    stories = [story.strip() for story in text.read_text(encoding="utf-8").split("<|endoftext|>") if story.strip()]
    if len(stories) == 1:  # no separators: paragraphs
        stories = [part.strip() for part in stories[0].split("\n") if part.strip()]
    cut = int(len(stories) * (1 - share))
    documents = ["\n".join(stories[start : start + 30]) for start in range(0, cut, 30)]
    paths = work / f"{text.stem}-calibration.txt", work / f"{text.stem}-held-out.txt"
    paths[0].write_text("<|endoftext|>".join(documents), encoding="utf-8")
    paths[1].write_text("\n".join(stories[cut:]), encoding="utf-8")
    return paths


def write_tokens(checkpoint: str, data: dict[str, Any], folder: Path) -> Path:
    """Write the tokens that our runs see, training and selection, for a peer."""
    train, chosen_by = CalibrationData(**data).token_sets(open_checkpoint(checkpoint), torch.device("cpu"))
    file = folder.with_suffix(".safetensors")
    save_file(
        {
            "input_ids": torch.cat([train.input_ids, chosen_by.input_ids]),
            "mask": torch.cat([train.mask, chosen_by.mask]),
        },
        file,
    )
    return file


def dense_folder(checkpoint: str, work: Path) -> str:
    """Return a Hugging Face folder of the model: peers read no GGUF."""
    folder = work / Path(checkpoint).stem
    if not checkpoint.endswith(".gguf"):
        return checkpoint
    if not folder.exists():
        full_precision(checkpoint).bfloat16().save_pretrained(folder)
        open_checkpoint(checkpoint).tokenizer().save_pretrained(folder)
    return str(folder)


def _timed(command: list[str], log: Path) -> tuple[float, int]:
    """Run a command with its output in a log; return wall seconds and its peak resident bytes.

    The system counts as a child's the memory of whoever started it; so a small process does.
    """
    peak = log.with_suffix(".peak")
    started = time.perf_counter()
    with log.open("w") as output:
        status = subprocess.run([sys.executable, "-c", _STARTER, peak, *command], stdout=output, stderr=output)
    if status.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed; see {log}.")
    return time.perf_counter() - started, int(peak.read_text())


def _seconds_taken_over(folder: Path, base: Path) -> float:
    """Return what the blocks that `folder`'s run took over from `base`'s had cost there."""
    if folder == base or not (base / "journal.jsonl").exists():
        return 0.0
    ours, theirs = (
        {line["fingerprint"]: line["seconds"] for line in map(json.loads, (run / "journal.jsonl").open())}
        for run in (folder, base)
    )
    return sum(seconds for fingerprint, seconds in theirs.items() if fingerprint in ours)


def versions_beside(python: str, names: tuple[str, ...]) -> str:
    """Return what is installed beside an interpreter."""
    script = "import sys; from importlib.metadata import version; print(*(f'{n}={version(n)}' for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", script, *names], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
