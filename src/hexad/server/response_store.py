"""ResponseStore: the responses that clients may ask for again, or go on from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response's JSON, and a JSON list of all items that went into it, those of earlier responses too."""

    response: bytes
    items: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.response) + len(self.items)


class ResponseStore:
    """In memory, and bounded: the responses longest not used are forgotten.

    most: so many responses. max_bytes: of all together.
    """

    def __init__(self, most: int, max_bytes: int) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._bytes = 0

    def put(self, id: str, stored: StoredResponse) -> None:
        """Keeps a response. One that is longer than all may be together is not kept."""
        self.delete(id)
        if stored.size > self._max_bytes:
            return
        self._stored[id] = stored
        self._bytes += stored.size
        while len(self._stored) > self._most or self._bytes > self._max_bytes:
            self.delete(next(iter(self._stored)))

    def get(self, id: str) -> StoredResponse | None:
        """A response that is still there."""
        if id not in self._stored:
            return None
        self._stored.move_to_end(id)
        return self._stored[id]

    def delete(self, id: str) -> bool:
        """Forgets a response. Returns whether there was one."""
        stored = self._stored.pop(id, None)
        self._bytes -= stored.size if stored else 0
        return stored is not None
