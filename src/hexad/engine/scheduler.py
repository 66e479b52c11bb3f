"""Scheduler: divides a token budget among requests, step after step.

There is no prefill phase and no decode phase. A request has tokens known and tokens computed; a step hands
out tokens so that the second catches up with the first. A long prompt simply takes several steps to do so,
beside the others' single tokens.
"""

from __future__ import annotations

from collections import deque

from hexad.engine.block_manager import BlockManager, blocks_for
from hexad.engine.request import Request, RequestStatus
from hexad.engine.step import SampleSpec, ScheduledSequence, ScheduledStep, StepResult
from hexad.outputs import FinishReason


class Scheduler:
    """Running requests first, then waiting ones in the order of arrival.

    A request is admitted only if the pool can hold it and all the running ones at their greatest lengths, so
    that none ever lacks a block half-way; the blocks themselves are taken one by one, as tokens come. The
    first waiting request holds up those behind it, so that none can starve.
    """

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        # With fewer tokens than sequences, the last of the running ones could be left out step after step.
        assert max_num_batched_tokens >= max_num_seqs
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._promised_blocks = 0

    def add(self, request: Request) -> None:
        """Queues a request. It must fit into an empty pool."""
        assert request.request_id not in self.requests, f"request id {request.request_id} is in use"
        assert blocks_for(request.max_computed) <= self.blocks.num_blocks
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self) -> ScheduledStep:
        """The next step: each sequence's share of the budget, and the blocks to put it in."""
        budget = self.max_num_batched_tokens
        sequences = []
        for request in self.running:
            if not budget:
                break
            sequences.append(self._share(request, budget))
            budget -= len(sequences[-1].token_ids)
        while budget and self._admit():
            sequences.append(self._share(self.running[-1], budget))
            budget -= len(sequences[-1].token_ids)
        return ScheduledStep(sequences)

    def update(self, step: ScheduledStep, result: StepResult) -> list[Request]:
        """Takes what the step computed and drew. Returns the requests that have new tokens, in scheduled
        order; those that are finished by them have left the scheduler and hold no blocks.

        A result that does not fit the step is refused before any request has changed.
        """
        drawn = [len(token_ids) for token_ids in result.token_ids]
        wanted = [int(sequence.sample is not None) for sequence in step.sequences]
        assert drawn == wanted, f"{drawn} tokens were drawn where the step asked for {wanted}"
        requests = [self.requests[sequence.request_id] for sequence in step.sequences]
        advanced = []
        for request, sequence, token_ids in zip(requests, step.sequences, result.token_ids, strict=True):
            request.num_computed += len(sequence.token_ids)
            for token_id in token_ids:
                request.append(token_id)
            if token_ids:
                advanced.append(request)
        for request in advanced:
            if request.finish_reason is not None:
                self.finish(request, request.finish_reason)
        return advanced

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Lets go of a request, waiting or running, and frees its blocks."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._promised_blocks -= blocks_for(request.max_computed)
        else:
            self.waiting.remove(request)
        del self.requests[request.request_id]
        self.blocks.release(request.block_table)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.detokenizer.finish()

    def _admit(self) -> bool:
        """Moves the first waiting request to the running ones, if there is room for it."""
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        promised = self._promised_blocks + blocks_for(self.waiting[0].max_computed)
        if promised > self.blocks.num_blocks:
            return False
        request = self.waiting.popleft()
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self._promised_blocks = promised
        return True

    def _share(self, request: Request, budget: int) -> ScheduledSequence:
        start, known = request.num_computed, len(request.token_ids)
        end = min(known, start + budget)
        self.blocks.grow(request.block_table, end)
        params = request.params
        sample = SampleSpec(
            temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
            seed=request.seed, sequence=0, position=known,
        ) if end == known else None  # fmt: skip
        return ScheduledSequence(
            request_id=request.request_id,
            token_ids=request.token_ids[start:end],
            start=start,
            block_table=request.block_table.copy(),
            sample=sample,
        )
