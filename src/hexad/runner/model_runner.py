"""ModelRunner: one rank's compiled graph with its KV cache, and what it keeps of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from itertools import islice
from math import isnan
from typing import TYPE_CHECKING, cast

import numpy as np

from hexad.backends.backend import Backend, Batch, CompileOptions, Executable, Limits
from hexad.backends.sampling import SampleBatch, SampleOutput
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.config import EngineConfig
from hexad.engine.step import ScheduledStep, StepCost, StepResult, TokenLogprobs
from hexad.errors import BackendError, ConfigError, InsufficientMemoryError
from hexad.graph import Graph
from hexad.graph.cost import step_numbers
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.params import PoolingParams, SamplingParams
from hexad.placement.hardware import cpu_count, free_memory
from hexad.placement.plan import Plan, plan
from hexad.runner.batch import make_batch
from hexad.runner.grammar import Grammar, GrammarCompiler, MaskPool
from hexad.runner.sampling import Sampler, SampleRows, token_logprobs
from hexad.runner.sequence_state import Vocabulary

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer

BACKENDS: Mapping[str, tuple[str, str]] = {
    "cpu": ("hexad.backends.cpu", "CpuBackend"),
    "reference": ("hexad.backends.reference", "ReferenceBackend"),
}
"""Module and class of each backend; a module is imported when its backend is asked for."""


NOT_FINITE = (
    "The model's numbers are not finite: its file is damaged, or they outgrew float32. "
    "Fetch the file again (`hexad pull` checks the ones it knows)."
)

_NOT_REPORTED = TokenLogprobs([], [], [])


class ModelRunner:
    """Turns scheduled steps into tokens. Its memory is planned, and refused, before any weight is packed.

    tokenizer: asked for when a request needs it; the checkpoint's own by default. packing: called when only
    packing the weights is left, in which other threads can run.

    Raises ConfigError, CheckpointError, InsufficientMemoryError.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        backend: str = "cpu",
        *,
        tokenizer: Callable[[], Tokenizer] | None = None,
        packing: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.backend = make_backend(backend)
        graph = build_graph(checkpoint.config, checkpoint.weights, checkpoint.path)
        # The reference stays the model as it was written down: what fuse does is checked against it.
        self.graph = graph if backend == "reference" else fuse(graph)
        context = int(checkpoint.config["max_position_embeddings"])
        self.plan = plan_memory(self.graph, self.backend, config, context)
        self.limits = _limits(config, self.plan.max_model_len, self.plan.kv_blocks)
        tokenizer = tokenizer or checkpoint.tokenizer
        self.vocabulary = Vocabulary(self.graph.vocab_size, tokenizer)
        self._compiler = GrammarCompiler(tokenizer, self.graph.vocab_size)
        self._masks = MaskPool()
        self._sampler = Sampler(self.vocabulary)
        self._wanted: SampleBatch | None = None
        self._output: SampleOutput | None = None
        self._closed = False
        self._executable: Executable | None = self._compile(packing)

    @property
    def executable(self) -> Executable:
        """The compiled graph. Raises BackendError while it sleeps and after `close`."""
        if self._executable is None:
            raise BackendError(
                "The model is closed." if self._closed else "The model is asleep; wake it first."
            )
        return self._executable

    @cached_property
    def step_cost(self) -> StepCost:
        """What this model's steps cost."""
        packed, kv_dtype = weight_bytes(self.graph, self.backend), self.config.resolved_kv_dtype
        return StepCost(*step_numbers(self.graph, self.graph.weights, kv_dtype=kv_dtype, weight_bytes=packed))

    def check(self, params: SamplingParams | PoolingParams) -> None:
        """Raises ParamsError for a grammar that does not compile. May be called from any thread: what takes
        long is done here, and the sequence's first step finds it done, unless so many other grammars came
        between that it is compiled again."""
        if isinstance(params, SamplingParams):
            self._grammar(params)
            self.vocabulary.prepare(params)

    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes a step and draws the tokens it asks for. A sequence whose numbers break, or that is left
        nothing to draw, gets an error of its own."""
        executable, sampler = self.executable, self._sampler
        for sequence_id in step.finished:
            sampler.drop(sequence_id)
        for spec in step.new:
            sampler.add(spec, self._grammar(spec.params))
        if step.block_copies:
            executable.copy_blocks(step.block_copies)
        if not step.sequence_ids:
            return StepResult([])
        reports = sampler.reports(step)
        batch, rows = make_batch(step, reports), sampler.rows(step, reports)
        assert len(batch.sample_rows) == len(rows.positions) <= self.limits.max_rows
        if not rows.positions:
            complete = executable.forward(batch)
            return StepResult([[] for _ in step.draws], given_up=not complete)
        wanted, complete = self._forward(executable, batch, rows)
        pooled = self._pooled(rows)
        if len(pooled) == len(rows.positions):
            result = StepResult([[] for _ in step.draws])
            sampler.accept(rows, [-1] * len(pooled), np.empty(0, np.float32))
        else:
            # The same object is the same sequences once more, whose output has the same form.
            output = executable.sample(wanted, self._output if wanted is self._wanted else None)
            self._wanted, self._output = wanted, output
            tokens = output.tokens.tolist()
            sampler.accept(rows, tokens, output.mirostat_mu)
            result = self._drawn(step, rows, tokens)
            if reports or sampler.asking:
                self._report(step, reports, rows, wanted, output, result)
        if pooled:
            self._pool(executable, rows, pooled, result)
        result.given_up = not complete
        return result

    def sleep(self) -> None:
        """Frees weights and KV cache; what was computed is lost. No sequence may be alive."""
        self._executable = None
        self._sampler = Sampler(self.vocabulary)

    def wake(self) -> None:
        """Packs the weights again, into memory planned as before. Raises InsufficientMemoryError."""
        if self._closed:
            raise BackendError("The model is closed.")
        if self._executable is None:
            free = free_memory()
            if free < self.plan.total:
                raise InsufficientMemoryError(
                    f"The model cannot wake: it takes {self.plan.total / 2**30:.2f} GiB of memory, and "
                    f"{free / 2**30:.2f} GiB are free. Free memory, and wake it again."
                )
            self._executable = self._compile()

    def close(self) -> None:
        """Frees the weights and the KV cache, and lets go of the checkpoint's arrays."""
        self._closed = True
        self._executable = None
        self._masks.close()
        self.graph.weights = {}

    def _compile(self, packing: Callable[[], None] = lambda: None) -> Executable:
        options = _options(self.config)
        return self.backend.compile(self.graph, self.graph.weights, options, self.limits, packing)

    def _grammar(self, params: SamplingParams | PoolingParams) -> Grammar | None:
        if isinstance(params, PoolingParams) or params.structured_outputs is None:
            return None
        return self._compiler.compile(params.structured_outputs)

    def _forward(self, executable: Executable, batch: Batch, rows: SampleRows) -> tuple[SampleBatch, bool]:
        """Computes, while another thread fills the grammars' masks. Returns what is wanted of the rows, and
        whether all were computed."""
        grammars = self._sampler.grammars(rows)
        if not grammars:
            complete = executable.forward(batch)
            return self._sampler.make(rows), complete
        masks = np.empty((len(grammars), self.vocabulary.num_words), np.uint32)
        self._masks.start(list(grammars.values()), masks)
        try:
            complete = executable.forward(batch)
        finally:
            self._masks.wait()
        return self._sampler.make(rows, grammars, masks), complete

    def _drawn(self, step: ScheduledStep, rows: SampleRows, tokens: list[int]) -> StepResult:
        """The tokens of a step, and why some could not be drawn."""
        drawn, ids, positions = tokens, rows.sequence_ids, rows.positions
        if rows.reported:
            reported = set(rows.reported)
            drawing = [row for row in range(len(tokens)) if row not in reported]
            drawn, ids, positions = ([given[row] for row in drawing] for given in (tokens, ids, positions))
        if ids == step.sequence_ids:  # nearly always, each draws one for itself
            result = StepResult([[token_id] for token_id in drawn])
        else:
            rest = iter(drawn)
            result = StepResult([list(islice(rest, len(draws))) for draws in step.draws])
        if -1 in drawn:
            for sequence_id, position, token_id in zip(ids, positions, drawn, strict=True):
                if token_id < 0:
                    state = self._sampler.states.get(sequence_id)
                    result.errors[sequence_id] = (state and state.why_none(position)) or NOT_FINITE
        return result

    def _report(
        self,
        step: ScheduledStep,
        reports: Mapping[int, range],
        rows: SampleRows,
        wanted: SampleBatch,
        output: SampleOutput,
        result: StepResult,
    ) -> None:
        """Adds the logprobs that sequences asked for."""
        reported = set(rows.reported)
        for place, positions in reports.items():
            sequence_id = step.sequence_ids[place]
            if isinstance(self._sampler.states[sequence_id].spec.params, SamplingParams):
                # One entry per position, also for those that were reported on before or are not asked for.
                missing = positions.start - step.starts[place]
                result.prompt_logprobs[sequence_id] = [_NOT_REPORTED] * missing
        for row, entry in token_logprobs(wanted, output):
            sequence_id = rows.sequence_ids[row]
            if row in reported:
                result.prompt_logprobs[sequence_id].append(entry)
                if isnan(entry.logprobs[0]):
                    result.errors[sequence_id] = NOT_FINITE
            else:
                result.logprobs[sequence_id] = entry

    def _pooled(self, rows: SampleRows) -> list[int]:
        """The rows to be pooled."""
        states = self._sampler.states
        return [
            row for row in rows.reported
            if isinstance(states[rows.sequence_ids[row]].spec.params, PoolingParams)
        ]  # fmt: skip

    def _pool(self, executable: Executable, rows: SampleRows, pooled: list[int], result: StepResult) -> None:
        hidden = executable.hidden()
        for row in pooled:
            sequence_id = rows.sequence_ids[row]
            state = self._sampler.states[sequence_id]
            state.pool(hidden[row])
            if rows.positions[row] + 1 == len(state.spec.prompt_token_ids):
                embedding = state.embedding()
                if np.isfinite(embedding).all():
                    result.embeddings[sequence_id] = embedding.tolist()
                else:
                    result.errors[sequence_id] = NOT_FINITE


def make_backend(name: str) -> Backend:
    """The backend of that name. Raises ConfigError for an unknown one."""
    if name not in BACKENDS:
        raise ConfigError(f"There is no backend {name!r}; there are {' and '.join(map(repr, BACKENDS))}.")
    module, attribute = BACKENDS[name]
    return cast(Backend, getattr(import_module(module), attribute)())


def plan_memory(graph: Graph, backend: Backend, config: EngineConfig, context_length: int) -> Plan:
    """What the model will take on this machine; see `placement.plan`. Loads nothing.

    graph: as the backend gets it. context_length: the model's own, in tokens.
    """
    limits = _limits(config, config.max_model_len or context_length, kv_blocks=0)
    return plan(
        weight_bytes=sum(weight_bytes(graph, backend).values()),
        kv_bytes_per_block=backend.kv_block_bytes(graph, config.resolved_kv_dtype),
        workspace_bytes=backend.workspace_bytes(graph, _options(config), limits),
        config=config,
        context_length=context_length,
        free_bytes=free_memory(),
    )


def weight_bytes(graph: Graph, backend: Backend) -> dict[str, int]:
    """Bytes in memory of each weight the graph reads, by name: a shared one is there once."""
    names = {name for node in graph.nodes for name in node.weights}
    return {name: backend.weight_bytes(graph.weights[name]) for name in names}


def _options(config: EngineConfig) -> CompileOptions:
    # More threads than CPUs only wait for each other; results do not depend on their number.
    threads = min(config.threads or cpu_count(), cpu_count())
    return CompileOptions(config.compute, config.resolved_kv_dtype, threads, config.prefault)


def _limits(config: EngineConfig, max_model_len: int, kv_blocks: int) -> Limits:
    return Limits(
        max_rows=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
    )
