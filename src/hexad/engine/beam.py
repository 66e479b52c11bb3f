"""BeamSearch: which continuations live on. It knows tokens and logprobs, and nothing of blocks or steps.

The rules are those of transformers' `generate(num_beams=width, early_stopping=False)`, so that the beams are,
too. At each step all continuations of all live beams are ranked by the sum of their logprobs. Those among the
first `width` that end are kept for the results; the first `width` that do not end live on. A beam's score is
its cum_logprob / length ** length_penalty, where length counts its tokens after the prompt, the one that ends
it included. The search is over once there are `width` ended beams and the score of the best live one, at its
present length, is not above any of theirs; or else when the beams have max_new_tokens.

With a positive length penalty a longer beam may come to a better score than its present one, so this end
may miss some; and only live beams that reach max_new_tokens are results, not those alive at such an end.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

from hexad.outputs import FinishReason
from hexad.params import BeamSearchParams


@dataclass(frozen=True, slots=True)
class Beam:
    """A finished beam: its tokens after the prompt, the sum of their logprobs, and why it ended.

    token_ids has the end-of-generation token, if there is one, as its last.
    """

    token_ids: list[int]
    cum_logprob: float
    finish_reason: FinishReason


class BeamSearch:
    """One search; `advance` carries it from one set of live beams to the next, beginning with the prompt.

    max_new_tokens: most tokens of a beam. eos_ids: tokens that end one, unless params.ignore_eos. As in vLLM,
    logprobs are the model's own, so params.temperature changes nothing. Of equals, those that `advance` is
    given first come first.
    """

    def __init__(self, params: BeamSearchParams, max_new_tokens: int, eos_ids: frozenset[int]) -> None:
        self.params = params
        self._eos_ids = frozenset[int]() if params.ignore_eos else eos_ids
        self._max_new_tokens = max_new_tokens
        self._live: list[tuple[list[int], float]] = [([], 0.0)]  # tokens, cum_logprob
        self._ended: list[Beam] = []  # the best, in order

    @property
    def num_candidates(self) -> int:
        """How many of the likeliest tokens after each live beam decide the next step: if all end tokens are
        among them, there are still `width` to live on."""
        return self.params.beam_width + len(self._eos_ids)

    def advance(self, candidates: list[list[tuple[int, float]]]) -> list[tuple[int, int]]:
        """candidates[i]: (token, logprob) of the `num_candidates` likeliest tokens after live beam i, or of
        the whole vocabulary if that is smaller. Returns the next live beams, best first, as (live beam
        continued, token): `width` of them, or all there are; none when the search is over."""
        width = self.params.beam_width
        ranked = sorted(
            (
                (cum_logprob + logprob, parent, token_id)
                for parent, ((_, cum_logprob), after) in enumerate(zip(self._live, candidates, strict=True))
                for token_id, logprob in after
            ),
            key=itemgetter(0),
            reverse=True,
        )
        at_limit = len(self._live[0][0]) + 1 == self._max_new_tokens
        live: list[tuple[list[int], float]] = []
        moves: list[tuple[int, int]] = []
        for place, (cum_logprob, parent, token_id) in enumerate(ranked):
            ends = token_id in self._eos_ids
            if ends or at_limit:
                if place < width:
                    token_ids = [*self._live[parent][0], token_id]
                    self._ended.append(Beam(token_ids, cum_logprob, "stop" if ends else "length"))
            elif len(live) < width:
                live.append(([*self._live[parent][0], token_id], cum_logprob))
                moves.append((parent, token_id))
        self._ended.sort(key=lambda beam: self._score(beam.token_ids, beam.cum_logprob), reverse=True)
        del self._ended[width:]
        if len(self._ended) == width and live:
            worst = self._ended[-1]
            if self._score(*live[0]) <= self._score(worst.token_ids, worst.cum_logprob):
                return []
        self._live = live
        return moves

    def results(self) -> list[Beam]:
        """The best beams that have ended, best first: `width` of them once the search is over, unless the
        vocabulary has not so many continuations."""
        return list(self._ended)

    def _score(self, token_ids: list[int], cum_logprob: float) -> float:
        # A float, as a large power of an integer takes long.
        return float(cum_logprob / len(token_ids) ** float(self.params.length_penalty))
