"""Where full-precision weights come from: a Hugging Face folder or hub id, or a GGUF file; read lazily."""

from lfq_lightning.errors import UserError
from lfq_lightning.file_names import user_path
from lfq_lightning.models.checkpoints.checkpoint import LICENCES, Checkpoint

__all__ = ["LICENCES", "Checkpoint", "open_checkpoint"]


def open_checkpoint(source: str) -> Checkpoint:
    """Open a model by path or hub id; reads no weights. Raises UserError if it cannot be one of ours."""
    path = user_path(source, "model.checkpoint")
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise UserError(f"model.checkpoint: there is no file {source}; give the path of a GGUF file.")
        from lfq_lightning.models.checkpoints.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    from lfq_lightning.models.checkpoints.hf_checkpoint import HFCheckpoint, download

    folder = path if path.is_dir() else download(source)
    from lfq_lightning.packed.packed_folder import holds_codes

    if holds_codes(folder):
        from lfq_lightning.models.checkpoints.packed_checkpoint import PackedCheckpoint

        return PackedCheckpoint(folder)
    return HFCheckpoint(folder)
