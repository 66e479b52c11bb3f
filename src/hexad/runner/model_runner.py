"""ModelRunner: one rank's compiled graph with its KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from hexad.backends.backend import Backend, CompileOptions, Executable, Limits
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.config import BLOCK_TOKENS, EngineConfig
from hexad.engine.step import ScheduledStep, StepResult
from hexad.errors import BackendError, ConfigError
from hexad.graph import Graph
from hexad.graph.cost import KV_BYTES
from hexad.graph.fuse import fuse
from hexad.graph.ops import taken_rows
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
        self.plan = plan_memory(
            self.graph, compiler, config, int(checkpoint.config["max_position_embeddings"])
        )
        self.limits = _limits(config, self.plan.max_model_len, self.plan.kv_blocks)
        # More threads than CPUs only wait for each other; results do not depend on their number.
        threads = min(config.threads or cpu_count(), cpu_count())
        options = CompileOptions(config.compute, config.resolved_kv_dtype, threads)
        self._executable: Executable | None = compiler.compile(
            self.graph, checkpoint.weights, options, self.limits
        )

    @property
    def executable(self) -> Executable:
        """The compiled graph. Raises BackendError after `close`."""
        if self._executable is None:
            raise BackendError("The model is closed.")
        return self._executable

    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes a step and draws the tokens it asks for."""
        executable = self.executable
        if step.block_copies:
            executable.copy_blocks(step.block_copies)
        batch = make_batch(step)
        executable.forward(batch)
        if not batch.sample_rows.size:
            return StepResult([[] for _ in step.sequences])
        drawn = iter(executable.sample(make_sample_batch(step)).tolist())
        return StepResult([[] if s.sample is None else [next(drawn)] for s in step.sequences])

    def close(self) -> None:
        """Frees the weights and the KV cache."""
        self._executable = None


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
        weight_bytes=sum(packed_bytes(graph, backend).values()),
        kv_bytes_per_block=kv_block_bytes(graph, config),
        workspace_bytes=_workspace_bytes(graph, backend, limits),
        config=config,
        context_length=context_length,
        free_bytes=free_memory(),
    )


def packed_bytes(graph: Graph, backend: Backend) -> dict[str, int]:
    """Bytes in memory of each weight the graph reads, by name: a shared one is there once."""
    from hexad.backends.cpu.layouts import layout_of

    sizes = {}
    for name in {name for node in graph.nodes for name in node.weights}:
        weight = graph.weights[name]
        if backend.name == "cpu" and len(weight.shape) == 2:
            sizes[name] = layout_of(weight).nbytes(weight.shape)
        else:  # float32
            sizes[name] = 4
            for dim in weight.shape:
                sizes[name] *= dim
    return sizes


def kv_block_bytes(graph: Graph, config: EngineConfig) -> int:
    """Bytes of one KV block: keys and values of 32 tokens in all layers, heads padded to 32 features."""
    features = 0
    for node in graph.nodes:
        if node.op in ("attention", "fused_attention"):
            features += 2 * node.attrs["kv_heads"] * (-(-node.attrs["head_dim"] // 32) * 32)
    return features * BLOCK_TOKENS * KV_BYTES[config.resolved_kv_dtype]


def _limits(config: EngineConfig, max_model_len: int, kv_blocks: int) -> Limits:
    return Limits(
        max_rows=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
    )


def _workspace_bytes(graph: Graph, backend: Backend, limits: Limits) -> int:
    """The backend's own figure if it has one; else four values alive at once, each the widest there is."""
    if hasattr(backend, "workspace_bytes"):
        return int(backend.workspace_bytes(graph, limits))
    widest = [0, 0]
    for node, taken in zip(graph.nodes, taken_rows(graph), strict=True):
        widest[taken] = max(widest[taken], node.features)
    return 4 * 4 * (limits.max_rows * widest[False] + limits.max_seqs * widest[True])
