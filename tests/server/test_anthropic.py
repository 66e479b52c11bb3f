"""Anthropic's Messages API through the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from pydantic import BaseModel
from tests.server.conftest import KEY
from tests.server.process import ServerProcess

MODEL = "smollm2:135m"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK: Any = {"name": "get_time", "input_schema": {"type": "object", "additionalProperties": False}}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def strict_client(strict_server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=strict_server.url, api_key=KEY, max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_streamed_and_whole(client: anthropic.Anthropic) -> None:
    given: Any = {"model": MODEL, "max_tokens": 20, "messages": QUESTION, "extra_body": GREEDY}
    whole = client.messages.create(**given)
    assert "Paris" in text_of(whole)
    assert (whole.role, whole.type, whole.stop_reason) == ("assistant", "message", "end_turn")
    with client.messages.create(**given, stream=True) as raw:
        events: list[Any] = list(raw)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event.delta.text for event in events[2:-3]) == text_of(whole)
    with client.messages.stream(**given) as stream:
        final = stream.get_final_message()
    assert text_of(final) == text_of(whole)
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION)
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_stops(client: anthropic.Anthropic) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "extra_body": GREEDY}
    cut = client.messages.create(**given, max_tokens=2)
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 2)
    stopped = client.messages.create(**given, max_tokens=20, stop_sequences=["Paris", "@@"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    assert "Paris" not in text_of(stopped)
    with client.messages.stream(**given, max_tokens=20, stop_sequences=["Paris"]) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "Paris")
    assert text_of(final) == text_of(stopped)


def test_forms_of_a_conversation(client: anthropic.Anthropic) -> None:
    """System and contents as strings or blocks, and turns in pieces, are the same to the model."""
    given: Any = {"model": MODEL, "max_tokens": 8, "extra_body": GREEDY}
    text = [{"type": "text", "text": "Hello."}, {"type": "text", "text": "Who are you?"}]
    forms: list[Any] = [
        {"system": "Be brief.", "messages": [{"role": "user", "content": "Hello.\nWho are you?"}]},
        {
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": text}],
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *({"role": "user", "content": [block]} for block in text),
            ]
        },
    ]
    messages = [client.messages.create(**given, **form) for form in forms]
    assert len({text_of(message) for message in messages}) == 1
    counts = {client.messages.count_tokens(model=MODEL, **form).input_tokens for form in forms}
    assert len(counts) == 1


def test_prefill(client: anthropic.Anthropic) -> None:
    begun: Any = [*QUESTION, {"role": "assistant", "content": "In one word: the capital is"}]
    given: Any = {"model": MODEL, "max_tokens": 3, "messages": begun, "extra_body": GREEDY}
    assert text_of(client.messages.create(**given)).startswith(" ")
    closed = client.messages.count_tokens(model=MODEL, messages=[*begun, *QUESTION]).input_tokens
    assert client.messages.count_tokens(model=MODEL, messages=begun).input_tokens < closed - 5


def test_tools_and_the_loop(client: anthropic.Anthropic) -> None:
    given: Any = {"model": MODEL, "max_tokens": 60, "tools": [WEATHER, CLOCK], "extra_body": GREEDY}
    choice: Any = {"type": "tool", "name": "get_weather"}
    first = client.messages.create(**given, messages=QUESTION, tool_choice=choice)
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert call.type == "tool_use"
    assert call.name == "get_weather"
    assert call.input["city"] in ("Paris", "Rome")
    with client.messages.stream(**given, messages=QUESTION, tool_choice=choice) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (same,) = stream.get_final_message().content
    assert len(pieces) > 3
    assert same.type == "tool_use"
    assert same.input == call.input
    turns = [*QUESTION, {"role": "assistant", "content": [block.model_dump() for block in first.content]}]

    def answer(content: Any, **more: Any) -> Any:
        result = {"type": "tool_result", "tool_use_id": call.id, "content": content, **more}
        return client.messages.create(**given, messages=[*turns, {"role": "user", "content": [result]}])

    last = answer("Sunny, 25 degrees.")
    assert last.content
    assert answer([{"type": "text", "text": "Sunny, 25 degrees."}]).content == last.content
    one: Any = {"type": "any", "disable_parallel_tool_use": True}
    forced = client.messages.create(**given, messages=QUESTION, tool_choice=one)
    assert [block.type for block in forced.content] == ["tool_use"]
    none = client.messages.create(**given, messages=QUESTION, tool_choice={"type": "none"})
    assert [block.type for block in none.content] == ["text"]
    failed = {"type": "tool_result", "tool_use_id": call.id, "is_error": True, "content": "No signal."}
    both: Any = [*turns, {"role": "user", "content": [failed, {"type": "text", "text": "Try again."}]}]
    plain: Any = [*turns, {"role": "user", "content": [failed | {"is_error": False}]}]
    counts = [client.messages.count_tokens(model=MODEL, messages=m).input_tokens for m in (both, plain)]
    assert counts[0] > counts[1] + 2


def test_tools_auto(client: anthropic.Anthropic) -> None:
    """What the model says of its own accord is read; it is made to say it, small as it is."""
    calls = [
        r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "Rome"\}\}\n</tool_call>',
        r'<tool_call>\n\{"name": "get_time", "arguments": \{\}\}\n</tool_call>',
    ]
    given: Any = {
        "model": MODEL,
        "max_tokens": 100,
        "messages": QUESTION,
        "tools": [WEATHER, CLOCK],
        "extra_body": {"structured_outputs": {"regex": rf"Well\.\n{calls[0]}\n{calls[1]}"}},
    }
    whole = client.messages.create(**given)
    assert whole.stop_reason == "tool_use"
    assert [block.type for block in whole.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in whole.content if block.type == "tool_use"] == [{"city": "Rome"}, {}]
    with client.messages.stream(**given) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    for streamed, block in zip(final.content, whole.content, strict=True):
        assert streamed.model_dump(exclude={"id"}) == block.model_dump(exclude={"id"})


def test_thinking(strict_client: anthropic.Anthropic) -> None:
    regex = r"<think>\nLet me see\.\n</think>\n\nYes\."
    given: Any = {
        "model": MODEL,
        "max_tokens": 50,
        "messages": QUESTION,
        "extra_body": {"structured_outputs": {"regex": regex}},
    }
    whole = strict_client.messages.create(**given)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.content[0].type == "thinking"
    assert whole.content[0].thinking == "Let me see."
    assert text_of(whole) == "Yes."
    with strict_client.messages.stream(**given) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0] == whole.content[0]
    assert text_of(final) == "Yes."
    hidden = strict_client.messages.create(**given, thinking={"type": "disabled"})
    assert [block.type for block in hidden.content] == ["text"]
    budget: Any = {"type": "enabled", "budget_tokens": 16}
    assert strict_client.messages.create(
        model=MODEL, max_tokens=4, messages=QUESTION, thinking=budget
    ).content
    back: Any = [*QUESTION, {"role": "assistant", "content": whole.content}, *QUESTION]
    assert strict_client.messages.create(model=MODEL, max_tokens=2, messages=back).content


class Answer(BaseModel):
    city: Literal["Paris", "Rome"]
    sure: bool


def test_structured_output(client: anthropic.Anthropic) -> None:
    given: Any = {"model": MODEL, "max_tokens": 60, "messages": QUESTION, "extra_body": GREEDY}
    parsed = client.messages.parse(**given, output_format=Answer)
    assert isinstance(parsed.parsed_output, Answer)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]\.role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, r"messages\[0\]\.content\[0\].*'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\]\.text"),
        ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\]\.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x"}]}]},
            r"content\[0\].*tool_use.*user",
        ),
        ({"system": [IMAGE]}, r"system\[0\]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, r"tools\[0\]\.input_schema"),
        ({"tool_choice": {"type": "perhaps"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "get_weather"),
        ({"temperature": 5}, "temperature"),
        ({"top_k": "many"}, "top_k"),
        ({"stop_sequences": [""]}, "stop"),
        ({"n": 2}, "n must be 1"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, "8192"),
    ],
)
def test_refused(client: anthropic.Anthropic, wrong: dict[str, Any], message: str) -> None:
    body = {"model": MODEL, "max_tokens": 2, "messages": QUESTION} | wrong
    with pytest.raises(anthropic.BadRequestError, match=message) as caught:
        client.post("/v1/messages", body=body, cast_to=object)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    error: Any = caught.value.body
    assert error["type"] == "error"
    assert error["request_id"] == caught.value.request_id


def test_unknown_model(client: anthropic.Anthropic) -> None:
    for call in (client.messages.count_tokens, lambda **given: client.messages.create(max_tokens=1, **given)):
        with pytest.raises(anthropic.NotFoundError) as caught:
            call(model="claude-9", messages=QUESTION)
        assert caught.value.type == "not_found_error"


def test_keys(strict_server: ServerProcess) -> None:
    with (
        anthropic.Anthropic(base_url=strict_server.url, api_key="wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        client.messages.create(model=MODEL, max_tokens=1, messages=QUESTION)
    assert caught.value.type == "authentication_error"


def test_full_and_late(strict_client: anthropic.Anthropic) -> None:
    given: Any = {
        "model": MODEL,
        "max_tokens": 8000,
        "messages": QUESTION,
        "extra_body": {"ignore_eos": True},
    }
    with strict_client.messages.create(**given, stream=True) as stream:
        next(stream)
        with pytest.raises(anthropic.RateLimitError) as caught:
            strict_client.messages.create(model=MODEL, max_tokens=1, messages=QUESTION)
        assert caught.value.type == "rate_limit_error"
        with pytest.raises(anthropic.APIStatusError, match="3 seconds") as late:
            list(stream)
    assert late.value.type == "timeout_error"


def test_async_client(server: ServerProcess, client: anthropic.Anthropic) -> None:
    given: Any = {"model": MODEL, "max_tokens": 6, "messages": QUESTION, "extra_body": GREEDY}

    async def main() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client,
            client.messages.stream(**given) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(main()) == text_of(client.messages.create(**given))
