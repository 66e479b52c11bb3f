"""The likeliest continuations of a prompt: python examples/beam_search.py [MODEL]"""

import sys

from hexad import LLM, BeamSearchParams

with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    [output] = llm.beam_search(
        "The tallest mountain on Earth is", BeamSearchParams(beam_width=4, max_tokens=12)
    )
    for beam in output.sequences:
        print(f"{beam.cum_logprob:8.3f} {beam.text!r}")
