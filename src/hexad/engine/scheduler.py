"""Scheduler: divides a token budget among sequences, step after step.

There is no prefill phase and no decode phase. A sequence has tokens known and tokens computed; a step hands
out tokens so that the second catches up with the first. A long prompt simply takes several steps to do so,
beside the others' single tokens; a sequence that lost its blocks to others does it once more.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import chain

from hexad.config import BLOCK_TOKENS
from hexad.engine.block_manager import BlockManager, blocks_for
from hexad.engine.pace import LEAST_TOKENS, Pace
from hexad.engine.request import Request, Sequence, Status
from hexad.engine.step import ScheduledStep, SequenceSpec

GIVING_UP = 8
"""Steps from one whose prompts were given up to the next: they are to get on whatever disturbs."""

SETTLING = 8
"""Tokens that a stream has had when it is first seen to stutter. Requests that come together so begin
together, at full speed: else the first would hold up the last, and all would run in smaller steps."""


class Scheduler:
    """Running sequences first, then waiting ones, both in the order of their rank.

    Of the running ones, those with a single token to compute come before those that have more: streams go on
    whatever prompts there are, and the pace says how much of these fits beside them. When blocks run out, the
    last in rank gives up its own and waits for its turn; it is computed again then. The first waiting
    sequence holds up those behind it, so that none can starve, and sequences go on in rank order, so that the
    first of them always gets on: whatever fits into an empty pool comes to its end.

    new_sequence: makes the next sequence of a request whose n are not all there yet. settling: tokens that a
    stream must have had for prompts to be held back for it.
    """

    def __init__(
        self,
        blocks: BlockManager,
        pace: Pace,
        new_sequence: Callable[[Request], Sequence],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        settling: int = SETTLING,
    ) -> None:
        # With fewer tokens than sequences, the last of the running ones could be left out step after step.
        assert max_num_batched_tokens >= max_num_seqs
        self.blocks = blocks
        self.pace = pace
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        self.scheduled: list[Sequence] = []  # those of the step under way, in its order
        self.num_waiting = 0
        self.num_preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # prompt tokens looked up in the prefix cache, and found
        # A heap; finished ones drop out at the top.
        self._waiting: list[tuple[tuple[int, ...], Sequence]] = []
        self._new_sequence = new_sequence
        self._settling = settling
        self._new: dict[int, SequenceSpec] = {}  # by sequence id, those that the runner has yet to be told of
        self._forget: list[int] = []
        self._left = 0  # tokens of the step's budget
        self._seconds = 0.0  # and time for its prompts
        self._kept_up = GIVING_UP  # steps since prompts were given up

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. It must fit into an empty pool."""
        sequence.status = Status.WAITING
        heappush(self._waiting, (sequence.rank, sequence))
        self.num_waiting += 1

    def schedule(self, now: float) -> ScheduledStep:
        """The next step: each sequence's share of the budget, and the blocks to put it in. now: the time."""
        step = self._schedule(now)
        while not step.sequence_ids and self.running:
            # Prompts that hold each other's last blocks, or beams waiting for siblings that find no room.
            self._preempt()
            step = self._schedule(now)
        if self._new:  # one that was admitted may have got no tokens yet
            named = {*step.sequence_ids, *chain.from_iterable(step.draws)}
            step.new = [self._new.pop(i) for i in list(self._new) if i in named]
        step.finished, self._forget = self._forget, []
        self._kept_up += 1
        return step

    def give_up(self, step: ScheduledStep) -> None:
        """Takes note that the optional sequences of a step were not computed."""
        kept = len(step.counts) - step.optional
        step.counts[kept:] = [0] * step.optional
        for sequence in self.scheduled[kept:]:
            self.blocks.release(sequence.block_table, blocks_for(sequence.num_computed))
        self._kept_up = 1

    def remove(self, sequence: Sequence) -> None:
        """Lets go of a sequence, waiting or running, and frees its blocks. Its `finish` is the caller's
        matter."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING and sequence.candidates is None:
            self.num_waiting -= 1
        sequence.status = Status.FINISHED
        if len(self._waiting) > 2 * self.num_waiting + 100:  # cancelled ones shall not pile up
            self._waiting = [entry for entry in self._waiting if entry[1].status is Status.WAITING]
            heapify(self._waiting)
        self.blocks.release(sequence.block_table)
        if sequence.known and self._new.pop(sequence.sequence_id, None) is None:
            self._forget.append(sequence.sequence_id)

    def advance(self, sequence: Sequence, count: int) -> None:
        """Takes note that `count` more of its tokens are computed; full blocks are made known to others."""
        computed = sequence.num_computed = sequence.num_computed + count
        if self.blocks.caching:
            while (sequence.num_published + 1) * BLOCK_TOKENS <= computed:
                index = sequence.num_published
                self.blocks.publish(sequence.block_table, index, sequence.key(index))
                sequence.num_published += 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Gives a child all that its parent has computed; the last block is copied when one of them goes
        on."""
        child.block_table = self.blocks.share(parent.block_table)
        child.num_computed = parent.num_computed
        child.keys = parent.keys[: parent.num_published]
        child.num_published = parent.num_published
        parent.shares = child.shares = True

    def regrow(self, live: list[Sequence], beams: list[Sequence], moves: list[tuple[int, int]]) -> None:
        """Beams[i] goes on as live[parent] with one token more, for moves[i] = (parent, token)."""
        states = []
        for parent, token_id in moves:
            old = live[parent]
            keys = old.keys[: old.num_published]
            states.append(
                (self.blocks.share(old.block_table), old.num_computed, [*old.token_ids, token_id], keys)
            )
        for sequence in live:
            self.blocks.release(sequence.block_table)
        for sequence, (block_table, computed, token_ids, keys) in zip(beams, states, strict=True):
            sequence.block_table, sequence.num_computed, sequence.token_ids = block_table, computed, token_ids
            sequence.keys, sequence.num_published, sequence.shares = keys, len(keys), True
            sequence.candidates = None
            if sequence.status is Status.WAITING and computed and len(self.running) < self.max_num_seqs:
                self._run(sequence)
            elif sequence.status is Status.WAITING or not computed:
                if sequence.status is Status.RUNNING:
                    self.running.remove(sequence)
                self.blocks.release(sequence.block_table)
                self._reset(sequence)
                self.add(sequence)

    def _schedule(self, now: float) -> ScheduledStep:
        step = ScheduledStep()
        running, preemptions = self.running, self.num_preemptions
        scheduled = self.scheduled = list[Sequence]()
        prompts: list[Sequence] = []
        positions = owed = i = 0  # owed: blocks that prompts so far still need
        while i < len(running):  # it may lose sequences from its end
            sequence = running[i]
            i += 1
            token_ids = sequence.token_ids
            start = sequence.num_computed
            if start + 1 != len(token_ids) or start < sequence.num_prompt:
                if start < len(token_ids):
                    prompts.append(sequence)
                    owed += blocks_for(len(token_ids)) - len(sequence.block_table) + sequence.shares
                continue
            if (sequence.shares or not start % BLOCK_TOKENS) and not self._make_room(sequence, step, owed):
                break
            positions += start
            step.sequence_ids.append(sequence.sequence_id)
            step.starts.append(start)
            step.tokens.append(token_ids[start])
            step.block_tables.append(sequence.block_table)
            step.draws.append(sequence.draw)
            scheduled.append(sequence)
        streams = len(scheduled)
        step.counts = [1] * streams
        self._left = self.max_num_batched_tokens - streams
        num_prompts = len(prompts) + len(self._waiting)
        watched = num_prompts > 0 and any(
            s.request.watched and s.num_generated > self._settling for s in scheduled
        )
        self._seconds = self.pace.begin(streams, positions, prompts=num_prompts, watched=watched)
        # What holds up one prompt holds up those behind it.
        if (
            all(self._hand_out(sequence, step) for sequence in prompts)
            and self.num_preemptions == preemptions
        ):
            while (admitted := self._admit(now)) is not None and self._hand_out(admitted, step):
                pass
        if watched and self._kept_up >= GIVING_UP and not any(step.draws[streams:]):
            step.optional, step.expected = len(step.draws) - streams, self.pace.expected
        return step

    def _hand_out(self, sequence: Sequence, step: ScheduledStep) -> bool:
        """Gives a sequence as many tokens as budget, time and blocks allow. Whether that is all it needs."""
        request, start, known = sequence.request, sequence.num_computed, len(sequence.token_ids)
        in_time = self.pace.tokens_within(self._seconds, start)
        if len(step.tokens) == len(step.sequence_ids):  # the first prompt of the step
            in_time = max(in_time, LEAST_TOKENS)
        table, blocks = sequence.block_table, self.blocks
        copies = (
            sequence.shares and start % BLOCK_TOKENS > 0 and blocks.is_shared(table[start // BLOCK_TOKENS])
        )
        room = (len(table) + blocks.num_free - copies) * BLOCK_TOKENS - start
        count = min(known - start, self._left, in_time, room)
        if count <= 0:
            return False
        if not step.sequence_ids and count == in_time and not self._waiting:
            # In equal pieces: a small last one would cost more by the token.
            count = -(-(known - start) // -(-(known - start) // count))
        if copies:
            step.block_copies.append(blocks.copy_on_write(table, start // BLOCK_TOKENS))
        sequence.shares = False
        end = start + count
        blocks.grow(table, end)
        self._left -= count
        self._seconds -= self.pace.add_prompt(count, start)
        draws: tuple[int, ...] = sequence.draw if end == known and request.generate else ()
        if draws and request.num_started == 1 < request.n:
            draws += self._start_siblings(request)
        step.sequence_ids.append(sequence.sequence_id)
        step.counts.append(count)
        step.starts.append(start)
        step.tokens += sequence.token_ids[start:end]
        step.block_tables.append(table)
        step.draws.append(draws)
        self.scheduled.append(sequence)
        return end == known

    def _start_siblings(self, request: Request) -> tuple[int, ...]:
        """Starts as many of a request's n sequences as there is room for, with tokens drawn from the same
        logits as the first one's. A drawn row costs about a token."""
        siblings = []
        for _ in range(min(request.n - 1, self.max_num_seqs - len(self.running), self._left)):
            sibling = self._new_sequence(request)
            # Nothing to compute until the step has brought its token.
            sibling.num_computed = request.num_prompt
            self._run(sibling)
            siblings.append(sibling.sequence_id)
        self._left -= len(siblings)
        self._queue_next(request)
        return tuple(siblings)

    def _queue_next(self, request: Request) -> None:
        """Queues the next of the request's n sequences: one at a time, so that a large n takes no memory
        yet."""
        if request.num_started < request.n:
            self.add(self._new_sequence(request))

    def _admit(self, now: float) -> Sequence | None:
        """Moves the first waiting sequence to the running ones, if there is room for all its tokens."""
        while self._waiting and self._waiting[0][1].status is Status.FINISHED:
            heappop(self._waiting)
        if not self._waiting or len(self.running) == self.max_num_seqs or self._left <= 0:
            return None
        sequence = self._waiting[0][1]
        request = sequence.request
        self._reuse(sequence)
        missing = blocks_for(len(sequence.token_ids)) - len(sequence.block_table) + sequence.shares
        # A few blocks are left to those that run already, or they would soon drive the newcomer out again.
        if missing > self.blocks.num_free - (self.blocks.num_blocks // 100 if self.running else 0):
            self.blocks.release(sequence.block_table)
            self._reset(sequence)
            return None
        heappop(self._waiting)
        self.num_waiting -= 1
        self._run(sequence)
        if sequence.index and sequence.index + 1 == request.num_started:  # not one that was preempted
            self._queue_next(request)
        elif request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
            request.num_cached_tokens = sequence.num_computed
            if self.blocks.caching and request.reads_cache:
                self.prefix_queries += request.num_prompt
            self.prefix_hits += sequence.num_computed
        return sequence

    def _reuse(self, sequence: Sequence) -> None:
        """Finds blocks in which the sequence's tokens have been computed: all but the last, whose logits it
        needs."""
        request, needed = sequence.request, len(sequence.token_ids) - 1
        if sequence.index and needed < request.num_prompt:
            for sibling in self.running:
                if sibling.request is request and sibling.num_computed >= needed:
                    full = needed // BLOCK_TOKENS
                    sequence.block_table = self.blocks.share(sibling.block_table[: blocks_for(needed)])
                    sequence.num_computed, sequence.shares = needed, needed % BLOCK_TOKENS > 0
                    sequence.keys, sequence.num_published = (
                        sibling.keys[:full],
                        min(full, sibling.num_published),
                    )
                    return
        if self.blocks.caching and request.reads_cache:
            found = self.blocks.find(map(sequence.key, range(needed // BLOCK_TOKENS)))
            sequence.block_table = found
            sequence.num_published = len(found)
            sequence.num_computed = len(found) * BLOCK_TOKENS

    def _make_room(self, sequence: Sequence, step: ScheduledStep, owed: int) -> bool:
        """Gives a stream the block that its next token goes to, if there are more than `owed` to prompts that
        go before it. False if it had to give up its own."""
        index, slot = divmod(sequence.num_computed, BLOCK_TOKENS)
        table, blocks = sequence.block_table, self.blocks
        while blocks.num_free <= owed and (not slot or (sequence.shares and blocks.is_shared(table[index]))):
            if self._preempt() is sequence:
                return False
        if slot and blocks.is_shared(table[index]):
            step.block_copies.append(blocks.copy_on_write(table, index))
        sequence.shares = False
        blocks.grow(table, sequence.num_computed + 1)
        return True

    def _preempt(self) -> Sequence:
        """Takes its blocks from the running sequence that is last in rank, which is to be computed again."""
        sequence = self.running.pop()
        self.num_preemptions += 1
        sequence.request.metrics.num_preemptions += 1
        self.blocks.release(sequence.block_table)
        self._reset(sequence)
        if sequence.candidates is None:
            self.add(sequence)
        else:  # a beam that has its candidates has nothing left to compute
            sequence.status = Status.WAITING
        return sequence

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=lambda s: s.rank)
        if not sequence.known:
            sequence.known = True
            self._new[sequence.sequence_id] = sequence.spec()

    @staticmethod
    def _reset(sequence: Sequence) -> None:
        """It has given up its blocks, and begins anew."""
        assert not sequence.block_table
        sequence.num_computed = sequence.num_published = 0
        sequence.shares = False
