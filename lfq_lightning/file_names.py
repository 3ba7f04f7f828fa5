"""The files of a model and of a run, and paths as a user types them."""

from pathlib import Path

from lfq_lightning.errors import UserError, one_line

CONFIG = "config.json"  # written last: with it a folder is a model
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
CARD = "README.md"
CHECKSUMS = "checksums.json"  # file → SHA-256 of what a run or an export wrote besides shards, whose are in the index

JOURNAL = "journal.jsonl"  # a line for each block that is done
FACTS = "facts.json"  # what a run depends on
STATE = "state.safetensors"  # the block in training
TOKENS = "tokens.safetensors"  # calibration data that the model wrote
RESOLVED = "lfq.yaml"  # the config as it was resolved
VERSIONS = "versions.json"
METRICS = "metrics.json"
REPORT = "report.html"
LOGS = "logs"  # Lightning's loggers may write here before the run does
EVALUATION = "evaluation"  # what `lfq eval` measured
LOCK = ".lock"
STREAM = ".stream"  # how names of activations on disk end


def shard_name(number: int, shards: int) -> str:
    """Return the file of a shard: 0 is what is outside the blocks, block i is in i + 1."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def user_path(text: str | Path, where: str) -> Path:
    """Return the path with `~` expanded. Raises UserError, beginning with `where`, for what can be no path here."""
    try:
        path = Path(text).expanduser()
        path.lstat()  # asks the system, which refuses names that are too long, among others
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        shown = str(text) if len(str(text)) <= 60 else f"{str(text)[:57]}…"
        raise UserError(f"{where}: {shown!r} is no path ({one_line(error)[:80]}); give another one.") from error
    return path
