"""ChatTemplate: renders a conversation with the Jinja template that a checkpoint carries.

A template is code by a stranger, so it runs in Jinja's immutable sandbox, with only those filters and string
methods that conversations have a use for, and under two bounds of our own. Time: every loop iteration, call
and filter looks at the clock. Size: no value that it makes, and no text that it puts out, is longer than what
it is given by more than MAX_LENGTH, which also keeps each single step short. What could leap past that in one
step (`*`, `**`, `%`, and the likes of `replace`) is estimated before it is done.

Semantics (block trimming, `tojson`, `raise_exception`, `strftime_now`, `break` and `continue`, the
`generation` tag, `tools` being none, where a message to be continued ends) are those of `apply_chat_template`
in transformers, for which templates are written.
"""

from __future__ import annotations

import functools
import json
import math
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hexad.checkpoint.messages import MAX_BITS, plain, plain_messages, plain_tools
from hexad.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    import jinja2

MAX_LENGTH = 1 << 20
"""By how much a text (in characters) or list (in characters and items) may outgrow what a template is given:
messages, tools and variables."""

MAX_TEMPLATE = 1 << 16
"""Longest template, in characters: several times those of real models. Jinja takes a second or two to compile
as much."""

MAX_SECONDS = 5.0
"""Longest that one rendering may take. Honest ones take about a millisecond."""

SLACK = 16
"""How many times the bound on size may be reached by what need not become one text: all that macros put out,
and the estimated length of a format."""

# fmt: off
FILTERS = frozenset([
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "format", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string",
    "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount",
])
STRING_METHODS = frozenset([
    "capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower",
    "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition",
    "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
])
# fmt: on


_MARK_END = " \t "
"""White space that no template puts out by itself: where it is gone, the template trims contents."""


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
        self._bounds = _Bounds()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one prompt text.

        messages: non-empty; each a mapping with the string `role` and the `content`: a string, or a list of
            {"type": "text", "text": …}; None where an assistant's message has `tool_calls`. Whatever else a
            message has is the template's. Arguments of tool calls may be JSON text or mappings.
        add_generation_prompt: end with the opening of the assistant's turn.
        continue_final_message: end right after the last message's content instead, for the model to go on.
        tools: functions that the model may call, as JSON schemas in OpenAI's form.
        variables: more for the template to see, such as {"enable_thinking": False}; JSON values.

        The text holds the special tokens, the beginning of sequence included where the model wants it: encode
        it with `add_special=False`. Special-token text inside a message counts as special too, as it does in
        transformers and vLLM.

        Raises PromptError where messages, tools or variables are malformed or the template refuses them,
        TokenizerError where the template is broken.
        """
        given: dict[str, Any] = {
            "messages": plain_messages(messages),
            "tools": plain_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        more = plain(variables or {}, "variables")
        if taken := more.keys() & (given.keys() | {"continue_final_message"}):
            raise PromptError(f"variables must not set {min(taken)!r}, which has an argument of its own.")
        mark = content = ""
        if continue_final_message:
            if add_generation_prompt:
                raise PromptError(
                    "continue_final_message needs add_generation_prompt=False: one message is to go on, or "
                    "another to begin."
                )
            mark = f"continue-here-{secrets.token_hex(8)}"  # unguessable, so that no message has it in it
            last = given["messages"][-1]
            content, last["content"] = last["content"], last["content"] + mark + _MARK_END
        tokens = {name: token for name, token in self._tokens.items() if token is not None}
        text = self._generate({"documents": None} | tokens | more | given)
        return self._cut(text, mark, content) if mark else text

    def _generate(self, variables: dict[str, Any]) -> str:
        with self._lock:  # the bounds are one rendering's
            try:
                self._bounds.reset(variables)
                return self._bounds.join(self._compiled.generate(variables))
            except (PromptError, TokenizerError):
                raise
            except Exception as error:  # a stranger's code may raise anything
                raise self._broken("fails on these messages", error) from error

    def _cut(self, text: str, mark: str, content: str) -> str:
        """The text up to the last mark, which follows the content."""
        text, found, rest = text.rpartition(mark)
        if not found or content.strip() not in text:
            raise PromptError(
                f"{self._source}: the chat template changes or leaves out the last message, so it cannot be "
                "continued."
            )
        text = text.replace(mark + _MARK_END, "").replace(mark, "")  # where a template writes contents twice
        # A template that trims contents would have trimmed this one's end, too.
        return text if rest.startswith(_MARK_END) else text.rstrip()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if len(self.text) > MAX_TEMPLATE:
            raise TokenizerError(
                f"{self._source}: the chat template has {len(self.text):,} characters; at most "
                f"{MAX_TEMPLATE:,} are read. Use a plain prompt (--raw) instead."
            )
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
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.filters import do_indent, do_round, make_attrgetter
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace, pass_environment
        from jinja2.visitor import NodeTransformer

        bounds = self._bounds

        class Generation(Extension):
            """`{% generation %}…{% endgeneration %}` marks text for training; here it is only its body."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Parser) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        class Bound(NodeTransformer):
            """Puts the bounds where Jinja has no hook: loops, `~`, and lists, tuples and dicts."""

            def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
                self.generic_visit(node)
                node.iter = filtered(node.iter, "hexad_timed")
                return node

            def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
                self.generic_visit(node)
                return filtered(nodes.List(node.nodes, lineno=node.lineno), "hexad_concat")

            def visit_literal(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
                self.generic_visit(node)
                return filtered(node, "hexad_admit") if getattr(node, "ctx", "load") == "load" else node

            visit_List = visit_Tuple = visit_Dict = visit_literal  # noqa: N815

        def filtered(node: Any, name: str) -> nodes.Filter:
            return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

        class Environment(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset({"+", "-", "*", "**", "%"})
            concat = staticmethod(bounds.join)  # bodies of macros and of `{% set %}`

            def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
                return Bound().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

            def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
                if isinstance(obj, str | int | float):
                    return isinstance(obj, str) and attr in STRING_METHODS
                return super().is_safe_attribute(obj, attr, value)

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                bounds.check_operation(operator, left, right)
                return bounds.admit(super().call_binop(context, operator, left, right))

            def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
                method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
                text, name = getattr(method, "__self__", None), getattr(method, "__name__", None)
                if isinstance(text, str):
                    if name in ("format", "format_map"):
                        bounds.check_format(text, (args, kwargs))
                    elif name == "replace":
                        bounds.check_replace(text, *args)
                    elif name == "join":
                        return bounds.join(_between(text, *args))
                return bounds.admit(super().call(context, function, *args, **kwargs))

        class OpaqueNamespace(Namespace):
            """A namespace can hold what is larger than its size, itself even, so it is not written out."""

            __repr__ = object.__repr__

        def bounded(function: Any) -> Any:
            @functools.wraps(function)  # keeps Jinja's marks on it
            def filter(*args: Any, **kwargs: Any) -> Any:
                return bounds.admit(function(*args, **kwargs))

            return filter

        # Jinja's own filters of these names, without what autoescaping adds.

        def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
            text, old, new = str(value), str(old), str(new)
            bounds.check_replace(text, old, new)
            return text.replace(old, new, -1 if count is None else count)

        @pass_environment
        def join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
            items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
            return bounds.join(_between(str(d), map(str, items)))

        @pass_environment
        def total(environment: Any, value: Any, attribute: Any = None) -> Any:
            return sum(value if attribute is None else map(make_attrgetter(environment, attribute), value))

        def format(value: Any, *args: Any, **kwargs: Any) -> str:
            bounds.check_format(text := str(value), (args, kwargs))
            return str(text % (kwargs or args))

        def indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
            bounds.check(len(value.splitlines()) * _magnitude(width))
            return do_indent(value, width, first, blank)

        def round(value: float, precision: int = 0, method: Any = "common") -> float:
            if abs(precision) > 100:  # it computes 10**precision
                raise _LimitError(f"it rounds to {precision:,} digits")
            return do_round(value, precision, method)

        def to_json(
            value: Any,
            ensure_ascii: bool = False,
            indent: int | str | None = None,
            separators: tuple[str, str] | None = None,
            sort_keys: bool = False,
        ) -> str:
            # Jinja's own filter escapes <, >, & and ' for HTML.
            if indent is not None and _magnitude(indent) > 100:
                raise _LimitError(f"it indents by {_magnitude(indent)}")
            encoder = json.JSONEncoder(
                ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )
            return bounds.join(encoder.iterencode(value))

        def raise_exception(message: str) -> None:
            raise PromptError(f"{self._source}: the chat template refuses these messages: {message}")

        def strftime_now(form: str) -> str:
            if len(form) > 100:
                raise _LimitError(f"it formats the time with {len(form):,} characters")
            return datetime.now().strftime(form)

        environment = Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
            finalize=bounds.emit,
        )
        ours = {
            "replace": replace,
            "join": join,
            "sum": total,
            "format": format,
            "indent": indent,
            "round": round,
            "tojson": to_json,
        }
        environment.filters = {
            name: bounded(function)
            for name, function in (environment.filters | ours).items()
            if name in FILTERS
        }
        environment.filters.update(
            hexad_timed=bounds.timed, hexad_concat=bounds.concat, hexad_admit=bounds.admit
        )
        del environment.globals["lipsum"]
        environment.globals.update(
            namespace=OpaqueNamespace, raise_exception=raise_exception, strftime_now=strftime_now
        )
        return environment


class _Bounds:
    """The clock and the ruler of one rendering. Every method raises _LimitError where a bound is passed."""

    def __init__(self) -> None:
        self.reset(None)

    def reset(self, given: Any) -> None:
        """Begins a rendering with these values."""
        self.limit: float = math.inf
        self.limit = MAX_LENGTH + self.size(given)
        self.emitted = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise _LimitError(f"it runs for more than {MAX_SECONDS} s")

    def timed(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item

    def check(self, length: int) -> None:
        if length > self.limit:
            raise _LimitError(f"it builds a text or list longer than {self.limit:,}")

    def size(self, value: Any) -> int:
        """Characters and items in a value, and in all that is in it."""
        total, rest = 0, [value]
        while rest:
            item = rest.pop()
            total += 1
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_BITS:
                    raise _LimitError(f"it computes an integer of more than {MAX_BITS:,} bits")
            elif isinstance(item, Mapping):
                rest += item.keys()
                rest += item.values()
            elif isinstance(item, Collection) and not isinstance(item, range):
                rest += item
            self.check(total)
        return total

    def admit(self, value: Any) -> Any:
        """The value, found to be small enough; an iterator's items are looked at as it is consumed."""
        self.tick()
        if isinstance(value, Iterator):
            return self._admit_each(value)
        self.size(value)
        return value

    def _admit_each(self, items: Iterator[Any]) -> Iterator[Any]:
        total = 0
        for item in self.timed(items):
            self.check(total := total + self.size(item))
            yield item

    def emit(self, value: Any) -> Any:
        """What `{{ value }}` puts out, wherever it goes."""
        self.emitted += self.size(value) + 15  # a piece costs memory too
        self.check(self.emitted // SLACK)
        return value

    def join(self, pieces: Iterable[str]) -> str:
        kept, length = [], 0
        for piece in self.timed(pieces):
            kept.append(piece)
            self.check(length := length + len(piece))
        return "".join(kept)

    def concat(self, items: list[Any]) -> str:
        return self.join(map(str, items))

    def check_operation(self, operator: str, left: Any, right: Any) -> None:
        size = self.size(left), self.size(right)
        integers = isinstance(left, int), isinstance(right, int)
        if operator == "**" and all(integers):
            if left.bit_length() * right > MAX_BITS:
                raise _LimitError(f"it computes an integer of more than {MAX_BITS:,} bits")
        elif operator == "*" and any(integers) and not all(integers):
            self.check(size[1] * left if integers[0] else size[0] * right)
        elif operator == "%" and isinstance(left, str):
            self.check_format(left, right)

    def check_replace(self, text: str, old: str, new: str, count: int = -1) -> None:
        self.check(text.count(old) * len(new))

    def check_format(self, text: str, arguments: Any) -> None:
        """Takes every field to splice in every argument, and every integer to be the width of every field."""
        if _LOOKUP.search(text):
            raise _LimitError("it looks into the arguments of a format")
        widths = sum(map(int, re.findall("[0-9]+", text))) + sum(map(abs, _integers(arguments)))
        fields = text.count("%") + text.count("{")
        self.check(fields * (self.size(arguments) + widths) // SLACK)


_LOOKUP = re.compile(r"\{[^{}:!]*[.\[]")  # {0.name} or {0[name]}


def _between(separator: str, items: Iterable[str]) -> Iterator[str]:
    for i, item in enumerate(items):
        if i:
            yield separator
        yield item


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        yield from _integers([*value.values()])
    elif isinstance(value, Collection) and not isinstance(value, str | range):
        for item in value:
            yield from _integers(item)


def _magnitude(width: int | str) -> int:
    return len(width) if isinstance(width, str) else abs(width)
