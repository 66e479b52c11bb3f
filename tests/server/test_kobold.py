"""KoboldAI's API with koboldcpp's extensions, over plain HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from typing import Any

import jsonschema
import pytest
from tests.server.plain_http import answer, call, events, lines, wait_until_idle
from tests.server.process import ServerProcess

from hexad import LLM, SamplingParams
from hexad.server.kobold import Sessions

PROMPT = "The capital of France is"
GREEDY = {"prompt": PROMPT, "max_length": 12, "temperature": 0}
ENDLESS = {"prompt": "Once", "max_length": 6000, "ban_eos_token": True, "sampler_seed": 1}


def generate(server: ServerProcess, **body: Any) -> Any:
    (result,) = answer(server, "/api/v1/generate", {**GREEDY, **body})["results"]
    return result


def test_generates(server: ServerProcess, llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    found = generate(server)
    assert found["text"] == output.outputs[0].text
    assert (found["finish_reason"], found["prompt_tokens"], found["completion_tokens"]) == ("length", 5, 12)
    assert answer(server, "/api/latest/generate", GREEDY)["results"] == [found]


def test_defaults_and_order_are_koboldcpps(server: ServerProcess, llm: LLM) -> None:
    same = {
        "temperature": 0.75,
        "top_k": 100,
        "top_p": 0.92,
        "repeat_last_n": 320,
        "seed": 9,
        "max_tokens": 16,
    }
    order = ["dry", "penalties", "top_k", "typical_p", "top_p", "min_p", "temperature", "top_n_sigma", "xtc"]
    (output,) = llm.generate("Once upon a time", SamplingParams(samplers=order, **same))
    body = {"prompt": "Once upon a time", "max_length": 16, "sampler_seed": 9}
    assert answer(server, "/api/v1/generate", body)["results"][0]["text"] == output.outputs[0].text


def test_samplers_by_number_and_by_other_names(server: ServerProcess, llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.6, top_k=20, top_p=0.8, min_p=0.02, repetition_penalty=1.3, repeat_last_n=8, seed=4,
        max_tokens=16, typical_p=0.9, presence_penalty=0.5, top_n_sigma=3, dry_multiplier=0.8,
        dry_penalty_last_n=320, dry_sequence_breakers=["\n"], xtc_probability=0.5, xtc_threshold=0.2,
        samplers=[
            "dry", "temperature", "top_n_sigma", "top_p", "min_p", "penalties", "top_k", "typical_p", "xtc",
        ],
    )  # fmt: skip
    (output,) = llm.generate(PROMPT, params)
    found = generate(
        server, temperature=1.6, top_k=20, top_p=0.8, min_p=0.02, rep_pen=1.3, rep_pen_range=8,
        sampler_seed=4, max_length=16, typical=0.9, presence_penalty=0.5, nsigma=3, dry_multiplier=0.8,
        xtc_probability=0.5, dry_sequence_breakers='["\\n"]', sampler_order=[5, 2, 6, 0, 4],
        rep_pen_slope=0.7, top_a=0, tfs=1, smoothing_factor=0,
    )  # fmt: skip
    assert found["text"] == output.outputs[0].text


@pytest.mark.parametrize(
    "more", [{}, {"stop_sequence": ["\n"]}, {"stop_sequence": ["\n"], "trim_stop": False}]
)
def test_a_stream_is_the_whole(server: ServerProcess, more: dict[str, Any]) -> None:
    whole = generate(server, **more)
    stream = list(lines(server, "/api/extra/generate/stream", {**GREEDY, **more}))
    assert stream[0::2] == ["event: message"] * (len(stream) // 2)
    found = [json.loads(line.removeprefix("data: ")) for line in stream[1::2]]
    assert "".join(event["token"] for event in found) == whole["text"]
    assert [event["finish_reason"] for event in found] == [None] * (len(found) - 1) + [whole["finish_reason"]]
    if more:
        assert whole["finish_reason"] == "stop"
        assert ("\n" in whole["text"]) is ("trim_stop" in more)


def test_memory_stays_when_the_prompt_is_too_long(server: ServerProcess) -> None:
    memory, story = "[ Paris is the capital. ]\n", "The cat sat on the mat and looked at the dog. " * 200
    limits = {"memory": memory, "prompt": story, "max_context_length": 80, "max_length": 16}
    found = generate(server, **limits)
    assert found["prompt_tokens"] == 64
    head = answer(server, "/api/extra/tokencount", {"prompt": memory})["ids"]
    tail = answer(server, "/api/extra/tokencount", {"prompt": story, "special": False})["ids"]
    ids = [*head, *tail[len(head) - 64 :]]
    expected = answer(server, "/completion", {"prompt": ids, "n_predict": 16, "temperature": 0})
    assert found["text"] == expected["content"]
    assert generate(server, prompt="", memory="", max_length=2)["prompt_tokens"] == 1


def test_what_is_longer_than_the_context_is_cut_down() -> None:
    with ServerProcess("--max-model-len", "96", "--api-key", "k") as small:
        small.key = "k"
        found = generate(small, prompt="x " * 900_000, max_context_length=10**6, max_length=8)
        assert (found["prompt_tokens"], found["completion_tokens"]) == (96 - 8, 8)
        story = "The cat sat on the mat. " * 90
        found = generate(small, prompt=story, max_length=10**6, ban_eos_token=True)
        assert (found["prompt_tokens"], found["completion_tokens"]) == (19, 77)
        found = generate(small, memory=story, prompt="Once upon", max_context_length=20)
        assert (found["prompt_tokens"], found["completion_tokens"]) == (16, 4)
        assert answer(small, "/api/extra/version")["protected"] is True
        small.key = ""
        status, value = call(small, "/api/v1/generate", GREEDY)
        assert (status, value["detail"]["type"]) == (401, "authentication_error")


def test_what_the_text_must_match(server: ServerProcess) -> None:
    assert re.fullmatch("[0-9]{4}", generate(server, grammar="root ::= [0-9]{4}")["text"])
    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}
    found = generate(server, grammar=json.dumps({**schema, "additionalProperties": False}), max_length=60)
    jsonschema.validate(json.loads(found["text"]), schema)


def test_bans_and_biases(server: ServerProcess) -> None:
    (paris,) = answer(server, "/api/extra/tokencount", {"prompt": " Paris"})["ids"]
    assert generate(server)["text"].startswith(" Paris")
    assert "Paris" not in generate(server, banned_tokens=["Paris"])["text"]
    assert not generate(server, custom_token_bans=f"x, {paris}")["text"].startswith(" Paris")
    assert not generate(server, logit_bias={str(paris): -100})["text"].startswith(" Paris")
    chat = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    ended = generate(server, prompt=chat, max_length=300)
    assert ended["finish_reason"] == "stop"
    length = ended["completion_tokens"] + 5
    for name in ("ban_eos_token", "use_default_badwordsids", "bypass_eos"):
        on = generate(server, prompt=chat, max_length=length, **{name: True})
        assert (on["finish_reason"], on["completion_tokens"]) == ("length", length)
    shown = generate(server, prompt=chat, max_length=length, bypass_eos=True, render_special=True)
    assert "<|im_end|>" in shown["text"]


def check(server: ServerProcess, **key: str) -> str:
    return str(answer(server, "/api/extra/generate/check", key or None)["results"][0]["text"])


def wait_for_text(server: ServerProcess, **key: str) -> str:
    deadline = time.monotonic() + 20
    while not (text := check(server, **key)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert text
    return text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_key_checks_and_aborts(server: ServerProcess, streamed: bool) -> None:
    found: dict[str, Any] = {}

    def run() -> None:
        body = {**ENDLESS, "genkey": "mine"}
        if streamed:
            got = events(server, "/api/extra/generate/stream", body)
            found["text"] = "".join(event["token"] for event in got)
            found["reason"] = got[-1]["finish_reason"]
        else:
            (result,) = answer(server, "/api/v1/generate", body)["results"]
            found["text"], found["reason"] = result["text"], result["finish_reason"]

    thread = threading.Thread(target=run)
    thread.start()
    early = wait_for_text(server, genkey="mine")
    later = check(server, genkey="mine")
    assert later.startswith(early)
    assert check(server, genkey="yours") == check(server) == ""  # nobody else sees it
    for stranger in ({"genkey": "yours"}, {}):
        assert answer(server, "/api/extra/abort", stranger) == {"success": "false", "done": "false"}
    perf = answer(server, "/api/extra/perf")
    assert perf["idle"] == 0
    assert answer(server, "/api/extra/abort", {"genkey": "mine"}) == {"success": "true", "done": "true"}
    thread.join(10)
    assert not thread.is_alive()
    assert found["text"].startswith(later)
    assert found["reason"] == "stop"
    wait_until_idle(server)
    assert check(server, genkey="mine") == ""
    assert answer(server, "/api/extra/perf")["total_gens"] > perf["total_gens"]


def test_without_a_key_only_the_only_request_is_ones_own(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stream = stack.enter_context(
                contextlib.closing(lines(server, "/api/extra/generate/stream", ENDLESS))
            )
            assert next(stream) == "event: message"
        assert answer(server, "/load")["server_load"] == 2
        assert check(server) == ""
        assert answer(server, "/api/extra/abort", {})["success"] == "false"
        assert answer(server, "/load")["server_load"] == 2
    wait_until_idle(server)  # the clients are gone


def test_the_only_request_needs_no_key(server: ServerProcess) -> None:
    stream = lines(server, "/api/extra/generate/stream", ENDLESS)
    next(stream)
    wait_for_text(server)
    assert answer(server, "/api/extra/abort", {})["success"] == "true"
    *_, last = stream
    assert json.loads(last.removeprefix("data: "))["finish_reason"] == "stop"
    wait_until_idle(server)


def test_an_abort_before_the_request_is_queued_holds() -> None:
    class Queued:
        closed = False

        def close(self) -> None:
            self.closed = True

    sessions, queued = Sessions(), Queued()
    with sessions.open("a") as session:
        (found,) = sessions.find("a")
        found.abort()
        session.begin(queued)  # type: ignore[arg-type]
        assert queued.closed
    assert sessions.find("a") == []


def test_a_request_that_fails_leaves_no_session() -> None:
    sessions = Sessions()
    with pytest.raises(KeyError), sessions.open(""):
        raise KeyError
    assert sessions.find("") == []


def test_what_the_server_says_of_itself(server: ServerProcess) -> None:
    for base in ("/api/v1", "/api/latest"):
        assert answer(server, f"{base}/model") == {"result": "smollm2:135m"}
        assert answer(server, f"{base}/info/version") == {"result": "1.2.5"}
        assert answer(server, f"{base}/config/max_context_length") == {"value": 8192}
        assert answer(server, f"{base}/config/max_length")["value"] > 0
        assert answer(server, f"{base}/config/soft_prompt") == {"value": ""}
        assert answer(server, f"{base}/config/soft_prompts_list") == {"values": []}
    assert answer(server, "/api/extra/true_max_context_length") == {"value": 8192}
    version = answer(server, "/api/extra/version")
    assert version["result"] == "KoboldCpp"
    assert tuple(map(int, version["version"].split("."))) >= (1, 60)  # streams, checks, counts tokens
    assert (version["llm"], version["txt2img"], version["protected"]) == (True, False, False)
    generate(server, max_length=4)
    perf = answer(server, "/api/extra/perf")
    assert (perf["last_token_count"], perf["queue"], perf["idle"], perf["stop_reason"]) == (4, 0, 1, 0)
    assert perf["last_eval_time"] == pytest.approx(perf["last_eval"] * 4 / 1e3)


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"prompt": 1}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, None),
        ({"prompt": "a", "max_length": 0}, 400, "max_length"),
        ({"prompt": "a", "temperature": "x"}, 400, "temperature"),
        ({"prompt": "a", "temperature": 3}, 400, "temperature"),
        ({"prompt": "a", "sampler_order": [7]}, 400, "sampler_order"),
        ({"prompt": "a", "top_a": 0.2}, 400, "top_a"),
        ({"prompt": "a", "tfs": 0.9}, 400, "tfs"),
        ({"prompt": "a", "smoothing_factor": 0.3}, 400, "smoothing_factor"),
        ({"prompt": "a", "images": ["x"]}, 400, "images"),
        ({"prompt": "a", "dry_sequence_breakers": "[", "dry_multiplier": 1}, 400, "dry_sequence_breakers"),
        ({"prompt": "a", "grammar": "root ::= ("}, 400, "structured_outputs"),
        ({"prompt": "a", "genkey": "k" * 300}, 400, "genkey"),
    ],
)
def test_errors(server: ServerProcess, body: dict[str, Any], status: int, field: str | None) -> None:
    for path in ("/api/v1/generate", "/api/latest/generate", "/api/extra/generate/stream"):
        found, value = call(server, path, body)
        assert found == status
        assert value["detail"]["msg"]
        assert value["detail"]["field"] == field
    wait_until_idle(server)
