"""Ollama's API, over plain HTTP."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from datetime import datetime
from typing import Any

import jsonschema
import pytest
from tests.server.plain_http import answer, call, lines, wait_until_idle
from tests.server.process import ServerProcess

from hexad import LLM, SamplingParams
from hexad.server.chat import ChatMessage, ToolCall
from hexad.server.ollama import _message, _Reply
from hexad.server.ollama_schemas import ChatRequest

MODEL = "smollm2:135m"
MESSAGES = [{"role": "user", "content": "Say hello."}]
GREEDY = {"num_predict": 12, "temperature": 0, "repeat_penalty": 1}
COUNTS = ("prompt_eval_count", "eval_count")
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def generate(server: ServerProcess, prompt: str = "Say hello.", **body: Any) -> Any:
    given = {"model": MODEL, "prompt": prompt, "stream": False, "options": GREEDY, **body}
    return answer(server, "/api/generate", given)


def chat(server: ServerProcess, **body: Any) -> Any:
    given = {"model": MODEL, "messages": MESSAGES, "stream": False, "options": GREEDY, **body}
    return answer(server, "/api/chat", given)


def test_answers(server: ServerProcess, llm: LLM) -> None:
    (output,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12))
    text, num_prompt = output.outputs[0].text, len(output.prompt_token_ids)
    for found in (generate(server), chat(server)):
        said = found["response"] if "response" in found else found["message"]["content"]
        assert said == text
        assert (found["model"], found["done"]) == (MODEL, True)
        assert found["prompt_eval_count"] == num_prompt
        assert found["eval_count"] == len(output.outputs[0].token_ids)
        assert all(isinstance(found[name], int) for name in DURATIONS)
        assert found["total_duration"] >= found["prompt_eval_duration"] + found["eval_duration"] > 1e6
        assert datetime.fromisoformat(found["created_at"]).tzinfo is not None
    assert chat(server)["message"]["role"] == "assistant"
    assert generate(server, options={**GREEDY, "num_predict": 2})["done_reason"] == "length"
    assert generate(server, options={**GREEDY, "num_predict": -1, "stop": ["!"]})["done_reason"] == "stop"
    system = [{"role": "system", "content": "Answer in French."}, *MESSAGES]
    assert (
        generate(server, system="Answer in French.")["response"]
        == (chat(server, messages=system)["message"]["content"])
    )


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_a_stream_is_the_whole(server: ServerProcess, path: str) -> None:
    body = {"model": MODEL, "prompt": "Say hello.", "messages": MESSAGES, "options": GREEDY}
    whole = answer(server, path, {**body, "stream": False})
    *pieces, last = [json.loads(line) for line in lines(server, path, body)]

    def said(value: Any) -> str:
        return str(value["response"] if "response" in value else value["message"]["content"])

    assert "".join(map(said, pieces)) == said(whole)
    assert len(pieces) > 3
    assert not any(piece["done"] for piece in pieces)
    assert (said(last), last["done"], last["done_reason"]) == ("", True, whole["done_reason"])
    assert [last[name] for name in COUNTS] == [whole[name] for name in COUNTS]
    assert last.keys() == whole.keys()


def test_defaults_and_order_are_ollamas(server: ServerProcess, llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1, repeat_last_n=64, seed=5, max_tokens=16,
        samplers=["penalties", "top_k", "typical_p", "temperature", "top_p", "min_p"],
    )  # fmt: skip
    (output,) = llm.generate("Once upon a time", params)
    options = {"seed": 5, "num_predict": 16, "num_ctx": 2048, "num_thread": 8}
    found = generate(server, "Once upon a time", raw=True, options=options)
    assert found["response"] == output.outputs[0].text
    again = generate(
        server, "Once upon a time", raw=True, options={**options, "top_k": 3, "temperature": 1.5}
    )
    (output,) = llm.generate(
        "Once upon a time",
        SamplingParams(
            temperature=1.5, top_k=3, top_p=0.9, repetition_penalty=1.1, repeat_last_n=64, seed=5,
            max_tokens=16, samplers=params.samplers,
        ),
    )  # fmt: skip
    assert again["response"] == output.outputs[0].text


def test_what_the_answer_must_match(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"enum": [1, 2]}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    options = {**GREEDY, "num_predict": 80}
    found = json.loads(chat(server, format=schema, options=options)["message"]["content"])
    jsonschema.validate(found, schema)
    jsonschema.validate(json.loads(generate(server, format=schema, options=options)["response"]), schema)
    begun = generate(server, format="json")["response"]
    assert begun.lstrip().startswith("{")
    assert generate(server, format="")["response"] == generate(server)["response"]


def test_an_empty_request_only_loads(server: ServerProcess) -> None:
    for body in ({}, {"prompt": "", "keep_alive": 0}, {"prompt": "", "keep_alive": "5m"}):
        found = answer(server, "/api/generate", {"model": MODEL, **body})
        assert (found["response"], found["done"], found["done_reason"]) == ("", True, "load")
    found = answer(server, "/api/chat", {"model": MODEL, "messages": []})
    assert (found["message"]["content"], found["done"], found["done_reason"]) == ("", True, "load")


def test_tools_reach_the_model(server: ServerProcess) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    plain, told = chat(server), chat(server, tools=[tool])
    assert told["prompt_eval_count"] > plain["prompt_eval_count"] + 20
    history = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_name": "weather", "content": "sunny"},
    ]
    assert chat(server, messages=history)["prompt_eval_count"] > plain["prompt_eval_count"] + 20


def test_messages_and_calls_in_ollamas_form() -> None:
    body = ChatRequest(model=MODEL, messages=[])
    calls = [ToolCall("1", "weather", '{"city":"Paris"}'), ToolCall("2", "odd", "[1")]
    said = _Reply(MODEL, body, in_chat=True)._said(ChatMessage("", "hm", calls))["message"]
    assert said == {
        "role": "assistant",
        "content": "",
        "thinking": "hm",
        "tool_calls": [
            {"function": {"index": 0, "name": "weather", "arguments": {"city": "Paris"}}},
            {"function": {"index": 1, "name": "odd", "arguments": {"arguments": "[1"}}},
        ],
    }
    message = {"role": "tool", "tool_name": "weather", "thinking": "hm", "images": []}
    assert _message(message) == {
        "role": "tool", "name": "weather", "reasoning_content": "hm", "content": "",
    }  # fmt: skip


def test_names_with_and_without_latest() -> None:
    with ServerProcess("--served-model-name", "tiny", "--max-model-len", "64") as tiny:
        for name in ("tiny", "tiny:latest"):
            body = {"model": name, "prompt": "Hi", "raw": True, "stream": False, "options": GREEDY}
            assert answer(tiny, "/api/generate", body)["model"] == name
            assert answer(tiny, "/api/show", {"name": name})["details"]["format"] == "gguf"
        (listed,) = answer(tiny, "/api/tags")["models"]
        assert listed["name"] == listed["model"] == "tiny:latest"
        assert call(tiny, "/api/chat", {"model": "tiny:1b", "messages": MESSAGES})[0] == 404
        long = {"model": "tiny", "messages": [{"role": "user", "content": "a b " * 60}]}
        status, value = call(tiny, "/api/chat", long)
        assert status == 400
        assert "with a context of 64" in value["error"]
        cut = {"model": "tiny", "input": "a b " * 60}
        assert answer(tiny, "/api/embed", cut)["prompt_eval_count"] == 64
        assert call(tiny, "/api/embed", {**cut, "truncate": False})[0] == 400


def test_what_the_server_says_of_itself(server: ServerProcess) -> None:
    assert tuple(map(int, answer(server, "/api/version")["version"].split("."))) >= (0, 6, 4)
    (listed,) = answer(server, "/api/tags")["models"]
    assert listed["details"] == {
        "parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"],
        "parameter_size": "134.52M", "quantization_level": "Q4_1",
    }  # fmt: skip
    assert 80e6 < listed["size"] < 110e6
    (running,) = answer(server, "/api/ps")["models"]
    assert running.items() >= listed.items()
    assert running["context_length"] == 8192
    shown = answer(server, "/api/show", {"model": MODEL})
    assert shown["model_info"]["general.parameter_count"] == 134_515_008
    assert shown["model_info"]["llama.block_count"] == 30
    assert shown["capabilities"] == ["completion", "tools"]
    assert "<|im_start|>" in shown["template"]


def test_embeddings(server: ServerProcess) -> None:
    found = answer(server, "/api/embed", {"model": MODEL, "input": ["Hello there", "Bye"]})
    assert [math.hypot(*vector) for vector in found["embeddings"]] == pytest.approx([1, 1])
    (vector,) = answer(server, "/api/embed", {"model": MODEL, "input": "Hello there"})["embeddings"]
    assert vector == found["embeddings"][0]
    assert answer(server, "/api/embeddings", {"model": MODEL, "prompt": "Hello there"}) == {
        "embedding": vector
    }
    (short,) = answer(server, "/api/embed", {"model": MODEL, "input": "Hello there", "dimensions": 8})[
        "embeddings"
    ]
    assert short == pytest.approx([value / math.hypot(*vector[:8]) for value in vector[:8]])
    assert answer(server, "/api/embed", {"model": MODEL, "input": []})["embeddings"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/api/generate", {"prompt": "a"}, 400, "model"),
        ("/api/generate", {"model": "other", "prompt": "a"}, 404, "model 'other' not found"),
        ("/api/generate", {"model": MODEL, "prompt": 7}, 400, "prompt"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "template": "x"}, 400, "template is not supported"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "context": [1]}, 400, "context"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "images": ["x"]}, 400, "images"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "suffix": "b"}, 400, "fill in the middle"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "format": "xml"}, 400, "format"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "options": {"top_k": "x"}}, 400, "top_k"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "options": {"tfs_z": 0.5}}, 400, "tfs_z"),
        ("/api/generate", {"model": MODEL, "prompt": "a", "think": True}, 400, "does not support thinking"),
        ("/api/generate", {"model": MODEL, "prompt": "\ud800", "raw": True}, 400, "Unicode"),
        ("/api/chat", {"model": MODEL, "messages": [{"role": 1}]}, 400, "role"),
        ("/api/chat", {"model": MODEL, "messages": [{"role": "user", "images": ["x"]}]}, 400, "images"),
        ("/api/chat", {"model": MODEL, "messages": "Hi"}, 400, "messages"),
        ("/api/chat", {"model": MODEL, "messages": MESSAGES, "tools": [{}]}, 400, "tools"),
        ("/api/chat", {"model": MODEL, "messages": MESSAGES, "format": {"type": "x"}}, 400, "x"),
        ("/api/show", {}, 400, "model"),
        ("/api/show", {"model": "other"}, 404, "not found"),
        ("/api/pull", {"model": "other"}, 404, "/api/pull"),
    ],
)
def test_errors(server: ServerProcess, path: str, body: dict[str, Any], status: int, says: str) -> None:
    found, value = call(server, path, body)
    assert (found, value.keys()) == (status, {"error"})
    assert says in value["error"]
    wait_until_idle(server)


@pytest.mark.parametrize("origin", [None, "http://evil.example"])
def test_json_need_not_be_called_json_but_by_web_pages(server: ServerProcess, origin: str | None) -> None:
    """As `curl -d` sends it. A page of another origin could send that without the browser asking first."""
    body = json.dumps({"model": MODEL, "prompt": "Say hello.", "stream": False, "options": GREEDY}).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded", **({"Origin": origin} if origin else {})}
    request = urllib.request.Request(server.url + "/api/generate", data=body, headers=headers)
    if origin is None:
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.loads(response.read())["response"] == generate(server)["response"]
    else:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        with caught.value as error:
            assert error.code == 400
