"""Grammar: what each kind of structured output takes, what is refused, and masks in the background."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schemas import schemas

from hexad.checkpoint.tokenizer import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Tokenizer,
    byte_alphabet,
    tokenizer_from_gguf,
)
from hexad.errors import ParamsError
from hexad.params import StructuredOutputsParams
from hexad.runner import grammar as module
from hexad.runner.gbnf import escaped, gbnf_to_lark
from hexad.runner.grammar import Grammar, GrammarCompiler, MaskPool

BYTES = byte_alphabet()
WORDS = [
    '{"',
    '": ',
    '", "',
    '"}',
    "true",
    "false",
    "null",
    " the",
    "abab",
    "ba",
    "\n\n",
    "  ",
    "ß",
    "é",
    "日本",
    "</",
]
SPECIAL = {"<|end|>": CONTROL, "<|eot_id|>": CONTROL, "<|tool|>": CONTROL, "<think>": USER_DEFINED}
EXTRA = 70  # how much wider the logits are than the vocabulary


def make_tokenizer(pre: str = "gpt-2", **changes: Any) -> Tokenizer:
    """All bytes, some words, and SPECIAL; the first two of these end a generation."""
    tokens, merges = list(BYTES), []
    for word in WORDS:
        spelled = "".join(BYTES[byte] for byte in word.encode())
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in tokens:
                tokens.append(spelled[:end])
                merges.append(f"{spelled[: end - 1]} {spelled[end - 1]}")
    types = [NORMAL] * len(tokens) + list(SPECIAL.values())
    tokens += SPECIAL
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": tokens.index("<|end|>"),
    } | changes
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}
    return tokenizer_from_gguf({"general.architecture": "llama", **metadata}, Path("model.gguf"))


TOKENIZER = make_tokenizer()
COMPILER = GrammarCompiler(lambda: TOKENIZER, TOKENIZER.vocab_size + EXTRA)
WORDS_OF_MASK = (TOKENIZER.vocab_size + EXTRA + 31) // 32
END, TOOL = (TOKENIZER.encode(name)[0] for name in ("<|end|>", "<|tool|>"))


def compiled(**spec: Any) -> Grammar:
    return COMPILER.compile(StructuredOutputsParams(**spec))


def allowed(grammar: Grammar) -> set[int]:
    mask = np.full(WORDS_OF_MASK, 0xFFFFFFFF, np.uint32)
    grammar.fill_mask(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def takes(text: str, **spec: Any) -> bool:
    """Whether the text may be generated, by any tokens: where the grammar leaves no choice of text, only one
    spelling of it is allowed."""
    states = {0: compiled(**spec)}
    data = text.encode()
    for at in range(len(data)):
        if at not in states:
            continue
        for token_id in allowed(states[at]) - TOKENIZER.special_ids:
            piece = TOKENIZER.token_bytes(token_id)
            if at + len(piece) not in states and data.startswith(piece, at):
                states[at + len(piece)] = states[at].copy()
                states[at + len(piece)].accept(token_id)
    return len(data) in states and TOKENIZER.eos_ids <= allowed(states[len(data)])


def drawn(seed: int, most: int = 2000, **spec: Any) -> str | None:
    """A text of tokens drawn from those allowed; None if it does not end."""
    rng, grammar, tokens = random.Random(seed), compiled(**spec), []
    for _ in range(most):
        token_id = rng.choice(sorted(allowed(grammar)))
        grammar.accept(token_id)
        if token_id in TOKENIZER.eos_ids:
            assert grammar.finished
            return TOKENIZER.decode(tokens, skip_special=False)
        tokens.append(token_id)
    return None


def tag(begin: str, content: dict[str, Any], end: str) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def structural(format: Any) -> dict[str, str]:
    return {"structural_tag": json.dumps({"type": "structural_tag", "format": format})}


ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
LIST = r"""# one item a line
root ::= item+
item ::= "- " [^\r\n\x0b\x0c\x85\u2028\u2029]+ "\n"
"""
JSON = r"""
root   ::= value
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
    string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" char* "\"" ws
char   ::= [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
LARK = r"""
start: greeting ("," name)+ "!"
greeting: "hello" | "bye"
name: /[a-z]+/
"""
ANY, BOOLEAN = {"type": "any_text"}, {"type": "json_schema", "json_schema": {"type": "boolean"}}
TOOLS = {
    "type": "triggered_tags",
    "triggers": ["<f"],
    "tags": [tag("<f a>", BOOLEAN, "</f>"), tag("<f b>", ANY, "</f>")],
}
NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}
STRUCTURES = json.dumps(
    {
        "structures": [
            {"begin": "<f=a>", "schema": {"type": "integer", "minimum": 0, "maximum": 9}, "end": "</f>"},
            {"begin": "<f=b>", "schema": {"const": "x"}, "end": "</f>"},
        ],
        "triggers": ["<f="],
    }
)

# What is asked for, texts that match, and texts that do not.
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "json": (
        {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        ['{"a":1}', '{ "a": -12 }', '{\n  "a": 1\n}', '{"a":1,"b":null}'],
        ["", "{}", '{"a":1.5}', '{"a":1', ' {"a":1}', '{"a":1} ', '{  "a":1}', '{"a":01}'],
    ),
    "json text": ({"json": '{"enum": ["a", 1, null]}'}, ['"a"', "1", "null"], ["a", "2", '"b"']),
    "json anything": ({"json": "true"}, ["[]", "1", '"x"', '{"a": [true]}'], ["", "x"]),
    "json_object": ({"json_object": True}, ["{}", '{"a": [1, {"b": "é"}]}'], ["[]", "1", "{", '{"a"}']),
    "whitespace": (
        {"json": {"type": "array", "items": {"const": 1}}, "whitespace_pattern": " {2}"},
        ["[1,1]", "[  1,  1  ]"],
        ["[ 1]", "[   1]", "[\n1]"],
    ),
    "regex": (
        {"regex": r"[é0-9]+@[a-z]{2,3}\.(com|org)"},
        ["é1@ab.com"],
        ["a@b.com", "a@ab.net", "a@ab.comm", "@ab.com"],
    ),
    "anchored regex": ({"regex": r"^ab?$"}, ["a", "ab"], ["", "abb", "ba"]),
    "choice": (
        {"choice": ["yes", "yes please", 'a"\\/\n.*+?()[]{}|^$#&~-é日😀', "<|end|>", "x<|tool|>y"]},
        ["yes", "yes please", 'a"\\/\n.*+?()[]{}|^$#&~-é日😀', "<|end|>", "x<|tool|>y"],
        ["", "ye", "yes ", "no", "<|end|", "xy"],
    ),
    "arithmetic": (
        {"grammar": ARITHMETIC},
        ["x=5\n", "a+b*(c) = 5 \n\n", "x=y\nz=5\n"],
        ["x", "x=5", "x==5\n", "1x=5\n"],
    ),
    "list": ({"grammar": LIST}, ["- a\n", "- a\n- é 日\n"], ["", "- \n", "- a", "- a\u2028\n", "a\n"]),
    "gbnf json": (
        {"grammar": JSON},
        ['{"a": [1, -2.5e3, "x\\n\\u00e9"], "b": {}}', "[]", '"\\""', "true ", "0", '["",""]'],
        ['{"a": tru}', '{"a" 1}', '"\n"', '"\\x"', "01", "[1,]", '"a'],
    ),
    "lark": ({"grammar": LARK}, ["hello,a!", "bye,a,bc!"], ["hello!", "hello,a", "hi,a!", "hello,A!"]),
    "structures, typed": (
        {"structural_tag": json.dumps({"type": "structural_tag", **json.loads(STRUCTURES)})},
        ["x<f=a>3</f>", "x"],
        ["<f=a>x</f>"],
    ),
    "structures": (
        {"structural_tag": STRUCTURES},
        ["", "hello", "<f=a>3</f>", 'so: <f=b>"x"</f> and <f=a>0</f>.', "<f", "</f>"],
        ["<f=", "<f=c>", "<f=a>12</f>", "<f=a>x", "<f=a>3</f"],
    ),
    "const_string": (structural({"type": "const_string", "value": "hé"}), ["hé"], ["h", "hé!"]),
    "regex before text": (
        structural(
            {
                "type": "sequence",
                "elements": [
                    {"type": "regex", "pattern": "[a-z]*"},
                    {"type": "const_string", "value": "end"},
                    {"type": "or", "elements": [NUMBER, {"type": "const_string", "value": "."}]},
                ],
            }
        ),
        ["end.", "abcend.", "endend12"],
        ["en.", "abc.", "end", "end.."],
    ),
    "think, then tools": (
        structural({"type": "sequence", "elements": [tag("<think>", ANY, "</think>"), TOOLS]}),
        ["<think></think>", "<think>a < b</think>so", "<think>x</think>a<f a>true</f><f b>y</f>b"],
        ["x", "<think>x", "<think>x</think><f c>", "<think>x</think><f a>1</f>"],
    ),
    "at least one": (structural(TOOLS | {"at_least_one": True}), ["a<f b></f>b"], ["", "a"]),
    "the first only": (structural(TOOLS | {"stop_after_first": True}), ["a", "<f b>x</f>"], ["<f b>x</f>a"]),
    "exactly one": (
        structural(TOOLS | {"stop_after_first": True, "at_least_one": True}),
        ["a<f b>x</f>"],
        ["a", "<f b>x</f>a"],
    ),
    "separated": (
        structural({"type": "tags_with_separator", "separator": ", ", "tags": [tag("<", BOOLEAN, ">")]}),
        ["", "<true>", "<true>, <false>"],
        ["<true>,", "<true><true>", "x"],
    ),
    "separated, one": (
        structural(
            {
                "type": "tags_with_separator",
                "separator": ",",
                "tags": [tag("<", BOOLEAN, ">")],
                "at_least_one": True,
                "stop_after_first": True,
            }
        ),
        ["<true>"],
        ["", "<true>,<true>"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_just_the_texts_that_match_are_taken(name: str) -> None:
    spec, good, bad = CASES[name]
    assert [text for text in good if not takes(text, **spec)] == []
    assert [text for text in bad if takes(text, **spec)] == []


@pytest.mark.parametrize("name", CASES)
def test_texts_drawn_at_random_match(name: str) -> None:
    spec, _, _ = CASES[name]
    texts = [drawn(seed, most=200, **spec) for seed in range(5)]
    assert all(takes(text, **spec) for text in texts if text is not None)
    if name in ("json text", "anchored regex", "choice", "const_string", "structures", "separated, one"):
        assert None not in texts
    if "regex" in spec:
        assert all(re.fullmatch(spec["regex"], text) for text in texts if text is not None)
    if "choice" in spec:
        assert set(texts) <= set(spec["choice"])


def test_random_schemas_hold() -> None:
    ended = 0
    for seed, schema in enumerate(schemas(60, seed=1)):
        text = drawn(seed, json=schema)
        if text is not None:
            ended += 1
            jsonschema.validate(json.loads(text), schema)
    assert ended >= 57


# Regular expressions over a and b: what GBNF and regexes say of them is compared with Python's re.
REGEXES = st.recursive(
    st.sampled_from(["a", "b", "[ab]", "[^a]", "ab", "é", "[aé]"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("then", parts)),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("or", parts)),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "{0,3}"])).map(
            lambda p: ("times", *p)
        ),
        inner.map(lambda part: ("rule", part)),
    ),
    max_leaves=6,
)


def as_regex(node: Any) -> str:
    match node:
        case str():
            return node
        case "then", parts:
            return "".join(f"(?:{as_regex(part)})" for part in parts)
        case "or", parts:
            return f"(?:{'|'.join(map(as_regex, parts))})"
        case "times", part, count:
            return f"(?:{as_regex(part)}){count}"
        case "rule", part:
            return as_regex(part)
    raise AssertionError(node)


def as_gbnf(node: Any, rules: list[str]) -> str:
    match node:
        case str():
            return node if node.startswith("[") else json.dumps(node, ensure_ascii=False)
        case "then", parts:
            return " ".join(f"({as_gbnf(part, rules)})" for part in parts)
        case "or", parts:
            return " | ".join(f"({as_gbnf(part, rules)})" for part in parts)
        case "times", part, count:
            body = as_gbnf(part, rules)
            return f"{body}{count}" if isinstance(part, str) and part.startswith("[") else f"({body}){count}"
        case "rule", part:
            body = as_gbnf(part, rules)
            rules.append(body)
            return f"rule-{len(rules)}"
    raise AssertionError(node)


@settings(max_examples=150, deadline=None)
@given(REGEXES, st.lists(st.text("abéx", max_size=6), min_size=5, max_size=12))
def test_gbnf_and_regexes_mean_what_re_says(node: Any, texts: list[str]) -> None:
    regex, rules = as_regex(node), []
    root = as_gbnf(node, rules)
    grammar = "\n".join([f"root ::= {root}", *(f"rule-{i + 1} ::= {body}" for i, body in enumerate(rules))])
    # Texts that match, too: those that the grammar itself gives.
    texts = texts + [text for seed in range(3) if (text := drawn(seed, 30, regex=regex)) is not None]
    for text in texts:
        matches = re.fullmatch(regex, text) is not None
        assert takes(text, grammar=grammar) == matches, (grammar, text)
        assert takes(text, regex=regex) == matches, (regex, text)


@pytest.mark.parametrize(
    ("rules", "runs"),
    [
        ('root ::= [0-9]{2,4} "x"', 1),
        ('root ::= "\\"" char* "\\""\nchar ::= [^"\\\\] | "\\\\" ["n]', 1),
        ('root ::= item ("," item)*\nitem ::= [a-z]+ " "*', 2),
        ('root ::= [a-z]* "end"', 0),  # the run would swallow the end
        ("root ::= word word\nword ::= [a-z]+", 0),  # and the first word the second
        ('root ::= (word ","?)*\nword ::= [a-z]+', 0),
        ('root ::= "if" | [a-z]+', 0),  # llguidance would not come back to "if"
        ('root ::= [aé]+ "è"', 0),  # é and è begin with the same byte
        (
            'root ::= ("a" x | [a-c] y)\nx ::= "1" "2" | [0-9] "z"\ny ::= [0-9]+ "q"',
            0,
        ),  # two readings of "a1"
    ],
)
def test_runs_are_one_terminal_where_greed_does_no_harm(rules: str, runs: int) -> None:
    assert len(re.findall(r"\](?:[*+]|\{[\d,]+\})/", gbnf_to_lark(rules))) == runs


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not": ({"json": {"not": {"type": "string"}}}, "Unimplemented keys.*not"),
    "uniqueItems": ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "if": ({"json": {"if": {}, "then": False}}, "Unimplemented keys"),
    "unknown format": ({"json": {"type": "string", "format": "iban"}}, "Unknown format: iban"),
    "overlapping oneOf": ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "oneOf"),
    "remote $ref": ({"json": {"$ref": "https://example.org/schema"}}, "example.org"),
    "lookahead": ({"json": {"type": "string", "pattern": "(?=a)a"}}, "look-around"),
    "false": ({"json": "false"}, "that something matches"),
    "no value": ({"json": {"enum": []}}, "[Uu]nsatisfiable"),
    "impossible length": ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "minLength"),
    "lenient": ({"json": {"not": {}, "x-guidance": {"lenient": True}}}, "x-guidance"),
    "keys that count twice": (
        {"json": {"items": {"minProperties": 2}}},
        "minProperties 2 .* required .here 0",
    ),
    "inexact integer": ({"json": {"properties": {"a": {"const": 2**53 + 1}}}}, "9007199254740993"),
    "inexact bound": ({"json": {"type": "integer", "maximum": 2**63 - 1}}, "9223372036854775807"),
    "NaN": ({"json": '{"enum": [NaN]}'}, "nan is no JSON number"),
    "whitespace_pattern": ({"json": {}, "whitespace_pattern": "("}, "unclosed group"),
    "regex": ({"regex": "a(b"}, "unclosed group"),
    "back reference": ({"regex": r"(a)\1"}, "backreferences"),
    "word boundary": ({"regex": r"a\b"}, "lookarounds"),
    "no text": ({"regex": "[a&&b]"}, "no text matches"),
    "long regex": ({"regex": "a" * 20_000}, "20,000 bytes; at most 16,384"),
    "long grammar": ({"grammar": f'start: "{"a" * 300_000}"'}, "300,009 bytes; at most 262,144"),
    "long choice": ({"choice": ["a" * 300_000]}, "300,000 bytes; at most 262,144"),
    "deep gbnf": ({"grammar": f'root ::= {"(" * 50_000}"a"{")" * 50_000}'}, "nested too deeply"),
    "lark without start": ({"grammar": 'a: "b"'}, "start"),
    "lark, unknown name": ({"grammar": "start: a"}, "unknown name"),
    "lark, hidden text": ({"grammar": 'start: a "b"\na[stop="<"]: /.*/'}, "option 'stop'"),
    "lark, lenient": (
        {"grammar": 'start: %json {"uniqueItems": true, "x-guidance": {"lenient": true}}'},
        "x-guidance",
    ),
    "lark, schema": ({"grammar": 'start: %json {"minProperties": 3}'}, "minProperties 3"),
    "lark, no JSON": ({"grammar": "start: %json {"}, "after %json"),
    "llguidance's own notation": ({"grammar": '{"grammars": [{"json_schema": {}}]}'}, "does not compile"),
    "gbnf, open text": ({"grammar": 'root ::= "a"\n  "b'}, "line 2"),
    "gbnf, empty range": ({"grammar": "root ::= [z-a]"}, "range 'z' to 'a'"),
    "gbnf, empty class": ({"grammar": "root ::= []"}, "matches nothing"),
    "gbnf, escape": ({"grammar": 'root ::= "\\q"'}, "unknown escape"),
    "gbnf, surrogate": ({"grammar": 'root ::= "\\uD800"'}, "no character"),
    "gbnf, parenthesis": ({"grammar": 'root ::= ("a"'}, "[)] was expected"),
    "gbnf, count": ({"grammar": 'root ::= "a"{3,1}'}, "asks for no number"),
    "gbnf, repeat": ({"grammar": 'root ::= * "a"'}, "'[*]' has no place"),
    "gbnf, no root": ({"grammar": 'a ::= "b"'}, "'root' is not defined"),
    "gbnf, rule": ({"grammar": 'root ::= a\n\nb ::= "x"'}, "line 1: rule 'a' is not defined"),
    "gbnf, twice": ({"grammar": 'root ::= "a"\nroot ::= "b"'}, "line 2: rule 'root' is defined twice"),
    "gbnf, endless": ({"grammar": 'root ::= root "a"'}, "no text matches"),
    "tag, no JSON": ({"structural_tag": "{"}, "not valid JSON"),
    "tag, neither form": ({"structural_tag": "{}"}, "it must be"),
    "tag, unknown format": (structural({"type": "qwen_xml_parameter"}), "no format that is supported"),
    "tag, unknown key": (structural(BOOLEAN | {"style": "xml"}), "takes json_schema, not json_schema, style"),
    "tag, missing key": (structural({"type": "const_string"}), "takes value, not none"),
    "tag, schema": (structural({"type": "json_schema", "json_schema": {"not": {}}}), "Unimplemented keys"),
    "tag, endless text": (
        structural({"type": "sequence", "elements": [ANY, BOOLEAN]}),
        "any_text must stand last",
    ),
    "tag, no list": (structural({"type": "or", "elements": []}), "list that is not empty"),
    "tag, no text": (structural({"type": "const_string", "value": 1}), "must be a text"),
    "tag, no tag": (structural(TOOLS | {"tags": [BOOLEAN]}), "is no tag"),
    "tag, no trigger": (structural(TOOLS | {"triggers": ["<g"]}), "no trigger begins the tag '<f a>'"),
    "tag, idle trigger": (structural(TOOLS | {"triggers": ["<f", "<g"]}), "'<g' begins no tag"),
    "tag, mixed trigger": (
        structural(
            {"type": "triggered_tags", "triggers": ["a<|tool|>"], "tags": [tag("a<|tool|>", BOOLEAN, "")]}
        ),
        "text before a control token",
    ),
    "tag, structure": (
        {"structural_tag": '{"structures": [{}], "triggers": ["a"]}'},
        "begin, schema and end",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(name: str) -> None:
    spec, message = REFUSED[name]
    with pytest.raises(ParamsError, match=message) as caught:
        compiled(**spec)
    assert len(str(caught.value)) < 1000


def test_properties_and_annotations_are_no_keywords() -> None:
    schema = {
        "type": "object",
        "properties": {"minProperties": {"const": 5}, "default": {"type": "integer", "default": 2**60}},
        "required": ["minProperties", "default"],
        "additionalProperties": False,
        "minProperties": 2,
        "examples": [{"default": 2**60}],
    }
    assert takes('{"minProperties":5,"default":1}', json=schema)
    with pytest.raises(ParamsError, match="1152921504606846976"):
        compiled(json={"properties": {"default": {"const": 2**60}}})


@pytest.mark.parametrize(
    "spec",
    [
        {"grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(9000)) + 'a9000: "x"'},
        {
            "json": {
                "$ref": "#/$defs/0",
                "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(6000)} | {"6000": {}},
            }
        },
    ],
    ids=["lark", "json"],
)
def test_long_chains_of_definitions_do_not_overflow_the_stack(spec: dict[str, Any]) -> None:
    # In a thread, whose stack is smaller than the main one's on some systems. An overflow ends the process.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: allowed(compiled(**spec))).result()


def test_masks_hold_only_tokens_that_may_come_next() -> None:
    grammar = compiled(regex="(ab)+é?")
    ids = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    assert allowed(grammar) == {ids[b"a"], ids[b"ab"], ids[b"aba"], ids[b"abab"]}
    grammar.accept(ids[b"aba"])
    assert not grammar.finished
    assert allowed(grammar) == {ids[b"b"], ids[b"ba"]}
    grammar.accept(ids[b"b"])
    assert not grammar.finished
    more = {ids[token] for token in (b"a", b"ab", b"aba", b"abab", "é".encode(), "é".encode()[:1])}
    assert allowed(grammar) == more | TOKENIZER.eos_ids
    other = grammar.copy()
    grammar.accept(ids["é".encode()])
    assert grammar.finished
    assert allowed(grammar) == TOKENIZER.eos_ids
    assert allowed(other) == more | TOKENIZER.eos_ids


@pytest.mark.parametrize("end", sorted(TOKENIZER.eos_ids))
def test_every_end_of_generation_token_ends_the_text(end: int) -> None:
    for spec in ({"regex": "ab?"}, {"regex": "a"}):
        grammar = compiled(**spec)
        grammar.accept(ord("a"))
        assert allowed(grammar) >= TOKENIZER.eos_ids
        grammar.accept(end)
        assert grammar.finished
        assert grammar.error is None
        assert allowed(grammar) == TOKENIZER.eos_ids
        grammar.accept(end)
        assert grammar.copy().finished


def test_control_tokens_are_not_text() -> None:
    grammar = compiled(regex="(?s:.*)")
    assert allowed(grammar) & TOKENIZER.special_ids == TOKENIZER.eos_ids
    assert TOKENIZER.encode("<think>")[0] in allowed(grammar)  # user-defined tokens are
    # Their names may be, spelled in other tokens.
    assert drawn(0, choice=["a<|end|>b"]) == "a<|end|>b"
    assert drawn(0, choice=["<|tool|>"]) == "<|tool|>"
    grammar = compiled(choice=["<|end|>"])
    assert not allowed(grammar) & TOKENIZER.special_ids


def test_tags_name_control_tokens() -> None:
    spec = structural(
        {"type": "triggered_tags", "triggers": ["<|tool|>"], "tags": [tag("<|tool|>a", BOOLEAN, "<|end|>")]}
    )
    grammar = compiled(**spec)
    for text in ("so ", "<|tool|>", "atrue"):
        for token_id in TOKENIZER.encode(text):
            assert token_id in allowed(grammar), text
            grammar.accept(token_id)
    assert allowed(grammar) == {END}
    assert not takes("<|tool|>b", **structural(tag("<|tool|>a", ANY, "")))
    assert TOOL in allowed(compiled(grammar="root ::= <|tool|>"))
    assert TOOL in allowed(compiled(grammar=f"start: <[{TOOL}]>"))


def test_text_that_the_tokenizer_would_normalise_stays_as_it_is() -> None:
    tokenizer = make_tokenizer("qwen2")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"
    grammar = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size).compile(
        StructuredOutputsParams(choice=["e\u0301"])
    )
    tokens = []
    while not grammar.finished:
        tokens.append(min(allowed_by(grammar, tokenizer)))
        grammar.accept(tokens[-1])
    assert tokenizer.decode(tokens) == "e\u0301"


def allowed_by(grammar: Grammar, tokenizer: Tokenizer) -> set[int]:
    mask = np.empty((tokenizer.vocab_size + 31) // 32, np.uint32)
    grammar.fill_mask(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def test_a_forbidden_token_leaves_nothing_to_draw() -> None:
    grammar = compiled(regex="ab")
    assert grammar.error is None
    grammar.accept(TOKENIZER.encode("true")[0])
    assert not grammar.finished
    assert grammar.error
    assert allowed(grammar) == set()
    grammar.accept(END)
    assert not grammar.finished
    assert allowed(grammar) == set()


def test_a_grammar_that_outgrows_its_limits_leaves_nothing_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STEP_ITEMS", 60)
    compiler = GrammarCompiler(lambda: TOKENIZER, TOKENIZER.vocab_size + EXTRA)
    grammar = compiler.compile(
        StructuredOutputsParams(grammar='start: "a" (b | c)\nb: x* "b"\nc: x* "c"\nx: /[a-z]/')
    )
    grammar.accept(TOKENIZER.encode("a")[0])
    for _ in range(100):
        if not allowed(grammar):
            break
        grammar.accept(TOKENIZER.encode("t")[0])
    assert grammar.error is not None
    assert "Too many items" in grammar.error
    assert not grammar.finished


def test_nothing_is_loaded_before_the_first_grammar() -> None:
    program = (
        "import sys; from hexad.runner.grammar import GrammarCompiler, MaskPool; "
        "GrammarCompiler(lambda: 1 / 0, 100), MaskPool(); assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_vocabulary_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer(eos_token_id=None, token_type=[NORMAL] * TOKENIZER.vocab_size)
    assert not tokenizer.eos_ids
    with pytest.raises(ParamsError, match="token that ends the text"):
        GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size).compile(StructuredOutputsParams(regex="a"))


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[str] = []
    compile = module._compile
    monkeypatch.setattr(module, "_compile", lambda *args: (compilations.append(args[0]), compile(*args))[1])
    compiler = GrammarCompiler(lambda: TOKENIZER, TOKENIZER.vocab_size + EXTRA)
    first = compiler.compile(StructuredOutputsParams(json={"type": "boolean"}))
    first.accept(TOKENIZER.encode("true")[0])
    second = compiler.compile(StructuredOutputsParams(json={"type": "boolean"}))
    assert first.finished
    assert not second.finished
    assert compilations == ["json"]
    for i in range(module.CACHED_GRAMMARS + 1):
        compiler.compile(StructuredOutputsParams(regex=f"a{{{i + 1}}}"))
    compiler.compile(StructuredOutputsParams(json={"type": "boolean"}))
    assert compilations.count("json") == 2


def test_compiling_in_many_threads() -> None:
    loads: list[int] = []
    compiler = GrammarCompiler(lambda: (loads.append(1), TOKENIZER)[1], TOKENIZER.vocab_size + EXTRA)
    before = threading.stack_size()
    specs = [StructuredOutputsParams(json=schema) for schema in schemas(12, seed=3)] * 3
    with ThreadPoolExecutor(6) as pool:
        masks = [allowed(grammar) for grammar in pool.map(compiler.compile, specs)]
    assert (
        masks[:12] == masks[12:24] == masks[24:] == [allowed(compiled(json=spec.json)) for spec in specs[:12]]
    )
    assert loads == [1]
    assert threading.stack_size() == before


def test_the_pool_fills_masks_beside_the_caller() -> None:
    grammars = [compiled(json=schema) for schema in schemas(8, seed=5)]
    masks = np.full((8, WORDS_OF_MASK), 0xFFFFFFFF, np.uint32)
    expected = np.zeros_like(masks)
    for grammar, row in zip(grammars, expected, strict=True):
        grammar.copy().fill_mask(row)
    threads = threading.active_count()
    pool = MaskPool()
    pool.start([], masks[:0])
    pool.wait()
    assert threading.active_count() == threads
    for _ in range(3):
        masks[:] = 0xFFFFFFFF
        pool.start(grammars, masks)
        pool.wait()
        assert (masks == expected).all()
        assert threading.active_count() == threads + 1
    pool.close()
    assert threading.active_count() == threads
    pool.start(grammars[:1], masks[:1])
    pool.close()


def test_the_pool_works_while_the_caller_does() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Grammar):
        def __init__(self) -> None:
            pass

        def fill_mask(self, out: Any) -> None:
            entered.set()
            assert leave.wait(10)
            raise ValueError("broken")

    pool = MaskPool()
    pool.start([Slow()], np.zeros((1, 1), np.uint32))
    assert entered.wait(10)
    leave.set()
    with pytest.raises(ValueError, match="broken"):
        pool.wait()
    pool.wait()
    pool.close()


@given(st.characters(codec="utf-8"))
def test_escaped_characters_are_themselves(char: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9]|\\x\{[0-9a-f]+\}", escaped(char))
    assert len(escaped(char)) == 1 or chr(int(escaped(char)[3:-1], 16)) == char
