"""OpenAI's API through the official client: models, completions, chat, embeddings, and errors."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tests.server.process import ServerProcess

MODEL = "smollm2:135m"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {"type": "string", "enum": ["Paris", "Rome"]}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "hexad"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.models.retrieve("gpt-9")


def test_completions_streamed_and_whole(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "prompt": ["The capital of France is", "One, two,"], "max_tokens": 8}
    whole = client.completions.create(**given, temperature=0)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert "Paris" in whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 16
    texts = ["", ""]
    usage = None
    options: Any = {"include_usage": True}
    for chunk in client.completions.create(**given, temperature=0, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 16)


@pytest.mark.parametrize("chat", [False, True])
def test_usage_as_it_grows(client: openai.OpenAI, chat: bool) -> None:
    given: Any = {"model": MODEL, "max_tokens": 6, "temperature": 0, "stream": True}
    given["stream_options"] = {"continuous_usage_stats": True}
    chunks: Any
    if chat:
        messages: Any = [{"role": "user", "content": "Count to ten."}]
        chunks = client.chat.completions.create(**given, messages=messages)
    else:
        chunks = client.completions.create(**given, prompt="One, two, three,")
    usages = [chunk.usage for chunk in chunks]
    generated = [usage.completion_tokens for usage in usages]
    assert generated == sorted(generated)
    assert (len(generated) > 3, generated[0] <= 1, generated[-1]) == (True, True, 6)
    assert {usage.total_tokens - usage.completion_tokens for usage in usages} == {usages[0].prompt_tokens}


def test_echo_logprobs(client: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    echo = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=2
    ).choices[0]
    assert echo.text.startswith(prompt)
    assert echo.logprobs is not None
    assert echo.logprobs.tokens is not None
    assert "".join(echo.logprobs.tokens) == echo.text
    assert echo.logprobs.token_logprobs is not None
    assert echo.logprobs.token_logprobs[0] is None
    assert echo.logprobs.text_offset is not None
    for offset, token in zip(echo.logprobs.text_offset, echo.logprobs.tokens, strict=True):
        assert echo.text[offset:].startswith(token)
    assert echo.logprobs.top_logprobs is not None
    assert all(len(top) in (2, 3) for top in echo.logprobs.top_logprobs[1:])
    none = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, temperature=0, logprobs=0)
    assert none.choices[0].logprobs is not None
    assert none.choices[0].logprobs.token_logprobs == pytest.approx(echo.logprobs.token_logprobs[-3:])
    assert none.choices[0].logprobs.tokens == echo.logprobs.tokens[-3:]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, None),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ],
)
def test_completions_refused(client: openai.OpenAI, wrong: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", extra_body=wrong)
    assert caught.value.param == param


def test_stop_reason(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "prompt": "One, two, three, four,", "temperature": 0, "max_tokens": 12}
    stopped = client.completions.create(**given, stop=["six", "xyz"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == "six"  # type: ignore[attr-defined]
    assert "five" in stopped.text
    assert "six" not in stopped.text


def test_several_seeded(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 1.5, "seed": 7}
    first = client.chat.completions.create(**given, n=3)
    again = client.chat.completions.create(**given, n=3)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    usage = None
    options: Any = {"include_usage": True}
    for chunk in client.chat.completions.create(**given, n=3, stream=True, stream_options=options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    assert streamed == texts
    assert first.usage is not None
    assert usage is not None
    assert usage.completion_tokens == first.usage.completion_tokens
    assert usage.prompt_tokens == first.usage.prompt_tokens


def test_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 16}
    whole = client.chat.completions.create(**given).choices[0]
    assert "Paris" in (whole.message.content or "")
    assert whole.finish_reason == "stop"
    with client.chat.completions.stream(**given) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert events.count("content.done") == 1
    assert final.message.content == whole.message.content
    assert final.finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 6}
    whole = client.chat.completions.create(**given, logprobs=True, top_logprobs=3).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert "".join(entry.token for entry in whole.logprobs.content) == whole.message.content
    for entry in whole.logprobs.content:
        assert [entry.token] == [top.token for top in entry.top_logprobs][:1]  # greedy: the likeliest
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes or []).decode() == entry.token
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**given, logprobs=True, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs and choice.logprobs.content) or []
    assert streamed == whole.logprobs.content


def test_developer_is_the_system(client: openai.OpenAI) -> None:
    def answer(role: str) -> tuple[str | None, int]:
        messages: Any = [{"role": role, "content": "Answer in capital letters."}, *QUESTION]
        completion = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_completion_tokens=8, store=True, metadata={}
        )
        assert completion.usage is not None
        return completion.choices[0].message.content, completion.usage.prompt_tokens

    assert answer("developer") == answer("system")


def test_tools_forced_and_the_loop(client: openai.OpenAI) -> None:
    messages = list(QUESTION)
    given: Any = {"model": MODEL, "tools": [WEATHER, CLOCK], "temperature": 0, "max_completion_tokens": 80}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    first = client.chat.completions.create(**given, messages=messages, tool_choice=named).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.tool_calls is not None
    (call,) = first.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in CITY["enum"]
    messages.append(first.message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 25 degrees."})
    last = client.chat.completions.create(**given, messages=messages).choices[0]
    assert last.message.content
    parts = [{"type": "text", "text": "Sunny, 25 degrees."}]
    messages[-1]["content"] = parts  # type: ignore[typeddict-item]
    assert client.chat.completions.create(**given, messages=messages).choices[0] == last
    streamed = client.chat.completions.stream(**given, messages=list(QUESTION), tool_choice=named)
    with streamed as stream:
        (same,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert same.function.name == "get_weather"
    assert same.function.arguments == call.function.arguments
    required = client.chat.completions.create(
        **given, messages=messages, tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    assert len(required.message.tool_calls or []) == 1


def test_tools_auto(client: openai.OpenAI) -> None:
    """What the model says of its own accord is read; it is made to say it, small as it is."""
    regex = (
        r'Well\.\n<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "(Paris|Rome)"\}\}'
        r'\n</tool_call>\n<tool_call>\n\{"name": "get_time", "arguments": \{\}\}\n</tool_call>'
    )
    given: Any = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [WEATHER, CLOCK],
        "temperature": 0,
        "extra_body": {"structured_outputs": {"regex": regex}},
    }
    whole = client.chat.completions.create(**given).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "Well."
    calls = whole.message.tool_calls or []
    assert [call.function.name for call in calls if call.type == "function"] == ["get_weather", "get_time"]
    assert len({call.id for call in calls}) == 2
    with client.chat.completions.stream(**given) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Well."
    assert [call.function.arguments for call in final.message.tool_calls or []] == [
        call.function.arguments for call in calls if call.type == "function"
    ]
    one = client.chat.completions.create(**given, parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls or []) == 1
    none = client.chat.completions.create(**given, tool_choice="none").choices[0]
    assert none.finish_reason == "stop"
    assert "<tool_call>" in (none.message.content or "")


class Answer(BaseModel):
    city: Literal["Paris", "Rome"]
    sure: bool


def test_structured_output(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 60}
    parsed = client.chat.completions.parse(**given, response_format=Answer).choices[0].message
    assert isinstance(parsed.parsed, Answer)
    with client.chat.completions.stream(**given, response_format=Answer) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.parsed
    free = client.chat.completions.create(
        **given | {"max_completion_tokens": 200}, response_format={"type": "json_object"}
    ).choices[0]
    if free.finish_reason == "stop":
        assert isinstance(json.loads(free.message.content or ""), dict)
    chosen = client.completions.create(
        model=MODEL, prompt="Red or", extra_body={"structured_outputs": {"choice": ["blue", "green"]}}
    )
    assert chosen.choices[0].text in ("blue", "green")


def test_beam_search(client: openai.OpenAI) -> None:
    beams: Any = {"use_beam_search": True, "length_penalty": 0.5}
    given: Any = {"model": MODEL, "max_tokens": 6, "n": 3, "temperature": 0, "extra_body": beams}
    completion = client.completions.create(**given, prompt="The capital of France is")
    texts = [choice.text for choice in completion.choices]
    assert len(set(texts)) == 3
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 18
    chat = client.chat.completions.create(**given, messages=QUESTION)
    assert len({choice.message.content for choice in chat.choices}) == 3
    for more, param in (({"stream": True}, "stream"), ({"stop": "x"}, "stop"), ({"logprobs": 1}, "logprobs")):
        with pytest.raises(openai.BadRequestError, match="beam") as caught:
            client.completions.create(**given, prompt="x", **more)
        assert caught.value.param == param


def test_beams_are_the_likeliest(client: openai.OpenAI) -> None:
    """The best of many beams is at least as likely as the greedy text, by the model's own logprobs."""
    prompt = "Once upon a time"
    given: Any = {"model": MODEL, "max_tokens": 5, "temperature": 0}

    def logprob(text: str) -> float:
        echo: Any = {"prompt": prompt + text, "echo": True, "logprobs": 0, "max_tokens": 0}
        logprobs = client.completions.create(model=MODEL, **echo).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        return sum(filter(None, logprobs.token_logprobs))

    best = client.completions.create(**given, prompt=prompt, n=8, extra_body={"use_beam_search": True})
    greedy = client.completions.create(**given, prompt=prompt)
    assert logprob(best.choices[0].text) >= logprob(greedy.choices[0].text) - 1e-3


def cosine(a: list[float], b: list[float]) -> float:
    return sum(map(float.__mul__, a, b)) / math.hypot(*a) / math.hypot(*b)


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["The cat sleeps on the sofa.", "A cat is asleep on a couch.", "def f(x): return x ** 2"]
    made = client.embeddings.create(model=MODEL, input=texts)  # in base64, unless one asks for floats
    cats, others, code = (entry.embedding for entry in made.data)
    assert [entry.index for entry in made.data] == [0, 1, 2]
    assert math.hypot(*cats) == pytest.approx(1, abs=1e-5)
    assert cosine(cats, others) > cosine(cats, code)
    assert made.usage.prompt_tokens == made.usage.total_tokens > 20
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(cats, abs=1e-6)
    ids = [504, 3575, 282, 4649, 314]
    by_ids = client.embeddings.create(model=MODEL, input=[ids, ids[:2]])
    assert by_ids.usage.prompt_tokens == 7
    single = client.embeddings.create(model=MODEL, input=ids, extra_body={"truncate_prompt_tokens": 2})
    assert single.data[0].embedding == pytest.approx(by_ids.data[1].embedding, abs=1e-6)
    last = client.embeddings.create(model=MODEL, input=ids, extra_body={"pooling": "last"})
    assert cosine(last.data[0].embedding, by_ids.data[0].embedding) < 0.999
    many = client.embeddings.create(model=MODEL, input=[[504, i + 300] for i in range(130)])
    assert [entry.index for entry in many.data] == list(range(130))
    assert len({tuple(entry.embedding) for entry in many.data}) == 130


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"dimensions": 64}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [49152]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
    ],
)
def test_embeddings_refused(client: openai.OpenAI, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="a", extra_body=wrong)
    assert caught.value.param == param


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
AUDIO = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]


@pytest.mark.parametrize(
    ("wrong", "param", "message"),
    [
        ({"n": 2, "temperature": 0}, "n", "temperature"),
        ({"n": 129}, "n", "128"),
        ({"temperature": 3}, "temperature", "equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "equal to 1"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 100}, "logprobs", "20"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"function_call": "auto"}, "function_call", "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice", "required"),
        ({"tools": [{"type": "function"}]}, None, "name"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "get_weather",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"modalities": ["text", "audio"]}, "modalities", "text"),
        ({"messages": IMAGE}, "messages", r"messages\[0\].*content.*\[0\].*image_url"),
        ({"messages": AUDIO}, "messages", r"messages\[0\].*content.*\[0\].*input_audio"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, None, "8192"),
        ({"use_beam_search": True, "stream": True}, "stream", "beam"),
        ({"use_beam_search": True, "tools": [CLOCK], "tool_choice": "required"}, "tool_choice", "beam"),
    ],
)
def test_refused(client: openai.OpenAI, wrong: dict[str, Any], param: str | None, message: str) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "max_completion_tokens": 2} | wrong
    extra = {key: given.pop(key) for key in wrong if key != "messages"}
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**given, extra_body=extra)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_keys(strict_server: ServerProcess) -> None:
    with (
        openai.OpenAI(base_url=f"{strict_server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_full_and_late(strict_client: openai.OpenAI) -> None:
    """One runs longer than it may; meanwhile another is turned away at once."""
    endless: Any = {"ignore_eos": True}
    stream = strict_client.completions.create(
        model=MODEL, prompt="On and on", max_tokens=8000, stream=True, extra_body=endless
    )
    with stream:
        next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            strict_client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.APIError, match="3 seconds"):
            list(stream)
    assert strict_client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices


def test_reasoning(strict_client: openai.OpenAI) -> None:
    regex = r"<think>\nLet me see\.\n</think>\n\nYes\."
    given: Any = {
        "model": MODEL,
        "messages": QUESTION,
        "extra_body": {"structured_outputs": {"regex": regex}},
    }
    message: Any = strict_client.chat.completions.create(**given).choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me see.", "Yes.")
    texts = ["", ""]
    for chunk in strict_client.chat.completions.create(**given, stream=True):
        delta: Any = chunk.choices[0].delta
        texts[0] += getattr(delta, "reasoning_content", None) or ""
        texts[1] += delta.content or ""
    assert texts == ["Let me see.", "Yes."]


def test_async_client(server: ServerProcess, client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "temperature": 0, "max_completion_tokens": 6}

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:

            async def ask(number: int) -> str:
                messages: Any = [{"role": "user", "content": f"Count to {number}."}]
                text = ""
                async for chunk in await client.chat.completions.create(
                    **given, messages=messages, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*map(ask, range(8)))

    for i, text in enumerate(asyncio.run(main())):
        messages: Any = [{"role": "user", "content": f"Count to {i}."}]
        alone = client.chat.completions.create(**given, messages=messages)
        assert alone.choices[0].message.content == text
