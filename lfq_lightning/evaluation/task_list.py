"""The tasks of lm-eval that a name stands for, with their data from the hub or from local files."""

from functools import cache
from pathlib import Path
from typing import Any

import nltk
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.registry import did_you_mean

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class TaskList:
    """lm-eval's tasks by name; a group's are all it stands for.

    Args:
        names: of tasks, groups or tags.
        data_dir: a folder with local copies; None takes the hub. A task's files lie in `data_dir/<task>`, or for a task
            of a group in `data_dir/<group>/<configuration of its dataset>`, named after the splits (`train.jsonl`,
            `test.parquet`, …); a single file serves as every split. `data_dir/nltk_data` serves ifeval.

    Raises UserError for an unknown task, or data that is not there; reads no data.
    """

    def __init__(self, names: list[str], data_dir: Path | None) -> None:
        self.names, self.data_dir = names, data_dir
        self._manager = _manager()
        if data_dir is not None and not data_dir.is_dir():
            raise UserError(f"--data-dir: there is no folder {data_dir}.")
        index = self._manager.task_index
        for name in names:
            if name not in index:
                raise UserError(f"--tasks: unknown task {name!r}: {did_you_mean(name, index)}")
        self.members = {name: self._leaves(index[name]) for name in names}
        self._local = {leaf: self._files(name, leaf) for name, leaves in self.members.items() for leaf in leaves}

    def load(self, name: str, num_fewshot: int | None, limit_tokens: int | None) -> dict[str, Task]:
        """Read the data of the tasks that `name` stands for, and return them by their own names.

        Args:
            num_fewshot: solved examples before each question; the task's own number if None.
            limit_tokens: the longest answer, where it is to be shorter than the task's.
        """
        if self.data_dir is not None and (self.data_dir / "nltk_data").is_dir():
            nltk.data.path.insert(0, str(self.data_dir / "nltk_data"))
        tasks: dict[str, Task] = {}
        for leaf in self.members[name]:
            try:
                tasks |= self._manager.load([self._whole(leaf)])["tasks"]
            except ImportError as error:
                raise UserError(f"--tasks: {leaf} needs {error.name}: pip install 'lfq-lightning[eval]'.") from error
            except (OSError, ValueError, KeyError, LookupError) as error:
                raise UserError(
                    f"--tasks: the data of {leaf} cannot be read ({one_line(error)[:200]}); check the network, or give "
                    "local copies by --data-dir."
                ) from error
        for task in tasks.values():
            own = task.get_config("num_fewshot") or 0
            task.set_config("num_fewshot", own if num_fewshot is None else num_fewshot)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # else its examples differ from call to call
            if limit_tokens is not None and task.OUTPUT_TYPE == "generate_until":
                task.config.generation_kwargs["max_gen_toks"] = limit_tokens
        return tasks

    def _leaves(self, entry: Entry) -> list[str]:
        index = self._manager.task_index
        if entry.kind in {Kind.TASK, Kind.PY_TASK}:
            return [entry.name]
        if entry.kind is Kind.TAG:
            return sorted(name for name, other in index.items() if entry.name in other.tags and other is not entry)
        assert entry.yaml_path is not None
        listed = load_yaml(entry.yaml_path, resolve_func=False)["task"]
        names = [item if isinstance(item, str) else item["task"] for item in listed]
        return [leaf for name in names for leaf in self._leaves(index[name])]

    def _whole(self, leaf: str) -> str | dict[str, Any]:
        """Return a task's name, or its whole configuration where its data are local."""
        path = self._manager.task_index[leaf].yaml_path
        if path is None or not self._local[leaf]:
            return leaf
        config = {key: value for key, value in load_yaml(path).items() if key not in {"tag", "task_list"}}
        return config | {"task": leaf} | self._local[leaf]

    def _files(self, name: str, leaf: str) -> dict[str, Any]:
        """Return what a task's configuration has to say instead for its data to be local."""
        entry = self._manager.task_index[leaf]
        if self.data_dir is None or entry.yaml_path is None:
            return {}
        config = load_yaml(entry.yaml_path, resolve_func=False)
        folder = self.data_dir / leaf
        if not folder.is_dir():
            folder = self.data_dir / name
            if leaf != name and config.get("dataset_name"):
                folder = folder / config["dataset_name"]
        splits = {config[key] for key in _SPLITS if config.get(key)}
        files = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix in _READERS}
        if not files:
            raise UserError(
                f"--data-dir: {folder} holds no .jsonl, .json, .parquet or .csv for task {leaf}; put it there."
            )
        if len(files) > 1 and not splits <= set(files):
            absent = ", ".join(sorted(splits - set(files)))
            raise UserError(f"--data-dir: {folder} lacks {absent} (task {leaf}); name each file after its split.")
        only = next(iter(files.values()))
        chosen = {split: str(files.get(split, only)) for split in splits}
        return {
            "dataset_path": _READERS[only.suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": chosen},
        }


@cache
def _manager() -> TaskManager:
    return TaskManager()  # it reads thousands of files
