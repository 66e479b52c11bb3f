"""BlockManager: who owns which KV cache block. It deals in block numbers only; the backend has the memory."""

from __future__ import annotations

from hexad.config import BLOCK_TOKENS


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockManager:
    """The numbers 0 … num_blocks − 1, each free or in one sequence's block table.

    A block table lists the blocks of a sequence in the order of its tokens: position p is in
    block_table[p // BLOCK_TOKENS].
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    @property
    def num_allocated(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free)

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Appends blocks to the table until it holds `num_tokens` tokens."""
        missing = blocks_for(num_tokens) - len(block_table)
        assert missing <= len(self._free), "the scheduler promised more blocks than there are"
        for _ in range(missing):
            block_table.append(self._free.pop())

    def release(self, block_table: list[int]) -> None:
        """Frees the table's blocks and empties it."""
        while block_table:
            self._free.append(block_table.pop())
