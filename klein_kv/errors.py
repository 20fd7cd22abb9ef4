"""Everything that klein-kv raises on purpose.

    KleinKVError
    |-- CheckpointError     a checkpoint that cannot be exported: files, tensors, shapes, config
    |-- ArtifactError       an artifact folder that is not whole, not ours, or was altered
    |-- RequestError        a call with bad arguments (also a ValueError)
    |-- BackendError        a missing library, device or data type
    |-- CapacityError       not enough memory or disk for what was asked
    |-- BuildError          TensorRT refused to build, or to load, an engine
    `-- NotFiniteError      what was computed is NaN or infinite

Messages say what was wrong, what was found, what was expected and how to mend it, in that order.
"""

import re

__all__ = [
    "MALFORMED",
    "ArtifactError",
    "BackendError",
    "BuildError",
    "CapacityError",
    "CheckpointError",
    "KleinKVError",
    "NotFiniteError",
    "RequestError",
]


MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What taking a file's values for what they should be may raise."""

_LONGEST = 2000  # characters of a message
_LONG_WORD = re.compile(r"\S{400,}")


class KleinKVError(Exception):
    """Base of every error that klein-kv raises on purpose.

    Messages quote files and arguments: control codes of theirs are escaped, and long words and
    texts lose their middle.
    """

    def __str__(self) -> str:
        text = _LONG_WORD.sub(lambda word: f"{word[0][:100]}...{word[0][-30:]}", super().__str__())
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return "".join(x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text)


class CheckpointError(KleinKVError):
    """The checkpoint cannot be read or does not describe a klein model."""


class ArtifactError(KleinKVError):
    """The artifact folder is incomplete, altered, or from another format version."""


class RequestError(KleinKVError, ValueError):
    """An argument of a call is out of range or contradicts another one."""


class BackendError(KleinKVError):
    """A library, device or data type that the request needs is not there."""


class CapacityError(KleinKVError):
    """Memory or disk does not suffice; the message gives the numbers."""


class BuildError(KleinKVError):
    """TensorRT refused a network or an engine; the message carries its own words."""


class NotFiniteError(KleinKVError):
    """A result is NaN or infinite; the message names the graph and step that first gave one."""
