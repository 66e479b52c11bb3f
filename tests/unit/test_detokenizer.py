"""Detokenizer: what text it shows, and which stop string ends it, against a definition that sees it all."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hexad.engine.detokenizer import Detokenizer


class Pieces:
    """A stream whose token i is the i-th of some texts; one more is held back until the flush."""

    def __init__(self, pieces: list[str], last: str = "") -> None:
        self.pieces, self.last = pieces, last

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        last, self.last = self.last, ""
        return last


def definition(pieces: list[str], early: int, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The final text and its stop string: the longest that ends at the first place where any does, not
    counting places in the first `early` pieces."""
    text = "".join(pieces)
    for end in range(len("".join(pieces[:early])) + 1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text that a longer stop string begins with."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


# Few letters, so that stop strings occur, overlap, and hold each other.
letters = st.text("ab", max_size=6)


@given(
    pieces=st.lists(letters, max_size=12),
    last=letters,
    early=st.integers(0, 12),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4).map(tuple),
    include=st.booleans(),
)
@example(pieces=["ab", "abc"], last="", early=0, stop=("bab", "ababc"), include=False)
@example(pieces=["aab", "b"], last="", early=1, stop=("ab", "abb"), include=False)
@example(pieces=["abab", "a"], last="", early=1, stop=("ab", "b"), include=True)
def test_is_what_the_definition_says(
    pieces: list[str], last: str, early: int, stop: tuple[str, ...], include: bool
) -> None:
    early = min(early, len(pieces))
    expected, expected_stop = definition([*pieces, last], early, stop, include)
    detokenizer = Detokenizer(Pieces(pieces, last), stop, include_stop=include)
    deltas, found = [], None
    for i in range(len(pieces)):
        found = detokenizer.push(i, check_stop=i >= early)
        shown = detokenizer.text
        assert expected.startswith(shown)
        deltas.append(detokenizer.take())
        assert "".join(deltas) == shown
        if found is not None:
            break
        so_far = "".join(pieces[: i + 1])
        assert shown == so_far[: len(so_far) - held_back(so_far, stop)]  # no more is held back than need be
    found = found or detokenizer.finish()
    assert detokenizer.finish() is None
    assert (detokenizer.text, found) == (expected, expected_stop)
    assert "".join(deltas) + detokenizer.take() == expected


@given(pieces=st.lists(st.text(), max_size=8), data=st.data())
def test_stop_strings_cut_out_of_any_text(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(1, 20)), max_size=3))
    stop = tuple(text[start : start + length] for start, length in spans if text[start : start + length])
    detokenizer = Detokenizer(Pieces(pieces), stop)
    found = next((s for s in map(detokenizer.push, range(len(pieces))) if s is not None), None)
    detokenizer.finish()
    assert (detokenizer.text, found) == definition(pieces, 0, stop, include=False)


def test_taking_is_not_reading() -> None:
    """Deltas and cumulative texts may be mixed."""
    detokenizer = Detokenizer(Pieces(["a", "b", "c"]))
    detokenizer.push(0)
    assert detokenizer.text == "a"
    detokenizer.push(1)
    assert detokenizer.take() == "ab"
    assert detokenizer.take() == ""
    assert detokenizer.text == "ab"
    detokenizer.push(2)
    assert detokenizer.take() == "c"
    assert detokenizer.text == "abc"


def test_a_stop_ends_the_text_for_good() -> None:
    """What the stream still holds belongs to no text that is shown."""
    detokenizer = Detokenizer(Pieces(["one. two"], "\ufffd"), (". ",))
    assert detokenizer.push(0) == ". "
    assert detokenizer.finish() is None
    assert detokenizer.text == "one"


def test_long_stop_strings_take_linear_time_and_memory() -> None:
    """Ten thousand characters that all but match: a state for each of them, not one for each substring."""
    stop = "a" * 10_000
    detokenizer = Detokenizer(Pieces(["a" * 9_999, "b" + "a" * 9_999, "a"]), (stop + "c", stop))
    assert detokenizer.push(0) is None
    assert detokenizer.text == ""
    assert detokenizer.push(1) is None
    assert detokenizer.text == "a" * 9_999 + "b"
    assert detokenizer.push(2) == stop
    assert detokenizer.text == "a" * 9_999 + "b"


@pytest.mark.parametrize("reads", ["text", "take"])
def test_reading_does_not_join_everything_again(reads: str) -> None:
    """One joined piece is kept for the text shown, so a step copies it once and looks at nothing else."""
    detokenizer = Detokenizer(Pieces(["ab"]))
    for _ in range(1000):
        detokenizer.push(0)
        assert detokenizer.text if reads == "text" else detokenizer.take()
    kept = detokenizer._pieces if reads == "text" else detokenizer._untaken
    assert len(kept) <= 1
    assert detokenizer.text == "ab" * 1000
