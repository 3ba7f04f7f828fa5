"""Kill runs at random moments, and spoil what they leave: what is resumed ends in the same bytes every time.

    python -m benchmarks.chaos --work runs/chaos [--kills 8]

For FlexRound with LFQ and for GPTQ, on one and on two ranks: a run is sent SIGKILL, all of it or one rank, at random
moments until it has been killed `--kills` times, then it may finish; its folder is compared, byte by byte, with an
uninterrupted run's. Then a disk that is full while a shard is written, shards deleted and corrupted between runs, and a
config edited between runs; two runs into one folder at once; a disk that fills at every size of file; and bits flipped
in every kind of file that a run, stopped or finished, leaves. Writes benchmarks/results/chaos.csv; fails on the first
difference.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.random_llama import save_random_llama
from lfq_lightning.errors import UserError
from lfq_lightning.file_names import CHECKSUMS, LOCK
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.packed.seal import recorded_files
from lfq_lightning.report.run_record import RunRecord

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "chaos.csv"
TIMES = {"metrics.json", "journal.jsonl"}  # hold seconds, so they differ between any two runs
LAST = {"state.safetensors", "tokens.safetensors", "report.html"}  # go, or come, after config.json
_SIZES = 4  # about how many sizes of files a disk fills at
GRID = {"bits": 3, "group_size": 64}
FLEXROUND = {"name": "flexround", **GRID, "init": "gptq"}
PLANS = {
    "flexround+lfq": [
        {"match": "last", "quantizer": FLEXROUND, "objective": "logit_ce", "steps": 40, "batch_size": 4},
        {"match": "all", "quantizer": FLEXROUND, "steps": 40, "batch_size": 4},
    ],
    "gptq": [{"match": "all", "quantizer": {"name": "gptq", **GRID}}],
}


class Case:
    """One plan on one number of ranks: how to start it, and what it should leave."""

    def __init__(self, work: Path, plan: str, ranks: int) -> None:
        self.plan, self.ranks = plan, ranks
        self.folder = work / f"{plan}-{ranks}"
        self.reference = work / f"{plan}-{ranks}-reference"
        self.config = work / f"{plan}-{ranks}.json"
        content: dict[str, Any] = {
            "model": {"checkpoint": str(work / "model")},
            "data": {"dataset": str(work / "text.txt"), "num_samples": 32, "seq_len": 128, "num_held_out": 8},
            "plan": PLANS[plan],
            "trainer": {"accelerator": "cpu", "precision": "32-true"},
            "save_seconds": 0,
        }
        self.config.write_text(json.dumps(content))

    def start(self, output: Path, *more: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        run = ["-m", "lfq_lightning", "run", "--config", str(self.config), "--output", str(output), *more]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        command = [sys.executable, *(torchrun if self.ranks > 1 else []), *run]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, preexec_fn=before, **pipes)

    def finish(self, output: Path, *more: str) -> float:
        started = time.monotonic()
        process = self.start(output, *more)
        said = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"{self.config.stem} ended with {process.returncode}:\n{said}")
        return time.monotonic() - started

    def check(self) -> None:
        """Raise if the folder is not, byte by byte, what the uninterrupted run left."""
        ours, theirs = ({f.name for f in folder.iterdir() if f.is_file()} for folder in (self.folder, self.reference))
        if ours - LAST != theirs - LAST:
            raise SystemExit(f"{self.folder}: files differ: {sorted(ours ^ theirs)}")
        for name in sorted(theirs - TIMES - LAST):
            expected = (
                (self.reference / name).read_bytes().replace(self.reference.name.encode(), self.folder.name.encode())
            )
            if name == CHECKSUMS:  # that of lfq.yaml, which holds the path of the output, differs
                ours, theirs = ({**recorded_files(f), "lfq.yaml": ""} for f in (self.folder, self.reference))
                if ours != theirs:
                    raise SystemExit(f"{self.folder}: checksums differ")
            elif (self.folder / name).read_bytes() != expected:
                raise SystemExit(f"{self.folder / name} differs from {self.reference / name}")
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (self.folder, self.reference)]
        if metrics[0]["quantized"] != metrics[1]["quantized"]:
            raise SystemExit(f"{self.folder}: its metrics differ from those of {self.reference}")

    def nothing_pretends(self) -> None:
        """Raise if the folder of a run that was not let finish looks finished and is not."""
        if (self.folder / "config.json").exists():
            self.check()


def kill(process: subprocess.Popen[str], chance: random.Random) -> str:
    """Send SIGKILL to the whole run, or to one of its ranks; return which."""
    ranks = _family(process.pid)[1:]
    if ranks and chance.random() < 0.5:
        victim = chance.choice(ranks)
        _send(victim)
        process.communicate()
        return "one rank"
    kill_all(process)
    return "whole run"


def kill_all(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a run and all it has started."""
    for pid in _family(process.pid):
        _send(pid)
    process.communicate()


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _send(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # ended by itself in between
        os.kill(pid, signal.SIGKILL)


def be_killed(case: Case, kills: int, chance: random.Random) -> dict[str, Any]:
    """Let a run be killed that often, then finish."""
    for folder in (case.folder, case.reference):
        shutil.rmtree(folder, ignore_errors=True)
    whole = case.finish(case.reference)
    startup = _startup(case)
    ways: list[str] = []
    while len(ways) < kills:
        process = case.start(case.folder)
        deadline = time.monotonic() + startup + chance.random() * max(1.0, whole - startup)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"{case.config.stem} ended with {process.returncode}:\n{process.communicate()[0]}")
            case.check()  # it finished before it could be killed: once more from the start
            shutil.rmtree(case.folder)
            continue
        ways.append(kill(process, chance))
        journal = case.folder / "journal.jsonl"
        blocks = len(journal.read_text().splitlines()) if journal.exists() else 0
        print(f"{case.plan}, {case.ranks} ranks: kill {len(ways)} of {kills}, {blocks} blocks done", flush=True)
        if (case.folder / "config.json").exists():  # killed after its last file
            case.check()
            shutil.rmtree(case.folder)
    if not (case.folder / "config.json").exists():
        case.finish(case.folder)
    case.check()
    return {"kills": kills, "of one rank alone": ways.count("one rank"), "result": "same bytes"}


def _startup(case: Case) -> float:
    """Return how long it takes until the run begins to write."""
    folder = case.folder.with_name("startup")
    started = time.monotonic()
    process = case.start(folder)
    while not (folder / "facts.json").exists() and process.poll() is None:
        time.sleep(0.02)
    took = time.monotonic() - started
    kill_all(process)
    shutil.rmtree(folder)
    return took


def until_block(case: Case, number: int) -> None:
    """Run until that many blocks are done, then kill."""
    shutil.rmtree(case.folder, ignore_errors=True)
    process = case.start(case.folder)
    journal = case.folder / "journal.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < number:
        if process.poll() is not None:
            raise SystemExit(process.communicate()[0])
        time.sleep(0.02)
    kill_all(process)


def disk_full(case: Case) -> str:
    """Let no file grow beyond most of a shard: the write fails as on a full disk."""
    shutil.rmtree(case.folder, ignore_errors=True)
    size = (case.reference / "model-00002-of-00005.safetensors").stat().st_size * 3 // 4

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = case.start(case.folder, before=limit)
    said = process.communicate()[0]
    if process.returncode == 0 or "cannot be written" not in said or "Traceback (most recent" in said:
        raise SystemExit(f"a full disk went by, or was no clear error:\n{said}")
    case.nothing_pretends()
    case.finish(case.folder)
    case.check()
    return "one sentence, then same bytes"


def spoil(case: Case, how: str) -> str:
    """Delete or corrupt a finished shard between runs."""
    until_block(case, 2)
    shard = case.folder / "model-00002-of-00005.safetensors"
    if how == "deleted":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 16
        shard.write_bytes(content)
    case.finish(case.folder)
    case.check()
    return "noticed, same bytes"


def edit(case: Case) -> str:
    """Change the config between runs."""
    until_block(case, 2)
    before = _files(case.folder)
    process = case.start(case.folder, "--data.num-samples", "24")
    said = process.communicate()[0]
    if process.returncode == 0 or "was made with another data.num_samples (32, now 24)" not in said:
        raise SystemExit(f"an edited config went by:\n{said}")
    if before != _files(case.folder):
        raise SystemExit("a refused run has changed the folder")
    case.finish(case.folder)
    case.check()
    return "refused by name, nothing changed, then same bytes"


def _files(folder: Path) -> dict[str, bytes]:
    """Return what lies in a run's folder, but for the lock that a killed process leaves."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != LOCK}


def two_at_once(case: Case) -> str:
    """Start a run twice into one folder: one finishes, the other is refused."""
    shutil.rmtree(case.folder, ignore_errors=True)
    runs = [case.start(case.folder) for _ in range(2)]
    said = [run.communicate()[0] for run in runs]
    codes = sorted(run.returncode for run in runs)
    refused = "".join(text for text, run in zip(said, runs, strict=True) if run.returncode)
    if codes != [0, 2] or "is in use by another run" not in refused or "Traceback (most recent" in refused:
        raise SystemExit(f"two runs at once ended with {codes}:\n{''.join(said)}")
    case.check()
    return "one refused, same bytes"


def disk_full_at_every_size(case: Case) -> str:
    """Let no file grow beyond a size, for sizes between those of the files that a run writes."""
    sizes = sorted({file.stat().st_size for file in case.reference.rglob("*") if file.is_file()})
    limits = [1, *(size - 1 for size in sizes[:: max(1, len(sizes) // _SIZES)] if size > 1)]
    failed = 0
    for size in limits:
        shutil.rmtree(case.folder, ignore_errors=True)
        process = case.start(
            case.folder, before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        )
        said = process.communicate()[0]
        if "Traceback (most recent" in said:
            raise SystemExit(f"a disk full at {size} bytes gave a stack trace:\n{said}")
        if process.returncode:
            failed += 1
            if "lfq: error: " not in said:
                raise SystemExit(f"a disk full at {size} bytes gave no sentence:\n{said}")
            case.nothing_pretends()
            case.finish(case.folder)
        case.check()
    return (
        f"{failed} of {len(limits)} sizes stopped the run with a sentence, then same bytes; the others wrote it whole"
    )


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def flips_of_a_stopped_run(case: Case, count: int, chance: random.Random) -> str:
    """Flip a bit in any file of a run that was killed, each in turn: it is refused, or ends in the same bytes."""
    until_block(case, 2)
    stopped = case.folder.with_name("stopped")
    shutil.rmtree(stopped, ignore_errors=True)
    shutil.copytree(case.folder, stopped)
    files = sorted(file.name for file in stopped.iterdir() if file.is_file() and file.stat().st_size)
    refused = 0
    for number in range(count):
        shutil.rmtree(case.folder)
        shutil.copytree(stopped, case.folder)
        name = files[number % len(files)]
        flip(case.folder / name, chance)
        process = case.start(case.folder)
        said = process.communicate()[0]
        if "Traceback (most recent" in said:
            raise SystemExit(f"a bit flipped in {name} gave a stack trace:\n{said}")
        refused += bool(process.returncode)
        if process.returncode and "lfq: error: " not in said:
            raise SystemExit(f"a bit flipped in {name} gave no sentence:\n{said}")
        if not process.returncode:
            case.check()
    shutil.rmtree(stopped)
    return f"{count} flips in {', '.join(files)}: {refused} refused, {count - refused} ended in the same bytes"


def flips_of_a_finished_run(case: Case, count: int, chance: random.Random) -> str:
    """Flip a bit in any file of a finished folder, each in turn: reading it says so."""
    shutil.rmtree(case.folder, ignore_errors=True)
    names = sorted(f.relative_to(case.reference).as_posix() for f in case.reference.rglob("*") if f.is_file())
    unread = {"report.html"} | {name for name in names if name.startswith("logs/")}  # made of the others, read by none
    files = [name for name in names if name not in unread]
    for number in range(count):
        shutil.copytree(case.reference, case.folder)
        name = files[number % len(files)]
        flip(case.folder / name, chance)
        if not _told(case.folder):
            raise SystemExit(f"a bit flipped in {name} of a finished run was not noticed")
        shutil.rmtree(case.folder)
    return f"{count} flips in {len(files)} files, all noticed"


def _told(folder: Path) -> bool:
    """Tell whether what `lfq inspect` and `lfq report` read is found to be damaged."""
    try:
        opened = PackedFolder(folder)
        for _ in opened.shards():
            pass
        RunRecord.read(folder)
    except UserError:
        return True
    return bool(opened.changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for what lies between")
    parser.add_argument("--kills", type=int, default=8, help="of each of the four cases (8)")
    parser.add_argument("--flips", type=int, default=200, help="bits to flip, a quarter of them in stopped runs (200)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    save_random_llama(given.work / "model", blocks=4, hidden=128, intermediate=256)
    (given.work / "text.txt").write_text((ROOT / "LICENSE").read_text() * 3)
    chance = random.Random(given.seed)
    rows: list[dict[str, Any]] = []

    def note(case: Case, what: str, found: dict[str, Any]) -> None:
        rows.append({"plan": case.plan, "ranks": case.ranks, "what": what, **found})
        print(rows[-1], flush=True)

    for plan in PLANS:
        for ranks in (1, 2):
            case = Case(given.work, plan, ranks)
            note(case, "SIGKILL", be_killed(case, given.kills, chance))
        case = Case(given.work, plan, 1)
        note(case, "disk full during a shard", {"result": disk_full(case)})
        for how in ("deleted", "corrupted"):
            note(case, f"shard {how} between runs", {"result": spoil(case, how)})
        note(case, "config edited between runs", {"result": edit(case)})
        note(case, "two runs at once", {"result": two_at_once(case)})
        note(case, "disk full at every size", {"result": disk_full_at_every_size(case)})
        stopped = given.flips // 4 // len(PLANS)
        note(case, "bits of a stopped run", {"result": flips_of_a_stopped_run(case, stopped, chance)})
        finished = given.flips // len(PLANS) - stopped
        note(case, "bits of a finished run", {"result": flips_of_a_finished_run(case, finished, chance)})
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["plan", "ranks", "what", "kills", "of one rank alone", "result"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
