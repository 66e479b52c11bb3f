"""llama-server's own API, over plain HTTP."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from tests.server.plain_http import answer, call, events, wait_until_idle
from tests.server.process import ServerProcess

from hexad import LLM, SamplingParams
from hexad.checkpoint.store import resolve

PROMPT = "The capital of France is"
GREEDY = {"prompt": PROMPT, "n_predict": 12, "temperature": 0}


def complete(server: ServerProcess, **body: Any) -> Any:
    return answer(server, "/completion", {**GREEDY, **body})


def test_an_answer_has_all_fields(server: ServerProcess, llm: LLM) -> None:
    found = complete(server, return_tokens=True, cache_prompt=False)
    (output,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    assert found["content"] == output.outputs[0].text
    assert found["tokens"] == output.outputs[0].token_ids
    assert found["prompt"] == PROMPT
    assert (found["stop"], found["stop_type"], found["stopping_word"]) == (True, "limit", "")
    assert (found["index"], found["truncated"], found["model"]) == (0, False, "smollm2:135m")
    assert (found["tokens_predicted"], found["tokens_evaluated"], found["tokens_cached"]) == (12, 5, 0)
    times = found["timings"]
    assert (times["prompt_n"], times["predicted_n"], times["cache_n"]) == (5, 12, 0)
    for what in ("prompt", "predicted"):
        assert times[f"{what}_ms"] > 0
        assert times[f"{what}_per_second"] == pytest.approx(times[f"{what}_n"] / times[f"{what}_ms"] * 1e3)
        assert times[f"{what}_per_token_ms"] == pytest.approx(times[f"{what}_ms"] / times[f"{what}_n"])
    assert found["generation_settings"]["n_predict"] == 12
    assert found["generation_settings"]["temperature"] == 0


def test_defaults_and_order_are_llama_cpps(server: ServerProcess, llm: LLM) -> None:
    order = ["penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature"]
    params = SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repeat_last_n=64, seed=11, max_tokens=16,
        samplers=order,
    )  # fmt: skip
    (output,) = llm.generate("Once upon a time", params)
    found = answer(server, "/completion", {"prompt": "Once upon a time", "n_predict": 16, "seed": 11})
    assert found["content"] == output.outputs[0].text
    shown = answer(server, "/props")["default_generation_settings"]["params"]
    assert (shown["temperature"], shown["top_k"], shown["top_p"], shown["min_p"]) == (0.8, 40, 0.95, 0.05)
    assert (shown["n_predict"], shown["repeat_last_n"], shown["seed"]) == (-1, 64, 2**32 - 1)
    assert shown["samplers"] == [name.replace("typical_p", "typ_p") for name in order]


def test_samplers_are_named_as_llama_cpp_does(server: ServerProcess, llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.5, top_k=5, seed=3, max_tokens=12, repetition_penalty=1.2, repeat_last_n=64,
        samplers=["temperature", "top_k", "penalties"],
    )  # fmt: skip
    (output,) = llm.generate(PROMPT, params)
    same = {"temperature": 1.5, "top_k": 5, "seed": 3, "repeat_penalty": 1.2}
    for samplers in (["temperature", "top_k", "penalties"], "tke"):
        assert complete(server, samplers=samplers, **same)["content"] == output.outputs[0].text
    # Beyond their ranges samplers are off, and a temperature below 0 is greedy.
    assert complete(server, temperature=-1)["content"] == complete(server)["content"]
    off = {"top_k": -1, "top_p": 1.5, "min_p": -1, "typical_p": 2, "mirostat": 7}
    wide = complete(server, temperature=1, seed=5, **off)
    assert (wide["generation_settings"]["top_k"], wide["generation_settings"]["top_p"]) == (0, 1)
    assert wide["generation_settings"]["mirostat"] == 0


@pytest.mark.parametrize("more", [{}, {"stop": ["\n"]}, {"n_probs": 2, "timings_per_token": True}])
def test_a_stream_is_the_whole(server: ServerProcess, more: dict[str, Any]) -> None:
    whole = complete(server, return_tokens=True, **more)
    *chunks, last = events(server, "/completion", {**GREEDY, **more, "stream": True})
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [token for chunk in chunks for token in chunk["tokens"]] == whole["tokens"]
    assert all(chunk["stop"] is False for chunk in chunks)
    assert [chunk["tokens_predicted"] for chunk in chunks][-1] == whole["tokens_predicted"]
    assert (last["content"], last["tokens"], last["stop"]) == ("", [], True)
    for name in ("stop_type", "stopping_word", "tokens_predicted", "tokens_evaluated", "has_new_line"):
        assert last[name] == whole[name]
    if "n_probs" in more:
        found = [entry for chunk in chunks for entry in chunk["completion_probabilities"]]
        assert found == whole["completion_probabilities"]
        assert all("timings" in chunk for chunk in chunks)


def test_why_it_stopped(server: ServerProcess) -> None:
    word = complete(server, stop=["", "\n"])
    assert (word["stop_type"], word["stopping_word"]) == ("word", "\n")
    assert not word["content"].endswith("\n")
    chat = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    end = complete(server, prompt=chat, n_predict=200)
    assert (end["stop_type"], end["stopping_word"], end["truncated"]) == ("eos", "", False)
    on = complete(
        server, prompt=chat, n_predict=end["tokens_predicted"] + 8, ignore_eos=True, return_tokens=True
    )
    assert on["stop_type"] == "limit"
    assert not {0, 2} & set(on["tokens"])  # it is not drawn, either


def test_prompts_in_all_forms(server: ServerProcess) -> None:
    ids = answer(server, "/tokenize", {"content": PROMPT, "add_special": True})["tokens"]
    expected = complete(server)["content"]
    first, rest = answer(server, "/tokenize", {"content": "The"})["tokens"], " capital of France is"
    for prompt in (PROMPT, ids, [*first, rest], {"prompt_string": PROMPT}):
        assert complete(server, prompt=prompt)["content"] == expected
    found = complete(server, prompt=[PROMPT, "Hello", ids, [*first, rest]])
    assert [one["index"] for one in found] == [0, 1, 2, 3]
    assert [one["content"] == expected for one in found] == [True, False, True, True]
    assert found[1]["content"] == complete(server, prompt="Hello")["content"]
    chunks = events(server, "/completion", {**GREEDY, "prompt": [PROMPT, "Hello"], "stream": True})
    for i in (0, 1):
        assert "".join(c["content"] for c in chunks if c["index"] == i) == found[i]["content"]
        assert [c["stop"] for c in chunks if c["index"] == i][-1]
    several = complete(server, temperature=1, seed=1, n_cmpl=2, n_predict=6)
    assert [one["index"] for one in several] == [0, 1]


def test_no_tokens_compute_the_prompt(server: ServerProcess) -> None:
    text = "A prompt that is warmed up, so that the next one like it is there already. " * 4
    first = complete(server, prompt=text, n_predict=0)
    assert (first["content"], first["tokens_predicted"]) == ("", 0)
    assert first["generation_settings"]["n_predict"] == 0
    again = complete(server, prompt=text, n_predict=1)
    assert again["timings"]["cache_n"] == again["tokens_cached"] >= 32
    assert again["timings"]["prompt_n"] == again["tokens_evaluated"] - again["tokens_cached"]
    assert complete(server, prompt=text, n_predict=1, cache_prompt=False)["tokens_cached"] == 0


def test_what_the_text_must_match(server: ServerProcess) -> None:
    grammar = 'root ::= "yes " [0-9]{3}'
    assert re.fullmatch("yes [0-9]{3}", complete(server, grammar=grammar)["content"])
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["a", "b"]}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    found = complete(server, json_schema=schema, n_predict=100, grammar="")["content"]
    jsonschema.validate(json.loads(found), schema)


def test_biases_and_bans(server: ServerProcess) -> None:
    paris = answer(server, "/tokenize", {"content": " Paris"})["tokens"]
    assert complete(server)["content"].startswith(" Paris")
    for bias in ([[paris[0], False]], [[" Paris", False]], {" Paris": False}, {str(paris[0]): False}):
        assert paris[0] not in complete(server, logit_bias=bias, return_tokens=True)["tokens"]
    london = answer(server, "/tokenize", {"content": " London"})["tokens"]
    assert complete(server, logit_bias=[[" London", 100]], n_predict=1)["content"] == " London"
    assert complete(server, logit_bias={str(london[0]): 100}, n_predict=1)["content"] == " London"


def test_probabilities(server: ServerProcess) -> None:
    found = complete(server, n_probs=3, n_predict=4)["completion_probabilities"]
    assert len(found) == 4
    for entry in found:
        top = entry["top_logprobs"]
        assert len(top) == 3
        assert [one["logprob"] for one in top] == sorted((one["logprob"] for one in top), reverse=True)
        assert top[0]["id"] == entry["id"]  # greedy
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert sum(math.exp(one["logprob"]) for one in top) <= 1 + 1e-6


def test_chosen_fields(server: ServerProcess) -> None:
    fields = ["content", "generation_settings/n_predict", "timings", "no/such", "prompt/no"]
    found = complete(server, response_fields=fields)
    assert found.keys() == {"content", "n_predict", "timings"}
    assert found["n_predict"] == 12


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "prompt"),
        ({"prompt": []}, 400, "empty list"),
        ({"prompt": [1.5]}, 400, "token ids and texts"),
        ({"prompt": [[]]}, 400, "token ids and texts"),
        ({"prompt": [True]}, 400, "token ids and texts"),
        ({"prompt": [10**9]}, 400, "outside the vocabulary"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, 400, "multimodal_data"),
        ({"prompt": "\ud800"}, 400, "Unicode"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "a", "temperature": 5}, 400, "temperature: Input should be less than or equal to 2"),
        ({"prompt": "a", "model": "other"}, 404, "other"),
        ({"prompt": "a", "n_predict": -3}, 400, "n_predict"),
        ({"prompt": "a", "n_probs": 1000}, 400, "logprobs must be at most 20"),
        ({"prompt": "a", "samplers": ["magic"]}, 400, "magic"),
        ({"prompt": "a", "grammar": "root ::= ("}, 400, "grammar"),
        ({"prompt": "a", "grammar": "root ::= []", "json_schema": {}}, 400, "exclude each other"),
        ({"prompt": "a", "json_schema": 7}, 400, "json_schema"),
        ({"prompt": "a", "logit_bias": [[[1], 2]]}, 400, "logit_bias"),
        ({"prompt": "a", "logit_bias": [1]}, 400, "logit_bias"),
        ({"prompt": "a", "logit_bias": [[1, "much"]]}, 400, "logit_bias"),
        ({"prompt": "a", "post_sampling_probs": True}, 400, "post_sampling_probs is not supported"),
        ({"prompt": "a", "lora": [{"id": 0, "scale": 1}]}, 400, "lora is not supported"),
        ({"prompt": "a", "n_cmpl": 1000}, 400, "at most 128"),
    ],
)
def test_errors(server: ServerProcess, body: dict[str, Any], status: int, says: str) -> None:
    found, value = call(server, "/completion", body)
    assert found == status
    error = value["error"]
    assert error["code"] == status
    assert says in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_a_prompt_that_is_too_long(server: ServerProcess) -> None:
    for prompt in ("a b " * 6000, "x" * 2_000_000, [81] * 9000):
        status, value = call(server, "/completion", {"prompt": prompt, "n_predict": 1})
        assert (status, value["error"]["type"]) == (400, "exceed_context_size_error")
    wait_until_idle(server)


def test_the_context_can_be_used_up() -> None:
    with ServerProcess("--max-model-len", "64", "--max-num-seqs", "4") as small:
        body = {"prompt": [504] * 60, "temperature": 0, "ignore_eos": True}
        found = answer(small, "/completion", body)
        assert (found["tokens_predicted"], found["stop_type"], found["truncated"]) == (4, "limit", True)
        assert len(answer(small, "/slots")) == 4


def test_other_names(server: ServerProcess) -> None:
    assert answer(server, "/completions", GREEDY)["content"] == complete(server)["content"]
    assert answer(server, "/models") == answer(server, "/v1/models")


def test_what_the_server_says_of_itself(server: ServerProcess) -> None:
    found = answer(server, "/props")
    assert found["total_slots"] == 64
    assert found["default_generation_settings"]["n_ctx"] == 8192
    assert found["model_path"] == found["model_alias"] == "smollm2:135m"
    assert "<|im_start|>" in found["chat_template"]
    assert (found["bos_token"], found["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    slots = answer(server, "/slots")
    assert [slot["id"] for slot in slots] == list(range(64))
    assert {slot["n_ctx"] for slot in slots} == {8192}


def test_a_conversation_as_a_prompt(server: ServerProcess) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    found = answer(server, "/apply-template", {"messages": messages})["prompt"]
    assert found == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    status, value = call(server, "/apply-template", {"messages": [{"role": 7}]})
    assert (status, value["error"]["type"]) == (400, "invalid_request_error")


def test_embeddings(server: ServerProcess) -> None:
    (one,) = answer(server, "/embedding", {"content": "Hello there"})
    (vector,) = one["embedding"]
    assert one["index"] == 0
    assert math.hypot(*vector) == pytest.approx(1)
    two = answer(server, "/embeddings", {"input": ["Hello there", "Bye"]})
    assert two[0]["embedding"] == [vector]
    norms = {
        norm: answer(server, "/embedding", {"content": "Hello there", "embd_normalize": norm})[0][
            "embedding"
        ][0]
        for norm in (-1, 0, 1, 3)
    }
    assert math.hypot(*norms[-1]) > 1.5
    assert max(map(abs, norms[0])) == pytest.approx(32760)
    assert sum(map(abs, norms[1])) == pytest.approx(1)
    assert sum(abs(value) ** 3 for value in norms[3]) == pytest.approx(1)
    for found in norms.values():  # all of one direction
        assert [value / math.hypot(*found) for value in found] == pytest.approx(vector, abs=1e-5)
    assert call(server, "/embedding", {})[0] == 400


def test_a_model_that_cannot_fill_in(server: ServerProcess) -> None:
    status, value = call(server, "/infill", {"input_prefix": "a", "input_suffix": "b"})
    assert (status, value["error"]["type"]) == (400, "not_supported_error")


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of a model whose vocabulary has tokens to fill in the middle."""
    content = resolve("smollm2:135m").read_bytes()
    for old, new in (
        (b"<issue_closed>", b"<|fim_prefix|>"),
        (b"<jupyter_text>", b"<|fim_suffix|>"),
        (b"<jupyter_code>", b"<|fim_middle|>"),
    ):
        assert content.count(old) == 1
        content = content.replace(old, new)
    path = tmp_path_factory.mktemp("fim") / "fim.gguf"
    path.write_bytes(content)
    with ServerProcess("--max-model-len", "128", "--served-model-name", "fim", model=str(path)) as process:
        yield process


def test_filling_in(filler: ServerProcess) -> None:
    def expected(text: str) -> str:
        return str(answer(filler, "/completion", {**GREEDY, "prompt": text})["content"])

    body = {
        "input_prefix": "def f(a):\n",
        "input_suffix": "\n    return b",
        "n_predict": 12,
        "temperature": 0,
    }
    found = answer(filler, "/infill", body)
    text = "<|fim_prefix|>def f(a):\n<|fim_suffix|>\n    return b<|fim_middle|>"
    assert found["prompt"] == text
    assert found["content"] == expected(text)
    found = answer(filler, "/infill", {**body, "prompt": "    b ="})
    assert found["prompt"] == f"{text}    b ="
    files = [{"filename": "a.py", "text": "x = 1\n"}, {"text": "y = 2"}]
    found = answer(filler, "/infill", {**body, "input_extra": files})
    assert found["prompt"] == (
        f"<reponame>repository\n<file_sep>a.py\nx = 1\n<file_sep>tmp\ny = 2\n<file_sep>filename\n{text}"
    )
    *chunks, last = events(filler, "/infill", {**body, "stream": True})
    assert "".join(chunk["content"] for chunk in chunks) == answer(filler, "/infill", body)["content"]
    assert last["stop"]


def test_what_does_not_fit_is_left_out_around_the_middle(filler: ServerProcess) -> None:
    prefix, suffix = "".join(f"a{i} = 1\n" for i in range(90)), "".join(f"b{i} = 1\n" for i in range(90))
    body = {"input_prefix": prefix, "input_suffix": suffix, "n_predict": 28, "temperature": 0}
    files = [{"filename": "c.py", "text": "c = 3\n" * 50}]
    found = answer(filler, "/infill", {**body, "input_extra": files})
    assert 95 <= found["tokens_evaluated"] <= 100
    shown = re.fullmatch(r"<\|fim_prefix\|>(.*)<\|fim_suffix\|>(.*)<\|fim_middle\|>", found["prompt"], re.S)
    assert shown
    assert prefix.endswith(shown[1])
    assert suffix.startswith(shown[2])
    assert 2 * len(shown[2]) < len(shown[1])
    short = answer(filler, "/infill", {**body, "input_prefix": "a", "input_extra": files})
    assert len(short["prompt"]) > 0.8 * len(found["prompt"])  # the room is the suffix's then
    assert call(filler, "/infill", {"input_prefix": "a"})[0] == 400
