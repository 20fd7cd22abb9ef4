"""One call of a pipeline at a time."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from klein_kv.errors import RequestError

__all__ = ["one_at_a_time"]

P = ParamSpec("P")
R = TypeVar("R")


def one_at_a_time(call: Callable[P, R]) -> Callable[P, R]:
    """Has threads of one pipeline wait for each other; refuses a pipeline that is closed."""

    @functools.wraps(call)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        pipe: Any = args[0]
        with pipe._lock:
            if pipe._closed:
                raise RequestError("this pipeline is closed; open the artifacts again")
            return call(*args, **kwargs)

    return alone
