"""Weights as the checkpoint stores them: packed arrays with a logical shape, and their formats."""

from hexad.weights.dense import BF16, F16, F32
from hexad.weights.ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from hexad.weights.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from hexad.weights.weight import OpenFile, Place, Weight, WeightFormat

__all__ = [
    "BF16", "F16", "F32", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0",
    "OpenFile", "Place", "Weight", "WeightFormat",
]  # fmt: skip
