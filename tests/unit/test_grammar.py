"""Grammar: what each kind of structured output takes, and what is refused."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.grammars import (
    ANY,
    BOOLEAN,
    allowed,
    compiled,
    drawn,
    structural,
    tag,
    takes,
)
from tests.schemas import schemas

from hexad.errors import ParamsError
from hexad.runner.gbnf import gbnf_to_lark

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
    "required of no names": ({"json": {"type": "object", "required": [["a"]]}}, "required|string"),
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
