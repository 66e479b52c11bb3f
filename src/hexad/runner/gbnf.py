"""llama.cpp's GBNF, translated into Lark grammars for llguidance.

GBNF is a context-free grammar over characters. llguidance's terminals are matched greedily, one after the
other, as a lexer does: of `[a-z]* "end"` the first would swallow the second. So every character becomes a
terminal of its own. That keeps the language as it is written, but is slow where a character may be almost
any; so a repeated class becomes one terminal, a run, wherever it is certain that greed does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from hexad.errors import ParamsError

MAX_POSITIONS, MAX_PASSES = 4000, 50
"""Grammars of more characters, or more intertwined rules, are translated without looking for runs."""

_TOKEN = re.compile(
    r"""
    (?P<space>  \s+ | \#[^\n]* )
  | (?P<define> ::= )
  | (?P<name>   [A-Za-z0-9_-]+ )
  | (?P<text>   "(?:[^"\\]|\\.)*" )
  | (?P<chars>  \[\^?(?:[^\]\\]|\\.)*\] )
  | (?P<repeat> [*+?] | \{\s*\d+\s*(?:,\s*\d*\s*)?\} )
  | (?P<token>  <(?:\[\d+\]|[^<>\s\[\]]+)> )
  | (?P<mark>   [().|] )
    """,
    re.VERBOSE | re.DOTALL,
)
_CHAR = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|([^\\])", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "^": "^"}
_ASCII, _OTHER = (1 << 128) - 1, (1 << 0xF5) - (1 << 0xC2)


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is in GBNF, not in Lark's notation: whether its rules are written with `::=`."""
    return re.search(r"^\s*[\w-]+\s*::=", grammar, re.MULTILINE) is not None


def gbnf_to_lark(grammar: str) -> str:
    """The same language as a Lark grammar. Raises ParamsError with the line of what is no GBNF."""
    rules = _Parser(grammar).parse()
    rules = {name: _with_runs(body, rules) for name, body in rules.items()}
    _break_up_runs(rules)
    names = {name: f"r{i}" for i, name in enumerate(rules)} | {"root": "start"}
    return "\n".join(f"{names[name]}: {_lark(body, names)}" for name, body in rules.items())


def escaped(char: str) -> str:
    """A character as a regular expression."""
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


# The parts of a rule. Each object stands for one place in the grammar.


@dataclass(eq=False, slots=True)
class _Chars:
    """One of a set of characters. regex: a class. lead: bit b is set if byte b begins one in UTF-8."""

    regex: str
    lead: int


@dataclass(eq=False, slots=True)
class _Run:
    """Characters of a set, least to most of them. star: an option of a loop, which need not repeat it. whole:
    one terminal, not one for each character."""

    chars: _Chars
    least: int
    most: int | None
    star: bool = False
    whole: bool = True


@dataclass(eq=False, slots=True)
class _Special:
    """A control token, in Lark's notation."""

    text: str


@dataclass(eq=False, slots=True)
class _Ref:
    name: str


@dataclass(eq=False, slots=True)
class _Sequence:
    parts: list[_Part]


@dataclass(eq=False, slots=True)
class _Either:
    options: list[_Part]


@dataclass(eq=False, slots=True)
class _Repeat:
    part: _Part
    least: int
    most: int | None


_Part = _Chars | _Run | _Special | _Ref | _Sequence | _Either | _Repeat


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


class _Parser:
    """A recursive descent over a grammar's tokens. Line breaks mean nothing: a rule ends where the next one
    begins."""

    def __init__(self, grammar: str) -> None:
        self._grammar = grammar
        self._tokens = [*self._split(), *[_Token("end", "", len(grammar))] * 2]
        self._next = 0
        self._used = {"root": 0}

    def parse(self) -> dict[str, _Part]:
        rules: dict[str, _Part] = {}
        while self._peek().kind != "end":
            name = self._take("name", "the name of a rule")
            self._take("define", "::=")
            if name.text in rules:
                self._fail(f"rule {name.text!r} is defined twice", name.start)
            rules[name.text] = self._alternatives()
        for used, start in self._used.items():
            if used not in rules:
                self._fail(f"rule {used!r} is not defined", start)
        return rules

    def _alternatives(self) -> _Part:
        options = [self._sequence()]
        while self._peek().text == "|":
            self._next += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Either(options)

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while (part := self._item()) is not None:
            while self._peek().kind == "repeat":
                part = self._repeated(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else _Sequence(parts)

    def _item(self) -> _Part | None:
        token = self._peek()
        if token.kind == "name" and self._tokens[self._next + 1].kind == "define":
            return None
        if token.kind == "end" or token.text in ("|", ")"):
            return None
        self._next += 1
        match token.kind:
            case "name":
                self._used.setdefault(token.text, token.start)
                return _Ref(token.text)
            case "text":
                chars = self._chars(token.text[1:-1], token.start)
                parts: list[_Part] = [_Chars(f"[{escaped(char)}]", _lead(char, char)) for char, _ in chars]
                return parts[0] if len(parts) == 1 else _Sequence(parts)
            case "chars":
                return self._class(token)
            case "token":
                return _Special(token.text)
        if token.text == ".":
            return _Chars("[\\x{0}-\\x{10ffff}]", _ASCII | _OTHER)
        if token.text != "(":
            self._fail(f"{token.text!r} has no place here", token.start)
        body = self._alternatives()
        self._take(")", ")")
        return body

    def _class(self, token: _Token) -> _Chars:
        inner = token.text[1:-1]
        negated = inner.startswith("^")
        chars = self._chars(inner[negated:], token.start)
        if not chars:
            self._fail("a class without characters matches nothing", token.start)
        regex, lead = "", 0
        while chars:
            first = last = chars.pop(0)[0]
            # A dash is a range's unless it is escaped, or the first or last of the class.
            if len(chars) > 1 and chars[0] == ("-", False):
                last = chars[1][0]
                del chars[:2]
                if last < first:
                    self._fail(f"the range {first!r} to {last!r} is empty", token.start)
            regex += f"{escaped(first)}-{escaped(last)}"
            lead |= _lead(first, last)
        if negated:  # a byte that begins some of the characters left out begins others that are not
            return _Chars(f"[^{regex}]", _ASCII & ~lead | _OTHER)
        return _Chars(f"[{regex}]", lead)

    def _repeated(self, part: _Part) -> _Part:
        token = self._peek()
        self._next += 1
        if token.text in "*+?":
            return _Repeat(part, int(token.text == "+"), 1 if token.text == "?" else None)
        low, comma, high = (piece.strip() for piece in token.text[1:-1].partition(","))
        least, most = int(low), int(high) if high else None if comma else int(low)
        if most is not None and most < least:
            self._fail(f"{token.text} asks for no number", token.start)
        return _Sequence([]) if most == 0 else _Repeat(part, least, most)

    def _chars(self, text: str, start: int) -> list[tuple[str, bool]]:
        """The characters that the inside of a literal stands for, and whether each was escaped."""
        chars: list[tuple[str, bool]] = []
        at = 0
        while at < len(text):
            found = _CHAR.match(text, at)
            if found is None or (found[4] and found[4] not in _ESCAPES):
                self._fail(f"unknown escape {text[at : at + 2]!r}", start)
            if code := found[1] or found[2] or found[3]:
                if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
                    self._fail(f"{found[0]} is no character", start)
                chars.append((chr(int(code, 16)), True))
            else:
                chars.append((_ESCAPES[found[4]], True) if found[4] else (found[5], False))
            at = found.end()
        return chars

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, kind: str, what: str) -> _Token:
        token = self._peek()
        if kind not in (token.kind, token.text):
            self._fail(f"{what} was expected", token.start)
        self._next += 1
        return token

    def _split(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._grammar):
            found = _TOKEN.match(self._grammar, at)
            if found is None:
                self._fail(f"{self._grammar[at]!r} has no place here", at)
            if found.lastgroup != "space":
                yield _Token(str(found.lastgroup), found[0], at)
            at = found.end()

    def _fail(self, reason: str, start: int) -> NoReturn:
        line = self._grammar.count("\n", 0, start) + 1
        raise ParamsError(f"structured_outputs.grammar does not compile: line {line}: {reason}.")


def _lead(first: str, last: str) -> int:
    low, high = (char.encode()[0] for char in (first, last))
    return (1 << high + 1) - (1 << low)


def _with_runs(part: _Part, rules: dict[str, _Part]) -> _Part:
    """The part with a run for each class that is repeated, alone or as one of the options of a loop."""
    match part:
        case _Repeat(_Chars() as chars, least, most) if most != 1:
            run = _Run(chars, max(least, 1), most)
            return run if least else _Repeat(run, 0, 1)
        case _Repeat(body, (0 | 1) as least, None):
            options = _options(body, rules, set())
            classes = [option for option in options if isinstance(option, _Chars)]
            if not classes:
                return _Repeat(_with_runs(body, rules), least, None)
            lead = 0
            for chars in classes:
                lead |= chars.lead
            union = _Chars(f"[{''.join(chars.regex for chars in classes)}]", lead)
            others = [_with_runs(option, rules) for option in options if not isinstance(option, _Chars)]
            return _Repeat(_Either([_Run(union, 1, None, star=True), *others]), least, None)
        case _Repeat(body, least, most):
            return _Repeat(_with_runs(body, rules), least, most)
        case _Sequence(parts):
            return _Sequence([_with_runs(each, rules) for each in parts])
        case _Either(options):
            return _Either([_with_runs(each, rules) for each in options])
    return part


def _options(part: _Part, rules: dict[str, _Part], seen: set[str]) -> list[_Part]:
    """The options of a part; its rules that offer characters are replaced by their own options."""
    match part:
        case _Either(options):
            return [option for each in options for option in _options(each, rules, seen)]
        case _Ref(name) if name not in seen:
            options = _options(rules[name], rules, seen | {name})
            if any(isinstance(option, _Chars) for option in options):
                return options
    return [part]


@dataclass(slots=True)
class _Ends:
    """Where texts of a part may begin and end: bit sets of positions. empty: whether one is empty."""

    first: int = 0
    last: int = 0
    empty: bool = False


@dataclass(slots=True)
class _Positions:
    """Which terminals may stand where, whatever the context: a superset of what the grammar allows.

    parts: the terminals. following: of each, those that may come next, as a bit set.
    """

    rules: dict[str, _Part]
    parts: list[_Chars | _Run | _Special] = field(default_factory=list)
    following: list[int] = field(default_factory=list)
    index: dict[int, int] = field(default_factory=dict)
    ends: dict[str, _Ends] = field(default_factory=dict)

    def find(self) -> bool:
        """Fills everything in; False where there are too many."""
        for body in self.rules.values():
            self._number(body)
        if len(self.parts) > MAX_POSITIONS:
            return False
        self.following = [0] * len(self.parts)
        self.ends = {name: _Ends() for name in self.rules}
        for _ in range(MAX_PASSES):
            found = {name: self._walk(body) for name, body in self.rules.items()}
            if found == self.ends:
                return True
            self.ends = found
        return False

    def lead(self, position: int) -> int:
        match self.parts[position]:
            case _Chars(_, lead) | _Run(_Chars(_, lead)):
                return lead
        return 0

    def after(self, members: int) -> int:
        """The positions that may come after any of these."""
        following = 0
        for position in _bits(members):
            following |= self.following[position]
        return following

    def overlapping(self, possible: int) -> list[int]:
        """These positions, in groups of those that are linked by characters they share."""
        groups: list[tuple[int, int]] = []
        for position in _bits(possible):
            lead, group = self.lead(position), 1 << position
            apart = [each for each in groups if not each[0] & lead]
            for other_lead, other in (each for each in groups if each[0] & lead):
                lead, group = lead | other_lead, group | other
            groups = [*apart, (lead, group)]
        return [group for _, group in groups]

    def _number(self, part: _Part) -> None:
        match part:
            case _Chars() | _Run() | _Special():
                self.index[id(part)] = len(self.parts)
                self.parts.append(part)
            case _Sequence(parts) | _Either(parts):
                for each in parts:
                    self._number(each)
            case _Repeat(body):
                self._number(body)

    def _walk(self, part: _Part) -> _Ends:
        match part:
            case _Ref(name):
                return self.ends[name]
            case _Sequence(parts):
                ends = _Ends(empty=True)
                for each in parts:
                    ends = self._join(ends, self._walk(each))
                return ends
            case _Either(options):
                ends = _Ends()
                for each in options:
                    other = self._walk(each)
                    ends = _Ends(ends.first | other.first, ends.last | other.last, ends.empty or other.empty)
                return ends
            case _Repeat(body, least, most):
                ends = self._walk(body)
                if most != 1:
                    star = next((p for p in _bits(ends.first) if self._made_in(p, body)), -1)
                    for position in _bits(ends.last):
                        own = 1 << star if position == star else 0
                        self.following[position] |= ends.first & ~own
                return _Ends(ends.first, ends.last, ends.empty or not least)
        position = 1 << self.index[id(part)]
        return _Ends(position, position)

    def _join(self, left: _Ends, right: _Ends) -> _Ends:
        for position in _bits(left.last):
            self.following[position] |= right.first
        return _Ends(
            left.first | (right.first if left.empty else 0),
            right.last | (left.last if right.empty else 0),
            left.empty and right.empty,
        )

    def _made_in(self, position: int, body: _Part) -> bool:
        run = self.parts[position]
        return isinstance(run, _Run) and run.star and isinstance(body, _Either) and body.options[0] is run


def _break_up_runs(rules: dict[str, _Part]) -> None:
    """Leaves whole only the runs that greedy matching cannot get wrong: where one may begin, nothing else may
    begin with one of its characters, and nothing that does may follow it.

    A text can have several readings. So what may come next is judged for classes of positions: those that
    could have read the same character of a text share a class, and with it what may follow any of them.
    """
    positions = _Positions(rules)
    runs = [part for part in _all_parts(rules) if isinstance(part, _Run)]
    if not positions.find():
        for run in runs:
            run.whole = False
        return
    is_run = sum(1 << i for i, part in enumerate(positions.parts) if isinstance(part, _Run))
    start = positions.ends["root"].first
    key_of = list(range(len(positions.parts)))  # the class of each position, by its smallest member
    members = {key: 1 << key for key in key_of}
    merged = True
    while merged:
        merged = False
        for possible in [start, *(positions.after(each) | each & is_run for each in members.values())]:
            for group in positions.overlapping(possible):
                key, *others = sorted({key_of[position] for position in _bits(group)})
                for other in others:
                    merged = True
                    for position in _bits(members[other]):
                        key_of[position] = key
                    members[key] |= members.pop(other)
    for each, possible in [(0, start), *((each, positions.after(each)) for each in members.values())]:
        for position in _bits((each | possible) & is_run):
            part = positions.parts[position]
            assert isinstance(part, _Run)
            again = positions.following[position] >> position & 1
            rest = _bits(possible & ~(1 << position))
            if again or any(positions.lead(other) & part.chars.lead for other in rest):
                part.whole = False


def _all_parts(rules: dict[str, _Part]) -> Iterator[_Part]:
    stack = list(rules.values())
    while stack:
        part = stack.pop()
        yield part
        match part:
            case _Sequence(parts) | _Either(parts):
                stack.extend(parts)
            case _Repeat(body):
                stack.append(body)


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _lark(part: _Part, names: dict[str, str]) -> str:
    match part:
        case _Chars(regex):
            return f"/{regex}/"
        case _Run(_Chars(regex), least, most, whole=whole):
            return f"/{regex}{_count(least, most)}/" if whole else f"/{regex}/{_count(least, most)}"
        case _Special(text):
            return text
        case _Ref(name):
            return names[name]
        case _Sequence(parts):
            return " ".join(_lark(each, names) for each in parts) or '""'
        case _Either(options):
            return f"({' | '.join(_lark(each, names) for each in options)})"
        case _Repeat(body, least, most):
            return f"({_lark(body, names)}){_count(least, most)}"


def _count(least: int, most: int | None) -> str:
    match least, most:
        case 0, None:
            return "*"
        case 1, None:
            return "+"
        case 0, 1:
            return "?"
    return f"{{{least},{'' if most is None else most}}}"
