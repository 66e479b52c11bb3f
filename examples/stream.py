"""A chat answer, word by word: python examples/stream.py [MODEL]"""

import sys

from hexad import LLM, RequestOutputKind, SamplingParams

messages = [{"role": "user", "content": "Why is the sky blue? One sentence."}]
params = SamplingParams(temperature=0, max_tokens=64, output_kind=RequestOutputKind.DELTA)

with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    tokenizer = llm.get_tokenizer()
    # The template's text has the special tokens already.
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special=False)
    for output in llm.stream(prompt, params):
        print(output.outputs[0].text, end="", flush=True)
    print()
