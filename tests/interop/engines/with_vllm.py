"""Run by an environment with vLLM for CPUs: it reads FOLDER. Prints JSON: log-probabilities of SEQUENCES of tokens."""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, sequences = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, dtype="float16", enforce_eager=True, max_model_len=512)
    prompts = [{"prompt_token_ids": tokens} for tokens in sequences]
    logprobs = []
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    for tokens, output in zip(sequences, outputs, strict=True):
        steps = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        logprobs.append([step[token].logprob for token, step in steps])
    print("RESULT " + json.dumps({"logprobs": logprobs}))
