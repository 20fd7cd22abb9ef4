"""From reference images to a `ReferenceSet`: prepare, look up, and encode what is not there yet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.pixels import prepare_reference
from klein_kv.artifacts.positions import reference_ids
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import NUMPY_DTYPES
from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.planning.request import Request
from klein_kv.runtime.references.reference_file import load_references, read_reference_digest
from klein_kv.runtime.references.reference_set import KVOrigin, ReferenceSet, images_digest
from klein_kv.runtime.references.reference_store import ReferenceStore
from klein_kv.runtime.session import Session

__all__ = ["PreparedReferences", "ReferenceEncoder", "blank_references"]

_LONGEST_SIDE = 16384


@dataclass(frozen=True, slots=True)
class PreparedReferences:
    """Reference images as the VAE reads them.

    Attributes:
        pixels: uint8 [1, H, W, 3] each.
        num_tokens: R, tokens of all images together.
        first_size: (height, width) of the first image.
        images: their `images_digest`.
        digest: digest of the keys and values that they get here.
    """

    pixels: tuple[NDArray[np.uint8], ...]
    num_tokens: int
    first_size: tuple[int, int]
    images: str
    digest: str


class ReferenceEncoder:
    """Makes and finds the reference sets of one pipeline.

    Args:
        session: what runs the graphs, under a plan.
        manifest: the artifacts' manifest.
        origin: what the keys and values depend on besides the images.
        store: where they are kept.
    """

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        origin: KVOrigin,
        store: ReferenceStore,
    ) -> None:
        self.origin = origin
        self.store = store
        self._session = session
        self._manifest = manifest
        self._graphs = GraphSet(manifest.variant, origin.dtype, origin.kv_dtype)

    def prepare(self, images: Sequence[Image.Image]) -> PreparedReferences:
        """Checks and crops one image or more; computes nothing yet.

        Raises:
            RequestError: see `images.prepare_reference`.
        """
        unit = self._manifest.config.vae.multiple_of
        pixels = tuple(prepare_reference(image, unit) for image in images)
        digest = images_digest(pixels)
        return PreparedReferences(
            pixels=pixels,
            num_tokens=sum((x.shape[1] // unit) * (x.shape[2] // unit) for x in pixels),
            first_size=(pixels[0].shape[1], pixels[0].shape[2]),
            images=digest,
            digest=self.origin.digest(digest),
        )

    def tokens(self, prepared: PreparedReferences | None) -> dict[str, Buffer]:
        """Inputs `ref_hidden_states` and `ref_ids` of the graphs that take references."""
        session, manifest = self._session, self._manifest
        channels, unit = manifest.config.transformer.in_channels, manifest.config.vae.multiple_of
        if prepared is None:
            none = np.zeros((1, 0, channels), NUMPY_DTYPES[manifest.dtype])
            return {
                "ref_hidden_states": session.upload(none),
                "ref_ids": session.upload(np.zeros((0, 4), np.int64)),
            }
        grids = [(x.shape[1] // unit, x.shape[2] // unit) for x in prepared.pixels]
        tokens = session.assemble(
            (1, prepared.num_tokens, channels),
            (
                session.run("vae_encoder", {"image": session.upload(image)})["ref_hidden_states"]
                for image in prepared.pixels
            ),
        )
        return {"ref_hidden_states": tokens, "ref_ids": session.upload(reference_ids(grids))}

    def keep(self, prepared: PreparedReferences, kv: dict[str, Buffer]) -> ReferenceSet:
        """A set of keys and values that `first_step` or `encode_references` gave out."""
        net = self._manifest.config.transformer
        return ReferenceSet(
            kv=dict(kv),
            tensors=self._graphs.kv_tensors(net, prepared.num_tokens),
            num_tokens=prepared.num_tokens,
            first_size=prepared.first_size,
            images=prepared.images,
            origin=self.origin,
            session=self._session,
        )

    def compute(self, prepared: PreparedReferences) -> ReferenceSet:
        """Encodes, without looking anything up."""
        return self.keep(prepared, self._session.run("encode_references", self.tokens(prepared)))

    def encode(self, prepared: PreparedReferences) -> ReferenceSet:
        """The set from the store, or computed and kept there.

        Raises:
            CapacityError: the keys and values do not fit into memory.
        """
        references = self.store.get(prepared.digest)
        if references is None:
            self.check_memory(prepared)
            self._session.prepare()
            references = self.compute(prepared)
            self.store.put(references)
        return references

    def load(self, path: Path) -> ReferenceSet:
        """The set of a file; from the store, where it is already there.

        Raises:
            ArtifactError: the file is missing, damaged, or no saved reference set.
            RequestError: a set of other weights, types, backend or layout.
        """
        references = self.store.get(read_reference_digest(path))
        if references is None:
            net = self._manifest.config.transformer
            references = load_references(path, self._session, self.origin, net)
            self.store.put(references)
        return references

    def check(self, references: ReferenceSet) -> None:
        """Refuses sets that belong to something else.

        Raises:
            RequestError: with the reason.
        """
        if not isinstance(references, ReferenceSet):
            raise RequestError(
                f"references is a {type(references).__name__}, expected a set that "
                "encode_references or load_references gave; pass images as image="
            )
        reason = self.origin.difference(references.origin)
        if reason is not None:
            raise RequestError(
                f"the references cannot be used here: they {reason}; encode them again"
            )

    def with_references(
        self, request: Request, references: ReferenceSet | PreparedReferences, *, known: bool
    ) -> Request:
        """A request without references, and what these add to it.

        Args:
            request: with the stages of text-to-image.
            references: what it refers to.
            known: their keys and values are in memory.
        """
        unit = self._manifest.config.vae.multiple_of
        sizes: tuple[tuple[int, int], ...] = ((unit, unit * references.num_tokens),)
        if isinstance(references, PreparedReferences):
            sizes = tuple((x.shape[1], x.shape[2]) for x in references.pixels)
        if known:
            return replace(request, references=sizes, kv_held=True)
        new = ["vae_encoder"]
        if self._manifest.variant == "kv":
            new.append("first_step")
        at = "text_encoder" in request.stages
        stages = (*request.stages[:at], *new, *request.stages[at:])
        kept = self._manifest.variant == "kv" and self.store.budget > 0
        return replace(request, references=sizes, stages=stages, kv_kept=kept)

    def check_memory(self, prepared: PreparedReferences) -> None:
        """Refuses to encode what memory does not hold.

        Raises:
            CapacityError: with the numbers.
        """
        request = Request(
            height=prepared.first_size[0],
            width=prepared.first_size[1],
            references=tuple((x.shape[1], x.shape[2]) for x in prepared.pixels),
            stages=("vae_encoder", "encode_references"),
        )
        self._session.admit(request, self.store.free)


def blank_references(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Black pictures of these sizes, (height, width) in pixels each.

    Raises:
        RequestError: no size.
    """
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
