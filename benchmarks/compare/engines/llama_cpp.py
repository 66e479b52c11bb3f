"""llama.cpp through the low-level API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import functools
import time
from typing import Any

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from benchmarks.worker import serve

CHUNK = 512


class _Engine:
    model: Any
    context: Any
    batch_context: Any
    threads: int
    vocab_size: int


_silent = lib.llama_log_callback(lambda level, text, data: None)


def load(
    model: str, threads: int, context: int = 1024, batch: int = 0, batch_context: int = 0
) -> dict[str, str]:
    """One context for a single stream and one for batches, made at the first. In that each sequence has a KV
    cache of its own, which is faster here than one for all."""
    lib.llama_log_set(_silent, ctypes.c_void_p())
    lib.llama_backend_init()
    handle = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    if not handle:
        raise SystemExit(f"llama.cpp cannot load {model}.")
    _Engine.model = handle
    _Engine.threads = threads
    _Engine.context = _new_context(1, context)
    _Engine.batch_context = functools.cache(lambda: _new_context(batch, batch * batch_context))
    _Engine.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(handle))
    return {"version": lib.__version__, "settings": lib.llama_print_system_info().decode().strip(" |")}


def generate(prompts: list[list[int]], count: int) -> dict[str, Any]:
    """See benchmarks.compare.engines. Prompts in chunks of CHUNK tokens, across the borders of sequences;
    then one token of each sequence per step."""
    context = _Engine.context if len(prompts) == 1 else _Engine.batch_context()
    batch = lib.llama_batch_init(CHUNK, 0, 1)
    begin = time.perf_counter()
    _forget(context)
    rows = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    made: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        _decode(context, batch, chunk)
        for row, (_, _, sequence, wanted) in enumerate(chunk):
            if wanted:
                made[sequence].append(_greedy(context, row))
    while len(made[0]) < count:
        step = [
            (tokens[-1], len(prompt) + len(tokens) - 1, sequence, True)
            for sequence, (prompt, tokens) in enumerate(zip(prompts, made, strict=True))
        ]
        _decode(context, batch, step)
        for row, tokens in enumerate(made):
            tokens.append(_greedy(context, row))
    seconds = time.perf_counter() - begin
    lib.llama_batch_free(batch)
    return {"seconds": seconds, "tokens": made}


def logits(tokens: list[int], path: str) -> None:
    """Writes the logits of every position, float32 [tokens, vocab], as an .npy file."""
    _forget(_Engine.context)
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    _decode(_Engine.context, batch, [(token, row, 0, True) for row, token in enumerate(tokens)])
    rows = np.ctypeslib.as_array(lib.llama_get_logits(_Engine.context), (len(tokens), _Engine.vocab_size))
    np.save(path, rows)
    lib.llama_batch_free(batch)


def _new_context(sequences: int, tokens: int) -> Any:
    settings = lib.llama_context_default_params()
    settings.n_ctx = tokens
    settings.n_seq_max = sequences
    settings.kv_unified = False
    settings.n_batch = settings.n_ubatch = CHUNK
    settings.n_threads = settings.n_threads_batch = _Engine.threads
    context = lib.llama_init_from_model(_Engine.model, settings)
    if not context:
        raise SystemExit(f"llama.cpp has no room for {sequences} × {tokens // sequences} tokens.")
    return context


def _forget(context: Any) -> None:
    lib.llama_memory_clear(lib.llama_get_memory(context), True)


def _decode(context: Any, batch: Any, rows: list[tuple[int, int, int, bool]]) -> None:
    """Decodes (token, position, sequence, whether its logits are wanted) rows."""
    batch.n_tokens = len(rows)
    for row, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wanted
    if status := lib.llama_decode(context, batch):
        raise SystemExit(f"llama_decode failed with {status}.")


def _greedy(context: Any, row: int) -> int:
    """The likeliest token after a row of the last batch."""
    logits: NDArray[np.float32] = np.ctypeslib.as_array(
        lib.llama_get_logits_ith(context, row), (_Engine.vocab_size,)
    )
    return int(logits.argmax())


if __name__ == "__main__":
    serve(load, generate, logits)
