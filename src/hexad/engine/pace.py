"""Pace: how many prompt tokens fit into a step before the streams beside them stutter."""

from __future__ import annotations

from math import inf, sqrt

from hexad.engine.step import StepCost

LONGEST_STEP = 2.0
"""Seconds that no step shall pass."""

STRETCH = 2.2
"""How much longer than the streams' own step one with prompts may take, unless max_step_ms says otherwise. If
more prompts wait than streams run, what is added grows by as much: the few are not to hold up the many."""

LEAST_TOKENS = 4
"""Prompt tokens that a step takes in any case, so that prompts get on however busy the streams are."""

# What a slow machine does in a second. The first measured steps correct them; until then, steps are rather
# too short than too long.
BYTES = 10e9
MACS = 100e9
ATTENTION_MACS = 25e9

LEARNING = 0.1
"""Weight of the newest measurement."""

SURPRISE = 1.5
"""How far from what was expected a measurement counts: what is beyond is others' doing."""

GROWTH = 512
"""Tokens that streams may grow by while prompts come before it counts: until then a step is measured by what
the streams took as the prompts came, or a long prompt would slow them down more and more."""


class Pace:
    """Predicts a step's time from what it holds, and corrects itself by the times measured.

    Streams and prompts have a factor each: the former's time goes into reading weights and KV, the latter's
    into arithmetic, and machines differ in both. Prompts have another one beside streams, where they come in
    small pieces, which take longer by the token.
    """

    def __init__(self, cost: StepCost, max_step_ms: float | None = None) -> None:
        self._step = cost.step_bytes / BYTES
        self._stream = (cost.token_macs + cost.draw_macs) / MACS
        self._position = cost.position_bytes / BYTES
        self._token = cost.token_macs / MACS
        self._pair = cost.pair_macs / ATTENTION_MACS
        self._max_seconds = None if max_step_ms is None else max_step_ms / 1000
        self._stream_factor = 1.0
        self._prompt_factors = [1.0, 1.0]  # alone; beside streams
        self._stream_steps = 0
        self._prompt_steps = [0, 0]
        self._beside = False
        self._look_back = inf  # a stream's mean positions, as the prompts beside them came
        self._streams = self._prompts = 0.0  # what the step under way was predicted to take, without factors

    def begin(self, streams: int, positions: int, *, prompts: int, watched: bool) -> float:
        """Begins a step of so many streams, which look back on so many positions in all. Returns the seconds
        that prompts may add to it.

        prompts: that are not computed yet. watched: somebody sees the streams' tokens come, and would see
        them stutter.
        """
        self._prompts = self._streams = 0.0
        self._beside = streams > 0
        wanted = LONGEST_STEP
        if streams:
            self._streams = self._step + streams * self._stream + positions * self._position
            mean = positions / streams
            self._look_back = min(mean, max(self._look_back, mean - GROWTH)) if prompts else mean
        seconds = self._streams * self._stream_factor
        if streams and watched:
            stretch = 1 + (STRETCH - 1) * max(1.0, prompts / streams)
            grown = positions - streams * self._look_back
            before = seconds - grown * self._position * self._stream_factor
            wanted = stretch * before if self._max_seconds is None else self._max_seconds
        return max(0.0, min(wanted, LONGEST_STEP) - seconds)

    def tokens_within(self, seconds: float, start: int) -> int:
        """Most tokens of a prompt, from position `start` on, that take no longer than `seconds`."""
        # pair/2 · n² + (token + pair · start) · n + position · start = seconds
        seconds = max(0.0, seconds / self._prompt_factors[self._beside] - self._position * start)
        linear = self._token + self._pair * start
        return int(2 * seconds / (linear + sqrt(linear * linear + 2 * self._pair * seconds)))

    def add_prompt(self, tokens: int, start: int) -> float:
        """Adds a prompt's tokens to the step; returns the seconds they are predicted to take."""
        seconds = tokens * self._token + self._pair * tokens * (start + tokens / 2) + self._position * start
        self._prompts += seconds
        return seconds * self._prompt_factors[self._beside]

    @property
    def expected(self) -> float:
        """Seconds that the step is predicted to take."""
        return self._streams * self._stream_factor + self._prompts * self._prompt_factors[self._beside]

    def end(self, seconds: float) -> None:
        """Ends the step with the time it took."""
        if self._prompts:
            own = max(seconds - self._streams * self._stream_factor, 0.05 * seconds)
            i = self._beside
            self._prompt_factors[i] = _corrected(
                self._prompt_factors[i], own / self._prompts, self._prompt_steps[i]
            )
            self._prompt_steps[i] += 1
        elif self._streams:
            self._stream_factor = _corrected(self._stream_factor, seconds / self._streams, self._stream_steps)
            self._stream_steps += 1


def _corrected(factor: float, measured: float, steps: int) -> float:
    """A moving average that forgets its first guess at once, and later hardly minds single steps."""
    weight = 1 / (steps + 1)
    if weight < LEARNING:
        weight, measured = LEARNING, min(max(measured, factor / SURPRISE), factor * SURPRISE)
    return factor + weight * (min(max(measured, 1e-3), 1e3) - factor)
