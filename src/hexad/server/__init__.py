"""`hexad serve`: the APIs that people's clients already speak, over one AsyncLLM."""
