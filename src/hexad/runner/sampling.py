"""Sampler: what is kept of every sequence between its draws, and the SampleBatch that a step makes of it.

Every sequence has a row in one table. For most that is all, and a step takes their rows with one index. Those
whose draws depend on more (tokens before, a bias, a mask), or that report more, have a SequenceState too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hexad.backends.sampling import ROW_DTYPE, SAMPLER_IDS, SampleBatch, SampleOutput
from hexad.engine.step import ScheduledStep, SequenceSpec, TokenLogprobs
from hexad.params import PoolingParams, SamplingParams
from hexad.runner.batch import NO_REPORTS
from hexad.runner.sequence_state import Mask, SequenceState, Vocabulary

if TYPE_CHECKING:
    from hexad.runner.grammar import Grammar

_AS_PARAMS = tuple(
    name
    for name in ROW_DTYPE.names or ()
    if name in {field.name for field in fields(SamplingParams)} - {"seed"}
)
"""Fields of a row that are those of SamplingParams."""

_NO_TOKENS = np.empty(0, np.int32)
_NO_VALUES = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Whose the sample rows of a step are; both lists have one entry per row.

    sequence_ids: for whom a token is drawn, or of whom something is reported. positions: that of the token
    drawn, or that of the row itself, which is reported on. reported: numbers of the rows of the second kind,
    ascending.
    """

    sequence_ids: list[int]
    positions: list[int]
    reported: list[int]


class Sampler:
    """The sequences by id, and what each step asks and learns of them.

    states: of those that are not plain. asking: those that want logprobs of the tokens they draw.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.states: dict[int, SequenceState] = {}
        self.asking: set[int] = set()
        self._reporting: set[int] = set()
        self._row_of: dict[int, int] = {}
        self._table = np.zeros(64, ROW_DTYPE)
        self._free = list(range(len(self._table)))
        self._plain_ids: list[int] | None = None
        self._plain: SampleBatch
        self._no_masks = np.empty((0, vocabulary.num_words), np.uint32)

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self._row_of)

    def add(self, spec: SequenceSpec, grammar: Grammar | None = None) -> None:
        """Takes a sequence in. grammar: its own, at the beginning, if its text has to match one."""
        sequence_id = spec.sequence_id
        assert sequence_id not in self._row_of, f"sequence {sequence_id} is known already"
        state = SequenceState(spec, self.vocabulary, grammar)
        if not self._free:
            self._free = list(range(len(self._table), 2 * len(self._table)))
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        row = self._row_of[sequence_id] = self._free.pop()
        self._table[row] = _make_row(spec, self.vocabulary)
        self._plain_ids = None
        if self._table["num_logprobs"][row] >= 0:
            self.asking.add(sequence_id)
        if not state.is_plain:
            self.states[sequence_id] = state
        if state.reports:
            self._reporting.add(sequence_id)

    def drop(self, sequence_id: int) -> None:
        """Forgets a sequence; nothing happens if there is no such."""
        row = self._row_of.pop(sequence_id, None)
        if row is not None:
            self._free.append(row)
            self.states.pop(sequence_id, None)
            self.asking.discard(sequence_id)
            self._reporting.discard(sequence_id)

    def reports(self, step: ScheduledStep) -> Mapping[int, range]:
        """The positions on which a step has something to report, by the sequence's place in it. Each is
        reported on once, though a preempted sequence computes it again."""
        if self._reporting.isdisjoint(step.sequence_ids):
            return NO_REPORTS
        reports = {}
        for place, sequence_id in enumerate(step.sequence_ids):
            if sequence_id in self._reporting:
                start, due = step.starts[place], self.states[sequence_id].reports
                positions = range(max(start, due.start), min(start + step.counts[place], due.stop))
                if positions:
                    reports[place] = positions
        return reports

    def rows(self, step: ScheduledStep, reports: Mapping[int, range] = NO_REPORTS) -> SampleRows:
        """Whose the sample rows of `make_batch(step, reports)` are."""
        if not reports:
            ends = map(add, step.starts, step.counts)
            return SampleRows(
                [sequence_id for draws in step.draws for sequence_id in draws],
                [end for end, draws in zip(ends, step.draws, strict=True) for _ in draws],
                [],
            )
        rows = SampleRows([], [], [])
        for place, draws in enumerate(step.draws):
            positions = reports.get(place, ())
            rows.reported.extend(range(len(rows.positions), len(rows.positions) + len(positions)))
            rows.positions.extend(positions)
            rows.sequence_ids.extend([step.sequence_ids[place]] * len(positions))
            rows.positions.extend([step.starts[place] + step.counts[place]] * len(draws))
            rows.sequence_ids.extend(draws)
        return rows

    def grammars(self, rows: SampleRows) -> dict[int, Grammar]:
        """The grammars of the sequences that draw, by sequence id."""
        if not self.states:
            return {}
        reported = set(rows.reported)
        drawing = (i for row, i in enumerate(rows.sequence_ids) if row not in reported and i in self.states)
        return {i: grammar for i in drawing if (grammar := self.states[i].grammar) is not None}

    def make(
        self, rows: SampleRows, grammars: Iterable[int] = (), grammar_masks: Mask | None = None
    ) -> SampleBatch:
        """What is wanted of the sample rows; good until the next call.

        grammars: ids of the sequences of `grammars(rows)`. grammar_masks: what each of these allows, uint32
        [n, ⌈vocab / 32⌉]; it becomes part of the batch.
        """
        if not self.states:
            return self._plain_batch(rows)
        table = self._rows_of(rows)
        table["position"] = rows.positions
        history, asks, bias_ids, bias_values = (_Ragged() for _ in range(4))
        masks = _Masks(self.vocabulary.num_words, grammar_masks)
        grammar_row = {sequence_id: row for row, sequence_id in enumerate(grammars)}
        if rows.reported:
            table["draw"][rows.reported] = 0
            table["num_logprobs"][rows.reported] = -1
        reported = set(rows.reported)
        for i, sequence_id in enumerate(rows.sequence_ids):
            state = self.states.get(sequence_id)
            if state is None:
                continue
            position = rows.positions[i]
            if i in reported:
                if isinstance(state.spec.params, SamplingParams):
                    table["num_logprobs"][i] = state.num_prompt_logprobs
                    asks.add(i, state.prompt_asks_at(position))
                continue
            if state.history is not None:
                assert len(state.history.tokens) == position
                history.add(i, state.history.tokens)
            bias = state.bias_at(position)
            bias_ids.add(i, bias.ids)
            bias_values.add(i, bias.values)
            asks.add(i, state.asks)
            table["mask"][i] = masks.add(state.mask(), grammar_row.get(sequence_id))
            table["dry_breakers"][i] = masks.add(state.breakers)
        return SampleBatch(
            rows=table,
            history=history.values(np.int32),
            history_starts=history.starts(len(table)),
            bias_ids=bias_ids.values(np.int32),
            bias_values=bias_values.values(np.float32),
            bias_starts=bias_ids.starts(len(table)),
            ask_ids=asks.values(np.int32),
            ask_starts=asks.starts(len(table)),
            masks=masks.array(),
        )

    def _plain_batch(self, rows: SampleRows) -> SampleBatch:
        """For rows that say it all: as in the step before, but for the positions, if the same sequences
        draw."""
        if rows.sequence_ids != self._plain_ids:
            table, tokens = self._rows_of(rows), _NO_TOKENS
            starts = np.zeros(len(table) + 1, np.int64)
            self._plain = SampleBatch(
                table, tokens, starts, tokens, _NO_VALUES, starts, tokens, starts, self._no_masks
            )
            self._plain_ids = rows.sequence_ids
        self._plain.rows["position"] = rows.positions
        return self._plain

    def _rows_of(self, rows: SampleRows) -> NDArray[np.void]:
        return self._table[[self._row_of[sequence_id] for sequence_id in rows.sequence_ids]]

    def accept(self, rows: SampleRows, tokens: list[int], mirostat_mu: NDArray[np.float32]) -> None:
        """Takes note of what the rows came to: that they have been reported on, and the tokens drawn.

        tokens: −1 where there is none. mirostat_mu: float32 [n], for the next draws.
        """
        if not self.states:
            return
        reported = set(rows.reported)
        for i, sequence_id in enumerate(rows.sequence_ids):
            state = self.states.get(sequence_id)
            if state is None:
                continue
            if i in reported:
                state.reports = range(rows.positions[i] + 1, state.reports.stop)
            elif tokens[i] >= 0:
                state.accept(tokens[i])
                if state.mirostat:
                    self._table["mirostat_mu"][self._row_of[sequence_id]] = mirostat_mu[i]
            if not state.reports:
                self._reporting.discard(sequence_id)


class _Masks:
    """The masks of a batch; rows that are given the same one share it. grammars: its first ones."""

    def __init__(self, num_words: int, grammars: Mask | None) -> None:
        self._grammars = np.empty((0, num_words), np.uint32) if grammars is None else grammars
        self._others: list[Mask] = []
        self._number_of: dict[int, int] = {}

    def add(self, mask: Mask | None, grammar: int | None = None) -> int:
        """The number of a mask, or of the grammar's after it allows no more than `mask`; −1: all tokens."""
        if grammar is not None:
            if mask is not None:
                self._grammars[grammar] &= mask
            return grammar
        if mask is None:
            return -1
        if id(mask) not in self._number_of:
            self._number_of[id(mask)] = len(self._grammars) + len(self._others)
            self._others.append(mask)  # alive, so that no other gets its id
        return self._number_of[id(mask)]

    def array(self) -> Mask:
        return np.concatenate([self._grammars, np.stack(self._others)]) if self._others else self._grammars


class _Ragged:
    """Arrays of some of a batch's rows, in ascending order, to become one."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._arrays: list[NDArray[np.generic]] = []

    def add(self, row: int, array: NDArray[np.generic]) -> None:
        if array.size:
            self._rows.append(row)
            self._arrays.append(array)

    def values(self, dtype: type[np.generic]) -> NDArray[Any]:
        return np.concatenate(self._arrays) if self._arrays else np.empty(0, dtype)

    def starts(self, num_rows: int) -> NDArray[np.int64]:
        starts = np.zeros(num_rows + 1, np.int64)
        if self._rows:
            starts[np.array(self._rows) + 1] = [len(array) for array in self._arrays]
            np.cumsum(starts, out=starts)
        return starts


def token_logprobs(wanted: SampleBatch, output: SampleOutput) -> Iterator[tuple[int, TokenLogprobs]]:
    """What each row was to report, with the row's number: the token drawn, if one was, those asked for, and
    the likeliest. Rows that report nothing are passed over."""
    count_of, is_drawn = wanted.rows["num_logprobs"].tolist(), wanted.rows["draw"].tolist()
    tokens, logprobs, ranks = output.tokens.tolist(), output.logprobs.tolist(), output.ranks.tolist()
    asks, starts = wanted.ask_ids.tolist(), wanted.ask_starts.tolist()
    ask_logprobs, ask_ranks = output.ask_logprobs.tolist(), output.ask_ranks.tolist()
    top_ranks = _ranks(output.top_logprobs)
    for row, count in enumerate(count_of):
        if count < 0:
            continue
        drawn, asked = slice(row, row + is_drawn[row]), slice(starts[row], starts[row + 1])
        yield (
            row,
            TokenLogprobs(
                tokens[drawn] + asks[asked] + output.top_ids[row, :count].tolist(),
                logprobs[drawn] + ask_logprobs[asked] + output.top_logprobs[row, :count].tolist(),
                ranks[drawn] + ask_ranks[asked] + top_ranks[row, :count].tolist(),
            ),
        )


def _ranks(falling: NDArray[np.float32]) -> NDArray[np.int32]:
    """1 + the number of larger values in the same row, whose values fall: the place of the first equal."""
    places = np.broadcast_to(np.arange(1, falling.shape[1] + 1, dtype=np.int32), falling.shape).copy()
    places[:, 1:][falling[:, 1:] == falling[:, :-1]] = 1
    return np.maximum.accumulate(places, axis=1)


def _make_row(spec: SequenceSpec, vocabulary: Vocabulary) -> NDArray[np.void]:
    """The row of a sequence, ROW_DTYPE []; what changes from draw to draw is filled in when it is drawn."""
    row = np.zeros((), ROW_DTYPE)
    row["mask"] = row["dry_breakers"] = row["num_logprobs"] = -1
    params = spec.params
    if isinstance(params, PoolingParams):
        return row
    for name in _AS_PARAMS:
        row[name] = getattr(params, name)
    row["seed"] = spec.seed
    row["sequence"] = spec.index
    row["num_prompt"] = len(spec.prompt_token_ids)
    row["dry_last_n"] = params.dry_penalty_last_n
    row["mirostat_mu"] = 2 * params.mirostat_tau  # where the authors begin
    row["draw"] = 1
    row["order"][: len(params.samplers)] = [SAMPLER_IDS[name] for name in params.samplers]
    if params.logprobs is not None:
        row["num_logprobs"] = vocabulary.count(params.logprobs)
    elif params.logprob_token_ids:
        row["num_logprobs"] = 0
    return row
