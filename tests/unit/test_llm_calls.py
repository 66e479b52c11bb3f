"""Everything LLM does beside plain generation: chat, scores, embeddings, beams, cache, metrics, sleep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.character_tokenizer import VOCAB
from tests.tiny_models import limits_for, one_sequence, tiny_llama

from hexad import LLM, BeamSearchParams, PoolingParams, SamplingParams
from hexad.backends.backend import CompileOptions, Executable
from hexad.backends.reference import ReferenceBackend
from hexad.checkpoint.open import open_checkpoint
from hexad.errors import (
    ConfigError,
    EngineError,
    PromptError,
)
from hexad.models import build_graph

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def test_chat_is_the_rendered_conversation(llm: LLM) -> None:
    hi = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(hi, GREEDY)
    (by_hand,) = llm.generate("u:hi|a:", GREEDY)
    assert (one.prompt, one.prompt_token_ids) == ("u:hi|a:", by_hand.prompt_token_ids)
    assert one.outputs == by_hand.outputs
    more = [*hi, {"role": "assistant", "content": "yes"}]
    several = llm.chat([more, hi], [GREEDY, SamplingParams(temperature=0, max_tokens=2)])
    assert [output.prompt for output in several] == ["u:hi|a:yes|a:", "u:hi|a:"]
    assert several[1].outputs[0].token_ids == one.outputs[0].token_ids[:2]
    (open_end,) = llm.chat(more, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert open_end.prompt == "u:hi|a:yes"
    (more_in,) = llm.chat(
        hi, GREEDY, chat_template="T", tools=[{"name": "f"}], chat_template_kwargs={"mood": "!"}
    )
    assert more_in.prompt == "Tf!u:hi|a:"
    assert llm.chat([], GREEDY) == []
    with pytest.raises(PromptError, match="empty") as caught:
        llm.chat([hi, []], GREEDY)
    assert caught.value.__notes__ == ["It is prompt 1 of the 2 given, counted from 0."]


def reference_rows(text: str) -> Executable:
    """The tiny model by itself, after it has computed a text and wants something of each token."""
    model = tiny_llama(vocab=VOCAB, context=256)
    options = CompileOptions("int8", "f16", 1)
    executable = ReferenceBackend().compile(model.graph(), model.weights, options, limits_for())
    executable.forward(one_sequence([ord(c) for c in text]))
    return executable


@pytest.mark.parametrize("text", ["abcdefgh", "ab", "xyz" * 40])  # the last in several steps
def test_score_is_the_log_softmax_of_the_logits(llm: LLM, text: str) -> None:
    other, score = llm.score(["something else", text])
    logits = reference_rows(text).logits().astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [logprobs[i, ord(c)] for i, c in enumerate(text[1:])]
    assert score.logprobs == pytest.approx(expected, abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)
    assert (score.prompt, score.prompt_token_ids) == (text, [ord(c) for c in text])
    assert len(other.logprobs) == len("something else") - 1


def test_score_needs_two_tokens_and_takes_a_full_context(llm: LLM) -> None:
    with pytest.raises(PromptError, match="one token has no score"):
        llm.score("a")
    (full,) = llm.score("x" * 256)
    assert len(full.logprobs) == 255


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("text", ["abc", "q", "xyz" * 40])
def test_embed_pools_the_last_hidden_states(llm: LLM, text: str, normalize: bool) -> None:
    mean, last = llm.embed(
        [text, text],
        pooling_params=[
            PoolingParams(pooling="mean", normalize=normalize),
            PoolingParams(pooling="last", normalize=normalize),
        ],
    )
    hidden = reference_rows(text).hidden().astype(np.float64)
    for output, expected in ((mean, hidden.mean(axis=0)), (last, hidden[-1])):
        length = np.linalg.norm(expected) if normalize else 1.0
        assert output.outputs.embedding == pytest.approx(expected / length, abs=1e-4)
        assert output.prompt_token_ids == [ord(c) for c in text]
    (default,) = llm.embed(text)
    assert math.hypot(*default.outputs.embedding) == pytest.approx(1, abs=1e-5)


def test_beam_search_finds_what_greedy_may_miss(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    first, second = llm.beam_search(["abc", "xyz"], params)
    (greedy,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0))
    assert len(first.sequences) == len(second.sequences) == 4
    sums = [beam.cum_logprob for beam in first.sequences]
    assert sums == sorted(sums, reverse=True)
    for beam in first.sequences:
        assert beam.tokens[:3] == [97, 98, 99]
        assert beam.text == "".join(map(chr, beam.tokens[3:]))
        (score,) = llm.score({"prompt_token_ids": beam.tokens})
        assert beam.cum_logprob == pytest.approx(sum(score.logprobs[2:]), abs=1e-4)
    assert sums[0] >= (greedy.outputs[0].cumulative_logprob or 0) - 1e-6
    (narrow,) = llm.beam_search("abc", BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True))
    assert narrow.sequences[0].tokens[3:] == greedy.outputs[0].token_ids


def test_a_shared_prefix_is_cached_unless_it_is_reset_or_salted(llm: LLM) -> None:
    prompt = "p" * 100

    def cached(**more: str) -> int:
        return llm.generate({"prompt": prompt, **more}, GREEDY)[0].num_cached_tokens

    assert cached() == 0
    assert cached() == 96
    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") == 96
    assert llm.reset_prefix_cache()
    assert cached() == 0


def test_metrics_count_what_was_done(llm: LLM) -> None:
    llm.generate(["abc", "xyz12"], SamplingParams(max_tokens=4, ignore_eos=True))
    values = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value") and not m.labels}
    assert values["hexad:prompt_tokens"] == 8
    assert values["hexad:generation_tokens"] == 8
    assert values["hexad:num_requests_running"] == 0


def test_sleep_and_wake_up(llm: LLM) -> None:
    expected = llm.generate("abc" * 30, GREEDY)[0].outputs
    stream = llm.stream("abc", GREEDY)
    next(stream)
    with pytest.raises(EngineError, match="stream is open"):
        llm.sleep()
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="level must be 1 or 2, not 3"):
        llm.sleep(3)
    for level in (1, 2):
        llm.sleep(level)
        with pytest.raises(EngineError, match="asleep"):
            llm.generate("abc")
        llm.wake_up()
        llm.wake_up()
        (output,) = llm.generate("abc" * 30, GREEDY)
        assert (output.outputs, output.num_cached_tokens) == (expected, 0)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, compute="float", max_model_len=256, max_num_seqs=4) as llm:
        yield llm


def test_smollm2_chats_in_its_template(smollm2: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
    (output,) = smollm2.chat(messages, GREEDY)
    assert output.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    by_hand = smollm2.get_tokenizer().encode(output.prompt)
    assert output.prompt_token_ids == by_hand
    assert smollm2.generate(by_hand, GREEDY)[0].outputs == output.outputs


def test_smollm2_scores_and_embeds_like_the_reference(smollm2: LLM, smollm2_path: Path) -> None:
    text = "The capital of France is Paris."
    (score,) = smollm2.score(text)
    last, mean = smollm2.embed(
        [text, text],
        pooling_params=[PoolingParams(pooling="last"), PoolingParams(pooling="mean")],
    )
    token_ids = smollm2.get_tokenizer().encode(text)
    with open_checkpoint(smollm2_path) as checkpoint:
        graph = build_graph(checkpoint.config, checkpoint.weights)
        reference = ReferenceBackend().compile(
            graph, checkpoint.weights, CompileOptions("float", "f32", 2), limits_for()
        )
        reference.forward(one_sequence(token_ids))
    logits, hidden = reference.logits().astype(np.float64), reference.hidden()
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [logprobs[i, token_id] for i, token_id in enumerate(token_ids[1:])]
    assert score.logprobs == pytest.approx(expected, abs=1e-3)
    for output, pooled in ((last, hidden[-1]), (mean, hidden.mean(axis=0))):
        assert output.outputs.embedding == pytest.approx(pooled / np.linalg.norm(pooled), abs=1e-4)


def test_smollm2_prefers_sense_to_nonsense(smollm2: LLM) -> None:
    sense, nonsense = smollm2.score(["The cat sleeps on the sofa.", "Sofa the on sleeps cat the."])
    assert sense.perplexity < nonsense.perplexity / 10
    cat, kitten, rates = (
        output.outputs.embedding
        for output in smollm2.embed(["The cat sleeps.", "A kitten naps.", "Interest rates rose."])
    )
    assert np.dot(cat, kitten) > np.dot(cat, rates)


def test_threads_take_turns(llm: LLM) -> None:
    prompts = ["abc", "d" * 40, "efgh", "i"]
    alone = [llm.generate(prompt, GREEDY)[0].outputs for prompt in prompts]

    def both_ways(prompt: str) -> tuple[object, object]:
        *_, last = llm.stream(prompt, GREEDY)
        return last.outputs, llm.generate(prompt, GREEDY)[0].outputs

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both_ways, prompts)) == [(outputs, outputs) for outputs in alone]
