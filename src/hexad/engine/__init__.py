"""The brain: plain Python, no tensors. It decides which tokens are computed when and where their KV lives."""
