"""Does another environment's transformers, with nothing of ours installed, say what ours says with the same weights?

    python tests/interop/greedy.py OTHER_PYTHON MODEL_DIR PROMPT

Exit code 1 if the greedy texts differ.
"""

import subprocess
import sys

from lfq_lightning.packed.generate import Writer, answer
from lfq_lightning.packed.load_model import load

TOKENS = 60
ALONE = f"""
import importlib.util, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("lfq_lightning") is None, "lfq_lightning is installed here"
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": prompt}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, do_sample=False, max_new_tokens={TOKENS})
print("ANSWER " + repr(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


def main() -> None:
    python, folder, prompt = sys.argv[1:]
    # Isolated (-I): the working directory, where our package lies, is not importable.
    command = [python, "-I", "-c", ALONE, folder, prompt]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    theirs = next(line for line in printed.splitlines() if line.startswith("ANSWER ")).removeprefix("ANSWER ")
    model, own_tokenizer = load(folder, dequantize=True)
    for parameter in model.parameters():  # the same products, so the same roundings, on any CPU
        parameter.data = parameter.data.to(model.config.dtype)  # rotary tables stay in fp32
    ours = repr(answer(Writer(model), own_tokenizer, [{"role": "user", "content": prompt}], TOKENS))
    print(f"transformers alone: {theirs}\nlfq_lightning:      {ours}")
    sys.exit(0 if ours == theirs else 1)


if __name__ == "__main__":
    main()
