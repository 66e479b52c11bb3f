"""How alike texts are, and how likely the model holds them: python examples/embed_and_score.py [MODEL]"""

import sys

from hexad import LLM

texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Sofa the on sleeps cat the."]

with LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    # Embeddings have length 1, so that their dot product is the cosine of the angle between them.
    first, *others = [output.outputs.embedding for output in llm.embed(texts)]
    for text, embedding in zip(texts[1:], others, strict=True):
        cosine = sum(a * b for a, b in zip(first, embedding, strict=True))
        print(f"{cosine:.3f} alike: {texts[0]!r} and {text!r}")
    for score in llm.score(texts):
        print(f"perplexity {score.perplexity:8.1f}: {score.prompt!r}")
