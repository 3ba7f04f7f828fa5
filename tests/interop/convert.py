"""llama.cpp's own converter on a tiny random model, whose tokenizer it would not know.

    PYTHONPATH=LLAMA_CPP:LLAMA_CPP/gguf-py python tests/interop/convert.py CHECKPOINT OUTPUT.gguf

LLAMA_CPP is the folder with convert_hf_to_gguf.py, such as vendor/llama.cpp in the source of llama-cpp-python.
"""

import sys
from pathlib import Path

import gguf
import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    architecture = get_model_architecture(ModelBase.load_hparams(source, False), ModelType.TEXT)
    model_class = get_model_class(architecture)
    model_class.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    model_class.set_vocab = lambda self: self._set_vocab_gpt2()
    with torch.inference_mode():
        model_class(source, gguf.LlamaFileType.MOSTLY_BF16, target).write()


if __name__ == "__main__":
    main()
