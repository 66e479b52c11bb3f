from hexad import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
llm = LLM(model="smollm2:135m")
for o in llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95)):
    print(f"Prompt: {o.prompt!r}, Generated text: {o.outputs[0].text!r}")
