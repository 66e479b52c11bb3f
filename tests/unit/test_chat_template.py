"""ChatTemplate: what templates mean to transformers, and the bounds that a stranger's runs under."""

from __future__ import annotations

import re
import time
import tracemalloc
from typing import Any

import pytest

from hexad.checkpoint import chat_template
from hexad.checkpoint.chat_template import ChatTemplate
from hexad.errors import PromptError, TokenizerError

USER = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is <b>1 & 2</b>?\n\n"},
    {"role": "assistant", "content": "It's é“3”."},
    {"role": "user", "content": "{{ bos_token }} {% raw %}"},
]

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

TEMPLATES = [
    CHATML,
    # block trimming: the lines of the tags leave nothing behind, their indentation included
    "{% for m in messages %}\n    {% if true %}\n  {{ m.role }}: {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}\nend\n",
    # a macro, a namespace, loop variables, slicing, a filter chain
    "{% macro say(m, i) %}[{{ i }}/{{ m.role|upper }}]{{ m.content|trim|replace('3', 'x') }}{% endmacro %}"
    "{% set ns = namespace(last='none') %}{% for m in messages[1:] %}{{ say(m, loop.index0) }}"
    "{% if not loop.last %}, {% endif %}{% set ns.last = m.role %}{{ loop.length ~ loop.revindex }}"
    "{% endfor %}{{ ns.last }}{{ bos_token }}{{ eos_token }}",
    "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "{% if tools is not none %}tools{% endif %}{% if documents %}some{% endif %}[{{ absent }}{{ tools }}]",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for x in range(3) %}{{ x * 2 + 10 ** 2 }}{{ '-' * x }}{% endfor %}{{ 5000 * 5000 }}{{ 7 % 4 }}",
    "{% for a in [[1, [2]], [3, []]] recursive %}{{ a if a is number else '<' ~ loop(a) ~ '>' }}{% endfor %}",
    "{{ [1, 2] | sum }}{{ messages | map(attribute='content') | map('length') | sum }}{{ 2.345 | round(2) }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join('-', attribute='role') }}",
    "{{ ['a', 'b'].__len__ is defined }}{{ ', '.join(['a', 'b']) }}{{ 'a' ~ 1 ~ [2] ~ none ~ absent }}",
    "{{ 'aXbX' | replace('X', 1, 1) }}{{ 'aXbX'.replace('X', 'y') }}{{ 'a\n\nb' | indent(2, true) }}",
    "{{ '%s is %05.1f%%' % ('a', 2) }}{{ '%(a)d' | format(a=3) }}{{ '{:>4}|{a:.2f}'.format(1, a=2) }}",
    "{% set x %}a{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ x }}{{ {'a': (1, 'b')} }}",
    "{{ {'a': [1, {'b': 'é'}]} | tojson(indent=2) }}{{ [1, 'a'] | tojson(separators=(',', ':')) }}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}{% set a, b = 1, 2 %}{{ a + b - 2 ** -1 }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% else %}none{% endfor %}",
    "{% for x in absent %}{{ x }}{% else %}none{% endfor %}",
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather “now”.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2.5, None, True]}},
                "required": ["city"],
            },
        },
    }
]
TOOL_TALK = [
    {"role": "user", "content": "Weather in Paris?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Look it up.",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Paris", "days": [1, 2]}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "18 °C"},
]


def called(arguments: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}}


CALL = called({})

# In the manner of Hermes and Qwen.
TOOL_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + ('(' + message.name + ')' if message.name else '') + '\n' }}
    {%- if message.reasoning_content is string %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}</tool_call>' }}
        {%- for name, value in call.function.arguments.items() %}{{ name }}={{ value }};{% endfor %}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}"""


def render(text: str, messages: list[dict[str, Any]] = USER, **options: Any) -> str:
    return ChatTemplate(text, bos_token="<s>", eos_token="</s>", source="model.gguf").render(
        messages, **options
    )


def test_renders_chatml() -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHATML, add_generation_prompt=False) == expected
    assert render(CHATML) == expected + "<|im_start|>assistant\n"


def test_tojson_keeps_html_and_unicode() -> None:
    assert (
        render("{{ messages[0].content | tojson }}", [{"role": "user", "content": "<b>é & '"}])
        == '"<b>é & \'"'
    )


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") in {time.strftime("%Y"), str(int(time.strftime("%Y")) - 1)}


def test_absent_tokens_are_undefined() -> None:
    template = ChatTemplate("[{{ bos_token }}{{ eos_token is defined }}]", source="model.gguf")
    assert template.render(USER) == "[False]"


@pytest.mark.oracle
@pytest.mark.parametrize("text", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_equals_transformers(text: str, add_generation_prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template(
        [TALK],
        chat_template=text,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert render(text, TALK, add_generation_prompt=add_generation_prompt) == rendered[0]


@pytest.mark.oracle
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_tools_equal_transformers(tools: list[dict[str, Any]] | None) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template([TOOL_TALK], chat_template=TOOL_TEMPLATE, tools=tools)
    assert render(TOOL_TEMPLATE, TOOL_TALK, tools=tools, add_generation_prompt=False) == rendered[0]


def test_tool_calls_of_openai() -> None:
    """Arguments as JSON text, content None or absent: the template sees what it would of the plain form."""
    expected = render(TOOL_TEMPLATE, TOOL_TALK)
    assert '"arguments": {"city": "Paris", "days": [1, 2]}}</tool_call>city=Paris;days=[1, 2];' in expected
    call = TOOL_TALK[1]["tool_calls"][0]
    as_text = call["function"] | {"arguments": '{"city": "Paris", "days": [1, 2]}'}
    message = TOOL_TALK[1] | {"content": None, "tool_calls": [call | {"function": as_text}]}
    talk = [TOOL_TALK[0], message, TOOL_TALK[2]]
    assert render(TOOL_TEMPLATE, talk) == expected
    del message["content"]
    assert render(TOOL_TEMPLATE, talk) == expected
    assert as_text["arguments"] == '{"city": "Paris", "days": [1, 2]}'  # the caller's stay as they are


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_tool_calls_without_arguments(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert '"arguments": {}}' in render(TOOL_TEMPLATE, [message])
    del call["function"]["arguments"]
    assert '"arguments": {}}' in render(TOOL_TEMPLATE, [message])


def test_no_tools_and_no_tool_calls() -> None:
    """Empty lists are none: templates ask only whether there are any."""
    text = "{{ tools is none }}{{ 'tool_calls' in messages[0] }}"
    message = {"role": "assistant", "content": "a"}
    for empty in (None, []):
        assert render(text, [message | {"tool_calls": empty}], tools=empty) == "TrueFalse"


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert render("[{{ messages[0].content }}]", [{"role": "user", "content": parts}]) == "[a \nb]"
    assert render("[{{ messages[0].content }}]", [{"role": "user", "content": []}]) == "[]"


def test_variables() -> None:
    text = "{{ enable_thinking }}{{ documents[0].title }}{{ bos_token }}{{ nested.a[1] }}"
    variables = {"enable_thinking": False, "documents": [{"title": "T"}], "nested": {"a": (1, 2)}}
    assert render(text, variables=variables) == "FalseT<s>2"
    assert render("{{ bos_token }}{{ self is defined }}", variables={"bos_token": "B"}) == "BTrue"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "continue_final_message"])
def test_variables_replace_no_arguments(name: str) -> None:
    with pytest.raises(PromptError, match=f"variables must not set '{name}'"):
        render(CHATML, variables={name: []})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tools": "weather"}, "tools must be a list"),
        ({"tools": ["weather"]}, "tools must be a list of JSON objects"),
        ({"tools": [{"type": "function", "function": print}]}, r"tools\[0\]\['function'\].*builtin_function"),
        ({"variables": {"a": {1: 2}}}, r"variables\['a'\] must have strings as keys, not 1"),
        ({"variables": {"a": [b"bytes"]}}, r"variables\['a'\]\[0\].*not bytes"),
        ({"variables": {"a": 2**1024}}, r"variables\['a'\].*1,024 bits"),
        ({"variables": {"a": eval("[" * 80 + "]" * 80)}}, "nests more than 64 deep"),
        ({"continue_final_message": True}, "needs add_generation_prompt=False"),
    ],
)
def test_malformed_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        render(CHATML, **options)


CONTINUED = [
    CHATML,  # trims
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s> {% endfor %}",
    "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}</s>{% endfor %}",
]


@pytest.mark.oracle
@pytest.mark.parametrize("text", CONTINUED)
@pytest.mark.parametrize("content", ["It", "It is ", " It\n", "{}", "Hi"])
def test_continued_message_equals_transformers(text: str, content: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [*USER, {"role": "assistant", "content": content}]
    rendered, _ = utils.render_jinja_template(
        [messages], chat_template=text, continue_final_message=True, eos_token="</s>"
    )
    ours = render(text, messages, continue_final_message=True, add_generation_prompt=False)
    assert ours == rendered[0]


def test_continues_the_final_message() -> None:
    """It ends with the content, and with its trailing space where the template keeps that."""
    twice = "{{ messages[1].content }}|{{ messages[1].content }}</s>"
    for text, end in ((CHATML, "assistant\n{"), (twice, "{ \n|{ \n")):
        parts = [{"type": "text", "text": "{ \n"}]
        for content in ("{ \n", parts):
            messages = [*USER, {"role": "assistant", "content": content}]
            rendered = render(text, messages, continue_final_message=True, add_generation_prompt=False)
            assert rendered.endswith(end)
    assert parts == [{"type": "text", "text": "{ \n"}]


@pytest.mark.parametrize(
    "text", ["{{ messages[0].content }}", "{{ messages[1].content | replace('a', 'b') }}"]
)
def test_final_message_that_the_template_changes(text: str) -> None:
    messages = [*USER, {"role": "assistant", "content": "aaa"}]
    with pytest.raises(PromptError, match="changes or leaves out the last message"):
        render(text, messages, continue_final_message=True, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ("Hi", "str"),
        ({"role": "user", "content": "Hi"}, "dict"),
        (["Hi"], re.escape("messages[0]")),
        ([{"role": "user", "content": "Hi"}, {"role": "user"}], re.escape("messages[1]['content']")),
        ([{"content": "Hi"}], re.escape("messages[0]['role']")),
        ([{"role": "user", "content": ["Hi"]}], "must be a string"),
        ([{"role": 1, "content": "Hi"}], "must be a string"),
        ([{"role": "assistant", "content": None}], r"\['content'\] must be a string.*not None"),
        ([{"role": "user", "content": None, "tool_calls": [CALL]}], r"\['content'\] must be a string"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "type 'image_url'.*only 'text'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"\[0\]\['text'\] must be a string, not None"),
        ([{"role": "user", "content": "Hi", "x": {1}}], r"messages\[0\]\['x'\].*not set"),
        ([{"role": "assistant", "content": "", "tool_calls": "f"}], "must be a list"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "'function' with a 'name'"),
        ([{"role": "assistant", "content": "", "tool_calls": [called("{")]}], "arguments.*no JSON"),
        ([{"role": "assistant", "content": "", "tool_calls": [called("[1]")]}], "a JSON object, not"),
        ([{"role": "assistant", "content": "", "tool_calls": [called("[" * 99999)]}], "no JSON"),
    ],
)
def test_malformed_messages(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        render(CHATML, messages)


def test_template_refuses_messages() -> None:
    with pytest.raises(PromptError, match=r"model\.gguf.*roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}", "does not parse at line 1"),
        ("\n{{ 1 +* 2 }}", "line 2"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% include 'other' %}", "loader"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ absent.attribute }}", "undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "."),
    ],
)
def test_broken_template(text: str, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason) as caught:
        render(text)
    assert str(caught.value).startswith("model.gguf: the chat template ")


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_sandbox(text: str) -> None:
    """What reaches for Python's internals, or changes the messages, fails or yields nothing."""
    messages = [{"role": "user", "content": "Hi"}]
    try:
        rendered = render(text, messages)
    except TokenizerError:
        rendered = ""
    assert "class" not in rendered
    assert "module" not in rendered
    assert messages == USER


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 9 * [1] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(9999) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{{ '9' * 4000 }}{{ ('9' * 4000) | int }}",
        "{{ 1.5 | round(10 ** 9, 'ceil') }}",
        "{{ '%1500000000d' % 1 }}",
        "{{ '%*d' % (1500000000, 1) }}",
        "{{ '%.1500000000f' % 1.0 }}",
        "{{ '%1500000000d' | format(1) }}",
        "{{ '%(a)s' * 9999 % {'a': 'a' * 99999} }}",
        "{{ '{:>1500000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1500000000) }}",
        "{{ '{a:>1500000000}'.format_map({'a': 1}) }}",
        "{{ ('{0}' * 9999).format('a' * 99999) }}",
        "{% set n = namespace(a='a' * 99999) %}{{ ('{0.a}' * 9999).format(n) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999).join('b' * 99999) }}",
        "{{ ('b' * 99999) | join('a' * 99999) }}",
        "{{ (['a' * 99999] * 9999) | join }}",
        "{{ range(99999) | map('replace', '', 'a' * 9999) | list }}",
        "{{ ('a\n' * 99999) | indent(99999) }}",
        "{{ ('a\n' * 99999) | indent('a' * 99999) }}",
        "{{ [[[1] * 999]] | tojson(indent=99999) }}",
        "{{ ([1] * 99999) | tojson(separators=('a' * 99999, '')) }}",
        "{{ ('ab' * 8000000) | sort }}",
        "{% set a = 'a' * 99999 %}{{ [" + "a, " * 99 + "] }}",
        "{% set a = 'a' * 99999 %}{{ " + "a ~ " * 99 + "a }}",
        "{% set a %}{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
        "{% macro f() %}{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endmacro %}{{ f()[0] }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_bombs(text: str) -> None:
    """They are refused by a bound on size, and before Python has been asked for what they want."""
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError, match=r"Limit|Recursion|Overflow|Range"):
            render(text)
        assert tracemalloc.get_traced_memory()[1] < 1e8
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "method", ["ljust(9)", "rjust(9)", "center(9)", "zfill(9)", "expandtabs(9)", "encode()"]
)
def test_string_methods_that_templates_need_not(method: str) -> None:
    with pytest.raises(TokenizerError, match="unsafe"):
        render("{{ 'a'." + method + " }}")


@pytest.mark.parametrize("name", ["center", "wordwrap", "batch", "xmlattr", "urlize", "pprint", "random"])
def test_filters_that_templates_need_not(name: str) -> None:
    with pytest.raises(TokenizerError, match=f"No filter named '{name}'"):
        render("{{ 'a' | " + name + " }}")


def test_integers_have_no_methods() -> None:
    with pytest.raises(TokenizerError, match="unsafe"):
        render("{{ (1).to_bytes(1500000000, 'big') }}")


@pytest.mark.parametrize("pair", ["(n.x, n.x)", "[n.x, n.x]", "{'a': n.x, 'b': n.x}"])
def test_nesting_counts(pair: str) -> None:
    """60 levels, each holding the former twice, take no memory until they are written out."""
    text = "{% for i in range(60) %}{% set n.x = " + pair + " %}{% endfor %}{{ n.x }}"
    with pytest.raises(TokenizerError, match="LimitError"):
        render("{% set n = namespace(x=1) %}" + text)


def test_namespaces_are_not_written_out() -> None:
    """Else this chain of 60, each holding the former twice, would be 2**60 long."""
    text = "{% for i in range(60) %}{% set o.n = namespace(a=o.n, b=o.n) %}{% endfor %}{{ o.n }}"
    assert len(render("{% set o = namespace(n=1) %}" + text)) < 200


@pytest.mark.parametrize("content", ["a" * 3_000_000, "a<b>\n" * 600_000])
def test_long_messages(content: str) -> None:
    """The bound is on what a template adds; what it is given may be longer."""
    messages = [{"role": "user", "content": content}]
    text = content.strip()
    assert render(CHATML, messages) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    whole = "{% macro f(m) %}{{ m.content }}{% endmacro %}{{ "
    for expression in (
        "f(messages[0])",
        "messages[0].content.strip() + '\n'",
        "messages[0].content.replace('>', '>')",
        "messages[0].content | replace('<', '<') | string",
        "'%s: %s' % ('a', messages[0].content)",
        "'{}: {}'.format('a', messages[0].content)",
        "[messages[0].content, 'a'] | join(', ')",
        "messages[0].content | tojson",
    ):
        assert len(render(whole + expression + " }}", messages)) >= len(text)
    assert render("{{ messages[0].content.split('\n') | length }}", messages) == str(content.count("\n") + 1)


def test_long_tools_and_arguments() -> None:
    """The bound counts all that is given: what is in tools, tool calls and variables may be written out."""
    long = "a" * 3_000_000
    tools = [{"type": "function", "function": {"name": "f", "description": long}}]
    assert len(render("{{ tools | tojson }}", tools=tools)) > len(long)
    for arguments in ({"x": [long]}, '{"x": ["' + long + '"]}'):
        messages = [{"role": "assistant", "content": None, "tool_calls": [called(arguments)]}]
        assert len(render("{{ messages[0].tool_calls | tojson }}", messages)) > len(long)
    assert len(render("{{ x.y | join }}", variables={"x": {"y": [long]}})) == len(long)
    with pytest.raises(TokenizerError, match="LimitError"):
        render("{{ (tools | tojson) * 2 }}", tools=tools)


def test_many_messages() -> None:
    messages = [{"role": "user", "content": "Hi"}] * 500
    text = "{% for m in messages %}{% set n.m = n.m + [m] %}{% endfor %}{{ n.m | length }}"
    assert render("{% set n = namespace(m=[]) %}" + text, messages) == "500"


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    ],
)
def test_endless(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    template = ChatTemplate(text, source="model.gguf")
    with pytest.raises(TokenizerError, match=r"runs for more than 0\.5 s"):
        template.render(USER)


def test_usable_after_a_failure() -> None:
    template = ChatTemplate("{{ 10 // (messages[0].content | int) }}", source="model.gguf")
    with pytest.raises(TokenizerError):
        template.render([{"role": "user", "content": "0"}])
    assert template.render([{"role": "user", "content": "5"}]) == "2"
