"""Answers that are valid JSON of a given shape: python examples/structured.py [MODEL]"""

import json
import sys

from hexad import LLM, SamplingParams, StructuredOutputsParams

schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 24},
        "country": {"type": "string", "maxLength": 24},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
    },
    "required": ["city", "country", "continent"],
    "additionalProperties": False,
}
params = SamplingParams(temperature=0, max_tokens=96, structured_outputs=StructuredOutputsParams(json=schema))
messages = [{"role": "user", "content": "Name a famous city, its country and continent, as JSON."}]

with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    [output] = llm.chat(messages, params)
    print(json.loads(output.outputs[0].text))
