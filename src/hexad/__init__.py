"""hexad: an inference engine for large language models.

    from hexad import LLM, SamplingParams

    llm = LLM("smollm2:135m")
    for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0)):
        print(output.outputs[0].text)

Importing this package imports nothing else: a public name brings in its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hexad import errors
    from hexad.async_llm import AsyncLLM
    from hexad.config import EngineConfig
    from hexad.llm import LLM
    from hexad.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
        ScoreOutput,
    )
    from hexad.params import (
        BeamSearchParams,
        PoolingParams,
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

    __version__: str

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "Logprob",
    "PoolingParams",
    "RepetitionDetectionParams",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoreOutput",
    "StructuredOutputsParams",
    "__version__",
    "errors",
]

_HOME = {
    "LLM": "hexad.llm",
    "AsyncLLM": "hexad.async_llm",
    "BeamSearchOutput": "hexad.outputs",
    "BeamSearchParams": "hexad.params",
    "BeamSearchSequence": "hexad.outputs",
    "CompletionOutput": "hexad.outputs",
    "EmbeddingOutput": "hexad.outputs",
    "EmbeddingRequestOutput": "hexad.outputs",
    "EngineConfig": "hexad.config",
    "Logprob": "hexad.outputs",
    "PoolingParams": "hexad.params",
    "RepetitionDetectionParams": "hexad.params",
    "RequestMetrics": "hexad.outputs",
    "RequestOutput": "hexad.outputs",
    "RequestOutputKind": "hexad.params",
    "SamplingParams": "hexad.params",
    "ScoreOutput": "hexad.outputs",
    "StructuredOutputsParams": "hexad.params",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name == "errors":
        value = import_module("hexad.errors")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'hexad' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hexad")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
