"""/tokenize and /detokenize, which vLLM and llama-server share, and vLLM's /load."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.plain_http import answer, call
from tests.server.process import ServerProcess

from hexad import LLM

TEXT = "Hé, 世界 😀!"


def test_tokenize_as_vllm_has_it(server: ServerProcess, llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    found = answer(server, "/tokenize", {"model": "smollm2:135m", "prompt": TEXT, "return_token_strs": True})
    assert found["tokens"] == tokenizer.encode(TEXT)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 8192)
    assert found["token_strs"] == [tokenizer.token_text(i) for i in found["tokens"]]
    assert "token_strs" not in answer(server, "/tokenize", {"prompt": TEXT})
    messages = [{"role": "user", "content": "Hi"}]
    found = answer(server, "/tokenize", {"messages": messages})
    assert found["tokens"] == tokenizer.apply_chat_template(messages, tokenize=True)
    found = answer(server, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert found["tokens"] == tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=False
    )
    ended = [*messages, {"role": "assistant", "content": "Well,"}]
    found = answer(server, "/tokenize", {"messages": ended, "continue_final_message": True})
    assert tokenizer.decode(found["tokens"], skip_special=False).endswith("assistant\nWell,")


def test_tokenize_as_llama_server_has_it(server: ServerProcess, llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    found = answer(server, "/tokenize", {"content": TEXT})
    assert found == {"tokens": tokenizer.encode(TEXT, add_special=False)}
    pieces = answer(server, "/tokenize", {"content": TEXT, "with_pieces": True})["tokens"]
    assert [piece["id"] for piece in pieces] == found["tokens"]
    parts = [p.encode() if isinstance(p, str) else bytes(p) for p in (piece["piece"] for piece in pieces)]
    assert b"".join(parts).decode() == TEXT
    assert any(isinstance(piece["piece"], list) for piece in pieces)  # characters in parts
    assert answer(server, "/tokenize", {"content": "<|im_end|>"}) == {"tokens": [2]}
    assert answer(server, "/tokenize", {"content": ""}) == {"tokens": []}
    assert answer(server, "/tokenize", {"content": "plain", "parse_special": False})["tokens"]
    status, value = call(server, "/tokenize", {"content": "<|im_end|>", "parse_special": False})
    assert (status, value["error"]["param"]) == (400, "parse_special")


def test_detokenize_answers_both(server: ServerProcess, llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(TEXT + "<|im_end|>")
    found = answer(server, "/detokenize", {"tokens": ids})
    assert found == {"content": TEXT + "<|im_end|>", "prompt": TEXT + "<|im_end|>"}
    assert answer(server, "/detokenize", {"tokens": []})["prompt"] == ""


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/tokenize", {}, 400, "content, prompt and messages"),
        ("/tokenize", {"content": "a", "prompt": "a"}, 400, "content and prompt"),
        ("/tokenize", {"prompt": 7}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "other"),
        ("/tokenize", {"prompt": "x" * 2_000_000}, 400, "characters"),
        ("/tokenize", {"content": "\ud800"}, 400, "Unicode"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/detokenize", {"tokens": [-1]}, 400, "from 0 to 49151, not -1"),
        ("/detokenize", {"tokens": [49152]}, 400, "not 49152"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "other"),
    ],
)
def test_errors(server: ServerProcess, path: str, body: dict[str, Any], status: int, says: str) -> None:
    found, value = call(server, path, body)
    assert (found, value["error"]["code"]) == (status, status)
    assert says in value["error"]["message"]


def test_load(server: ServerProcess) -> None:
    assert answer(server, "/load") == {"server_load": 0}
