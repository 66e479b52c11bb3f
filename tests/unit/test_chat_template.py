"""ChatTemplate: what templates mean to transformers, and the bounds that a stranger's runs under."""

from __future__ import annotations

import re
import time

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
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_bombs(text: str) -> None:
    with pytest.raises(TokenizerError, match="fails on these messages"):
        render(text)


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
