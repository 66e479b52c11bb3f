"""BlockManager: every block is free or in exactly one table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexad.config import BLOCK_TOKENS
from hexad.engine.block_manager import BlockManager, blocks_for


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


def test_grows_only_when_a_block_is_full() -> None:
    blocks = BlockManager(4)
    table: list[int] = []
    for tokens in range(1, 4 * BLOCK_TOKENS + 1):
        before = table.copy()
        blocks.grow(table, tokens)
        assert table[: len(before)] == before
        assert len(table) == blocks_for(tokens) == blocks.num_allocated
    blocks.grow(table, 5)  # never shrinks
    assert len(table) == 4
    with pytest.raises(AssertionError, match="promised"):
        blocks.grow(table, 4 * BLOCK_TOKENS + 1)
    blocks.release(table)
    assert table == []
    assert (blocks.num_free, blocks.num_allocated) == (4, 0)


@given(st.data())
def test_blocks_are_never_lost_or_shared(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 12))
    blocks = BlockManager(num_blocks)
    tables: list[list[int]] = [[] for _ in range(4)]
    for _ in range(data.draw(st.integers(1, 30))):
        table = data.draw(st.sampled_from(tables))
        if data.draw(st.booleans()):
            room = (len(table) + blocks.num_free) * BLOCK_TOKENS
            tokens = data.draw(st.integers(0, room))
            wanted = max(blocks_for(tokens), len(table))
            blocks.grow(table, tokens)
            assert len(table) == wanted
        else:
            blocks.release(table)
        held = [block for t in tables for block in t]
        assert len(held) == len(set(held)) == blocks.num_allocated
        assert set(held) <= set(range(num_blocks))
        assert blocks.num_free + len(held) == num_blocks
