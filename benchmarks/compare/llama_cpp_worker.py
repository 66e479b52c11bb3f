"""llama.cpp through the low-level API of llama-cpp-python; see benchmarks.worker. Needs no hexad."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from benchmarks.worker import serve

CONTEXT = 1024
CHUNK = 512


class _Engine:
    model: Any
    context: Any
    vocab_size: int


_silent = lib.llama_log_callback(lambda level, text, data: None)


def load(model: str, threads: int) -> dict[str, str]:
    """Opens the model; the settings are those that are fastest for one stream on a CPU."""
    lib.llama_log_set(_silent, ctypes.c_void_p())
    lib.llama_backend_init()
    handle = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    if not handle:
        raise SystemExit(f"llama.cpp cannot load {model}.")
    settings = lib.llama_context_default_params()
    settings.n_ctx = CONTEXT
    settings.n_batch = settings.n_ubatch = CHUNK
    settings.n_threads = settings.n_threads_batch = threads
    _Engine.model = handle
    _Engine.context = lib.llama_init_from_model(handle, settings)
    _Engine.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(handle))
    return {"version": lib.__version__, "system": lib.llama_print_system_info().decode().strip(" |")}


def generate(tokens: list[int], count: int) -> dict[str, Any]:
    """`count` greedy tokens after `tokens`, end of sequence ignored: seconds and the tokens."""
    begin = time.perf_counter()
    _forget()
    _decode(tokens)
    made = [_greedy()]
    while len(made) < count:
        _decode(made[-1:])
        made.append(_greedy())
    return {"seconds": time.perf_counter() - begin, "tokens": made}


def logits(tokens: list[int], path: str) -> None:
    """Writes the logits of every position, float32 [tokens, vocab], as an .npy file."""
    _forget()
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for row, token in enumerate(tokens):
        batch.token[row] = token
        batch.pos[row] = row
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = 0
        batch.logits[row] = 1
    _check(lib.llama_decode(_Engine.context, batch))
    rows = np.ctypeslib.as_array(lib.llama_get_logits(_Engine.context), (len(tokens), _Engine.vocab_size))
    np.save(path, rows)
    lib.llama_batch_free(batch)


def _forget() -> None:
    lib.llama_memory_clear(lib.llama_get_memory(_Engine.context), True)


def _decode(tokens: list[int]) -> None:
    array = (lib.llama_token * len(tokens))(*tokens)
    _check(lib.llama_decode(_Engine.context, lib.llama_batch_get_one(array, len(tokens))))


def _greedy() -> int:
    row: NDArray[np.float32] = np.ctypeslib.as_array(
        lib.llama_get_logits_ith(_Engine.context, -1), (_Engine.vocab_size,)
    )
    return int(row.argmax())


def _check(status: int) -> None:
    if status:
        raise SystemExit(f"llama_decode failed with {status}.")


if __name__ == "__main__":
    serve(load, generate, logits)
