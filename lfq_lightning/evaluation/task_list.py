"""The tasks of lm-eval that a name stands for, with their data from the hub or from local files."""

from functools import cache
from pathlib import Path
from typing import Any

import nltk
from datasets.exceptions import DatasetsError
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
        self._local: dict[str, list[dict[str, Any]]] = {}
        if data_dir is not None:
            for name in names:
                self._local[name] = [self._local_task(name, *leaf) for leaf in self._leaves(index[name], {})]

    def load(self, name: str, num_fewshot: int | None, limit_tokens: int | None) -> dict[str, Task]:
        """Read the data of the tasks that `name` stands for, and return them by their own names.

        Args:
            num_fewshot: solved examples before each question; the task's own number if None.
            limit_tokens: the longest answer, where it is to be shorter than the task's.
        """
        if self.data_dir is not None and (self.data_dir / "nltk_data").is_dir():
            nltk.data.path.insert(0, str(self.data_dir / "nltk_data"))
        tasks: dict[str, Task] = {}
        for wanted in self._local.get(name, [name]):
            try:
                tasks |= self._manager.load([self._whole(wanted)])["tasks"]
            except ImportError as error:
                raise UserError(f"--tasks: {name} needs {error.name}: pip install 'lfq-lightning[eval]'.") from error
            except (OSError, ValueError, LookupError, RuntimeError, DatasetsError) as error:
                raise UserError(
                    f"--tasks: the data of {name} cannot be read ({one_line(error)[:200]}); check the network, or give "
                    "local copies by --data-dir."
                ) from error
        for task in tasks.values():
            own = task.get_config("num_fewshot")
            if own is None or (own and num_fewshot is not None):  # a task that says 0 wants none, as lm-eval has it
                task.set_config("num_fewshot", num_fewshot or 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # else its examples differ from call to call
            if limit_tokens is not None and task.OUTPUT_TYPE == "generate_until":
                task.config.generation_kwargs["max_gen_toks"] = limit_tokens
        return tasks

    def _leaves(self, entry: Entry, overrides: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Return the tasks that a name stands for, with what the group says differently of them."""
        index = self._manager.task_index
        if entry.kind in {Kind.TASK, Kind.PY_TASK}:
            return [(entry.name, overrides)]
        if entry.kind is Kind.TAG:
            tagged = sorted(name for name, other in index.items() if entry.name in other.tags and other is not entry)
            return [leaf for name in tagged for leaf in self._leaves(index[name], overrides)]
        assert entry.yaml_path is not None
        leaves = []
        for item in load_yaml(entry.yaml_path, resolve_func=False)["task"]:
            own = {"task": item} if isinstance(item, str) else item
            if own.get("task") not in index:
                raise UserError(f"--data-dir: {entry.name} describes tasks within itself; name its tasks one by one.")
            more = {key: value for key, value in own.items() if key != "task"}
            leaves += self._leaves(index[own["task"]], overrides | more)
        return leaves

    def _whole(self, wanted: str | dict[str, Any]) -> str | dict[str, Any]:
        """Return a name as it is, or the whole configuration of a task whose data are local."""
        if isinstance(wanted, str):
            return wanted
        path = self._manager.task_index[wanted["task"]].yaml_path
        assert path is not None
        return {key: value for key, value in load_yaml(path).items() if key not in {"tag", "task_list"}} | wanted

    def _local_task(self, name: str, leaf: str, overrides: dict[str, Any]) -> dict[str, Any]:
        """Return what a task's configuration has to say instead for its data to be local."""
        entry = self._manager.task_index[leaf]
        if entry.yaml_path is None:
            raise UserError(f"--data-dir: {leaf} is a program that fetches its data; omit --data-dir for it.")
        assert self.data_dir is not None
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
            **overrides,
            "task": leaf,
            "dataset_path": _READERS[only.suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": chosen},
        }


@cache
def _manager() -> TaskManager:
    return TaskManager()  # it reads thousands of files
