"""GgufFile: an existing GGUF file, its tensors found by the names that transformers has for them."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import user_path
from lfq_lightning.gguf_package import gguf_package, tensor_names


class GgufFile:
    """A GGUF file, its tensors mapped from disk.

    Args:
        path: the file.
        option: what names it, for messages.

    Raises UserError if it cannot be read, is one part of several, or of an architecture that the gguf package does not
    know.

    Attributes:
        architecture: llama.cpp's name of it.
        tensors: name in the file → the gguf package's ReaderTensor.
    """

    def __init__(self, path: str | Path, option: str) -> None:
        self.path, self._option = user_path(path, option), option
        gguf = gguf_package("reading GGUF")
        try:
            self.fields: dict[str, Any] = (reader := gguf.GGUFReader(self.path)).fields
            self.architecture = str(self.fields["general.architecture"].contents())
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"{option}: {self.path} cannot be read as GGUF ({one_line(error)}); give another."
            ) from error
        if self.value("split.count", 1) > 1:
            raise UserError(f"{option}: {self.path} is one part of several; merge them by llama-gguf-split --merge.")
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(self, key: str, default: Any = None) -> Any:
        """Return a field's value, or `default` if there is none."""
        return self.fields[key].contents() if key in self.fields else default

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """Return the value of `ARCHITECTURE.key`."""
        return self.value(f"{self.architecture}.{key}", default)

    def name_of(self, name: str) -> str | None:
        """Return the file's name for a tensor of transformers; of an expert, that of the stack of all. None if none."""
        plain = re.sub(r"\.experts\.\d+\.", ".experts.", name.replace("language_model.", ""))
        stored = self._names.get_name(plain, try_suffixes=(".weight", ".bias"))
        return stored if stored in self.tensors else None

    @cached_property
    def _names(self) -> Any:
        names = tensor_names(self.architecture, self.of_architecture("block_count"))
        if names is None:
            raise UserError(
                f"{self._option}: {self.path} is of architecture {self.architecture!r}, which the gguf package does "
                "not know; pip install -U gguf."
            )
        return names
