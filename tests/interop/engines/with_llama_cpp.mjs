// Run by node beside node-llama-cpp: llama.cpp reads a GGUF file. Prints JSON with tokens of TEXT and log-probabilities.
import {getLlama} from "node-llama-cpp";

const [file, text] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 256, threads: 1});
const tokens = model.tokenize(text);
const input = tokens.map((token) => [token, {generateNext: {logits: true}}]);
const steps = await context.getSequence().controlledEvaluate(input);
const logprobs = tokens.slice(1).map((token, i) => {
    const logits = steps[i].next.logits;
    const most = Math.max(...logits.values());
    let sum = 0;
    for (const logit of logits.values()) sum += Math.exp(logit - most);
    return logits.get(token) - most - Math.log(sum);
});
console.log("RESULT " + JSON.stringify({tokens, logprobs}));
process.exit(0);
