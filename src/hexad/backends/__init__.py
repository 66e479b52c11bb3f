"""Backends compile a graph and hold the KV cache: `reference` (NumPy, the oracle) and `cpu` (native)."""
