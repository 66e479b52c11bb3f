"""Every error hexad raises for a user's mistake or a machine's limit.

    HexadError
    ├── ConfigError               a setting is out of range or contradicts another
    ├── ParamsError               a SamplingParams field is out of range
    ├── PromptError               a prompt is empty, of the wrong type, or longer than the context
    ├── ModelNotFoundError        a model name or path leads to nothing
    │   └── DownloadError         it could not be fetched (offline, not found, checksum differs)
    ├── CheckpointError           a model file is malformed: names the file and the reason
    │   ├── UnsupportedError      it is well formed, but of an architecture or type hexad does not know
    │   └── TokenizerError        its tokenizer or chat template cannot be used
    ├── InsufficientMemoryError   weights, KV cache and workspace do not fit; raised before loading
    ├── BackendError              the native core refused or failed
    └── EngineError               the engine cannot do what it is asked now: busy, shut down, or broken

Messages say what happened, the numbers, and what to do. Errors about hexad's own invariants are plain
`assert`s and are never the user's fault.
"""


class HexadError(Exception):
    """Base of every error a user can cause or meet."""


class ConfigError(HexadError, ValueError):
    """A setting is out of range or contradicts another."""


class ParamsError(HexadError, ValueError):
    """A field of `SamplingParams` is out of range; the message names field, value and range."""


class PromptError(HexadError, ValueError):
    """A prompt is empty, of the wrong type, or longer than the context."""


class ModelNotFoundError(HexadError, FileNotFoundError):
    """A model name or path leads to nothing."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DownloadError(ModelNotFoundError):
    """A model could not be fetched: offline, not found, or its checksum differs."""


class CheckpointError(HexadError, ValueError):
    """A model file is malformed; the message names the file and the reason."""


class UnsupportedError(CheckpointError):
    """A well-formed model of an architecture, tensor type or version hexad does not know."""


class TokenizerError(CheckpointError):
    """A model's tokenizer or chat template cannot be used."""


class InsufficientMemoryError(HexadError, MemoryError):
    """Weights, KV cache and workspace do not fit into memory; raised before anything is loaded."""


class BackendError(HexadError, RuntimeError):
    """The native core refused its arguments or failed."""


class EngineError(HexadError, RuntimeError):
    """The engine cannot do what it is asked now: it is busy, was shut down, or broke (see `__cause__`)."""
