"""From reference images to a `ReferenceSet`: prepare, look up, and encode what is not there yet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.config import ModelConfig
from klein_kv.artifacts.pixels import prepare_reference
from klein_kv.artifacts.positions import reference_ids
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.planning.request import Request
from klein_kv.runtime.references.reference_set import (
    KVOrigin,
    ReferenceSet,
    images_digest,
    load_references,
    read_reference_digest,
)
from klein_kv.runtime.references.reference_store import ReferenceStore
from klein_kv.runtime.session import Session

__all__ = ["PreparedReferences", "ReferenceEncoder", "blank_references"]

_LONGEST_SIDE = 16384


@dataclass(frozen=True, slots=True)
class PreparedReferences:
    """Reference images as the VAE reads them."""

    pixels: tuple[NDArray[np.uint8], ...]  # [1, H, W, 3] each
    images: str  # their `images_digest`
    digest: str  # of the keys and values that they get here

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each."""
        return tuple((x.shape[1], x.shape[2]) for x in self.pixels)

    @property
    def first_size(self) -> tuple[int, int]:
        """(height, width) of the first image."""
        return self.sizes[0]


class ReferenceEncoder:
    """Makes and finds the reference sets of one pipeline."""

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        graphs: GraphSet,
        origin: KVOrigin,
        store: ReferenceStore,
        matte: str | None = "white",
    ) -> None:
        self.origin = origin
        self._session = session
        self._config = config
        self._graphs = graphs
        self._store = store
        self.matte = matte

    def prepare(
        self, images: Sequence[Image.Image] | PreparedReferences, *before: NDArray[np.uint8]
    ) -> PreparedReferences:
        """Checks and crops images (`pixels.prepare_reference`), with prepared ones `before` them.

        Computes nothing yet. `PreparedReferences` stay what they are, and have none before them.
        """
        if isinstance(images, PreparedReferences):
            return replace(images, digest=self.origin.digest(images.images))
        unit = self._config.vae.multiple_of
        new = (prepare_reference(image, unit, self.matte) for image in images)
        pixels = (*before, *new)
        digest = images_digest(pixels)
        return PreparedReferences(pixels, digest, self.origin.digest(digest))

    def tokens(self, prepared: PreparedReferences | None) -> dict[str, Buffer]:
        """Inputs `ref_hidden_states` and `ref_ids` of the graphs that take references."""
        session, channels = self._session, self._config.transformer.in_channels
        if prepared is None:
            none = np.zeros((1, 0, channels), NUMPY_DTYPES[self._graphs.dtype])
            return {
                "ref_hidden_states": session.upload(none),
                "ref_ids": session.upload(np.zeros((0, 4), np.int64)),
            }
        ids = reference_ids(self._grids(prepared))
        tokens = session.assemble(
            (1, len(ids), channels), (self._encode(image) for image in prepared.pixels)
        )
        return {"ref_hidden_states": tokens, "ref_ids": session.upload(ids)}

    def first_tokens(
        self, prepared: PreparedReferences, references: dict[str, Buffer] | None
    ) -> Buffer:
        """Tokens [1, S, C] of the first image alone; of all `references`, where these are there."""
        rows, columns = self._grids(prepared)[0]
        shape = (1, rows * columns, self._config.transformer.in_channels)
        if references is not None:
            return self._session.view(references["ref_hidden_states"], shape)
        return self._session.assemble(shape, [self._encode(prepared.pixels[0])])

    def _grids(self, prepared: PreparedReferences) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each image."""
        unit = self._config.vae.multiple_of
        return [(height // unit, width // unit) for height, width in prepared.sizes]

    def _encode(self, image: NDArray[np.uint8]) -> Buffer:
        session = self._session
        return session.run("vae_encoder", {"image": session.upload(image)})["ref_hidden_states"]

    def set_of(self, prepared: PreparedReferences, kv: dict[str, Buffer]) -> ReferenceSet:
        """A set of keys and values that `first_step` or `encode_references` gave out."""
        count = sum(rows * columns for rows, columns in self._grids(prepared))
        return ReferenceSet(
            kv=dict(kv),
            tensors=self._graphs.kv_tensors(self._config.transformer, count),
            num_tokens=count,
            first_size=prepared.first_size,
            images=prepared.images,
            origin=self.origin,
            session=self._session,
        )

    def encode(self, prepared: PreparedReferences) -> ReferenceSet:
        """The set from the store, or computed and kept; a CapacityError if it does not fit."""
        references = self._store.get(prepared.digest)
        if references is None:
            stages = ("vae_encoder", "encode_references")
            request = Request(*prepared.first_size, prepared.sizes, stages)
            self._session.admit(request, self._store.free)
            self._session.prepare()
            kv = self._session.run("encode_references", self.tokens(prepared))
            references = self.set_of(prepared, kv)
            self._store.put(references.digest, references)
        return references

    def load(self, path: Path) -> ReferenceSet:
        """The set of a file, or of the store, where it is already there; see `load_references`."""
        references = self._store.get(read_reference_digest(path))
        if references is None:
            net = self._config.transformer
            references = load_references(path, self._session, self.origin, net)
            self._store.put(references.digest, references)
        self.check(references)
        return references

    def check(self, references: ReferenceSet) -> None:
        """Refuses sets that belong to something else, with the reason."""
        if not isinstance(references, ReferenceSet):
            raise RequestError(
                f"references is a {type(references).__name__}, expected a set that "
                "encode_references or load_references gave; pass images as image="
            )
        self.origin.check(references.origin, "the references")

    def with_references(
        self, request: Request, references: ReferenceSet | PreparedReferences, *, known: bool
    ) -> Request:
        """A request for text-to-image with what references add; `known` ones are in memory."""
        if isinstance(references, PreparedReferences):
            sizes = references.sizes
        else:
            unit = self._config.vae.multiple_of
            sizes = ((unit, unit * references.num_tokens),)
        kv = self._graphs.variant == "kv"
        new: tuple[str, ...] = ("vae_encoder", "first_step") if kv else ("vae_encoder",)
        if known:  # a start image is mixed with noise all the same
            new = ("vae_encoder",) if "blend" in request.stages else ()
        at = "text_encoder" in request.stages
        stages = (*request.stages[:at], *new, *request.stages[at:])
        if known:
            return replace(request, references=sizes, stages=stages, kv_held=True)
        stays = kv and self._store.budget > 0
        return replace(request, references=sizes, stages=stages, kv_kept=stays)


def blank_references(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Black pictures of these sizes, (height, width) in pixels; a RequestError if one is none."""
    for size in sizes:
        if not (
            isinstance(size, tuple | list)
            and len(size) == 2
            and all(isinstance(side, int) and 0 < side <= _LONGEST_SIDE for side in size)
        ):
            raise RequestError(
                f"size of a reference is {size!r}, expected (height, width) in pixels, at most "
                f"{_LONGEST_SIDE} each"
            )
    return [Image.new("RGB", (width, height)) for height, width in sizes]
