"""JSON files of ours: their format is checked, and values are read as the types of their fields.

Such files are other people's: a value of another type is an error, not a surprise.
"""

import json
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from klein_kv.errors import MALFORMED, ArtifactError

__all__ = ["from_json", "read_document"]

_NUMBERS = {int: (int,), float: (int, float), bool: (bool,)}
"""What JSON may give for a type; to Python a truth value would be an integer."""


def read_document(path: Path, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """A JSON object that says its format, `kind`, and its version.

    An `ArtifactError` tells of another one, and of the `remedy`; a FileNotFoundError of none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, *MALFORMED) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; {remedy}") from error
    if not isinstance(value, dict) or value.get("format") != kind:
        found = value.get("format") if isinstance(value, dict) else None
        raise ArtifactError(f"{path}: the format is {found!r}, expected {kind!r}; {remedy}")
    if value.get("format_version") != version:
        raise ArtifactError(
            f"{path} has format version {value.get('format_version')}, this klein-kv reads "
            f"{version}; upgrade klein-kv, or {remedy}"
        )
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The value as a `kind`: a dataclass, a named tuple, or a type that their fields have.

    Absent fields take their default; of a union the first type is meant, or null. One of
    `MALFORMED` where the value is no such thing, or has fields that the class does not know: what
    gets a new field gets a new format version.
    """
    if kind is str:
        return _text(value)
    if kind in _NUMBERS:
        if type(value) not in _NUMBERS[kind]:
            raise TypeError(f"{value!r:.80} is no {kind.__name__}")
        return kind(value)
    origin, inner = get_origin(kind), get_args(kind)
    if hasattr(kind, "__dataclass_fields__"):
        types = _types(kind)
        return kind(**{name: from_json(types[name], item) for name, item in value.items()})
    if origin is dict:
        return {_text(name): from_json(inner[1], item) for name, item in value.items()}
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


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    value.encode()  # JSON may hold half a surrogate pair
    return value


def _sequence(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{value!r:.80} is no list")
    return value


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
