"""Reference images that were uploaded as a resource: prepared pixels by the digest of them.

The engine keeps keys and values; the shelf keeps what they are made from, so that any replica can
make them again, and a set that the GPU gave up costs a first step instead of an error.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.jobs import Pixels

__all__ = ["ReferenceShelf", "ShelvedReferences"]


@dataclass(frozen=True, slots=True, eq=False)
class ShelvedReferences:
    """An ordered set of prepared images.

    Attributes:
        digest: their `images_digest`, which is the id of the resource.
        created: seconds since 1970.
    """

    digest: str
    images: tuple[Pixels, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def nbytes(self) -> int:
        """Of all pixels."""
        return sum(image.nbytes for image in self.images)


class ReferenceShelf:
    """Sets by id, at most `budget` bytes of them, least recently used out first.

    Used on the event loop alone.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._sets: OrderedDict[str, ShelvedReferences] = OrderedDict()

    def put(self, references: ShelvedReferences) -> ShelvedReferences:
        """Keeps a set; returns the one that was there before, if it was.

        Raises:
            ServiceError: it alone is larger than the budget.
        """
        known = self._sets.get(references.digest)
        if known is not None:
            self._sets.move_to_end(references.digest)
            return known
        if references.nbytes > self.budget:
            raise ServiceError(
                "payload_too_large", "the images are larger than what is kept here", "image"
            )
        while self.nbytes + references.nbytes > self.budget:
            _, oldest = self._sets.popitem(last=False)
            self.nbytes -= oldest.nbytes
        self._sets[references.digest] = references
        self.nbytes += references.nbytes
        return references

    def get(self, digest: str) -> ShelvedReferences:
        """The set of an id.

        Raises:
            ServiceError: "reference_not_found".
        """
        references = self._sets.get(digest)
        if references is None:
            raise ServiceError(
                "reference_not_found",
                "there are no references of this id; upload the images again",
                "references",
            )
        self._sets.move_to_end(digest)
        return references

    def delete(self, digest: str) -> None:
        """Forgets a set.

        Raises:
            ServiceError: "reference_not_found".
        """
        self.nbytes -= self.get(digest).nbytes
        del self._sets[digest]
