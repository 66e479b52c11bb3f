"""AsyncEngine: an Engine in a thread of its own, which any number of event loops share."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakValueDictionary

from hexad.checks import check_integer
from hexad.engine.engine import Engine
from hexad.engine.metrics import Metric
from hexad.engine.request import Request
from hexad.errors import BackendError, EngineError, ParamsError
from hexad.outputs import (
    BeamSearchOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)
from hexad.params import BeamSearchParams, PoolingParams, RequestOutputKind, SamplingParams

T = TypeVar("T")

Params = SamplingParams | PoolingParams | BeamSearchParams
Output = RequestOutput | EmbeddingRequestOutput | BeamSearchOutput

logger = logging.getLogger(__name__)


class AsyncEngine:
    """Runs an Engine in a thread of its own, which does nothing at all while there is nothing to do.

    Calls reach the thread through an inbox that it empties between steps, and all outputs of a step reach an
    event loop with one call. Any thread may call any method; `submit` needs a running event loop.

    engine: from now on the thread's alone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # for these three; the thread alone takes slots away
        self._slots: dict[str, _Slot] = {}
        self._outboxes: WeakValueDictionary[asyncio.AbstractEventLoop, _Outbox] = WeakValueDictionary()
        self._refusal: str | None = None  # why nothing is taken on any more
        self._cause: BaseException | None = None
        self._asleep = self._stopping = False
        self._on_broken: Callable[[], object] | None = None
        # A daemon, for Python waits for other threads before it calls what is registered for its exit. There
        # it must be stopped: a thread that comes back from native code when the interpreter is gone takes the
        # process down.
        self._thread = threading.Thread(target=self._run, name="hexad-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def is_sleeping(self) -> bool:
        """Whether weights and KV cache are freed."""
        return self._asleep

    def check(self, prompt_token_ids: Sequence[int], params: Params, *, generate: bool = True) -> None:
        """What `submit` checks: raises PromptError or ParamsError. A grammar can take it a while."""
        self._engine.check(prompt_token_ids, params, generate=generate)

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: Params,
        *,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        generate: bool = True,
        checked: bool = False,
    ) -> Stream:
        """Queues a request; see `Engine.add_request`. Its outputs come as a stream on the running event loop.

        checked: `check` has been called. Asleep, the engine takes requests, too, and they wait.

        Raises PromptError and ParamsError; EngineError if the id is in use or the engine no longer runs.
        """
        arrival_time = time.monotonic()
        loop = asyncio.get_running_loop()
        check_integer(ParamsError, "priority", priority, "an integer", lambda _: True)
        if not checked:
            self.check(prompt_token_ids, params, generate=generate)
        with self._taking_on():
            if request_id in self._slots:
                raise EngineError(f"There is a request {request_id!r} already; give each an id of its own.")
            outbox = self._outboxes.setdefault(loop, _Outbox(loop))
            slot = self._slots[request_id] = _Slot(request_id, params, outbox)
            add = partial(
                self._engine.add_request, request_id, prompt_token_ids, params, prompt=prompt,
                priority=priority, cache_salt=cache_salt, generate=generate, arrival_time=arrival_time,
                watched=slot.kind is not RequestOutputKind.FINAL_ONLY, checked=True,
            )  # fmt: skip
            self._inbox.put(partial(self._add, slot, add))
        return Stream(slot, self._inbox, partial(self._cancel, slot))

    def cancel(self, request_id: str) -> None:
        """Ends a request before the next step: its blocks are free then, and its last output says "abort".
        Does nothing for a request that has ended."""
        self._inbox.put(lambda: self._cancel(self._slots.get(request_id)))

    def on_broken(self, callback: Callable[[], object]) -> None:
        """Has the engine's thread call this if it breaks; it takes on nothing more then. Somebody may watch
        who is to restart it."""
        with self._lock:
            self._on_broken = callback
            broken = self._cause is not None
        if broken:
            callback()

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted, under vLLM's names."""
        return self._engine.get_metrics()

    async def reset_prefix_cache(self) -> None:
        """Forgets all computed blocks that could be used again. What runs is not disturbed."""
        await self._call(self._engine.reset_prefix_cache)

    async def sleep(self) -> None:
        """Frees weights and KV cache until `wake`. Raises EngineError while there are requests."""
        await self._call(self._sleep)

    async def wake(self) -> None:
        """Loads weights and KV cache again and goes on with the requests that wait. Raises
        InsufficientMemoryError if there is no longer room for them; the engine sleeps on then."""
        await self._call(self._wake)

    async def shutdown(self, *, drain: bool = False) -> None:
        """Takes on nothing more and ends the thread. drain: requests go on to their ends before; if not, or
        where the engine sleeps, they are cancelled."""
        self._stop(drain)
        await asyncio.to_thread(self._thread.join)
        atexit.unregister(self.close)

    def close(self) -> None:
        """Cancels all requests and ends the thread, after the step under way. It can be called twice."""
        self._stop(drain=False)
        self._thread.join()
        atexit.unregister(self.close)

    # What the callers' threads do.

    @contextlib.contextmanager
    def _taking_on(self) -> Iterator[None]:
        """Holds the lock, under which the thread sees to what is put into its inbox. Raises EngineError."""
        if not self._thread.is_alive() and self._refusal is None:
            raise EngineError("The engine's thread did not survive the fork; load the model in this process.")
        with self._lock:
            if self._refusal is not None:
                raise self._error()
            yield

    async def _call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises between two steps."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._cause is not None:
                    raise self._error()
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._taking_on():
            self._inbox.put(call)
        return await asyncio.wrap_future(future)

    def _stop(self, drain: bool) -> None:
        if not self._thread.is_alive():
            return
        with self._lock:
            if self._refusal is None:
                self._refusal = "The engine was shut down."
        self._inbox.put(partial(self._end, drain))

    def _error(self) -> EngineError:
        error = EngineError(self._refusal)
        error.__cause__ = self._cause
        return error

    # What the engine's thread does.

    def _run(self) -> None:
        try:
            while not self._stopping or self._can_step:
                for _ in range(max(self._inbox.qsize(), not self._can_step)):
                    self._inbox.get()()
                if self._can_step:
                    self._deliver(self._engine.step())
        except BaseException as error:
            self._die(error)

    @property
    def _can_step(self) -> bool:
        return self._engine.has_unfinished and not self._asleep

    def _add(self, slot: _Slot, add: Callable[[], Request]) -> None:
        if self._slots.get(slot.request_id) is slot:
            add()

    def _cancel(self, slot: _Slot | None) -> None:
        if slot is not None and self._slots.get(slot.request_id) is slot:
            request = self._engine.abort(slot.request_id)
            if request is not None:  # else it is yet to be added: another of this id was to be cancelled
                self._deliver([request])

    def _sleep(self) -> None:
        if self._asleep:
            return
        if self._engine.has_unfinished:
            raise EngineError(
                f"The engine cannot sleep while there are requests, {len(self._engine.requests)} now: let "
                "them end, or cancel them."
            )
        self._engine.reset_prefix_cache()
        self._engine.executor.sleep()
        self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._engine.executor.wake()
            self._asleep = False

    def _end(self, drain: bool) -> None:
        self._stopping = True
        if not drain or self._asleep:
            for slot in list(self._slots.values()):
                self._cancel(slot)

    def _deliver(self, requests: Iterable[Request]) -> None:
        """Hands news of the requests over to those who read them."""
        posts: dict[_Outbox, _News] = {}
        ended = []
        for request in requests:
            slot, finished = self._slots[request.request_id], request.finished
            if finished:
                ended.append(slot)
            elif slot.kind is RequestOutputKind.FINAL_ONLY:
                continue
            posts.setdefault(slot.outbox, {})[slot] = slot.output_of(request), finished
        if ended:
            with self._lock:
                for slot in ended:
                    del self._slots[slot.request_id]
        for outbox, news in posts.items():
            outbox.deliver(news)

    def _die(self, error: BaseException) -> None:
        """Tells everybody that there is nothing more to come."""
        logger.critical("The engine's thread broke; all its requests end.", exc_info=error)
        with self._lock:
            self._refusal = f"The engine broke ({type(error).__name__}: {error}); load the model anew."
            self._cause = error
            slots = list(self._slots.values())
            self._slots.clear()
            callback = self._on_broken
        posts: dict[_Outbox, _News] = {}
        for slot in slots:
            posts.setdefault(slot.outbox, {})[slot] = self._error(), True
        for outbox, news in posts.items():
            outbox.deliver(news)
        while not self._inbox.empty():
            self._inbox.get()()
        if callback is not None:
            callback()


class Stream:
    """The outputs of one request as they come, for one reader, on the event loop that submitted it.

    By the params' output_kind they hold all so far, or what is new, or there is only one at the end. A reader
    who is slower than the engine misses nothing, and no more than one output ever waits for it: the next one
    takes its place or, where they hold what is new, is joined to it.

    `anext` may be cancelled and called again. A stream that is closed or dropped before its end cancels its
    request.
    """

    def __init__(
        self, slot: _Slot, inbox: SimpleQueue[Callable[[], None]], cancel: Callable[[], None]
    ) -> None:
        self._slot = slot
        self._inbox = inbox
        self._cancel = cancel

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._slot.request_id

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Output:
        """Raises EngineError if the engine broke; and, in place of an embedding or of beams, BackendError if
        their step failed and EngineError if they were cancelled."""
        slot = self._slot
        if slot.waiter is not None:
            raise RuntimeError(
                f"Somebody else waits for request {slot.request_id!r}: a stream has one reader."
            )
        while slot.output is None:
            if slot.ended:
                raise StopAsyncIteration
            slot.waiter = slot.outbox.loop.create_future()
            try:
                await slot.waiter
            finally:
                slot.waiter = None
        output, slot.output = slot.output, None
        if isinstance(output, Exception):
            raise output
        return output

    def close(self) -> None:
        """Cancels the request, unless it has ended."""
        if not self._slot.ended:
            self._inbox.put(self._cancel)

    async def aclose(self) -> None:
        """`close`, for contextlib.aclosing."""
        self.close()

    def __del__(self) -> None:
        self.close()  # takes no lock: it may be called anywhere


class _Slot:
    """A request between the thread and its stream's reader.

    output: not yet taken. ended: no more will come after it. waiter: what the reader waits for. These three
    are the event loop's alone.
    """

    __slots__ = ("ended", "kind", "outbox", "output", "params", "request_id", "waiter")

    def __init__(self, request_id: str, params: Params, outbox: _Outbox) -> None:
        self.request_id = request_id
        self.params = params
        self.kind = params.output_kind if isinstance(params, SamplingParams) else RequestOutputKind.FINAL_ONLY
        self.outbox = outbox
        self.output: Output | Exception | None = None
        self.ended = False
        self.waiter: asyncio.Future[None] | None = None

    def output_of(self, request: Request) -> Output | Exception:
        """What the request's reader is to be told now."""
        if isinstance(self.params, SamplingParams):
            return request.output(self.kind is RequestOutputKind.DELTA)
        if request.beams is not None:
            return BeamSearchOutput(request.beams)
        if request.embedding is not None:
            embedding = EmbeddingOutput(request.embedding)
            return EmbeddingRequestOutput(self.request_id, embedding, request.prompt_token_ids)
        error = next((sequence.error for sequence in request.sequences if sequence.error), None)
        return BackendError(error) if error else EngineError(f"Request {self.request_id!r} was cancelled.")

    def after(self, first: Output | Exception | None, second: Output | Exception) -> Output | Exception:
        """The second of two outputs, with what it does not repeat of the first if that was not taken."""
        if (
            isinstance(first, RequestOutput)
            and isinstance(second, RequestOutput)
            and self.kind is RequestOutputKind.DELTA
        ):
            return _joined(first, second)
        return second


_News = dict[_Slot, tuple[Output | Exception, bool]]
"""For whom, what, and whether it is the last."""


class _Outbox:
    """What one event loop has yet to be told. However long it is busy, one call waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._news: _News = {}

    def deliver(self, news: _News) -> None:
        """Leaves outputs and sees to it that their readers get them."""
        with self._lock:
            waiting = self._news
            if waiting:
                for slot, (output, ended) in news.items():
                    before, _ = waiting.get(slot, (None, False))
                    waiting[slot] = slot.after(before, output), ended
            else:
                self._news = news
        if not waiting:
            with contextlib.suppress(RuntimeError):  # the loop is closed, at any time: nobody reads any more
                self.loop.call_soon_threadsafe(self._wake_readers)

    def _wake_readers(self) -> None:
        with self._lock:
            news, self._news = self._news, {}
        for slot, (output, ended) in news.items():
            slot.output = slot.after(slot.output, output)
            slot.ended = ended
            if slot.waiter is not None and not slot.waiter.done():
                slot.waiter.set_result(None)


def _joined(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two successive outputs of what is new as one."""
    completions = {completion.index: completion for completion in first.outputs}
    for completion in second.outputs:
        before = completions.get(completion.index)
        completions[completion.index] = (
            completion if before is None else _joined_completion(before, completion)
        )
    prompt_logprobs = first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs
    return replace(
        second, outputs=[completions[i] for i in sorted(completions)], prompt_logprobs=prompt_logprobs
    )


def _joined_completion(first: CompletionOutput, second: CompletionOutput) -> CompletionOutput:
    logprobs = None if first.logprobs is None else first.logprobs + (second.logprobs or [])
    return replace(
        second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids, logprobs=logprobs
    )
