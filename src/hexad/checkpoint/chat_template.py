"""ChatTemplate: renders a conversation with the Jinja template that a checkpoint carries.

A template is code by a stranger, so it runs in Jinja's immutable sandbox and under two bounds of our own: how
long it may run (looked at in each loop iteration and call) and how large a text it may build (by output, `~`,
`+` and `*`). Semantics (block trimming, `tojson`, `raise_exception`, `strftime_now`, `break` and `continue`,
the `generation` tag, `tools` being none) are those of `apply_chat_template` in transformers, for which
templates are written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hexad.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    import jinja2

MAX_LENGTH = 1 << 24
"""Longest text (in characters) or list (in items) that a template may build."""

MAX_SECONDS = 5.0
"""Longest that one rendering may take. Honest ones take about a millisecond."""


class _LimitError(Exception):
    """A template went past one of the bounds."""


class ChatTemplate:
    """A compiled-on-first-use chat template.

    text: the template's Jinja source.
    bos_token, eos_token: texts of these tokens, which templates splice in; None leaves the name undefined.
    source: what the errors name, usually the checkpoint's path.
    """

    def __init__(
        self, text: str, *, bos_token: str | None = None, eos_token: str | None = None, source: object
    ) -> None:
        self.text = text
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._lock = threading.Lock()
        self._deadline = 0.0

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one prompt text.

        messages: non-empty; each a mapping with at least the strings `role` and `content`.
        add_generation_prompt: end with the opening of the assistant's turn.

        The text holds the special tokens, the beginning of sequence included where the model wants it: encode
        it with `add_special=False`. Special-token text inside a message counts as special too, as it does in
        transformers and vLLM.

        Raises PromptError where messages are malformed or the template refuses them, TokenizerError where the
        template is broken.
        """
        _validate(messages)
        variables = {name: token for name, token in self._tokens.items() if token is not None}
        with self._lock:  # the deadline is per rendering
            self._deadline = time.monotonic() + MAX_SECONDS
            try:
                pieces = self._compiled.generate(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **variables,
                )
                return _join(pieces)
            except (PromptError, TokenizerError):
                raise
            except Exception as error:  # a stranger's code may raise anything
                raise self._broken("fails on these messages", error) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = self._environment()
        try:
            return environment.from_string(self.text)
        except Exception as error:  # TemplateSyntaxError mostly; RecursionError where it nests too deeply
            line = getattr(error, "lineno", None)
            raise self._broken(
                f"does not parse at line {line}" if line else "does not parse", error
            ) from error

    def _broken(self, what: str, error: Exception) -> TokenizerError:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ").removeprefix("_")
        return TokenizerError(
            f"{self._source}: the chat template {what} ({reason}). Use a plain prompt (--raw) instead."
        )

    def _environment(self) -> jinja2.Environment:
        # Imported here: Jinja costs tens of milliseconds that a plain prompt need not pay.
        import json
        from datetime import datetime

        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.visitor import NodeTransformer

        class Generation(Extension):
            """`{% generation %}…{% endgeneration %}` marks text for training; here it is only its body."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Parser) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        class Bound(NodeTransformer):
            """Has every loop look at the clock, and every `~` at the length of its result."""

            def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
                self.generic_visit(node)
                node.iter = filtered(node.iter, "hexad_timed")
                return node

            def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
                self.generic_visit(node)
                return filtered(node, "hexad_bounded")

        def filtered(node: Any, name: str) -> nodes.Filter:
            return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

        def tick() -> None:
            if time.monotonic() > self._deadline:
                raise _LimitError(f"it runs for more than {MAX_SECONDS} s")

        def timed(items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                tick()
                yield item

        class Environment(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset({"+", "*", "**"})

            def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
                return Bound().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                repeats = operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__"))
                if repeats or operator == "**":  # checked before, because afterwards may be too late
                    _check_length(_magnitude(left) * _magnitude(right))
                return _bounded(super().call_binop(context, operator, left, right))

            def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
                tick()  # recursive macros and loops
                return super().call(context, function, *args, **kwargs)

        def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            # Jinja's own filter escapes <, >, & and ' for HTML.
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        def raise_exception(message: str) -> None:
            raise PromptError(f"{self._source}: the chat template refuses these messages: {message}")

        def strftime_now(form: str) -> str:
            return datetime.now().strftime(form)

        environment = Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters.update(tojson=to_json, hexad_timed=timed, hexad_bounded=_bounded)
        environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        return environment


def _validate(messages: object) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError(
            "messages must be a non-empty list of {'role': …, 'content': …}, not "
            + ("an empty one." if isinstance(messages, list | tuple) else f"{type(messages).__name__}.")
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"messages[{i}] must have 'role' and 'content', not be {type(message).__name__}."
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise PromptError(f"messages[{i}][{key!r}] must be a string, not {message.get(key)!r:.80}.")


def _join(pieces: Iterable[str]) -> str:
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        _check_length(length)
    return "".join(kept)


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_length(len(value))
    return value


def _magnitude(factor: Any) -> int:
    return len(factor) if hasattr(factor, "__len__") else abs(int(factor))


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise _LimitError(f"it builds a text or list longer than {MAX_LENGTH:,}")
