"""Write a packed model in another format, shard by shard; nothing is calibrated again."""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import CARD, CHECKSUMS, CONFIG, FACTS, INDEX, JOURNAL, LOCK, METRICS, REPORT, user_path
from lfq_lightning.formats import FORMATS
from lfq_lightning.formats.named import require_grid
from lfq_lightning.packed.engines import engines
from lfq_lightning.packed.model_card import model_card
from lfq_lightning.packed.packed_folder import SHARD_CHECKSUMS, PackedFolder
from lfq_lightning.packed.seal import sealed, sha256

_LEFT_BEHIND = ("*.safetensors", INDEX, CONFIG, JOURNAL, FACTS, CARD, REPORT, CHECKSUMS, LOCK)
_FOLDERS = ("additional_chat_templates",)


def export(source: str, format_name: str, output: str) -> Path:
    """Convert the packed model in `source` and return the new folder. Memory holds one shard.

    Raises UserError, and leaves nothing behind, if the format cannot hold the model or `output` exists.
    """
    folder, target = PackedFolder(source), user_path(output, "output")
    to = FORMATS.get(format_name.replace("-", "_"))()
    if target.exists():
        raise UserError(f"output: {target} exists; give a new folder.")
    outer = {name: "head" if name in folder.linears else "embeddings" for name in folder.outer}
    for name, kind in outer.items():
        if name in folder.schemes and kind not in to.outer:
            raise UserError(
                f"{name} is quantised, and {format_name} holds no quantised {kind}; export to another format."
            )
    for name, scheme in folder.schemes.items():
        require_grid(to, name, scheme)
        to.check(name, scheme, folder.shapes[name])
    family = folder.family
    schemes = {family.stored_layer(name): scheme for name, scheme in folder.schemes.items()}
    quantization = to.config(schemes, family.ignored([*folder.dense, *folder.routers, *folder.extra_layers()]))
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        raise UserError(f"output: {partial} is left of an export that was cut off, or another's; remove it.")
    try:
        partial.mkdir(parents=True)
        for file in folder.path.iterdir():
            if file.is_file() and not any(fnmatch.fnmatch(file.name, pattern) for pattern in _LEFT_BEHIND):
                shutil.copyfile(file, partial / file.name)
            elif file.name in _FOLDERS:
                shutil.copytree(file, partial / file.name)
        index: dict[str, Any] = {"metadata": {"total_size": 0, SHARD_CHECKSUMS: {}}, "weight_map": {}}
        for shard in folder.shards():
            tensors = dict(shard.dense)
            for name, quantized in shard.layers.items():
                tensors |= to.pack(name, quantized)
            tensors = family.to_disk(tensors)
            save_file(tensors, partial / shard.file, metadata={"format": "pt"})
            shutil.copymode(folder.path / shard.file, partial / shard.file)  # safetensors lets only the owner read
            index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
            index["metadata"][SHARD_CHECKSUMS][shard.file] = sha256(partial / shard.file)
            index["weight_map"] |= dict.fromkeys(tensors, shard.file)
        settings = {**folder.settings, **to.settings(quantization)}
        _write_json(partial / INDEX, {**index, "weight_map": dict(sorted(index["weight_map"].items()))})
        _write_json(partial / CONFIG, settings)
        metrics = partial / METRICS
        measured = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else None
        card = model_card(settings, folder.schemes, engines(to, folder.schemes, folder.dense), measured)
        (partial / CARD).write_text(card, encoding="utf-8")
        small = [file for file in sorted(partial.rglob("*")) if file.is_file() and file.suffix != ".safetensors"]
        _write_json(partial / CHECKSUMS, sealed({file.relative_to(partial).as_posix(): sha256(file) for file in small}))
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"output: {target} cannot be written ({one_line(error)}); give another folder.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
