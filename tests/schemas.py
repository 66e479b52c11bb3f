"""Random JSON schemas whose texts are bounded, so that even a model that knows nothing comes to an end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

WORDS = ["name", "age", "city", "tags", "id", "größe", "x y", "ok", "price", "when", 'say "hi"', "a/b"]
PATTERNS = [r"^[a-z]{2,6}$", r"^[A-Z]\d{3}$", r"^(foo|bar)-[0-9]{1,3}$", r"^\w{1,5}@\w{1,5}\.com$"]
FORMATS = ["uuid", "ipv4", "ipv6", "date-time", "time"]


def schemas(count: int, seed: int = 0) -> list[Schema]:
    """Bounded strings, arrays and numbers, patterns, formats, enums, objects with optional properties,
    tuples, anyOf, $ref."""
    rng = random.Random(seed)
    return [_with_definitions(rng) for _ in range(count)]


def _with_definitions(rng: random.Random) -> Schema:
    schema = _object(rng, 0) if rng.random() < 0.7 else _any(rng, 0)
    if rng.random() < 0.2:
        shared = _any(rng, 2)
        schema = {
            "$defs": {"shared": shared},
            "type": "array",
            "items": {"$ref": "#/$defs/shared"},
            "maxItems": 3,
        }
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    leaves: list[Callable[[random.Random], Schema]] = [_string, _string, _number, _integer, _choice, _simple]
    nested = [_object, _array, _tuple, _any_of]
    if depth < 3 and rng.random() < 0.45:
        return rng.choice(nested)(rng, depth)
    return rng.choice(leaves)(rng)


def _string(rng: random.Random) -> Schema:
    match rng.randrange(4):
        case 0:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case 1:
            return {"type": "string", "format": rng.choice(FORMATS)}
        case _:
            most = rng.randint(1, 16)
            return {"type": "string", "minLength": rng.randint(0, most), "maxLength": most}


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
    if rng.random() < 0.2:
        schema = {
            "type": "integer",
            "exclusiveMinimum": low,
            "maximum": low + 100,
            "multipleOf": rng.choice([2, 5]),
        }
    return schema


def _number(rng: random.Random) -> Schema:
    low = round(rng.uniform(-100, 100), 2)
    return {"type": "number", "minimum": low, "exclusiveMaximum": round(low + rng.uniform(0.5, 100), 2)}


def _choice(rng: random.Random) -> Schema:
    values: list[Any] = [*rng.sample(WORDS, 3), 1, 2.5, True, None, {"a": [1]}]
    if rng.random() < 0.2:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _simple(rng: random.Random) -> Schema:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"], "maxLength": 4}])


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 5))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    most = rng.randint(1, 4)
    items = _any(rng, depth + 1)
    return {"type": "array", "items": items, "minItems": rng.randint(0, most), "maxItems": most}


def _tuple(rng: random.Random, depth: int) -> Schema:
    parts = [_any(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth + 1) for _ in range(rng.randint(2, 3))]}
