"""ModelRunner: one rank's compiled graph with its KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from hexad.backends.backend import Backend, CompileOptions, Executable, Limits
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.config import EngineConfig
from hexad.engine.step import ScheduledStep, StepResult
from hexad.errors import BackendError, ConfigError
from hexad.graph import Graph
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.placement.hardware import cpu_count, free_memory
from hexad.placement.plan import Plan, plan
from hexad.runner.batch import make_batch, make_sample_batch

BACKENDS: Mapping[str, tuple[str, str]] = {
    "cpu": ("hexad.backends.cpu", "CpuBackend"),
    "reference": ("hexad.backends.reference", "ReferenceBackend"),
}
"""Module and class of each backend; a module is imported when its backend is asked for."""


class ModelRunner:
    """Turns scheduled steps into tokens. Its memory is planned, and refused, before any weight is packed.

    Raises ConfigError, CheckpointError, InsufficientMemoryError.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, backend: str = "cpu") -> None:
        compiler = make_backend(backend)
        graph = build_graph(checkpoint.config, checkpoint.weights, checkpoint.path)
        # The reference stays the model as it was written down: what fuse does is checked against it.
        self.graph = graph if backend == "reference" else fuse(graph)
        context = int(checkpoint.config["max_position_embeddings"])
        self.plan = plan_memory(self.graph, compiler, config, context)
        self.limits = _limits(config, self.plan.max_model_len, self.plan.kv_blocks)
        self._executable: Executable | None = compiler.compile(
            self.graph, checkpoint.weights, _options(config), self.limits
        )

    @property
    def executable(self) -> Executable:
        """The compiled graph. Raises BackendError after `close`."""
        if self._executable is None:
            raise BackendError("The model is closed.")
        return self._executable

    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes a step and draws the tokens it asks for. Raises BackendError if the numbers break."""
        executable = self.executable
        if step.block_copies:
            executable.copy_blocks(step.block_copies)
        batch = make_batch(step)
        executable.forward(batch)
        if not batch.sample_rows.size:
            return StepResult([[] for _ in step.sequences])
        tokens = executable.sample(make_sample_batch(step)).tolist()
        if -1 in tokens:
            raise BackendError(
                "The model's logits are not finite: its file is damaged, or its numbers outgrow float32. "
                "Fetch the file again (`hexad pull` checks the ones it knows)."
            )
        drawn = iter(tokens)
        return StepResult([[] if s.sample is None else [next(drawn)] for s in step.sequences])

    def close(self) -> None:
        """Frees the weights and the KV cache, and lets go of the checkpoint's arrays."""
        self._executable = None
        self.graph.weights = {}


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
    return CompileOptions(config.compute, config.resolved_kv_dtype, threads)


def _limits(config: EngineConfig, max_model_len: int, kv_blocks: int) -> Limits:
    return Limits(
        max_rows=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
    )
