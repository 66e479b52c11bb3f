"""Several prompts at once, each with its own parameters: python examples/generate.py [MODEL]"""

import sys

from hexad import LLM, SamplingParams

prompts = {
    "The capital of France is": SamplingParams(temperature=0, max_tokens=8),
    "Once upon a time": SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=40),
    "A short list of fruits:": SamplingParams(temperature=0.5, min_p=0.1, seed=1, max_tokens=24),
}

with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    for output in llm.generate(list(prompts), list(prompts.values())):
        [completion] = output.outputs
        print(f"{output.prompt!r} → {completion.text!r} ({completion.finish_reason})")
