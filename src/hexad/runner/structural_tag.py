"""vLLM's structural tags, translated into Lark grammars for llguidance: formats for parts of a text.

A format is one of const_string, json_schema, regex, any_text, sequence, or, tag, triggered_tags and
tags_with_separator. Where a text names a control token, as in "<|tool_call|>", that token is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from hexad.checks import shown
from hexad.errors import ParamsError
from hexad.runner.gbnf import escaped

_FORMATS: dict[str, tuple[set[str], set[str]]] = {
    "const_string": ({"value"}, set()),
    "json_schema": ({"json_schema"}, set()),
    "regex": ({"pattern"}, set()),
    "any_text": (set(), set()),
    "sequence": ({"elements"}, set()),
    "or": ({"elements"}, set()),
    "tag": ({"begin", "content", "end"}, set()),
    "triggered_tags": ({"triggers", "tags"}, {"at_least_one", "stop_after_first"}),
    "tags_with_separator": ({"tags", "separator"}, {"at_least_one", "stop_after_first"}),
}
"""Keys that a format must have, and may have, beside `type`."""


def structural_tag_to_lark(text: str, control_ids: Mapping[str, int], schema: Callable[[Any], str]) -> str:
    """A Lark grammar for a structural tag.

    text: JSON, either {"structures": [{"begin", "schema", "end"}, …], "triggers": […]} or
    {"type": "structural_tag", "format": …}. control_ids: ids of control tokens by name. schema: writes a JSON
    schema as %json is to have it.

    Raises ParamsError for what is malformed or cannot be enforced.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        _fail(f"it is not valid JSON: {error}")
    return _Translator(control_ids, schema).translate(_modern(value))


class _Part(NamedTuple):
    """A piece of a rule: a regular expression, or Lark for what is none."""

    text: str
    regular: bool


class _Translator:
    """Neighbouring regular expressions become one terminal: llguidance matches terminals greedily, one after
    the other, so that of `[a-z]*` and `end` the first would swallow the second. Before anything else a
    regular expression still goes as far as it can."""

    def __init__(self, control_ids: Mapping[str, int], schema: Callable[[Any], str]) -> None:
        self._control_ids = control_ids
        self._schema = schema
        self._rules = ["TEXT: /(?s:.*)/"]
        names = sorted((name for name in control_ids if name), key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def translate(self, format: Any) -> str:
        body = _rendered(self._format(format, last=True))
        return "\n".join([f"start: {body}", *self._rules])

    def _format(self, format: Any, *, last: bool) -> list[_Part]:
        """last: whether nothing follows, so that free text needs no end."""
        kind = _checked_format(format)
        match kind:
            case "const_string":
                return self._literal(format["value"])
            case "json_schema":
                return [_Part(f"%json {self._schema(format['json_schema'])}", False)]
            case "regex":
                return [_Part(f"(?:{_string(format['pattern'])})", True)]
            case "sequence":
                elements = _list(format["elements"])
                ends = [*[False] * (len(elements) - 1), last]
                parts = [self._format(element, last=end) for element, end in zip(elements, ends, strict=True)]
                return [part for element in parts for part in element]
            case "or":
                return self._either(
                    [self._format(element, last=last) for element in _list(format["elements"])]
                )
            case "tag":
                return [*self._literal(format["begin"]), *self._tag_rest(format, last=last)]
            case "tags_with_separator":
                return self._separated(format)
        if not last:
            _fail(f"{kind} must stand last, or (any_text) in a tag with an end, to be told from what follows")
        return [_Part("TEXT", False)] if kind == "any_text" else self._triggered(format)

    def _tag_rest(self, tag: Mapping[str, Any], *, last: bool) -> list[_Part]:
        """What follows the beginning of a tag."""
        end = self._literal(tag["end"])
        if not end or _checked_format(tag["content"]) != "any_text":
            return [*self._format(tag["content"], last=last and not end), *end]
        if not end[0].regular:  # a control token: no text reaches across it
            return [_Part("TEXT", False), *end]
        return [self._rule("[lazy]", f"TEXT {_rendered(end[:1])}"), *end[1:]]

    def _triggered(self, format: Mapping[str, Any]) -> list[_Part]:
        triggers = sorted({_string(trigger) for trigger in _list(format["triggers"])}, key=len)
        rests: dict[str, list[list[_Part]]] = {}
        for tag in _tags(format):
            begin = _string(tag["begin"])
            # The shortest comes first in the text, too.
            trigger = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
            if trigger is None:
                _fail(f"no trigger begins the tag {begin!r}")
            rest = [*self._literal(begin[len(trigger) :]), *self._tag_rest(tag, last=False)]
            rests.setdefault(trigger, []).append(rest)
        if unused := set(triggers) - set(rests):
            _fail(f"the trigger {min(unused)!r} begins no tag")
        groups = []
        for trigger, options in rests.items():
            head = self._literal(trigger)
            if head[0].regular and len(head) > 1:
                _fail(f"the trigger {trigger!r} is text before a control token; use one of them")
            if head[0].regular:
                head = [self._rule("[lazy]", f"TEXT {_rendered(head)}")]
            else:
                head = [_Part("TEXT", False), *head]
            groups.append(_rendered([*head, *self._either(options)]))
        group = self._rule("", " | ".join(groups)).text
        match bool(format.get("at_least_one")), bool(format.get("stop_after_first")):
            case True, True:
                return [_Part(group, False)]
            case False, True:
                return [_Part(f"({group} | TEXT)", False)]
            case least, _:
                return [_Part(f"{group}{'+' if least else '*'} TEXT", False)]

    def _separated(self, format: Mapping[str, Any]) -> list[_Part]:
        tag = _rendered(self._either([self._format(tag, last=False) for tag in _tags(format)]))
        more = (
            ""
            if format.get("stop_after_first")
            else f" ({_rendered(self._literal(format['separator']))} {tag})*"
        )
        return [_Part(f"({tag}{more}){'' if format.get('at_least_one') else '?'}", False)]

    def _either(self, options: list[list[_Part]]) -> list[_Part]:
        if len(options) == 1:
            return options[0]
        if all(part.regular for option in options for part in option):
            return [
                _Part(f"(?:{'|'.join(''.join(part.text for part in option) for option in options)})", True)
            ]
        return [_Part(f"({' | '.join(map(_rendered, options))})", False)]

    def _literal(self, text: Any) -> list[_Part]:
        """A text, with its control tokens; no part for none."""
        pieces = [_string(text)] if self._control is None else self._control.split(_string(text))
        return [
            _Part(f"<[{self._control_ids[piece]}]>", False)
            if piece in self._control_ids
            else _Part(regex, True)
            for piece in pieces
            if (regex := "".join(map(escaped, piece)))
        ]

    def _rule(self, options: str, body: str) -> _Part:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return _Part(name, False)


def _rendered(parts: Sequence[_Part]) -> str:
    """Parts, one after the other, as the body of a Lark rule."""
    from llguidance import regex_to_lark

    pieces: list[str] = []
    regex = ""
    for part in [*parts, _Part("", False)]:
        if part.regular:
            regex += part.text
            continue
        if regex:
            pieces.append(f"/{regex_to_lark(regex, '')}/")
        regex = ""
        pieces.append(part.text)
    return " ".join(piece for piece in pieces if piece) or '""'


def _modern(value: Any) -> Any:
    """The format within a structural tag of either form; the older one may name its type, too."""
    if (
        isinstance(value, dict)
        and value.keys() - {"type"} == {"structures", "triggers"}
        and value.get("type", "structural_tag") == "structural_tag"
    ):
        tags = []
        for structure in _list(value["structures"]):
            if not isinstance(structure, dict) or structure.keys() != {"begin", "schema", "end"}:
                _fail(f"a structure has begin, schema and end; this one is {shown(structure)}")
            content = {"type": "json_schema", "json_schema": structure["schema"]}
            tags.append({"begin": structure["begin"], "content": content, "end": structure["end"]})
        return {"type": "triggered_tags", "triggers": value["triggers"], "tags": tags}
    if not (
        isinstance(value, dict) and value.keys() == {"type", "format"} and value["type"] == "structural_tag"
    ):
        _fail('it must be {"structures": …, "triggers": …} or {"type": "structural_tag", "format": …}')
    return value["format"]


def _tags(format: Mapping[str, Any]) -> list[Any]:
    tags = [{"type": "tag"} | tag if isinstance(tag, dict) else tag for tag in _list(format["tags"])]
    if wrong := [tag for tag in tags if _checked_format(tag) != "tag"]:
        _fail(f"{shown(wrong[0])} is no tag")
    return tags


def _checked_format(format: Any) -> str:
    """The format's type, once its keys are known to be right: what is not understood must not be ignored."""
    kind = format.get("type") if isinstance(format, dict) else None
    if not isinstance(kind, str) or kind not in _FORMATS:
        _fail(f"{shown(format)} is no format that is supported: {', '.join(_FORMATS)}")
    needed, optional = _FORMATS[kind]
    keys = set(format) - {"type"}
    if not needed <= keys <= needed | optional:
        wanted = ", ".join(sorted(needed | optional)) or "no keys"
        _fail(f"the format {kind} takes {wanted}, not {', '.join(sorted(keys)) or 'none'}")
    return kind


def _string(value: Any) -> str:
    if not isinstance(value, str):
        _fail(f"{shown(value)} must be a text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        _fail(f"{shown(value)} must be a list that is not empty")
    return value


def _fail(reason: str) -> NoReturn:
    raise ParamsError(f"structured_outputs.structural_tag: {reason}.")
