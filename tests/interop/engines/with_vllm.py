"""Run by an environment with vLLM for CPUs: it reads FOLDER. Prints JSON with log-probabilities of TOKENS."""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, tokens = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=256)
    output = llm.generate([{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    steps = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
    print("RESULT " + json.dumps({"logprobs": [step[token].logprob for token, step in steps]}))
