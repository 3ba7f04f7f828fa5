"""EvaluatedModel: a model under evaluation, packed or in full precision, in memory only while it is needed."""

import gc
import hashlib
import json
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lfq_lightning.data.self_generate import end_ids
from lfq_lightning.errors import UserError, one_line
from lfq_lightning.evaluation.answers import Answers
from lfq_lightning.file_names import CONFIG
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.checkpoints.checkpoint import read_generation_config, read_tokenizer
from lfq_lightning.models.discover import family_of
from lfq_lightning.models.head import Head
from lfq_lightning.models.load_full_precision import load_full_precision
from lfq_lightning.models.widen import WideLinear
from lfq_lightning.packed.load_model import load
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.precision import product_dtype
from lfq_lightning.runs.fingerprint import sample_digest

_SMALL = (CONFIG, "generation_config.json", "tokenizer*", "chat_template*", "special_tokens_map.json")


class EvaluatedModel:
    """A model and what it has answered.

    Args:
        source: a packed folder, or a full-precision model: a folder, a hub id, a GGUF file.
        device: where it runs.
        folder: where its answers are kept, in a file named by a digest of the model.
        packed: keep a packed model's layers packed in memory; else they are dense, bit for bit the weights that ship.

    Raises UserError if there is no such model; reads no weights.
    """

    def __init__(self, source: str, device: torch.device, folder: Path, packed: bool = False) -> None:
        self.source, self.device, self.packed = source, device, packed
        path, self.has_packed_head = Path(source).expanduser(), False
        if _quantised(path):
            self.checkpoint = None
            opened = PackedFolder(path)
            self.config, files = opened.config, [path / file for file in opened.files]
            self.has_packed_head = packed and opened.family.head in opened.schemes
        else:
            self.checkpoint = open_checkpoint(source)
            self.config, files = self.checkpoint.config, self.checkpoint.weight_files()
        if path.is_dir() or self.checkpoint is not None:  # what else an answer depends on
            home = self.checkpoint.path if self.checkpoint is not None else path
            files = [*files, *(file for name in _SMALL for file in sorted(home.glob(name)))]
        try:
            stored = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32
            runs_in = product_dtype(stored, device)
            parts = [sample_digest(file) for file in files] + [str(device.type), str(packed), str(runs_in)]
        except OSError as error:
            raise UserError(f"{source} is not whole ({one_line(error)}); copy the model again.") from error
        self.digest = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
        self.answers = Answers(folder / f"answers-{self.digest}.jsonl")
        self._model: PreTrainedModel | None = None
        self.kept_head: Head | None = None  # of the reference, for all that is compared with it once it is released

    @property
    def model(self) -> PreTrainedModel:
        """The model, read when it is first asked for."""
        if self._model is None:
            if self.checkpoint is None:
                self._model, _ = load(self.source, dequantize=not self.packed, device=self.device)
            else:
                self._model = load_full_precision(self.checkpoint, self.device)
                generation = self.checkpoint.generation_config()
                if generation is not None:
                    self._model.generation_config = generation
        return self._model

    @property
    def vocab_size(self) -> int:
        """Tokens that the head knows."""
        size: int = self.config.get_text_config().vocab_size
        return size

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.checkpoint is not None:
            return self.checkpoint.tokenizer()
        return read_tokenizer(Path(self.source).expanduser())

    def end_tokens(self) -> set[int]:
        """Return the tokens that end an answer."""
        folder = Path(self.source).expanduser()
        own = self.checkpoint
        generation = read_generation_config(folder) if own is None else own.generation_config()
        return end_ids(generation, self.config, self.tokenizer)

    def release(self) -> None:
        """Free the model."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def head(self) -> Head:
        """Return the model's head in fp32, for hidden states that its own final norm has left."""
        linear = self.model.get_output_embeddings()
        if not isinstance(linear, nn.Linear | WideLinear):
            raise UserError(f"{self.source} has a packed LM head, which is not measured here; omit --packed.")
        terms = family_of(self.config, self.source).logit_terms(self.config.to_dict())
        bias = None if linear.bias is None else linear.bias.float()
        return Head(nn.Identity(), linear.weight.float(), bias, *terms)

    @torch.no_grad()
    def hidden(self, token_ids: list[int]) -> torch.Tensor:
        """Return the hidden states (T, D) that the head reads, for one sequence."""
        ids = torch.tensor([token_ids], device=self.device)
        return self.model.base_model(input_ids=ids).last_hidden_state[0]


def _quantised(path: Path) -> bool:
    if not (path / CONFIG).is_file():
        return False
    try:
        return bool(json.loads((path / CONFIG).read_text(encoding="utf-8")).get("quantization_config"))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}/config.json cannot be read ({one_line(error)}); copy the model again.") from error
