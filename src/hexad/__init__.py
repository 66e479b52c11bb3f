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
    from hexad.config import EngineConfig
    from hexad.llm import LLM
    from hexad.outputs import CompletionOutput, RequestOutput
    from hexad.params import SamplingParams

    __version__: str

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
]

_HOME = {
    "LLM": "hexad.llm",
    "CompletionOutput": "hexad.outputs",
    "EngineConfig": "hexad.config",
    "RequestOutput": "hexad.outputs",
    "SamplingParams": "hexad.params",
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
