"""lfq_lightning: weight-only post-training quantisation of LLMs that keeps the token distribution."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["load", "streamed_logits"]

if TYPE_CHECKING:
    from lfq_lightning.models.streamed import streamed_logits
    from lfq_lightning.packed.load_model import load


def __getattr__(name: str) -> Any:
    if name == "load":  # on demand: `lfq --version` need not wait for torch
        from lfq_lightning.packed.load_model import load

        return load
    if name == "streamed_logits":
        from lfq_lightning.models.streamed import streamed_logits

        return streamed_logits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
