"""BlockManager: blocks are held as often as tables name them, and the cache finds what was published."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hexad.config import BLOCK_TOKENS
from hexad.engine.block_manager import BlockManager, blocks_for, next_key, root_key


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (0, 1, 31, 32, 33, 64, 65)] == [0, 1, 1, 1, 2, 2, 3]


def test_keys_stand_for_the_salt_and_all_tokens_so_far() -> None:
    a, b, c = ([n] * BLOCK_TOKENS for n in (1, 2, 3))
    root = root_key(None)
    assert next_key(next_key(root, a), b) == next_key(next_key(root_key(None), a), b)
    keys = [
        root, root_key(""), root_key("salt"), root_key("salt", "adapter"), next_key(root, a),
        next_key(root, b),
        next_key(root_key("salt"), a), next_key(next_key(root, a), c), next_key(next_key(root, b), c),
        next_key(root, [*a[:-1], 2**40]),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def filled(blocks: BlockManager, chain: str) -> list[int]:
    """A table with a published block for each letter of a chain."""
    table: list[int] = []
    blocks.grow(table, len(chain) * BLOCK_TOKENS)
    for i in range(len(chain)):
        blocks.publish(table, i, chain[: i + 1].encode())
    return table


def keys_of(chain: str) -> list[bytes]:
    return [chain[: i + 1].encode() for i in range(len(chain))]


def test_finds_the_longest_published_beginning() -> None:
    blocks = BlockManager(8)
    table = filled(blocks, "abc")
    assert blocks.find(keys_of("abxy")) == table[:2]
    assert blocks.num_allocated == 3
    assert blocks.find(keys_of("xab")) == []
    blocks.forget()
    assert blocks.find(keys_of("abc")) == []


def test_freed_blocks_are_found_until_they_are_taken_tails_before_heads() -> None:
    blocks = BlockManager(6)
    old, new = filled(blocks, "abc"), filled(blocks, "xy")
    a, b, c = old
    x, y = new
    blocks.release(old)
    blocks.release(new)
    assert blocks.num_allocated == 0
    taken: list[int] = []
    blocks.grow(taken, 6 * BLOCK_TOKENS)
    # The block that never held anything, then the chains by age, each from its end.
    assert taken[1:] == [c, b, a, y, x]
    assert blocks.find(keys_of("abc")) == blocks.find(keys_of("xy")) == []


def test_blocks_without_a_key_are_taken_before_cached_ones() -> None:
    blocks = BlockManager(4)
    table = filled(blocks, "ab")
    blocks.grow(table, 3 * BLOCK_TOKENS)
    plain = table[2]
    blocks.release(table)
    taken: list[int] = []
    blocks.grow(taken, 2 * BLOCK_TOKENS)
    assert plain in taken
    assert len(blocks.find(keys_of("ab"))) == 2


def test_being_found_makes_a_block_young_again() -> None:
    blocks = BlockManager(2)
    first, second = filled(blocks, "a"), filled(blocks, "x")
    a, x = first[0], second[0]
    blocks.release(first)
    blocks.release(second)
    again = blocks.find(keys_of("a"))
    assert again == [a]
    blocks.release(again)
    taken: list[int] = []
    blocks.grow(taken, 1)
    assert taken == [x]


def test_of_two_equal_blocks_one_is_kept() -> None:
    blocks = BlockManager(4)
    known, twin = filled(blocks, "a"), []
    blocks.grow(twin, BLOCK_TOKENS)
    assert blocks.num_allocated == 2
    blocks.publish(twin, 0, b"a")
    assert twin == known
    assert blocks.num_allocated == 1
    blocks.release(known)
    assert blocks.num_allocated == 1
    # It may have been freed in between, too.
    blocks.release(twin)
    other: list[int] = []
    blocks.grow(other, BLOCK_TOKENS)
    blocks.publish(other, 0, b"a")
    assert blocks.num_allocated == 1
    assert blocks.find([b"a"]) == other


class BlocksMachine(RuleBasedStateMachine):
    """Tables that grow, are shared, copied on write, published, found and released in any order."""

    @initialize(num_blocks=st.integers(1, 12))
    def begin(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what a block was last published as
        self.names = 0

    @rule(more=st.integers(0, 4), data=st.data())
    def grow(self, more: int, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([*self.tables, []]))
        more = min(more, self.blocks.num_free)
        before = list(table)
        self.blocks.grow(table, (len(table) + more) * BLOCK_TOKENS)
        assert table[: len(before)] == before
        new = table[len(before) :]
        assert len(set(new)) == more
        assert not any(block in other for other in self.tables if other is not table for block in new)
        for block in new:
            self.contents.pop(block, None)
        if table and not any(table is other for other in self.tables):
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.append(self.blocks.share(table[: data.draw(st.integers(1, len(table)))]))

    @precondition(lambda self: self.tables and self.blocks.num_free)
    @rule(data=st.data())
    def copy_on_write(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        index = len(table) - 1
        if not self.blocks.is_shared(table[index]):
            return
        shared = table[index]
        assert self.blocks.copy_on_write(table, index) == (shared, table[index])
        assert not self.blocks.is_shared(table[index])
        self.contents.pop(table[index], None)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c"]))
    def publish(self, data: st.DataObject, name: bytes) -> None:
        table = data.draw(st.sampled_from(self.tables))
        index = data.draw(st.integers(0, len(table) - 1))
        if table[index] in self.contents:
            return
        self.blocks.publish(table, index, name)
        self.contents[table[index]] = name

    @rule(names=st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3))
    def find(self, names: list[bytes]) -> None:
        table = self.blocks.find(names)
        assert [self.contents[block] for block in table] == names[: len(table)]
        if table:
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.release(table)
        assert table == []

    @rule()
    def forget(self) -> None:
        self.blocks.forget()
        self.contents.clear()
        assert self.blocks.find([b"a"]) == self.blocks.find([b"b"]) == []

    @invariant()
    def every_block_is_counted(self) -> None:
        if not hasattr(self, "blocks"):
            return
        held = Counter(block for table in self.tables for block in table)
        assert self.blocks.num_allocated == len(held)
        assert self.blocks.num_free == self.blocks.num_blocks - len(held)
        for block, count in held.items():
            assert self.blocks.is_shared(block) == (count > 1)


TestBlocksMachine = BlocksMachine.TestCase
TestBlocksMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
