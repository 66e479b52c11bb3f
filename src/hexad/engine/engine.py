"""Engine: turns requests into tokens, one `step()` at a time."""

from __future__ import annotations

import random
from collections.abc import Callable

from hexad.checks import shown
from hexad.config import EngineConfig
from hexad.engine.block_manager import BlockManager, blocks_for
from hexad.engine.detokenizer import Detokenizer, TextStream
from hexad.engine.request import Request
from hexad.engine.scheduler import Scheduler
from hexad.engine.step import Executor
from hexad.errors import PromptError
from hexad.outputs import RequestOutput
from hexad.params import SamplingParams


class Engine:
    """Prompts in, Requests with new tokens out, step after step. One caller at a time.

    executor: computes the steps. max_model_len: longest sequence in tokens. kv_blocks: size of the KV cache
    in blocks. vocab_size: token ids are below it. eos_ids: tokens that end a generation. new_stream: makes
    the TextStream of a new request.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        max_model_len: int,
        kv_blocks: int,
        vocab_size: int,
        eos_ids: frozenset[int],
        new_stream: Callable[[], TextStream],
    ) -> None:
        self.executor = executor
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.scheduler = Scheduler(
            BlockManager(kv_blocks),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._new_stream = new_stream
        self._seeds = random.SystemRandom() if config.seed is None else random.Random(config.seed)

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.scheduler.requests)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
    ) -> Request:
        """Queues a request under an id of the caller's choice; `prompt` is its text, passed on to the output.
        Returns the request, which `step` carries on.

        Raises PromptError if it can never run: no tokens, ids outside the vocabulary, no room for a new token
        in the context, or more KV cache than there is.
        """
        max_len = self._checked_max_len(prompt_token_ids, params)
        request = Request(
            request_id=request_id,
            prompt=prompt,
            token_ids=list(prompt_token_ids),
            params=params,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            max_len=max_len,
            stop_ids=frozenset() if params.ignore_eos else self.eos_ids,
            detokenizer=Detokenizer(self._new_stream()),
        )
        self.scheduler.add(request)
        return request

    def step(self) -> list[Request]:
        """Runs one step; there must be something to do. Returns the requests that got new tokens. They live
        on: their `output()` is plain data, for whoever wants it at this step, and what a step costs does not
        grow with the tokens generated before.

        If the executor raises, no request has advanced: the step may be repeated, or its requests aborted.
        """
        step = self.scheduler.schedule()
        return self.scheduler.update(step, self.executor.execute(step))

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees its blocks at once. Returns its last output, or None if it has ended."""
        request = self.scheduler.requests.get(request_id)
        if request is None:
            return None
        self.scheduler.finish(request, "abort")
        return request.output()

    def _checked_max_len(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """Most tokens the request can come to, prompt included."""
        num_prompt = len(prompt_token_ids)
        if not num_prompt:
            raise PromptError("The prompt is empty: there must be at least one token.")
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < self.vocab_size:
            position, token_id = next(
                (i, t) for i, t in enumerate(prompt_token_ids) if not 0 <= t < self.vocab_size
            )
            raise PromptError(
                f"Token id {shown(token_id)} at position {position} of the prompt is outside the vocabulary "
                f"(0 … {self.vocab_size - 1})."
            )
        if num_prompt >= self.max_model_len:
            raise PromptError(
                f"The prompt has {num_prompt} tokens; with a context of {self.max_model_len} at most "
                f"{self.max_model_len - 1} leave room for a new one. Shorten it, or raise max_model_len if "
                "the model allows."
            )
        max_len = self.max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, num_prompt + params.max_tokens)
        needed, blocks = blocks_for(max_len - 1), self.scheduler.blocks.num_blocks
        if needed > blocks:
            raise PromptError(
                f"The request can grow to {max_len} tokens ({num_prompt} of them prompt), which takes "
                f"{needed} KV cache blocks; there are {blocks}. Lower max_tokens or raise kv_cache_gib."
            )
        return max_len
