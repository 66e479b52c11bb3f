"""Prompts in every form, conversations, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hexad.errors import ParamsError, PromptError
from hexad.prompts import (
    PromptReader,
    TokenPrompt,
    conversation_list,
    naming_prompt,
    prompt_list,
    read_each,
)


class Characters:
    """A token is a character; 0 begins a text, but not a rendered conversation."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [0] * add_special + [ord(character) for character in text]

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return json.dumps([messages, options])


@pytest.fixture
def reader() -> PromptReader:
    tokenizer: Any = Characters()
    return PromptReader(tokenizer)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", TokenPrompt("ab", [0, 97, 98])),
        ("", TokenPrompt("", [0])),
        ([97, 98], TokenPrompt(None, [97, 98])),
        ((97, 98), TokenPrompt(None, [97, 98])),
        (range(3), TokenPrompt(None, [0, 1, 2])),
        ([], TokenPrompt(None, [])),  # for the engine to refuse
        ({"prompt": "ab"}, TokenPrompt("ab", [0, 97, 98])),
        ({"prompt_token_ids": [97]}, TokenPrompt(None, [97])),
        ({"prompt": "shown", "prompt_token_ids": [97]}, TokenPrompt("shown", [97])),
        ({"prompt": "a", "cache_salt": "mine"}, TokenPrompt("a", [0, 97], "mine")),
        ({"prompt_token_ids": [1], "cache_salt": None}, TokenPrompt(None, [1])),
    ],
)
def test_reads(reader: PromptReader, prompt: Any, expected: TokenPrompt) -> None:
    read = reader.read(prompt)
    assert read == expected
    assert read.token_ids is not prompt, "the caller's list must stay the caller's"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (17, "not int 17"),
        (None, "not NoneType None"),
        (b"abc", "not bytes"),
        ([1, 2.5], r"not list \[1, 2\.5\]"),
        ([1, True], "not list"),
        ([1, "a"], "not list"),
        ({}, r"not \[\]"),
        ({"text": "abc"}, r"not \['text'\]"),
        ({"prompt": "abc", "salt": "x"}, r"not \['prompt', 'salt'\]"),
        ({"cache_salt": "x"}, r"not \['cache_salt'\]"),
        ({"prompt": 5}, "'prompt' must be a str, not int 5"),
        ({"prompt": "abc", "cache_salt": 5}, "'cache_salt' must be a str, not int 5"),
        ({"prompt_token_ids": "abc"}, "not str 'abc'"),
    ],
)
def test_refuses(reader: PromptReader, prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        reader.read(prompt)


def test_a_conversation_is_rendered_and_gets_no_special_tokens(reader: PromptReader) -> None:
    messages = [{"role": "user", "content": "hi"}]
    read = reader.chat(messages, tools=None, add_generation_prompt=False)
    assert json.loads(read.text or "") == [
        messages,
        {"tools": None, "add_generation_prompt": False, "tokenize": False},
    ]
    assert "".join(map(chr, read.token_ids)) == read.text
    with pytest.raises(PromptError, match="must not set 'messages'"):
        reader.chat(messages, variables={"messages": []})
    override = reader.chat(messages, add_generation_prompt=True, variables={"add_generation_prompt": False})
    assert json.loads(override.text or "")[1] == {"add_generation_prompt": False, "tokenize": False}


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (("a", "b"), ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
        ([[1], "a"], [[1], "a"]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ([], []),
        (None, [None]),
    ],
)
def test_one_prompt_or_many(prompts: Any, expected: list[Any]) -> None:
    assert prompt_list(prompts) == expected


def test_one_conversation_or_many() -> None:
    one = [{"role": "user", "content": "hi"}]
    assert conversation_list(one) == [one]
    assert conversation_list([one, one]) == [one, one]
    assert conversation_list([]) == []
    assert conversation_list([one, "hi"]) == [[one, "hi"]]  # which the chat template refuses


def test_an_error_says_which_of_several_prompts_it_is_about(reader: PromptReader) -> None:
    assert [read.token_ids for read in read_each([[1], [2]], reader.read)] == [[1], [2]]
    with pytest.raises(PromptError) as caught:
        read_each(["good", 5], reader.read)
    assert caught.value.__notes__ == ["It is prompt 1 of the 2 given, counted from 0."]
    with pytest.raises(PromptError) as caught:
        read_each([5], reader.read)
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(ParamsError) as params_error, naming_prompt(7, 9):
        raise ParamsError("wrong")
    assert params_error.value.__notes__ == ["It is prompt 7 of the 9 given, counted from 0."]
