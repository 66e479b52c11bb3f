"""Reading files that nobody vouches for: mapped into memory, or JSON of bounded size and depth."""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from pathlib import Path
from typing import Any

from hexad.errors import CheckpointError
from hexad.weights import OpenFile

# Python's objects take up to 250 bytes for six characters of JSON, so what makes objects is counted first.
MAX_JSON_BYTES = 100_000_000
MAX_BRACKETS = 200_000
MAX_COMMAS = 2**20


def map_file(path: Path) -> tuple[mmap.mmap, OpenFile]:
    """A file, mapped to be read, and open. Raises CheckpointError if it is empty, unreadable or no regular
    file."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path}: not a regular file")
        file = OpenFile(path)
        if not os.fstat(file.descriptor).st_size:
            raise CheckpointError(f"{path}: the file is empty; fetch it again")
        return mmap.mmap(file.descriptor, 0, access=mmap.ACCESS_READ), file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def release(buffer: mmap.mmap) -> None:
    """Lets go of a mapped file's pages that are in this process's memory; they come back as they are read."""
    if hasattr(buffer, "madvise"):
        buffer.madvise(mmap.MADV_DONTNEED)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError; see `parse_json`."""
    buffer, _ = map_file(path)
    with buffer:
        if len(buffer) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {len(buffer)} bytes long; the limit is {MAX_JSON_BYTES}")
        return parse_json(buffer[:], path, "the file")


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """The object that JSON in UTF-8 describes, no key of an object twice.

    path, what: for messages. Raises CheckpointError for anything else, or more than any model needs.
    """
    brackets, commas = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    if brackets > MAX_BRACKETS or commas > MAX_COMMAS:
        raise CheckpointError(
            f"{path}: {what} has {brackets} brackets and {commas} commas; "
            f"the limits are {MAX_BRACKETS} and {MAX_COMMAS}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items = dict(pairs)
        if len(items) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: {what} has {twice!r:.80} twice")
        return items

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path}: {what} is nested too deeply") from None
    except ValueError as error:  # also what is not UTF-8, and integers of thousands of digits
        raise CheckpointError(f"{path}: {what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is no JSON object, but a {type(value).__name__}")
    return value
