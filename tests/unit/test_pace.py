"""Pace: what it predicts, how it corrects itself, and how much of a prompt it lets into a step."""

from __future__ import annotations

import pytest

from hexad.engine.pace import (
    ATTENTION_MACS,
    BYTES,
    GROWTH,
    LEARNING,
    LONGEST_STEP,
    MACS,
    STRETCH,
    SURPRISE,
    Pace,
)
from hexad.engine.step import StepCost

COST = StepCost(
    step_bytes=100_000_000,
    token_macs=100_000_000,
    draw_macs=30_000_000,
    pair_macs=20_000,
    position_bytes=20_000,
)


def streams_alone(streams: int, positions: int) -> float:
    """Predicted seconds of a step of streams, from the work that StepCost says it is."""
    moved = COST.step_bytes + positions * COST.position_bytes
    return moved / BYTES + streams * (COST.token_macs + COST.draw_macs) / MACS


def prompt_alone(tokens: int, start: int) -> float:
    """The same of a prompt's tokens: each looks at all before it, and half of itself; what lies before all of
    them is read once."""
    pairs = sum(start + i + 0.5 for i in range(tokens))
    read = start * COST.position_bytes / BYTES
    return tokens * COST.token_macs / MACS + pairs * COST.pair_macs / ATTENTION_MACS + read


def test_prompts_get_what_the_streams_can_bear() -> None:
    pace, own = Pace(COST), streams_alone(4, 1000)
    assert pace.begin(4, 1000, prompts=1, watched=True) == pytest.approx((STRETCH - 1) * own)
    assert pace.begin(4, 1000, prompts=4, watched=True) == pytest.approx((STRETCH - 1) * own)
    assert pace.begin(4, 1000, prompts=12, watched=True) == pytest.approx(3 * (STRETCH - 1) * own)
    assert pace.begin(4, 1000, prompts=1, watched=False) == pytest.approx(LONGEST_STEP - own)
    assert pace.begin(0, 0, prompts=1, watched=True) == LONGEST_STEP
    assert Pace(COST, 50).begin(4, 1000, prompts=1, watched=True) == pytest.approx(0.05 - own)
    assert Pace(COST, 1).begin(4, 1000, prompts=1, watched=True) == 0
    # Streams that take most of the longest step leave what is left of it, not as much again.
    many = streams_alone(1000, 0)
    assert LONGEST_STEP / 2 < many < LONGEST_STEP
    assert pace.begin(1000, 0, prompts=1, watched=True) == pytest.approx(LONGEST_STEP - many)
    assert pace.begin(10_000, 0, prompts=1, watched=True) == 0


def test_streams_that_grow_beside_prompts_are_measured_by_what_they_took_before() -> None:
    pace, before = Pace(COST), streams_alone(4, 4000)

    def step(positions: int, prompts: int = 1) -> float:
        return pace.begin(4, positions, prompts=prompts, watched=True) + streams_alone(4, positions)

    step(4000, prompts=0)
    for positions in (4004, 4400, 4000 + 4 * GROWTH):
        assert step(positions) == pytest.approx(STRETCH * before)
    # No more than so much is forgiven, whether they grew or longer ones came.
    assert step(4000 + 8 * GROWTH) == pytest.approx(STRETCH * streams_alone(4, 4000 + 4 * GROWTH))
    # Shorter ones are measured by themselves, and so are all once no prompt is left.
    assert step(2000) == pytest.approx(STRETCH * streams_alone(4, 2000))
    step(4800, prompts=0)
    assert step(4804) == pytest.approx(STRETCH * streams_alone(4, 4800))


@pytest.mark.parametrize("start", [0, 1, 777, 100_000])
@pytest.mark.parametrize("seconds", [0.0, 0.0009, 0.02, 0.3, 1.0])
def test_tokens_within_are_the_most_that_fit(seconds: float, start: int) -> None:
    count = Pace(COST).tokens_within(seconds, start)
    assert count >= 0
    assert count == 0 or prompt_alone(count, start) <= seconds + 1e-9
    assert prompt_alone(count + 1, start) > seconds


def test_no_tokens_fit_into_time_overdrawn() -> None:
    """A prompt's least tokens may take more than there was; what is left is below zero then."""
    attentive = StepCost(1, 1_000, 1, 20_000, 1)
    pace = Pace(attentive)
    assert pace.tokens_within(pace.begin(0, 0, prompts=1, watched=False) - 100, 0) == 0


def test_a_prompt_in_parts_reads_its_beginning_again_with_each() -> None:
    pace = Pace(COST)
    parts = sum(pace.add_prompt(count, start) for start, count in ((0, 7), (7, 100), (107, 1)))
    again = (7 + 107) * COST.position_bytes / BYTES
    assert pace.add_prompt(108, 0) == pytest.approx(prompt_alone(108, 0))
    assert parts == pytest.approx(prompt_alone(108, 0) + again)


def test_learns_how_fast_streams_and_prompts_are_here() -> None:
    """A machine 3 times as slow with streams, 7 times as slow with prompts; neither spoils the other."""
    pace = Pace(COST)
    for _ in range(30):
        pace.begin(4, 1000, prompts=1, watched=True)
        pace.end(3 * streams_alone(4, 1000))
    for _ in range(30):
        pace.begin(4, 1000, prompts=1, watched=True)
        pace.add_prompt(50, 200)
        pace.end(3 * streams_alone(4, 1000) + 7 * prompt_alone(50, 200))
    assert pace.begin(2, 10, prompts=1, watched=True) == pytest.approx(
        (STRETCH - 1) * 3 * streams_alone(2, 10)
    )
    assert pace.add_prompt(10, 0) == pytest.approx(7 * prompt_alone(10, 0))
    count = pace.tokens_within(0.5, 0)
    assert 7 * prompt_alone(count, 0) <= 0.5 < 7 * prompt_alone(count + 1, 0)
    # What prompts take by themselves is another matter: they come in larger pieces.
    pace.begin(0, 0, prompts=1, watched=False)
    assert pace.add_prompt(10, 0) == pytest.approx(prompt_alone(10, 0))
    pace.end(2 * prompt_alone(10, 0))
    assert pace.add_prompt(10, 0) == pytest.approx(2 * prompt_alone(10, 0))
    pace.begin(2, 10, prompts=1, watched=True)
    assert pace.add_prompt(10, 0) == pytest.approx(7 * prompt_alone(10, 0))


def test_the_first_measurement_replaces_the_guess_and_a_later_outlier_does_not() -> None:
    pace, own = Pace(COST), streams_alone(1, 0)

    def measured(times: float) -> float:
        pace.begin(1, 0, prompts=1, watched=True)
        pace.end(times * own)
        return pace.begin(1, 0, prompts=1, watched=True) / ((STRETCH - 1) * own)

    assert measured(0.25) == pytest.approx(0.25)
    assert 0.25 < measured(0.75) < 0.75  # the mean of the first ones
    for _ in range(40):
        before = measured(0.25)
    assert before == pytest.approx(0.25, rel=0.02)
    for surprise in (2.5, 1e9):
        before, after = measured(0.25), measured(surprise)
        assert after == pytest.approx(before * (1 + LEARNING * (SURPRISE - 1)))
    assert measured(1e-9) >= before * (1 - LEARNING * (1 - 1 / SURPRISE))
    for _ in range(100):  # what lasts is learnt
        measured(2.5)
    assert measured(2.5) == pytest.approx(2.5, rel=0.02)


def test_a_first_measurement_that_no_machine_makes_is_not_believed() -> None:
    """Such as of a process that slept for an hour."""
    pace, own = Pace(COST), streams_alone(1, 0)
    pace.begin(1, 0, prompts=1, watched=True)
    pace.end(1e9 * own)
    assert pace.begin(1, 0, prompts=1, watched=True) <= 1e3 * (STRETCH - 1) * own


def test_a_step_of_nothing_teaches_nothing() -> None:
    pace = Pace(COST)
    pace.begin(0, 0, prompts=1, watched=False)
    pace.end(5.0)
    assert pace.add_prompt(1, 0) == pytest.approx(prompt_alone(1, 0))
