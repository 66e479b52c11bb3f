"""Structured output through the whole engine: random schemas with a random model, every kind with SmolLM2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.gguf_writer import llama, write
from tests.schemas import schemas

from hexad import LLM, SamplingParams
from hexad.checkpoint.gguf import GGUFFile
from hexad.errors import ParamsError
from hexad.outputs import CompletionOutput
from hexad.params import StructuredOutputsParams

FORMATS = jsonschema.FormatChecker(["uuid", "ipv4", "ipv6"])
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["cats", "dogs", "tea"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
LIST = r"""
root ::= item item item
item ::= "- " [^\n]{1,40} "\n"
"""
SUM = r"""
root ::= term ([-+] term){1,2} " = " number
term ::= number | "(" number [*/] number ")"
number ::= [1-9] [0-9]{0,2}
"""
LARK = """
start: greeting ("," name){1,3} "."
greeting: "Hello" | "Bye"
name: /[A-Z][a-z]{1,8}/
"""
TOOL = {
    "begin": "<add>",
    "schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    "end": "</add>",
}


@pytest.fixture(scope="module")
def random_llm(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model of random weights with SmolLM2's vocabulary: it knows nothing of JSON, or of ending."""
    with GGUFFile(smollm2_path) as file:
        kept = {
            key: value.tolist() if hasattr(value, "tolist") else value
            for key, value in file.metadata.items()
            if key.startswith("tokenizer.ggml.")
        }
    metadata, tensors = llama(vocab=len(kept["tokenizer.ggml.tokens"]), llama__context_length=1024)
    path = tmp_path_factory.mktemp("random") / "random.gguf"
    path.write_bytes(write(metadata | kept, tensors))
    with LLM(path) as llm:
        yield llm


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, max_model_len=512) as llm:
        yield llm


def generate(
    llm: LLM, prompts: list[str], specs: list[dict[str, Any]], **params: Any
) -> list[CompletionOutput]:
    """One output for each spec."""
    outputs = llm.generate(
        prompts,
        [
            SamplingParams(**{"seed": i} | params, structured_outputs=StructuredOutputsParams(**spec))
            for i, spec in enumerate(specs)
        ],
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]


def test_200_schemas_with_a_random_model(random_llm: LLM) -> None:
    asked = schemas(200)
    specs = [{"json": schema} for schema in asked]
    outputs = generate(random_llm, ["{}"] * 200, specs, temperature=1.0, max_tokens=600)
    assert {output.finish_reason for output in outputs} <= {"stop", "length"}
    for output, schema in zip(outputs, asked, strict=True):
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema, format_checker=FORMATS)
        else:
            assert len(output.token_ids) == 600
    assert sum(output.finish_reason == "stop" for output in outputs) >= 190


def test_a_text_that_is_cut_says_so(random_llm: LLM) -> None:
    spec = {"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 9}}
    (output,) = generate(random_llm, ["x"], [spec], max_tokens=5)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 5


def test_a_schema_does_not_change_its_neighbours(random_llm: LLM) -> None:
    prompts = ["a", "b", "c", "d"]
    plain = SamplingParams(seed=7, max_tokens=24, ignore_eos=True)
    bound = SamplingParams(
        seed=7, max_tokens=60, structured_outputs=StructuredOutputsParams(regex="[a-z ]{20}")
    )
    mixed = random_llm.generate(prompts, [plain, bound, plain, bound], use_tqdm=False)
    alone = [
        random_llm.generate(prompt, params, use_tqdm=False)[0]
        for prompt, params in zip(prompts, [plain, bound, plain, bound], strict=True)
    ]
    assert [o.outputs[0].token_ids for o in mixed] == [o.outputs[0].token_ids for o in alone]
    assert all(re.fullmatch("[a-z ]{20}", mixed[i].outputs[0].text) for i in (1, 3))


def test_every_sequence_of_a_request_keeps_to_it(random_llm: LLM) -> None:
    params = SamplingParams(
        n=4, seed=1, max_tokens=60, structured_outputs=StructuredOutputsParams(regex="[0-9]{2}-[a-f]{3,9}")
    )
    (output,) = random_llm.generate("x", params, use_tqdm=False)
    texts = [each.text for each in output.outputs]
    assert all(re.fullmatch("[0-9]{2}-[a-f]{3,9}", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_with_smollm2(smollm2: LLM, temperature: float) -> None:
    asked = {
        "A person as JSON: ": {"json": PERSON},
        "The date of the first landing on the moon, as YYYY-MM-DD: ": {
            "regex": r"(19|20)\d\d-[01][0-9]-[0-3][0-9]"
        },
        "Is the sky green? Answer with one word: ": {"choice": ["yes", "no", "<|im_end|>"]},
        "A list of fruits:\n": {"grammar": LIST},
        "A sum: ": {"grammar": SUM},
        "A greeting: ": {"grammar": LARK},
        "Add 1 and 2: ": {"structural_tag": json.dumps({"structures": [TOOL], "triggers": ["<add>"]})},
    }
    outputs = generate(smollm2, list(asked), list(asked.values()), temperature=temperature, max_tokens=200)
    person, date, choice, fruits, equation, greeting, tagged = outputs
    assert all(output.finish_reason == "stop" for output in outputs[:-1])
    jsonschema.validate(json.loads(person.text), PERSON)
    assert re.fullmatch(r"(19|20)\d\d-[01][0-9]-[0-3][0-9]", date.text)
    assert choice.text in ("yes", "no", "<|im_end|>")
    assert re.fullmatch(r"(- [^\n]{1,40}\n){3}", fruits.text)
    term = r"([1-9]\d{0,2}|\([1-9]\d{0,2}[*/][1-9]\d{0,2}\))"
    assert re.fullmatch(rf"{term}([-+]{term}){{1,2}} = [1-9]\d{{0,2}}", equation.text)
    assert re.fullmatch(r"(Hello|Bye)(,[A-Z][a-z]{1,8}){1,3}\.", greeting.text)
    called = re.findall(r"<add>(.*?)(?:</add>|$)", tagged.text, re.DOTALL)
    assert tagged.finish_reason == "length" or all(json.loads(call) is not None for call in called)


def test_a_forced_tag_with_smollm2(smollm2: LLM) -> None:
    content = {"type": "json_schema", "json_schema": TOOL["schema"]}
    format = {
        "type": "triggered_tags",
        "triggers": ["<add>"],
        "tags": [{"type": "tag", "begin": "<add>", "content": content, "end": "</add>"}],
        "at_least_one": True,
        "stop_after_first": True,
    }
    spec = {"structural_tag": json.dumps({"type": "structural_tag", "format": format})}
    prompt = "To add 1 and 2 I write <add>[1, 2]</add>. To add 3 and 4 I write"
    (output,) = generate(smollm2, [prompt], [spec], temperature=0.0, max_tokens=60)
    assert output.finish_reason == "stop"
    assert json.loads(output.text.partition("<add>")[2].removesuffix("</add>")) is not None


def test_what_does_not_compile_is_refused_before_anything_runs(smollm2: LLM) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json={"not": {}}))
    with pytest.raises(ParamsError, match="Unimplemented keys"):
        smollm2.generate(["a", "b"], [SamplingParams(max_tokens=2), params], use_tqdm=False)
    assert smollm2.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished
