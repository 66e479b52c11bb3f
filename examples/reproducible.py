"""A seeded answer is the same alone and among others: python examples/reproducible.py [MODEL]"""

import sys

from hexad import LLM, SamplingParams

prompt = "My favourite place in the mountains is"
params = SamplingParams(temperature=1.0, seed=42, max_tokens=32)

with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    [alone] = llm.generate(prompt, params)
    company = [f"Number {n} is" for n in range(1, 8)]
    among_others = llm.generate([*company, prompt], params)[-1]

print(alone.outputs[0].text)
assert alone.outputs[0].token_ids == among_others.outputs[0].token_ids
print("The same eight at a time.")
