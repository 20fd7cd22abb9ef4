"""Who may use the service: holders of a key, or, without keys, this machine's own programs."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.settings import is_loopback

__all__ = ["KeyRing", "check_origin"]


class KeyRing:
    """API keys; compared in a time that does not depend on them.

    Attributes:
        open: whether there are none, so that everybody is let in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.open = not keys

    def owner(self, key: object) -> str | None:
        """Whose key it is: a name for it, "" where everybody is let in; None of a wrong one."""
        if self.open:
            return ""
        given = hashlib.sha256(str(key).encode("utf-8", "replace"))
        alike = [hmac.compare_digest(given.digest(), known) for known in self._digests]  # each
        return given.hexdigest() if any(alike) else None

    def bearer(self, headers: Headers) -> str | None:
        """The same of the key in `Authorization: Bearer KEY`."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return self.owner(key.strip()) if self.open or scheme.lower() == "bearer" else None


def check_origin(headers: Headers, *, local: bool) -> None:
    """Refuses web pages of other sites, which a browser lets send requests to this machine.

    A page of the service itself has its address as origin. `local`: the service listens on a
    loopback address, so another host name in a request is one that was bent to this machine.

    Raises:
        ServiceError: "forbidden".
    """
    host = headers.get("host", "")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise ServiceError("forbidden", "pages of other sites may not use this service")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if local and host and not is_loopback(name):
        raise ServiceError("forbidden", "this service answers to the names of this machine alone")
