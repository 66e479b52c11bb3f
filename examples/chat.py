"""Two conversations answered at once, in the model's chat template: python examples/chat.py [MODEL]"""

import sys

from hexad import LLM, SamplingParams

system = {"role": "system", "content": "Answer in one sentence."}
questions = ["What is a prime number?", "Who painted the Mona Lisa?"]
conversations = [[system, {"role": "user", "content": question}] for question in questions]

with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=48))
    for question, output in zip(questions, outputs, strict=True):
        print(f"{question}\n  {output.outputs[0].text.strip()}")
