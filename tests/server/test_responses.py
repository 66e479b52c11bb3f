"""OpenAI's Responses API through the official client: items, events, tools, and what is stored."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tests.server.process import ServerProcess

from hexad.server.response_store import ResponseStore, StoredResponse

MODEL = "smollm2:135m"
QUESTION = "What is the capital of France?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_text(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, metadata={"a": "b"})
    assert "Paris" in response.output_text
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.metadata == {"a": "b"}
    (message,) = response.output
    assert message.type == "message"
    assert message.status == "completed"
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == response.usage.input_tokens
    count = client.responses.input_tokens.count(model=MODEL, input=QUESTION)
    assert count.input_tokens == response.usage.input_tokens


def test_input_forms(client: openai.OpenAI) -> None:
    """The same conversation in several forms is the same to the model."""
    given: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 8}
    system, user = "Be brief.", QUESTION
    forms: list[Any] = [
        {"instructions": system, "input": user},
        {"input": [{"role": "developer", "content": system}, {"role": "user", "content": user}]},
        {
            "input": [
                {"type": "message", "role": "system", "content": [{"type": "input_text", "text": system}]},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": user}]},
            ]
        },
    ]
    responses = [client.responses.create(**given, **form) for form in forms]
    assert len({response.output_text for response in responses}) == 1
    assert len({response.usage.input_tokens for response in responses if response.usage}) == 1


def test_events(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "input": QUESTION, "temperature": 0}
    whole = client.responses.create(**given)
    with client.responses.create(**given, stream=True) as stream:
        events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-4].text == events[-3].part.text == whole.output_text
    final = events[-1].response
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]
    assert events[0].response.id == final.id
    assert events[0].response.status == "in_progress"
    item_ids = {event.item_id for event in events if hasattr(event, "item_id")}
    assert item_ids == {final.output[0].id}
    with client.responses.stream(**given) as managed:
        assert managed.get_final_response().output_text == whole.output_text


def test_incomplete(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 3}
    response = client.responses.create(**given)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 3
    with client.responses.create(**given, stream=True) as stream:
        *_, last = stream
    assert last.type == "response.incomplete"


def test_logprobs(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 5}
    asked: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response: Any = client.responses.create(**given, **asked)
    logprobs = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == response.output_text
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)
    with client.responses.create(**given, **asked, stream=True) as stream:
        events: list[Any] = list(stream)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [entry.token for event in deltas for entry in event.logprobs] == [
        entry.token for entry in logprobs
    ]


def test_store(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="My name is Ann.", temperature=0, max_output_tokens=8)
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(
        model=MODEL, previous_response_id=first.id, input="And yours?", temperature=0, max_output_tokens=8
    )
    assert second.previous_response_id == first.id
    texts = ["My name is Ann.", first.output_text, "And yours?"]
    messages: Any = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    spelled_out = client.responses.create(model=MODEL, input=messages, temperature=0, max_output_tokens=8)
    assert second.output_text == spelled_out.output_text
    assert second.usage is not None
    assert spelled_out.usage is not None
    assert second.usage.input_tokens == spelled_out.usage.input_tokens
    items: list[Any] = list(client.responses.input_items.list(second.id, order="asc", limit=2))
    assert [item.content[0].text for item in items] == texts
    newest: Any = client.responses.input_items.list(second.id, limit=1).data
    assert [item.content[0].text for item in newest] == texts[-1:]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, previous_response_id=first.id, input="Hi")
    assert caught.value.code == "previous_response_not_found"
    assert client.responses.retrieve(second.id).output_text == second.output_text
    third = client.responses.create(
        model=MODEL, previous_response_id=second.id, input="Bye.", max_output_tokens=2, store=False
    )
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(third.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(second.id)


def test_store_is_bounded(strict_client: openai.OpenAI) -> None:
    ids = [strict_client.responses.create(model=MODEL, input="Hi", max_output_tokens=1).id for _ in range(3)]
    with pytest.raises(openai.NotFoundError):
        strict_client.responses.retrieve(ids[0])
    assert [strict_client.responses.retrieve(id).id for id in ids[1:]] == ids[1:]


def test_store_bounds() -> None:
    store = ResponseStore(most=3, max_bytes=100)
    for i in range(4):
        store.put(f"r{i}", StoredResponse(b"x" * 10, b"y" * 10))
    assert store.get("r0") is None
    assert store.get("r1") is not None  # used: now the newest
    store.put("large", StoredResponse(b"x" * 50, b"y" * 20))
    assert [store.get(id) is not None for id in ("r1", "r2", "r3", "large")] == [True, False, False, True]
    store.put("too large", StoredResponse(b"x" * 101, b""))
    assert store.get("too large") is None
    assert store.get("large") is not None
    assert store.delete("large")
    assert not store.delete("large")
    store.put("r1", StoredResponse(b"x" * 100, b""))  # in its own place
    assert store.get("r1") is not None


def test_tools_and_the_loop(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_output_tokens": 60}
    choice: Any = {"type": "function", "name": "get_weather"}
    first = client.responses.create(**given, input="Is it warm in Rome?", tool_choice=choice)
    (call,) = first.output
    assert call.type == "function_call"
    assert call.status == "completed"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    chained = client.responses.create(**given, previous_response_id=first.id, input=[result])
    assert chained.output_text
    items: Any = [{"role": "user", "content": "Is it warm in Rome?"}, call.model_dump(), result]
    assert client.responses.create(**given, input=items).output_text == chained.output_text
    with client.responses.create(
        **given, input="Is it warm in Rome?", tool_choice=choice, stream=True
    ) as stream:
        events: list[Any] = list(stream)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == call.arguments == done[0].arguments
    assert len(deltas) > 3
    with pytest.raises(openai.BadRequestError, match="call_x"):
        client.responses.create(**given, input=[result | {"call_id": "call_x"}])
    limited: Any = {"type": "allowed_tools", "mode": "required", "tools": [choice]}
    other = WEATHER | {"name": "other"}
    allowed = client.responses.create(
        **given | {"tools": [other, WEATHER]}, input="Hi", tool_choice=limited, parallel_tool_calls=False
    )
    assert [item.name for item in allowed.output if item.type == "function_call"] == ["get_weather"]


def test_a_call_cut_off(client: openai.OpenAI) -> None:
    """It is said to be incomplete, and a conversation can go on after it."""
    given: Any = {"model": MODEL, "tools": [WEATHER], "temperature": 0}
    first = client.responses.create(**given, input="Rome?", tool_choice="required", max_output_tokens=18)
    (call,) = first.output
    assert call.type == "function_call"
    assert (first.status, call.status) == ("incomplete", "incomplete")
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(call.arguments)
    after = client.responses.create(
        **given, previous_response_id=first.id, input="Never mind.", max_output_tokens=4
    )
    assert after.output_text


def test_text_between_calls(client: openai.OpenAI) -> None:
    call = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "Rome"\}\}\n</tool_call>'
    given: Any = {
        "model": MODEL,
        "input": QUESTION,
        "tools": [WEATHER],
        "extra_body": {"structured_outputs": {"regex": rf"First\.\n{call}\nSecond\.\n{call}"}},
    }
    kinds = ["message", "function_call", "message", "function_call"]
    whole = client.responses.create(**given)
    assert [item.type for item in whole.output] == kinds
    assert whole.output_text == "First.Second."
    with client.responses.stream(**given) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == kinds
    added: list[Any] = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == [0, 1, 2, 3]


class Answer(BaseModel):
    city: Literal["Paris", "Rome"]
    sure: bool


def test_structured_output(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 60}
    parsed = client.responses.parse(**given, text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)
    assert parsed.text is not None
    with client.responses.stream(**given, text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_reasoning(strict_client: openai.OpenAI) -> None:
    regex = r"<think>\nLet me see\.\n</think>\n\nYes\."
    given: Any = {"model": MODEL, "input": QUESTION, "extra_body": {"structured_outputs": {"regex": regex}}}
    whole: Any = strict_client.responses.create(**given)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "Let me see."
    assert whole.output_text == "Yes."
    assert 2 <= whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
    with strict_client.responses.stream(**given) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Let me see."
    assert final.output_text == "Yes."
    items: Any = [{"role": "user", "content": QUESTION}, *(item.model_dump() for item in whole.output)]
    again = [*items, {"role": "user", "content": "Sure?"}]
    assert strict_client.responses.create(model=MODEL, input=again, max_output_tokens=2).output_text


def test_full_and_late(strict_client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "input": QUESTION, "extra_body": {"ignore_eos": True}}
    with strict_client.responses.create(**given, stream=True) as stream:
        next(stream)
        with pytest.raises(openai.RateLimitError):
            strict_client.responses.create(model=MODEL, input="Hi", max_output_tokens=1)
        *_, last = stream
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert "3 seconds" in last.response.error.message


def test_hanging_up_ends_it(strict_client: openai.OpenAI) -> None:
    """The only place is free again, long before the time that a request may take."""
    given: Any = {"model": MODEL, "input": QUESTION, "extra_body": {"ignore_eos": True}}

    def wait() -> None:
        deadline = time.monotonic() + 2
        while True:
            try:
                strict_client.responses.create(model=MODEL, input="Hi", max_output_tokens=1)
                return
            except openai.RateLimitError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    with strict_client.responses.create(**given, stream=True) as stream:
        next(stream)
    wait()
    with pytest.raises(openai.APITimeoutError):
        strict_client.responses.create(**given, timeout=0.3)
    wait()


@pytest.mark.parametrize(
    ("wrong", "param", "message"),
    [
        ({"background": True}, "background", "background"),
        ({"conversation": "conv_1"}, "conversation", "conversation"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt"),
        ({"n": 2}, "n", "must be 1"),
        ({"input": []}, "input", "empty"),
        ({"input": 7}, "input", "string"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input", r"input\[0\]\.role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input",
            r"input\[0\]\.content\[0\].*input_image",
        ),
        ({"input": [{"role": "user"}]}, "input", r"input\[0\]\.content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input", "call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}},
            "tool_choice",
            "get_weather",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"temperature": 5}, "temperature", "equal to 2"),
        ({"previous_response_id": "resp_0"}, "previous_response_id", "no response"),
        ({"input": "Hi", "metadata": {"a": 1}}, "metadata", "string"),
    ],
)
def test_refused(client: openai.OpenAI, wrong: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.post("/responses", body={"model": MODEL, "input": "Hi"} | wrong, cast_to=object)
    assert caught.value.param == param


def test_surrogates(server: ServerProcess) -> None:
    """Half a character is refused in a prompt, and does no harm in what is only handed back. The official
    client cannot send it."""

    def post(**body: Any) -> Any:
        request = urllib.request.Request(
            f"{server.url}/v1/responses",
            json.dumps({"model": MODEL, "max_output_tokens": 1, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    tool = WEATHER | {"parameters": {"type": "object", "title": "\ud83d"}}
    response = post(input="Hi", tools=[tool], tool_choice="none")
    assert response["tools"][0]["parameters"]["title"] == "?"
    for wrong in ("\ud83d", [{"role": "user", "content": "\ud83d"}]):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(input=wrong)
        with caught.value as error:
            assert error.code == 400
            assert "unicode" in error.read().decode().lower()


def test_async_client(server: ServerProcess, client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 6}

    async def main() -> str:
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
            client.responses.stream(**given) as stream,
        ):
            return "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])

    assert asyncio.run(main()) == client.responses.create(**given).output_text
