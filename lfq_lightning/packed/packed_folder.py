"""PackedFolder: a packed model on disk, in any of the formats, its shards read one at a time."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import CONFIG, INDEX, SINGLE, user_path
from lfq_lightning.formats import FORMATS, PackFormat, check_layout
from lfq_lightning.grids import Grid
from lfq_lightning.models.checkpoints.checkpoint import read_config
from lfq_lightning.models.checkpoints.low_precision import in_low_precision
from lfq_lightning.models.discover import family_of_names
from lfq_lightning.models.experts import router_names
from lfq_lightning.models.limits import limits
from lfq_lightning.models.meta_model import parted_model
from lfq_lightning.packed.seal import changed_files, sha256
from lfq_lightning.quantized_tensor import QuantizedTensor

SHARD_CHECKSUMS = "sha256"  # key in the index's metadata: file → digest


@dataclass(frozen=True)
class Shard:
    """What one file holds.

    Args:
        file: its name.
        layers: the packed layers.
        dense: all other tensors by full name.
        packed_bytes: what each packed layer takes on disk.
    """

    file: str
    layers: dict[str, QuantizedTensor]
    dense: dict[str, Tensor]
    packed_bytes: dict[str, int]


def is_packed(path: str) -> bool:
    """Tell whether a folder is to be read as a packed model; True too where nothing in it says what it is."""
    folder = user_path(path, "MODEL_DIR")
    if not (folder / CONFIG).is_file():
        return True
    if _quantization(folder / CONFIG):
        return holds_codes(folder)
    formats = [FORMATS.get(name)() for name in FORMATS.names()]
    return any(each.packed_name(name) is not None for name in _stored_names(folder) for each in formats)


def holds_codes(folder: Path) -> bool:
    """Tell by its config.json whether a folder holds codes, in a format that is read here or in another."""
    quantization = _quantization(folder / CONFIG)
    return bool(quantization) and not in_low_precision(quantization)


def _stored_names(folder: Path) -> Iterator[str]:
    """Yield the names of the tensors in a folder; nothing of a file that cannot be read: whoever opens it says so."""
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as shard:
                yield from shard.keys()
        except (SafetensorError, OSError):
            continue


def _quantization(file: Path) -> dict[str, Any]:
    """Return what a config.json says of quantisation; nothing if it cannot be read: whoever opens it says so."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError):
        return {}


class PackedFolder:
    """A folder with config.json and packed safetensors, ours or another tool's.

    Args:
        path: the folder. Raises UserError if it is not one, is damaged, or uses what this package cannot compute with.

    Attributes:
        changed: small files, such as config.json, that are not what was written beside the weights.
        shapes: full name → (O, I) of the linear layers, and of the embeddings.
        linears: those of the linear layers alone.
        outer: the names of embeddings and head.
        weight_shapes: name → shape of every weight that `weight` reads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path, "MODEL_DIR")
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path} is not a finished packed model (no config.json); run `lfq run` to make one.")
        if not (self.path / INDEX).is_file() and not (self.path / SINGLE).is_file():
            raise UserError(f"{self.path} has neither {INDEX} nor {SINGLE}; copy the model again.")
        try:
            self.settings: dict[str, Any] = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
            self.files, self._checksums = self._index()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{self.path}: config or index is damaged ({one_line(error)[:100]}); copy the model again."
            ) from error
        self.config: PretrainedConfig = read_config(self.path)
        self.quantization: dict[str, Any] = self.settings.get("quantization_config") or {}
        if not self.quantization:
            raise UserError(
                f"{self.path} is not packed (its config has no quantization_config); load it with transformers."
            )
        del self.config.quantization_config
        self.format_name, self.format = _format_of(self.quantization, self.path)
        self.changed = changed_files(self.path)
        model, names = parted_model(self.config, self.path)
        self.family = family_of_names(self.config, names)
        self.linears, self.routers = _linear_shapes(model), router_names(model)
        self.shapes = self.linears | _embedding_shape(model)
        self.outer = [*_embedding_shape(model), self.family.head]
        self.schemes = self._schemes()
        stored = [(self.family.model_name(name), name, file) for file, names in self.files.items() for name in names]
        self._places = {name: file for name, _, file in stored}
        self._on_disk = {name: there for name, there, _ in stored}
        self._parts = {
            layer: [f"{layer}.{last}" for last in self.format.layout(scheme, self.shapes[layer])]
            for layer, scheme in self.schemes.items()
        }
        self._dense_shapes = self._check_names(model)
        layers = {f"{layer}.weight": self.shapes[layer] for layer in self.schemes}
        self.weight_shapes = {**{n: s for n, s in self._dense_shapes.items() if n in self._places}, **layers}
        self._verified: set[str] = set()

    def shards(self) -> Iterator[Shard]:
        """Read file after file. Raises UserError for a damaged one, or one that does not fit the config."""
        for file in self.files:
            tensors = self._read(file)
            layers = [layer for name in tensors if (layer := self.format.packed_name(name)) is not None]
            dense = {name: tensor for name, tensor in tensors.items() if not self._is_part(name, file)}
            for layer in layers:
                tensors |= self._parts_elsewhere(layer, file)
                check_layout(self.format, self.schemes[layer], self.shapes[layer], layer, tensors, self.path)
            self._check_dense(dense)
            yield Shard(
                file,
                {layer: self._unpacked(layer, tensors) for layer in layers},
                dense,
                {layer: sum(tensors[name].nbytes for name in self._parts[layer]) for layer in layers},
            )

    def weight(self, name: str) -> Tensor:
        """Read one weight by its name in the model, dequantised if it is packed. Raises UserError for damage."""
        layer = name.removesuffix(".weight")
        parts = self._parts[layer] if layer in self.schemes and name.endswith(".weight") else [name]
        tensors: dict[str, Tensor] = {}
        for file in {self._places[part] for part in parts}:
            path = self.path / file
            try:
                if file not in self._verified:
                    self._verify(file)
                    self._verified.add(file)
                with safe_open(path, "pt") as shard:
                    here = [part for part in parts if self._places[part] == file]
                    tensors |= {part: shard.get_tensor(self._on_disk[part]) for part in here}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({one_line(error)}); copy the model again.") from error
        if layer not in self.schemes or not name.endswith(".weight"):
            self._check_dense(tensors)
            return tensors[name]
        check_layout(self.format, self.schemes[layer], self.shapes[layer], layer, tensors, path)
        return self._unpacked(layer, tensors).dequantize()

    def _verify(self, file: str) -> None:
        if file in self._checksums and sha256(self.path / file) != self._checksums[file]:
            raise UserError(f"{self.path / file} is not what was written (its checksum differs); copy the model again.")

    def _check_names(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is not packed. Raises UserError if the files' tensors are not the config's."""
        tied = set(model.all_tied_weights_keys)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        dense = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in self.schemes}
        needed = {name for name in dense if name not in tied and not self.family.converted(name)}
        needed |= {part for parts in self._parts.values() for part in parts}
        for name in sorted(needed - set(self._places)):
            raise UserError(f"{self.path} has no tensor {name}, which its config asks for; copy the model again.")
        return dense

    def _check_dense(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self._dense_shapes and tuple(tensor.shape) != self._dense_shapes[name]:
                raise UserError(
                    f"{self.path}: {name} is {tuple(tensor.shape)}, but by config.json it would be "
                    f"{self._dense_shapes[name]}; config and shards do not belong together, copy the model again."
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"{self.path}: {name} holds NaN or infinity; copy the model again.")

    def _unpacked(self, layer: str, tensors: dict[str, Tensor]) -> QuantizedTensor:
        quantized = self.format.unpack(layer, tensors, self.schemes[layer])
        if tuple(quantized.codes.shape) != self.shapes[layer]:
            raise UserError(
                f"{self.path}: {layer} holds {tuple(quantized.codes.shape)} codes, but by config.json it would hold "
                f"{self.shapes[layer]}; copy the model again."
            )
        return quantized

    def _is_part(self, name: str, file: str) -> bool:
        layer = name.rpartition(".")[0]
        if layer not in self._parts or name.endswith(".bias"):
            return False
        if name not in self._parts[layer]:
            raise UserError(
                f"{self.path / file} holds {name}, which {self.format_name} as read here has not; use the tool "
                "that made it."
            )
        return True

    def _parts_elsewhere(self, layer: str, file: str) -> dict[str, Tensor]:
        """Read the parts of a layer that other tools have put into another shard than its codes."""
        found: dict[str, Tensor] = {}
        for part in self._parts[layer]:
            other = self._places.get(part, file)
            if other != file:
                found[part] = self._read(other)[part]
        return found

    @property
    def dense(self) -> list[str]:
        """Linear layers that are not packed, the head included."""
        return [name for name in self.linears if name not in self.schemes]

    def extra_layers(self) -> list[str]:
        """Return what may be a linear layer among the tensors that are none of the model's."""
        extra = [name for name in self._places if self.family.is_extra(name)]
        return [name.removesuffix(".weight") for name in extra if name.endswith(".weight")]

    def _index(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        if not (self.path / SINGLE).is_file():  # which goes first, as in transformers
            index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            files: dict[str, list[str]] = {}
            for name, file in index["weight_map"].items():
                if Path(file).name != file:
                    raise ValueError(f"{file} is no file name")
                files.setdefault(file, []).append(name)
            return dict(sorted(files.items())), index.get("metadata", {}).get(SHARD_CHECKSUMS, {})
        with safe_open(self.path / SINGLE, "pt") as shard:
            return {SINGLE: list(shard.keys())}, {}

    def _schemes(self) -> dict[str, Grid]:
        names = [name for file in self.files.values() for name in file]
        layers = [layer for name in names if (layer := self.format.packed_name(name)) is not None]
        try:
            with limits("an expression in quantization_config", "mend config.json"):
                found = self.format.schemes(self.quantization, layers)
        except (KeyError, TypeError, AttributeError, re.error, RecursionError) as error:
            raise UserError(
                f"{self.path}: quantization_config is damaged ({one_line(error)[:100]}); copy the model again."
            ) from error
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        schemes = {self.family.model_layer(layer): scheme for layer, scheme in found.items()}
        layers = [self.family.model_layer(layer) for layer in layers]
        for layer in layers:
            if layer not in self.shapes:
                raise UserError(f"{self.path} packs {layer}, which its config knows nothing of; the two do not match.")
            if layer not in schemes:
                raise UserError(
                    f"{self.path} packs {layer}, but quantization_config has no scheme for it; copy it again."
                )
            size, width = schemes[layer].unit, self.shapes[layer][1]
            if not schemes[layer].divides(width):
                raise UserError(
                    f"{self.path}: groups of {size} do not divide the {width} inputs of {layer}; copy it again."
                )
        return {layer: schemes[layer] for layer in layers}

    def _read(self, file: str) -> dict[str, Tensor]:
        path = self.path / file
        try:
            self._verify(file)
            with safe_open(path, "pt") as shard:
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); copy the model again.") from error
        absent = set(self.files[file]) - set(tensors)
        if absent:
            raise UserError(f"{path} has no tensor {min(absent)}, but the index names it; copy the model again.")
        return self.family.to_model(tensors)


def _format_of(quantization: dict[str, Any], path: Path) -> tuple[str, PackFormat]:
    method = quantization.get("quant_method")
    version = quantization.get("checkpoint_format", "gptq")
    for name in FORMATS.names():
        found = FORMATS.get(name)()
        if found.quant_method == method and (method != "gptq" or name == version):
            return name, found
    named = f"gptq ({version})" if method == "gptq" else method
    raise UserError(f"{path} is quantised by {named}, which is not read here; known: {', '.join(FORMATS.names())}.")


def _linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _embedding_shape(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    rows, columns = model.get_parameter(f"{name}.weight").shape
    return {name: (rows, columns)}
