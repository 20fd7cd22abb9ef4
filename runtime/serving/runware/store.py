"""Images of clients: results behind a URL, and uploads; each is a reference by its UUID."""

import hmac
import secrets
import uuid
from dataclasses import dataclass

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.kept import Kept
from klein_kv.runtime.serving.runware.tasks import is_uuid

__all__ = ["PATH", "Caller", "ImageStore", "KeptImage"]

PATH = "/runware/v1"

_SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp"))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends tasks, and how this server is called from there.

    Attributes:
        owner: one per API key; what one keeps here is nobody else's.
        base: "http://host:port".
    """

    owner: str
    base: str


@dataclass(frozen=True, slots=True)
class KeptImage:
    """A file.

    Attributes:
        kind: "jpeg", "png" or "webp".
        secret: of its URL, which needs no key, so that a browser shows it.
    """

    data: bytes
    kind: str
    owner: str
    secret: str


class ImageStore:
    """Files by UUID, for a while. Used on the event loop alone."""

    def __init__(self, kept: Kept[KeptImage]) -> None:
        self._kept = kept

    def put(self, data: bytes, caller: Caller, ttl_s: float) -> tuple[str, str]:
        """Keeps a file; returns its UUID and URL."""
        kind = next(kind for magic, kind in _MAGIC if data.startswith(magic))
        name = str(uuid.uuid4())
        image = KeptImage(data, kind, caller.owner, secrets.token_urlsafe(16))
        self._kept.put(name, image, len(data), owner=caller.owner, ttl_s=ttl_s)
        return name, f"{caller.base}{PATH}/images/{name}/{image.secret}.{_SUFFIXES[kind]}"

    def find(self, reference: str, caller: Caller, param: str) -> bytes | None:
        """A file of this caller by UUID, or anybody's by its URL; None of another text.

        Refuses with "reference_not_found" where its time is over, or it never was.
        """
        own = f"{caller.base}{PATH}/images/"
        if reference.startswith(own):
            name, _, file = reference.removeprefix(own).partition("/")
            image = self.at(name, file)
        elif is_uuid(reference):
            image = self._kept.get(reference.lower())
            image = image if image is not None and image.owner == caller.owner else None
        else:
            return None
        if image is None:
            raise ServiceError(
                "reference_not_found", "there is no image of this UUID or URL any more", param
            )
        return image.data

    def at(self, name: str, file: str) -> KeptImage | None:
        """The file of a URL."""
        image = self._kept.get(name)
        if image is None:
            return None
        expected = f"{image.secret}.{_SUFFIXES[image.kind]}"
        same = hmac.compare_digest(expected.encode(), file.encode("utf-8", "replace"))
        return image if same else None

    def drop(self, name: str, caller: Caller, param: str) -> None:
        """Forgets a file of this caller's; refuses as `find` does, and what is no UUID."""
        if not is_uuid(name):
            raise ServiceError("invalid_value", f"{param} is no UUID of an image", param)
        self.find(name, caller, param)
        self._kept.drop(name.lower())
