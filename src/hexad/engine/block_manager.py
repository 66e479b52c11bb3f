"""BlockManager: who owns which KV cache block. It deals in block numbers only; the backend has the memory."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from hexad.config import BLOCK_TOKENS


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


def root_key(*extra: str | None) -> bytes:
    """Where the keys of a sequence's blocks begin: with all that the KV depends on besides its tokens."""
    return blake2b(repr(extra).encode(), digest_size=16).digest()


def next_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block: of the tokens in it and, through its parent's key, of all before it."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockManager:
    """The numbers 0 … num_blocks − 1, each free or in one or more sequences' block tables.

    A block table lists the blocks of a sequence in the order of its tokens: position p is in
    block_table[p // BLOCK_TOKENS]. Tables share a block where their sequences share its tokens: the block
    counts its references, and who would write to a shared one copies it first.

    Prefix cache: a full block is published under a key, which stands for its tokens and all before them. A
    free block keeps its contents and its key until it is needed for something else; those without a key are
    taken first, then those freed the longest ago, and of a sequence's the last first.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # in the order of taking
        self._keys: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, with or without cached contents."""
        return len(self._free)

    @property
    def num_allocated(self) -> int:
        """Blocks that sequences hold, shared ones counted once."""
        return self.num_blocks - len(self._free)

    def is_shared(self, block: int) -> bool:
        """Whether more than one table holds the block."""
        return self._references[block] > 1

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Appends blocks to the table until it holds `num_tokens` tokens; there must be enough free ones."""
        for _ in range(blocks_for(num_tokens) - len(block_table)):
            block_table.append(self._take())

    def share(self, block_table: Sequence[int]) -> list[int]:
        """A second table of the same blocks."""
        for block in block_table:
            self._refer(block)
        return list(block_table)

    def copy_on_write(self, block_table: list[int], index: int) -> tuple[int, int]:
        """Puts a block of the table's own in the place of a shared one; (source, destination) to copy."""
        shared, own = block_table[index], self._take()
        block_table[index] = own
        self._references[shared] -= 1
        return shared, own

    def release(self, block_table: list[int], keep: int = 0) -> None:
        """Gives up the table's blocks but for the first `keep`."""
        while len(block_table) > keep:
            self._give_up(block_table.pop())

    def publish(self, block_table: list[int], index: int, key: bytes) -> None:
        """Makes a full block known under its key. Where another block is known under it already, that one
        takes its place: its contents are the same bits."""
        block, known = block_table[index], self._published.get(key)
        if known is None:
            self._published[key] = block
            self._keys[block] = key
        elif known != block:
            self._refer(known)
            block_table[index] = known
            self._give_up(block)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """A table of the published blocks that hold the longest beginning of this chain of keys."""
        found = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            self._refer(block)
            found.append(block)
        return found

    def forget(self) -> None:
        """Empties the prefix cache. Tables keep their blocks."""
        self._published.clear()
        self._keys = [None] * self.num_blocks

    def _refer(self, block: int) -> None:
        if not self._references[block]:
            del self._free[block]
        self._references[block] += 1

    def _take(self) -> int:
        assert self._free, "the scheduler promised more blocks than there are"
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        key = self._keys[block]
        if key is not None:
            del self._published[key]
            self._keys[block] = None
        return block

    def _give_up(self, block: int) -> None:
        self._references[block] -= 1
        if not self._references[block]:
            self._free[block] = None
            if self._keys[block] is None:
                self._free.move_to_end(block, last=False)
