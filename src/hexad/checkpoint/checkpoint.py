"""Checkpoint: an open model, the same whatever files it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hexad.errors import CheckpointError
from hexad.weights import Weight

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer


@dataclass(eq=False)
class Checkpoint:
    """An open model: config, weights and tokenizer. Use as a context manager, or `close()`.

    path: the file or folder it was opened from.
    config: by Hugging Face's keys: model_type, name (str); hidden_size, intermediate_size, num_hidden_layers,
        num_attention_heads, num_key_value_heads, head_dim, rotary_dim, vocab_size,
        max_position_embeddings (int); rms_norm_eps, rope_theta (float); tie_word_embeddings (bool);
        rope_scaling (None or a mapping, see graph/rope.py); sliding_window (None or int); layer_types (None,
        or for each layer "full_attention" or "sliding_attention").
    weights: by Hugging Face's names; their arrays are views of the mapped file, or gathered from it when
        read, so read each once. A tied "lm_head.weight" is absent.
    generation_defaults: what its authors recommend to sample with, by the names of SamplingParams, each valid
        by itself.
    """

    path: Path
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    _load_tokenizer: Callable[[], Tokenizer] = field(repr=False)
    _close: Callable[[], None] = field(repr=False)
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    _check_tokenizer: Callable[[], None] = field(default=lambda: None, repr=False)
    _release: Callable[[], None] = field(default=lambda: None, repr=False)
    _tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    _closed: bool = field(default=False, init=False, repr=False)

    def check_tokenizer(self) -> None:
        """Raises the UnsupportedError or TokenizerError of a tokenizer of a kind that hexad does not know,
        without the work of making one."""
        self._check_tokenizer()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, made at the first call.

        Raises TokenizerError, or CheckpointError if the checkpoint was closed before.
        """
        if self._tokenizer is None:
            if self._closed:
                raise CheckpointError(
                    f"{self.path}: closed; ask for the tokenizer before closing the checkpoint"
                )
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def release(self) -> None:
        """Lets go of what of the files has come into this process's memory; it is read again when needed."""
        self._release()

    def close(self) -> None:
        """Lets go of the files. Arrays taken from `weights` and a tokenizer already made stay valid."""
        self.weights = {}
        self._closed = True
        self._close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
