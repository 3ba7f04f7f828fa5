"""Write a GGUF file: fields, then tensors, of which one shard's are in memory at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import user_path

Array = tuple["np.ndarray[Any, Any]", str]  # and the name of its GGML type
Arrays = Iterator[tuple[str, Array]]  # by their names in the file


def new_file(output: str) -> Path:
    """Return the path of a GGUF file that is to be. Raises UserError if it cannot be one."""
    target = user_path(output, "output")
    if target.suffix != ".gguf":
        raise UserError(f"output: {target} is to be one GGUF file; give a name that ends with .gguf.")
    if target.exists():
        raise UserError(f"output: {target} exists; give a new file.")
    return target


def write_gguf(
    target: Path, architecture: str, write_fields: Callable[[Any], None], arrays: Callable[[], Arrays]
) -> None:
    """Write a file; nothing is left of it if that fails. Raises UserError if the disk does not take it.

    Args:
        target: a new file.
        architecture: llama.cpp's name of it.
        write_fields: gives a GGUFWriter the other fields.
        arrays: yields the tensors, the same ones in the same order each time: sizes are written before values.
    """
    import gguf

    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {target.parent} cannot be made ({one_line(error)}); give another file.") from error
    try:
        writer = gguf.GGUFWriter(partial, architecture)
        write_fields(writer)
        for name, (array, kind) in arrays():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, (array, _) in arrays():
            writer.write_tensor_data(array)
        writer.close()
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"output: {target} cannot be written ({one_line(error)}); give another file.") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
