"""The contract between a compiled model and whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hexad.backends.sampling import SampleBatch, SampleOutput
from hexad.config import CacheDtype
from hexad.graph import Graph
from hexad.weights import Weight


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes an executable plans its buffers for.

    max_rows: most tokens in one step. max_seqs: most sequences in one step. max_model_len: longest sequence.
    kv_blocks: number of KV cache blocks of 32 tokens.
    """

    max_rows: int
    max_seqs: int
    max_model_len: int
    kv_blocks: int


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How numbers are computed and stored; see EngineConfig. threads: None takes what the machine allows.
    prefault: take all memory at once, instead of as it is used."""

    compute: Literal["int8", "float"] = "int8"
    kv_dtype: CacheDtype = "f16"
    threads: int | None = None
    prefault: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """The ragged arrays of one step, all int32 and C-contiguous, and what may be left out of it.

    tokens [rows]: the tokens to compute, sequence after sequence. row_starts [seqs + 1]: sequence s has rows
    row_starts[s] … row_starts[s+1] − 1. starts [seqs]: position of each sequence's first row; its earlier
    positions are in the KV cache. block_tables [seqs, width]: KV block numbers of each sequence, padded with
    −1. sample_rows [n]: rows of which something is wanted (tokens, logprobs, hidden states); ascending, and a
    row from which several tokens are drawn stands there several times. At most max_rows.

    optional_rows: the last rows, of whole sequences and none of them a sample row, that may be given up if
    the step is late. expected_seconds: how long it should take.
    """

    tokens: NDArray[np.int32]
    row_starts: NDArray[np.int32]
    starts: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    sample_rows: NDArray[np.int32]
    optional_rows: int = 0
    expected_seconds: float = 0.0


class OpTime(NamedTuple):
    """What one op took, summed over its runs. barriers: that each thread met. waited: of the seconds, what a
    thread spent there on average, which is what the op's parts differ in and what waking threads takes."""

    runs: int = 0
    barriers: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def plus(self, other: OpTime, sign: int = 1) -> OpTime:
        """The sum; with sign −1 the difference."""
        return OpTime(
            self.runs + sign * other.runs,
            self.barriers + sign * other.barriers,
            self.seconds + sign * other.seconds,
            self.waited + sign * other.waited,
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of an executable's calls went. nodes: of each node of the graph, in order. others: by
    name, what no node stands for. calls: whole calls, whose parts these are; `waited` is not known there."""

    nodes: Sequence[OpTime]
    others: Mapping[str, OpTime]
    calls: OpTime


class Executable(Protocol):
    """A compiled graph with its KV cache. Not re-entrant: one call at a time."""

    def forward(self, batch: Batch) -> bool:
        """Computes all rows, writes their KV, and keeps what the wanted logits need. Returns whether it did
        so: optional rows may be given up."""

    def sample(self, wanted: SampleBatch, output: SampleOutput | None = None) -> SampleOutput:
        """Draws and reports for the sample rows of the last forward, in tiles of rows, so that no more than a
        few rows of logits exist at a time.

        output: of an earlier call for as many rows and reports, which may be overwritten and returned."""

    def hidden(self) -> NDArray[np.float32]:
        """The last forward's sample rows after the last norm, float32 [n, hidden size]: what logits are made
        of."""

    def logits(self) -> NDArray[np.float32]:
        """The logits of the last forward's sample rows, float32 [n, vocab]; for tests and tools."""

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV blocks, (source, destination) in order."""

    def profile(self) -> Profile:
        """The times since the first call of this, which begins to take them; without it nothing is timed."""


class Backend(Protocol):
    """Turns a graph into an executable, and says beforehand what that takes."""

    name: str

    def weight_bytes(self, weight: Weight) -> int:
        """Bytes of a weight in memory."""

    def kv_block_bytes(self, graph: Graph, kv_dtype: CacheDtype) -> int:
        """Bytes of one KV block: keys and values of 32 tokens in all layers."""

    def workspace_bytes(self, graph: Graph, options: CompileOptions, limits: Limits) -> int:
        """Bytes an executable takes beside weights and KV cache; what kv_blocks says does not matter."""

    def compile(
        self,
        graph: Graph,
        weights: Mapping[str, Weight],
        options: CompileOptions,
        limits: Limits,
        packing: Callable[[], None] = lambda: None,
    ) -> Executable:
        """Plans the buffers and packs the weights. packing: called when only that is left to do, in which
        other threads can run. Raises BackendError for what it cannot run, CheckpointError for weights that
        cannot be read."""
