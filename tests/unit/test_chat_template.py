"""ChatTemplate: what templates mean to transformers, and the bounds that a stranger's runs under."""

from __future__ import annotations

import re
import time
import tracemalloc

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


def render(text: str, messages: list[dict[str, str]] = USER, **options: bool) -> str:
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
    ],
)
def test_malformed_messages(messages: list[dict[str, str]], reason: str) -> None:
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
