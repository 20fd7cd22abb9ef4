"""What JSON made of texts, numbers, dataclasses and named tuples, read back as those.

JSON files are other people's: a value of another type than its field's is an error, not a surprise.
"""

import operator
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["from_json", "text_of"]


def text_of(value: Any) -> str:
    """A text that a file holds; a TypeError if it is none, a ValueError if no Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    value.encode()  # JSON may hold half a surrogate pair
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The value as a `kind`: a dataclass, a named tuple, or a type that their fields have.

    Absent fields take their default; of a union the first type is meant, or null. One of
    `MALFORMED` where the value is no such thing, or has fields that the class does not know.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is str:
        return text_of(value)
    if kind is int:
        return operator.index(value)
    if kind is float:
        if type(value) not in (int, float):
            raise TypeError(f"{value!r:.80} is no number")
        return float(value)
    if is_dataclass(kind):
        types = _types(kind)
        return kind(**{name: from_json(types[name], item) for name, item in value.items()})
    if origin is dict:
        return {text_of(name): from_json(inner[1], item) for name, item in value.items()}
    if origin is UnionType:
        return None if value is None and NoneType in inner else from_json(inner[0], value)
    if origin is tuple and inner[-1] is ...:
        return tuple(from_json(inner[0], item) for item in _sequence(value))
    if origin is tuple:
        pairs = zip(inner, _sequence(value), strict=True)
        return tuple(from_json(each, item) for each, item in pairs)
    if hasattr(kind, "_fields"):
        pairs = zip(_types(kind).values(), _sequence(value), strict=True)
        return kind(*(from_json(each, item) for each, item in pairs))
    return value  # of any type, or checked by its class


def _sequence(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r:.80} is no list")
    return value


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
