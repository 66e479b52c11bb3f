"""plan: decides, before anything is loaded, how much memory each part gets. A pure function of numbers."""

from __future__ import annotations

from dataclasses import dataclass

from hexad.config import BLOCK_TOKENS, EngineConfig
from hexad.errors import ConfigError, InsufficientMemoryError

_GIB = 2**30

DEFAULT_FULL_SEQUENCES = 8
"""Sequences of full length the default KV cache has room for, where memory allows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """max_model_len: longest sequence in tokens. kv_blocks: KV blocks of 32 tokens. The rest is in bytes.

    free: memory that was free when the plan was made.
    """

    max_model_len: int
    kv_blocks: int
    kv_bytes: int
    weight_bytes: int
    workspace_bytes: int
    free: int

    @property
    def total(self) -> int:
        """Everything the engine will take."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes

    def describe(self) -> str:
        """A line for each part, for people."""
        tokens = f"{self.kv_blocks * BLOCK_TOKENS:,} tokens, at most {self.max_model_len:,} a sequence"
        return "\n".join(
            (
                f"weights    {_size(self.weight_bytes):>10}",
                f"KV cache   {_size(self.kv_bytes):>10}  {tokens}",
                f"workspace  {_size(self.workspace_bytes):>10}",
                f"total      {_size(self.total):>10}  of {_size(self.free)} free",
            )
        )

    def __str__(self) -> str:
        return self.describe()


def plan(
    *,
    weight_bytes: int,
    kv_bytes_per_block: int,
    workspace_bytes: int,
    config: EngineConfig,
    context_length: int,
    free_bytes: int,
) -> Plan:
    """Divides free memory among weights, workspace and KV cache.

    The KV cache is `config.kv_cache_gib`, or holds `config.kv_cache_tokens` rounded up to whole blocks. If
    neither is given it holds min(max_num_seqs, 8) sequences of max_model_len, but takes no more than a
    quarter of what weights and workspace leave free. One sequence of max_model_len it holds in any case: a
    sequence that has the whole cache to itself, all others preempted, must be able to end.

    Raises ConfigError where max_model_len exceeds the model's context_length or the cache asked for cannot
    hold one sequence, InsufficientMemoryError where the parts do not fit into free_bytes.
    """
    max_model_len = context_length if config.max_model_len is None else config.max_model_len
    if max_model_len > context_length:
        raise ConfigError(
            f"max_model_len {max_model_len} is longer than the model's context of {context_length} tokens. "
            f"Set it to at most {context_length}."
        )
    left = free_bytes - weight_bytes - workspace_bytes
    if left < 0:
        raise InsufficientMemoryError(
            f"The model does not fit: weights {_size(weight_bytes)} and workspace {_size(workspace_bytes)}, "
            f"but only {_size(free_bytes)} of memory is free. Choose a smaller or more strongly quantised "
            f"model, lower max_num_batched_tokens, or free memory."
        )
    one_sequence = -(-max_model_len // BLOCK_TOKENS)
    asked = ""
    if config.kv_cache_gib is not None:
        asked = f"kv_cache_gib={config.kv_cache_gib:g}"
        blocks = int(config.kv_cache_gib * _GIB) // kv_bytes_per_block
    elif config.kv_cache_tokens is not None:
        asked = f"kv_cache_tokens={config.kv_cache_tokens}"
        blocks = -(-config.kv_cache_tokens // BLOCK_TOKENS)
    else:
        wanted = min(config.max_num_seqs, DEFAULT_FULL_SEQUENCES) * one_sequence
        blocks = max(min(wanted, left // 4 // kv_bytes_per_block), one_sequence)
    if blocks < one_sequence:
        raise ConfigError(
            f"{asked} holds {blocks * BLOCK_TOKENS} tokens; one sequence of max_model_len {max_model_len} "
            f"needs {one_sequence * BLOCK_TOKENS} ({_size(one_sequence * kv_bytes_per_block)}). "
            f"Raise {asked.partition('=')[0]} or lower max_model_len."
        )
    if blocks * kv_bytes_per_block > left:
        fitting = left // kv_bytes_per_block
        if fitting >= one_sequence:
            advice = f"Set kv_cache_tokens to at most {fitting * BLOCK_TOKENS} instead of {asked}."
        elif fitting:
            also = f" and drop {asked}" if asked else ""
            advice = f"Lower max_model_len to at most {fitting * BLOCK_TOKENS}{also}."
        else:
            advice = "Choose a smaller model, lower max_num_batched_tokens, or free memory."
        raise InsufficientMemoryError(
            f"KV cache does not fit: {fitting} of at least {blocks} blocks (needs "
            f"{_size(blocks * kv_bytes_per_block)}, {_size(left)} free beside the weights). {advice}"
        )
    return Plan(max_model_len, blocks, blocks * kv_bytes_per_block, weight_bytes, workspace_bytes, free_bytes)


def _size(count: int) -> str:
    """Bytes for people: "93.2 MiB"."""
    if count < _GIB:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / _GIB:.2f} GiB"
