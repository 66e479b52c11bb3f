"""Hypothesis strategies shared by the tests."""

from __future__ import annotations

from hypothesis import strategies as st

from hexad.params import SamplingParams


def prompts(vocab_size: int, max_len: int) -> st.SearchStrategy[list[int]]:
    """Token ids of a prompt of 1 … max_len tokens; lengths next to a block's edge come often."""
    edges = [n for n in (1, 31, 32, 33, 64, 65) if n <= max_len]
    lengths = st.sampled_from(edges) | st.integers(1, max_len)
    tokens = st.integers(0, vocab_size - 1)
    # A long list of draws is slow; a short pattern, repeated, is as good.
    pattern = st.lists(tokens, min_size=1, max_size=5)
    return st.tuples(pattern, lengths).map(lambda p: (p[0] * (p[1] // len(p[0]) + 1))[: p[1]])


def sampling_params(max_tokens: int) -> st.SearchStrategy[SamplingParams]:
    """Valid parameters with short generations."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.8, 2.0]),
        top_k=st.integers(-1, 50),
        top_p=st.floats(0.1, 1.0),
        min_p=st.floats(0.0, 1.0),
        seed=st.none() | st.integers(0, 2**64 - 1),
        max_tokens=st.none() | st.integers(1, max_tokens),
        ignore_eos=st.booleans(),
    )
