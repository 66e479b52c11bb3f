"""How a token is drawn from a row of logits: the definition that every backend is held to, in NumPy.

Let l be the logits, float32 [vocab], and x = l + bias in float32, biases added in the order given. Tokens
whose x is NaN and tokens outside the row's mask are as if they did not exist. If the largest x of the others
is not finite, or there is none, nothing can be drawn: the token is −1.

A chain of samplers works on K, the tokens kept so far (at first all that exist and have x > −∞), on their x,
and on the temperature T, float32, at first 1. "Likelier" means larger x, or equal and of lower id. With max
the largest x in K now, z_i = (x_i − max) / T and weights w_i = exp(z_i) in float32; W = Σ w over K,
probabilities p_i = w_i / W, ln p_i = z_i − ln W, entropy H = ln W − Σ w_i z_i / W over the w_i > 0, all in
float64. The order of sums is a backend's own, so backends may differ where a bound falls within the rounding
of a sum or the last bit of exp. A row's float32 parameters are taken as they are: float64(float32(0.95))
where the arithmetic is in float64.

The samplers of `order`, one after the other; each at most once, those left out are not applied:

penalties    over the last repeat_last_n tokens of the history (−1: all, 0: none): tokens of K that occur
             there have x divided by repetition_penalty if x > 0 and multiplied by it otherwise, in float32;
             then those that occur c > 0 times among those of them that were generated (index in the history
             ≥ num_prompt) lose float32(c · frequency_penalty + presence_penalty), that sum in float64.
dry          if dry_multiplier ≠ 0: in the window of the last dry_last_n tokens of the history (−1: all, 0:
             none), m is, for each token t that stands in the window, the length of the longest run of tokens
             that ends the window and also stands, wholly within the window, right before some t; the two may
             overlap. There is no breaker in a run. x_t loses multiplier · base ** (m − allowed_length), in
             float64, at most the largest float32, rounded to float32, if m ≥ allowed_length and t itself is
             no breaker.
temperature  T = temperature. With dynatemp_range r > 0: T = low + (high − low) · (H / ln |K|) ** exponent
             with low = max(0, temperature − r), high = temperature + r (T = high where |K| = 1), in float64;
             then at least MIN_TEMPERATURE; rounded to float32.
top_n_sigma  if n > 0: keeps x_i ≥ float32(max − n · σ), computed in float64; σ is the population standard
             deviation of x over K.
typical_p    if < 1: keeps, by rising |−ln p_i − H|, equals by likelier first, the shortest prefix with Σ w ≥
             typical_p · W.
min_p        if > 0: keeps x_i ≥ float32(max + T · ln min_p), computed in float64.
top_k        if 0 < top_k < vocab: keeps the top_k likeliest.
top_p        if < 1: keeps, likeliest first, the shortest prefix with Σ w ≥ top_p · W.
xtc          if u₁ < xtc_probability and xtc_threshold ≤ 0.5: of the tokens with w ≥ xtc_threshold · W all
             but the least likely are dropped.

What penalties or dry has brought to −∞ leaves K; if then K is empty or its largest x infinite, the token is
−1.

Greedy (temperature < GREEDY_EPSILON): of the order only penalties and dry are applied; the likeliest token
is drawn. mirostat is off, too.

mirostat ≠ 0: of the order only penalties, dry and temperature are applied. Then, likeliest first and with
s_i = −log₂ p_i: version 2 keeps s_i ≤ mu, the likeliest in any case. Version 1 estimates Zipf's exponent
from the n = min(100, |K|) likeliest: ŝ = Σ t_i b_i / Σ t_i² over i from 0 to n − 2, with t_i = ln((i + 2) /
(i + 1)), b_i = ln(p_i / p_{i+1}) = z_i − z_{i+1}; ε = ŝ − 1; k = ((ε · 2^mu) / (1 − vocab^−ε)) ** (1 / ŝ),
and keeps the max(1, ⌊k⌋) likeliest; all if k is NaN. Float64 throughout, divisions by 0 as IEEE 754 has
them. After the draw, mu loses eta · (s − tau) with s = −log₂ of the probability of the token drawn over what
was kept, in float64, and is rounded to float32. mu is handed back unchanged where mirostat is off or no
token was drawn.

The draw: u₀ and u₁ are (word >> 8) · 2⁻²⁴ of words 0 and 1 of Philox4x32-10 for key (seed mod 2³², seed >>
32) and counter (position, sequence, 0, 0). The tokens of K stand likeliest first (by x as it now is) if
top_k, top_p or typical_p was applied (the "if" of its entry above holds, whether or not it dropped any) or
mirostat; else by id; xtc does not matter. Drawn is the first whose running sum of w exceeds u₀ · W; the last
one, if rounding leaves none.

Logprobs are log softmax of l (not x; no bias, no mask) over the tokens whose l is not NaN, in float64
rounded to float32 (a backend may take exp in float32 and sum in float64); NaN for all tokens if the largest
l is not finite. Ranks are 1 + the number of larger l. The likeliest tokens are those of l, the lower id
first among equals; those whose l is NaN are none of them, and −∞ is reported as such. A token whose l is NaN
has logprob NaN and rank 0. Whatever is not wanted or does not exist has token −1, logprob NaN and rank 0:
the drawn one's where nothing was drawn or num_logprobs is −1, and entries of top_ids and top_logprobs beyond
the row's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hexad.backends.sampling import ROW_DTYPE, SAMPLER_IDS, SampleBatch, SampleOutput
from hexad.errors import BackendError
from hexad.params import GREEDY_EPSILON, MIN_TEMPERATURE

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]
Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]

SAMPLER_NAMES = {number: name for name, number in SAMPLER_IDS.items()}


def sample(logits: Array, wanted: SampleBatch) -> SampleOutput:
    """Draws and reports for logits, float32 [n, vocab]. Raises BackendError if `wanted` does not fit."""
    _check(wanted, *logits.shape)
    rows = wanted.rows
    n, width = len(rows), int(rows["num_logprobs"].max(initial=0))
    output = SampleOutput(
        tokens=np.full(n, -1, np.int32),
        mirostat_mu=rows["mirostat_mu"].copy(),
        logprobs=np.full(n, np.nan, np.float32),
        ranks=np.zeros(n, np.int32),
        top_ids=np.full((n, width), -1, np.int32),
        top_logprobs=np.full((n, width), np.nan, np.float32),
        ask_logprobs=np.full(len(wanted.ask_ids), np.nan, np.float32),
        ask_ranks=np.zeros(len(wanted.ask_ids), np.int32),
    )
    for i, row in enumerate(rows):
        if row["draw"]:
            output.tokens[i], output.mirostat_mu[i] = draw(logits[i], wanted, i)
        _report(logits[i], wanted, i, output)
    return output


def draw(logits: Array, wanted: SampleBatch, i: int) -> tuple[int, float]:
    """The token that row i draws from its logits, float32 [vocab] (−1: none), and mirostat's mu after it."""
    row, vocab = wanted.rows[i], len(logits)
    bias = slice(wanted.bias_starts[i], wanted.bias_starts[i + 1])
    x = logits.copy()
    with np.errstate(invalid="ignore", over="ignore"):  # ∞ − ∞ is NaN: there is no such token
        np.add.at(x, wanted.bias_ids[bias], wanted.bias_values[bias])
    if row["mask"] >= 0:
        x[~mask_bits(wanted.masks[row["mask"]], vocab)] = np.nan
    breakers = np.zeros(vocab, bool)
    if row["dry_breakers"] >= 0:
        breakers = mask_bits(wanted.masks[row["dry_breakers"]], vocab)
    history = wanted.history[wanted.history_starts[i] : wanted.history_starts[i + 1]]
    k = kept(x, row, history, breakers)
    mu = row["mirostat_mu"].item()
    if not len(k.ids):
        return -1, mu
    w = k.weights()
    sums = np.cumsum(w)
    u0, _ = uniforms(row)
    place = min(int(np.searchsorted(sums, u0 * sums[-1], side="right")), len(w) - 1)
    if row["mirostat"] and row["temperature"].item() >= GREEDY_EPSILON:
        surprise = -np.log2(w[place] / sums[-1])
        mu -= row["mirostat_eta"].item() * (surprise - row["mirostat_tau"].item())
    return int(k.ids[place]), mu


@dataclass(slots=True)
class Kept:
    """K and T. ids: the tokens, int64; x: theirs, float32; temperature: T."""

    ids: NDArray[np.int64]
    x: Array
    temperature: np.float32

    def z(self) -> Array:
        """z, float32."""
        with np.errstate(over="ignore"):
            return cast(Array, (self.x - self.x.max()) / self.temperature)

    def weights(self) -> Doubles:
        """w, the largest of them 1."""
        return cast(Doubles, np.exp(self.z()).astype(np.float64))

    def log_probabilities(self) -> Doubles:
        """ln p."""
        return cast(Doubles, self.z().astype(np.float64) - np.log(self.weights().sum()))

    def entropy(self) -> float:
        """H, in nats."""
        w, z = self.weights(), self.z().astype(np.float64)
        return float(np.log(w.sum()) - (w[w > 0] * z[w > 0]).sum() / w.sum())

    def keep(self, which: Mask | NDArray[np.intp] | slice) -> None:
        """Keeps these places, in this order."""
        self.ids, self.x = self.ids[which], self.x[which]

    def sort(self) -> None:
        """Puts the likeliest first."""
        self.keep(np.lexsort((self.ids, -self.x)))

    def keep_prefix(self, mass: float) -> None:
        """Keeps the shortest prefix whose weights sum up to this share of all or more."""
        sums = np.cumsum(self.weights())
        self.keep(slice(int(np.searchsorted(sums, mass * sums[-1], side="left")) + 1))


def kept(x: Array, row: np.void, history: Tokens, breakers: Mask) -> Kept:
    """What a row of ROW_DTYPE leaves of x, in the order in which tokens are drawn; nothing where none can be.

    x: logits with bias, float32 [vocab], NaN for tokens that do not exist. history: int32. breakers: bool
    [vocab]. Of a greedy row only the token that it draws is left.
    """
    p = dict(zip(ROW_DTYPE.names or (), row.item(), strict=True))
    greedy, mirostat = p["temperature"] < GREEDY_EPSILON, p["mirostat"]
    applied = [SAMPLER_NAMES[number] for number in takewhile(bool, p["order"].tolist())]
    if greedy or mirostat:
        applied = [name for name in applied if name in ("penalties", "dry", "temperature")]
    ids = np.flatnonzero(~np.isnan(x))
    k = Kept(ids, x[ids], np.float32(1))
    likeliest_first = bool(greedy or mirostat)
    for name in ("start", *applied):
        match name:
            case "penalties":
                penalise(k, history, p)
            case "dry" if p["dry_multiplier"] != 0:
                penalise_repetitions(k, history, breakers, p)
            case "temperature" if not greedy:
                set_temperature(k, p["temperature"], p["dynatemp_range"], p["dynatemp_exponent"])
            case "top_n_sigma" if p["top_n_sigma"] > 0:
                keep_top_n_sigma(k, p["top_n_sigma"])
            case "typical_p" if p["typical_p"] < 1:
                keep_typical(k, p["typical_p"])
                likeliest_first = True
            case "min_p" if p["min_p"] > 0:
                keep_min_p(k, p["min_p"])
            case "top_k" if 0 < p["top_k"] < len(x):
                keep_top_k(k, p["top_k"])
                likeliest_first = True
            case "top_p" if p["top_p"] < 1:
                keep_top_p(k, p["top_p"])
                likeliest_first = True
            case "xtc" if p["xtc_threshold"] <= 0.5 and uniforms(row)[1] < p["xtc_probability"]:
                exclude_top_choices(k, p["xtc_threshold"])
        k.keep(k.x > -np.inf)
        if not np.isfinite(k.x.max(initial=-np.inf)):
            k.keep(slice(0))
            return k
    if likeliest_first:
        k.sort()
    else:
        k.keep(np.argsort(k.ids))
    if greedy:
        keep_top_k(k, 1)
    elif mirostat == 1:
        keep_mirostat_1(k, p["mirostat_mu"], len(x))
    elif mirostat == 2:
        keep_mirostat_2(k, p["mirostat_mu"])
    return k


# The samplers. Numbers are float64, parameters as the float32 that they are.


def penalise(k: Kept, history: Tokens, p: Mapping[str, Any]) -> None:
    """penalties, with p the row's parameters."""
    start = _window(history, p["repeat_last_n"])
    seen = np.isin(k.ids, history[start:])
    counts = np.bincount(history[max(start, p["num_prompt"]) :], minlength=k.ids.max(initial=0) + 1)[k.ids]
    repetition = np.float32(p["repetition_penalty"])
    with np.errstate(over="ignore"):
        repeated = np.where(k.x > 0, k.x / repetition, k.x * repetition)
        k.x = np.where(seen, repeated, k.x)
        lost = counts * p["frequency_penalty"] + p["presence_penalty"]
        k.x = np.where(counts > 0, k.x - lost.astype(np.float32), k.x)


def penalise_repetitions(k: Kept, history: Tokens, breakers: Mask, p: Mapping[str, Any]) -> None:
    """dry, with p the row's parameters."""
    window = history[_window(history, p["dry_last_n"]) :].tolist()
    end = len(window)
    longest: dict[int, int] = {}
    for place, token in enumerate(window):
        m = 0
        while m < place and (last := window[end - 1 - m]) == window[place - 1 - m] and not breakers[last]:
            m += 1
        longest[token] = max(m, longest.get(token, 0))
    for place, token in enumerate(k.ids.tolist()):
        m = longest.get(token, -1)
        if m >= max(0, p["dry_allowed_length"]) and not breakers[token]:
            with np.errstate(over="ignore"):
                power = np.float64(p["dry_base"]) ** (m - p["dry_allowed_length"])
                k.x[place] -= np.float32(min(p["dry_multiplier"] * power, np.finfo(np.float32).max))


def set_temperature(k: Kept, temperature: float, spread: float, exponent: float) -> None:
    """temperature; spread is dynatemp_range."""
    if spread > 0:
        low, high = max(0.0, temperature - spread), temperature + spread
        share = k.entropy() / np.log(len(k.ids)) if len(k.ids) > 1 else 1.0
        temperature = max(low + (high - low) * share**exponent, MIN_TEMPERATURE)
    k.temperature = np.float32(temperature)


def keep_top_n_sigma(k: Kept, n: float) -> None:
    """top_n_sigma."""
    x = k.x.astype(np.float64)
    k.keep(k.x >= np.float32(x.max() - n * x.std()))


def keep_typical(k: Kept, mass: float) -> None:
    """typical_p."""
    k.sort()
    k.keep(np.argsort(np.abs(-k.log_probabilities() - k.entropy()), kind="stable"))
    k.keep_prefix(mass)


def keep_min_p(k: Kept, share: float) -> None:
    """min_p."""
    k.keep(k.x >= np.float32(np.float64(k.x.max()) + np.float64(k.temperature) * np.log(share)))


def keep_top_k(k: Kept, count: int) -> None:
    """top_k."""
    k.sort()
    k.keep(slice(count))


def keep_top_p(k: Kept, mass: float) -> None:
    """top_p."""
    k.sort()
    k.keep_prefix(mass)


def exclude_top_choices(k: Kept, threshold: float) -> None:
    """xtc, after its coin."""
    k.sort()
    w = k.weights()
    k.keep(slice(max(0, int((w >= threshold * w.sum()).sum()) - 1), None))


def keep_mirostat_2(k: Kept, mu: float) -> None:
    """mirostat, version 2; the likeliest are first."""
    likely = -k.log_probabilities() / np.log(2) <= mu
    likely[0] = True
    k.keep(likely)


def keep_mirostat_1(k: Kept, mu: float, vocab: int) -> None:
    """mirostat, version 1; the likeliest are first."""
    z = k.z()[:100].astype(np.float64)
    i = np.arange(len(z) - 1)
    t, b = np.log((i + 2) / (i + 1)), z[:-1] - z[1:]
    with np.errstate(all="ignore"):
        exponent = (t * b).sum() / (t * t).sum()
        epsilon = exponent - 1
        count = (epsilon * 2.0**mu / (1 - np.float64(vocab) ** -epsilon)) ** (1 / exponent)
    if count < len(k.ids):
        k.keep(slice(max(1, int(count))))


# Chance.


def uniforms(row: np.void) -> tuple[float, float]:
    """u₀ and u₁ of a row of ROW_DTYPE, in [0, 1)."""
    seed = row["seed"].item()
    words = philox4x32(
        (row["position"].item(), row["sequence"].item(), 0, 0), (seed & 0xFFFFFFFF, seed >> 32)
    )
    u0, u1 = (int(word >> 8) * 2.0**-24 for word in words[:2])
    return u0, u1


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> NDArray[np.uint32]:
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words,
    uint32 [4], from a counter of four words and a key of two."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0, product1 & mask,
            (product0 >> 32) ^ c3 ^ k1, product0 & mask,
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return np.array([c0, c1, c2, c3], dtype=np.uint32)


# Reports.


def log_softmax(logits: Array) -> Doubles:
    """ln softmax over the logits that are not NaN, float64 [vocab]; all NaN if the largest is not finite."""
    there = logits[~np.isnan(logits)].astype(np.float64)
    top = there.max(initial=-np.inf)
    if not np.isfinite(top):
        return np.full(len(logits), np.nan)
    return cast(Doubles, logits.astype(np.float64) - (top + np.log(np.exp(there - top).sum())))


def rank(logits: Array, token: int) -> int:
    """1 + the number of larger logits; 0 for NaN."""
    return 0 if np.isnan(logits[token]) else 1 + int((logits > logits[token]).sum())


def _report(logits: Array, wanted: SampleBatch, i: int, output: SampleOutput) -> None:
    """Fills in what row i wants to know; its token has been drawn."""
    count, asked = wanted.rows["num_logprobs"][i], slice(wanted.ask_starts[i], wanted.ask_starts[i + 1])
    if count < 0 and asked.start == asked.stop:
        return
    logprobs = log_softmax(logits)
    output.ask_logprobs[asked] = logprobs[wanted.ask_ids[asked]]
    output.ask_ranks[asked] = [rank(logits, token) for token in wanted.ask_ids[asked]]
    token = output.tokens[i]
    if count >= 0 and token >= 0:
        output.logprobs[i], output.ranks[i] = logprobs[token], rank(logits, token)
    if count > 0:
        top = np.argsort(-logits, kind="stable")[: (~np.isnan(logits)).sum()][:count]  # NaNs are sorted last
        output.top_ids[i, : len(top)], output.top_logprobs[i, : len(top)] = top, logprobs[top]


# Arrays.


def mask_bits(words: NDArray[np.uint32], vocab: int) -> Mask:
    """The tokens that are in a mask of 32-bit words, bool [vocab]."""
    tokens = np.arange(vocab)
    return (words[tokens // 32] >> (tokens % 32).astype(np.uint32) & 1).astype(bool)


def _window(history: Tokens, last_n: int) -> int:
    """Where the last n tokens begin; −1: all."""
    return 0 if last_n < 0 else max(0, len(history) - last_n)


def _check(wanted: SampleBatch, n: int, vocab: int) -> None:
    rows, masks = wanted.rows, wanted.masks
    if len(rows) != n:
        raise BackendError(f"sampling parameters of {len(rows)} rows for {n}")
    for name, tokens, starts in (
        ("history", wanted.history, wanted.history_starts),
        ("bias", wanted.bias_ids, wanted.bias_starts),
        ("ask", wanted.ask_ids, wanted.ask_starts),
    ):
        if len(starts) != n + 1 or starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) < 0).any():
            raise BackendError(
                f"{name} starts {starts.tolist()} do not divide {len(tokens)} tokens among {n} rows"
            )
        if (tokens < 0).any() or (tokens >= vocab).any():
            raise BackendError(f"{name} has token ids outside the vocabulary of {vocab}")
    if len(masks) and masks.shape[1] != -(-vocab // 32):
        raise BackendError(f"masks of {masks.shape[1]} words for a vocabulary of {vocab}")
    for name in ("mask", "dry_breakers"):
        if (rows[name] >= len(masks)).any():
            raise BackendError(f"{name} {rows[name].max()} is outside the {len(masks)} masks")
