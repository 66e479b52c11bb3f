"""The engines: each a module that its own environment's interpreter runs, and only hexad's imports hexad.

Every one ends in `benchmarks.worker.serve(load, generate)`:

- `load(model, threads, context, batch, batch_context)` opens the file or folder `model` with the settings
  fastest here on `threads` threads, and room for one sequence of `context` tokens or `batch` sequences of
  `batch_context`. It returns {"version": …, "settings": what was chosen, in words}.
- `generate(prompts, count)` greedily makes `count` tokens after each prompt of token ids, whatever they are,
  and returns {"seconds": for all of it, "tokens": a list for each prompt}. Nothing is kept from call to call.
"""
