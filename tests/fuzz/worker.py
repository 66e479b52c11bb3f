"""A process that gives cases to hexad one by one and watches it: `python -m tests.fuzz.worker JOB`.

JOB is JSON: {"kind", "seed", "first", "step", "count", "scratch"} for cases made here, {"paths", "first"} for
saved ones; "seconds" ends it early. Lines of JSON on stdout: {"at": index} before a case, {"finding": reason,
"index": index} after one that broke a rule, {"done": count}. Without the last line this process was killed by
the case begun last.

The rules: a case may succeed or raise HexadErrors, which name the file, can be printed and are of sane
length; it takes at most SECONDS of processor time, and grows the resident set by at most 10 × its size + 50
MB.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import re
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tests.fuzz.case import Case, make, opened, valid

from hexad.checkpoint import open_checkpoint
from hexad.checkpoint.gguf import GGUFFile, LazyArray
from hexad.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from hexad.errors import CheckpointError, HexadError
from hexad.models import build_graph

T = TypeVar("T")

SECONDS = 2.0
HANG_SECONDS = 30.0
"""Of wall-clock time, after which a case is cut off; far more than SECONDS, for other processes run, too."""

GROWTH_FACTOR, GROWTH_BYTES = 10, 50e6
ADDRESS_SPACE = 8 << 30
MESSAGE_LENGTH = 2000

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, which steer terminals, and what UTF-8 has no bytes for."""

_TEXT = "hello world! <s>Löffel 🥄</s> \0\t  "
_MESSAGES = [{"role": "user", "content": "hello"}]


class Exercise:
    """All that calls of a user do with a model's files, short of running it.

    errors: the HexadErrors met. Anything else comes out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[HexadError] = []
        if path.is_file() and path.read_bytes()[:4] == b"GGUF":
            self._try(self._read_gguf)
        self._try(self._open)

    def _try(self, action: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return action(*arguments)
        except HexadError as error:
            self.errors.append(error)
            return None

    def _open(self) -> None:
        with open_checkpoint(self.path) as checkpoint:
            for name in list(checkpoint.weights):
                self._try(self._dequantise, checkpoint.weights, name)
            self._try(build_graph, checkpoint.config, checkpoint.weights, checkpoint.path)
            self._try(checkpoint.check_tokenizer)
            self._use_tokenizer(self._try(checkpoint.tokenizer))

    def _read_gguf(self) -> None:
        """What of the file even a model that is not opened has."""
        with GGUFFile(self.path) as file:
            pending = list(file.metadata.values())
            while pending:
                value = pending.pop()
                if isinstance(value, LazyArray):
                    if len(value) <= 1000:  # nothing in hexad decodes longer ones for decoding's sake
                        pending += self._try(value.tolist) or []
                    pending += self._try(value.__getitem__, slice(-1, None)) or []
            for name in file.tensors:
                self._try(self._dequantise, file.tensors, name)
            self._use_tokenizer(self._try(tokenizer_from_gguf, file.metadata, self.path))

    def _dequantise(self, weights: Any, name: str) -> None:
        weight = weights[name]
        assert weight.dequantise().shape == weight.shape

    def _use_tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is None:
            return
        for ids in (self._try(tokenizer.encode, _TEXT), range(min(tokenizer.vocab_size, 1000))):
            self._try(tokenizer.decode, ids or [])
        stream = tokenizer.stream()
        for token_id in range(min(tokenizer.vocab_size, 1000)):
            stream.push(token_id)
        stream.flush()
        if tokenizer.chat_template is not None:
            self._try(tokenizer.apply_chat_template, _MESSAGES)


def misfit(path: Path, folder: Path, size: int) -> str | None:
    """Opens and uses what is at a path; which rule that broke, if one. size: of all files together."""
    before, start = _resident("VmRSS"), time.process_time()
    _reset_peak()
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    try:
        errors = Exercise(path).errors
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error))[-4000:]
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds, growth = time.process_time() - start, _resident("VmHWM") - before
    if seconds > SECONDS:
        return f"took {seconds:.1f} s of processor time; at most {SECONDS} are allowed"
    if growth > GROWTH_FACTOR * size + GROWTH_BYTES:
        return f"grew the resident set by {growth / 1e6:.0f} MB for {size} bytes"
    for error in errors:
        if len(str(error)) > MESSAGE_LENGTH:
            return f"a message of {len(str(error))} characters: {str(error)[:300]} …"
        if _UNPRINTABLE.search(str(error)):
            return f"a message that no terminal should see: {error!r:.300}"
        if isinstance(error, CheckpointError) and str(folder) not in str(error):
            return f"{type(error).__name__} names no file: {error}"
    return None


def _resident(field: str) -> int:
    """A size of this process's in /proc/self/status in bytes; 0 where there is no such file."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)), 0)


def _reset_peak() -> None:
    """Makes VmHWM begin anew. Where that cannot be done, it can only show growth past all that was before."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cases(job: dict[str, Any]) -> Iterator[tuple[int, Path, Path, int]]:
    """(index, what to open, the folder it lies in, bytes of all files) of each case."""
    index = job["first"]
    if "paths" in job:
        for saved in map(Path, job["paths"][index:]):
            files = [path for path in saved.rglob("*") if path.is_file()] if saved.is_dir() else [saved]
            yield index, opened(saved), saved, sum(path.stat().st_size for path in files)
            index += 1
        return
    scratch = Path(job["scratch"]) / "case"
    while job["count"] is None or index < job["count"]:
        case: Case = make(job["kind"], job["seed"], index)
        yield index, case.save(scratch), scratch, sum(map(len, case.files.values()))
        index += job["step"]


def main() -> None:
    job = json.loads(sys.argv[1])
    end = time.monotonic() + (job.get("seconds") or 1e9)
    warnings.simplefilter("error")
    faulthandler.enable()
    for case in valid(job["kind"]) if "kind" in job else []:  # imports and allocates what is needed once
        Exercise(case.save(Path(job["scratch"]) / "valid"))
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    done = 0
    for index, path, folder, size in _cases(job):
        print(json.dumps({"at": index}), flush=True)
        reason = misfit(path, folder, size)
        done += 1
        if reason is not None:
            print(json.dumps({"finding": reason, "index": index}), flush=True)
        if time.monotonic() > end:
            break
    print(json.dumps({"done": done}), flush=True)


if __name__ == "__main__":
    main()
