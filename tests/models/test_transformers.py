"""Against transformers: the same beams in the same order with the same scores, and the same logprobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.character_tokenizer import CharacterTokenizer
from tests.tiny_models import dense

from hexad import LLM, BeamSearchParams, SamplingParams
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.engine.beam import BeamSearch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

VOCAB = 160
MAX_TOKENS = 12
PENALTIES = [0.5, 1.0, 2.0]
PROMPTS = [
    [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, size)]
    for seed, size in enumerate((1, 2, 3, 5, 7, 20, 31, 32, 33, 50))
]

Found = list[tuple[list[int], float]]
"""Beams: tokens after the prompt and score, best first."""


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A random Llama that is neither sure of the next token nor at a loss."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.25,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other over so small a model
    yield transformers.LlamaForCausalLM(config).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def eos_ids(model: Any) -> frozenset[int]:
    """Tokens that end beams now early, now late, now not at all: the commonest where nothing ends."""
    used = [
        token for prompt in PROMPTS for tokens, _ in generate(model, prompt, 4, 1.0, []) for token in tokens
    ]
    return frozenset(sorted(sorted(set(used)), key=used.count)[-10:])


def generate(
    model: Any,
    prompt: list[int],
    width: int,
    penalty: float,
    eos_ids: Sequence[int],
    max_tokens: int = MAX_TOKENS,
) -> Found:
    """What transformers finds."""
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            early_stopping=False,
            length_penalty=penalty,
            max_new_tokens=max_tokens,
            eos_token_id=list(eos_ids) or None,
            bos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    lengths = (found.beam_indices >= 0).sum(-1).tolist()  # shorter beams are padded
    return [
        (tokens[len(prompt) : len(prompt) + length], score)
        for tokens, length, score in zip(
            found.sequences.tolist(), lengths, found.sequences_scores.tolist(), strict=True
        )
    ]


def assert_same(found: Found, expected: Found) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    # float32 sums in another order; scores are about 1 to 10, and up to 300 where length multiplies
    expected_scores = pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4)
    assert [score for _, score in found] == expected_scores


@pytest.mark.parametrize("penalty", [-1.0, 0.0, *PENALTIES])
@pytest.mark.parametrize("num_eos", [0, 1, 10])
@pytest.mark.parametrize("width", [2, 4, 7])
def test_search(model: Any, eos_ids: frozenset[int], width: int, num_eos: int, penalty: float) -> None:
    """The search alone, with transformers' logprobs."""
    ends = frozenset(sorted(eos_ids)[:num_eos])
    for prompt in PROMPTS[:4]:
        search = BeamSearch(
            BeamSearchParams(beam_width=width, max_tokens=MAX_TOKENS, length_penalty=penalty),
            MAX_TOKENS,
            ends,
        )
        live = [prompt]
        while live:
            with torch.inference_mode():
                logprobs = model(torch.tensor(live)).logits[:, -1].log_softmax(-1)
            top = logprobs.topk(search.num_candidates)
            moves = search.advance(
                [
                    list(zip(tokens, values, strict=True))
                    for tokens, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
            )
            live = [[*live[parent], token] for parent, token in moves]
        found = [(b.token_ids, b.cum_logprob / len(b.token_ids) ** penalty) for b in search.results()]
        assert_same(found, generate(model, prompt, width, penalty, sorted(ends)))


@pytest.fixture(params=["cpu", "reference"])
def llm(
    request: pytest.FixtureRequest, model: Any, eos_ids: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """The same weights in float32, with a float32 KV cache."""
    hf = model.config
    names = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "max_position_embeddings",
        "tie_word_embeddings",
    )  # fmt: skip
    config = {name: getattr(hf, name) for name in names}
    config |= {"name": "tiny", "rope_theta": hf.rope_parameters["rope_theta"], "rotary_dim": hf.head_dim}
    weights = {name: dense(value.numpy()) for name, value in model.state_dict().items()}
    tokenizer: Any = CharacterTokenizer()
    tokenizer.eos_ids = eos_ids
    checkpoint = Checkpoint(Path("tiny"), config, weights, lambda: tokenizer, lambda: None)
    monkeypatch.setattr("hexad.checkpoint.store.resolve", Path)
    monkeypatch.setattr("hexad.checkpoint.open.open_checkpoint", lambda path: checkpoint)
    with LLM("tiny", backend=request.param, compute="float", kv_dtype="f32", max_num_seqs=9) as llm:
        yield llm
        assert llm.engine.blocks.num_allocated == 0


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("width", [2, 4])
def test_llm(
    llm: LLM, model: Any, eos_ids: frozenset[int], width: int, penalty: float, ignore_eos: bool
) -> None:
    """The prompts at once, so that their beams share the steps and compete for places."""
    params = BeamSearchParams(
        beam_width=width, max_tokens=MAX_TOKENS, length_penalty=penalty, ignore_eos=ignore_eos
    )
    outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    ends = frozenset() if ignore_eos else eos_ids
    lengths = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        found = []
        for beam in output.sequences:
            assert beam.tokens[: len(prompt)] == prompt
            tokens = beam.tokens[len(prompt) :]
            assert beam.finish_reason == ("stop" if tokens[-1] in ends else "length")
            assert beam.text == "".join(map(chr, tokens[: len(tokens) - (beam.finish_reason == "stop")]))
            found.append((tokens, beam.cum_logprob / len(tokens) ** penalty))
            lengths.add(len(tokens))
        assert_same(found, generate(model, prompt, width, penalty, sorted(ends)))
    assert lengths == {MAX_TOKENS} if ignore_eos else len(lengths) >= 2


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs(llm: LLM, model: Any, temperature: float) -> None:
    """Of prompts and of what is generated, within 1e-3; penalties and temperature do not show in them."""
    params = SamplingParams(
        temperature=temperature, presence_penalty=0.5, seed=1, max_tokens=MAX_TOKENS, ignore_eos=True,
        logprobs=3, prompt_logprobs=2,
    )  # fmt: skip
    for prompt, output in zip(
        PROMPTS, llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params), strict=True
    ):
        token_ids = [*prompt, *output.outputs[0].token_ids]
        with torch.inference_mode():
            expected = model(torch.tensor([token_ids])).logits[0].log_softmax(-1).numpy()
        assert output.prompt_logprobs is not None
        assert output.outputs[0].logprobs is not None
        reported = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        assert reported[0] is None
        assert len(reported) == len(token_ids)
        for position in range(1, len(token_ids)):
            entry, row = reported[position], expected[position - 1]
            assert entry is not None
            assert token_ids[position] in entry
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[token_id], abs=1e-3)
                # Nearly equal ones may swap ranks.
                assert (
                    (row > row[token_id] + 1e-3).sum() < logprob.rank <= (row >= row[token_id] - 1e-3).sum()
                )
            top = sorted(entry.values(), key=lambda logprob: logprob.rank)
            count = 2 if position < len(prompt) else 3
            assert [logprob.rank for logprob in top[:count]] == list(range(1, count + 1))
