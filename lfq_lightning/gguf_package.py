"""The gguf package, which not every machine has, and the one table of it that is read here."""

from typing import Any

from lfq_lightning.errors import UserError


def gguf_package(what: str) -> Any:
    """Return the package. Raises UserError, beginning with `what`, if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{what} needs the gguf package: pip install 'lfq-lightning[gguf]'.") from error
    return gguf


def tensor_names(architecture: str, blocks: int) -> Any:
    """Return the package's map from transformers' names to those in files; None if it has none of the architecture."""
    gguf = gguf_package("reading GGUF")
    number = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    return None if number is None else gguf.get_tensor_name_map(number, blocks)
