"""Reference images as the transformer sees them: keys and values, in memory and as a file.

A file is one safetensors file. Its metadata names everything that the digest covers, so that it is
refused with a reason. Format 1 had float8 values in another layout; its other files are read. A
CRC-32 over all tensors, in the order of the file, tells a damaged file; it is no protection against
one that was forged.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import TransformerConfig
from klein_kv.artifacts.signature import GraphSet, KVFormat, TensorSpec
from klein_kv.artifacts.weights import (
    WeightRef,
    map_weight,
    read_header,
    read_metadata,
    safetensors_header,
)
from klein_kv.errors import ArtifactError, CheckpointError, RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.outputs.whole_file import whole_file
from klein_kv.runtime.session import Session

__all__ = [
    "KVOrigin",
    "ReferenceSet",
    "images_digest",
    "load_references",
    "read_reference_digest",
]

_FORMAT = "klein-kv reference set 2"
_OLDER_FORMAT = "klein-kv reference set 1"
_NO_CHECKSUM = "00000000"


@dataclass(frozen=True, slots=True)
class KVOrigin:
    """Everything but the images that keys and values depend on."""

    model_digest: str  # of graphs and weights: `Manifest.graphs_digest`
    dtype: str  # that the graphs compute in
    kv_dtype: str  # that they hand keys and values on in: `dtype` or a `KVFormat`
    backend: str  # another one rounds differently
    adapters: str = ""  # which of them the weights hold, and how much of each; "" without any

    def digest(self, images: str) -> str:
        """Hex digest of keys and values of the images with this `images_digest`."""
        lines = "".join(f"{name} {value}\n" for name, value in asdict(self).items() if value)
        return hashlib.sha256(f"{lines}images {images}\n".encode()).hexdigest()

    def check(self, other: "KVOrigin", what: str) -> None:
        """A `RequestError` with what keeps sets of another origin (`what`) from being used here."""
        for name, reason in _DIFFERENCES.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise RequestError(
                    f"{what} cannot be used here: they {reason} (got {theirs[:16] or 'none'}, "
                    f"expected {mine[:16] or 'none'}); encode them again"
                )


_DIFFERENCES = {
    "model_digest": "belong to other weights",
    "dtype": "were computed in another type",
    "kv_dtype": "are kept in another type",
    "backend": "were computed by another backend",
    "adapters": "belong to another set of adapters",
}


def images_digest(pixels: Sequence[NDArray[np.uint8]]) -> str:
    """Hex digest of an ordered set of prepared images, each uint8 [1, H, W, 3]."""
    state = hashlib.sha256()
    for image in pixels:
        state.update(np.array(image.shape, "<i8").tobytes())
        state.update(np.ascontiguousarray(image).data)
    return state.hexdigest()


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class ReferenceSet:
    """Keys and values of an ordered set of reference images.

    Made by `KleinKVPipeline.encode_references` or `load_references`, for any number of requests.

    Attributes:
        kv: `signature.kv_names` of every block on the backend's device: `k_ref.{i}` and `v_ref.{i}`
            [1, R, H, D], and float8 ones' scales.
        tensors: name, type and concrete shape of each of `kv`.
        num_tokens: R, tokens of all images together.
        first_size: (height, width) of the first image after cropping: the default output size.
        images: `images_digest` of the prepared images.
        origin: what else they depend on.
        session: where the buffers live.
    """

    kv: dict[str, Buffer] = field(repr=False)
    tensors: tuple[TensorSpec, ...] = field(repr=False)
    num_tokens: int
    first_size: tuple[int, int]
    images: str
    origin: KVOrigin
    session: Session = field(repr=False)

    @property
    def digest(self) -> str:
        """Hex digest of everything that the keys and values depend on."""
        return self.origin.digest(self.images)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of their scales."""
        return sum(spec.nbytes({}) for spec in self.tensors)

    def array(self, name: str) -> NDArray[Any]:
        """One of `kv` on the host."""
        return self.session.download(self.kv[name])

    def save(self, path: str | Path) -> None:
        """Writes the set as one safetensors file; `KleinKVPipeline.load_references` reads it.

        Raises:
            CapacityError: the disk is full.
            RequestError: the file cannot be written there.
        """
        with whole_file(Path(path), self.nbytes) as file:
            file.write(self._header(_NO_CHECKSUM))
            checksum = 0
            for spec in self.tensors:
                array = self.array(spec.name)
                content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.seek(0)
            file.write(self._header(f"{checksum:08x}"))

    def _header(self, checksum: str) -> bytes:
        height, width = self.first_size
        metadata = {
            "format": _FORMAT,
            **asdict(self.origin),
            "images": self.images,
            "first_size": f"{height}x{width}",
            "crc32": checksum,
        }
        tensors = {spec.name: (spec.dtype, spec.concrete({})) for spec in self.tensors}
        return safetensors_header(tensors, metadata)


def read_reference_digest(path: Path) -> str:
    """Digest of the set that a file says it holds; an ArtifactError if it is no such file."""
    origin, images, _, _ = _read_description(path)
    return origin.digest(images)


def load_references(
    path: Path, session: Session, origin: KVOrigin, net: TransformerConfig
) -> ReferenceSet:
    """Maps a file, checks all of it, and uploads its keys and values.

    Raises:
        ArtifactError: the file is missing, damaged, or no saved reference set.
        RequestError: a set of other weights, LoRA set, types, backend or layout.
    """
    made_with, images, first_size, checksum = _read_description(path)
    origin.check(made_with, f"the references in {path}")
    try:
        refs = read_header(path, quantized=True)
    except CheckpointError as error:
        raise _damaged(path, error) from error
    graphs = GraphSet("kv", origin.dtype, origin.kv_dtype)
    count = refs["k_ref.0"].shape[1] if "k_ref.0" in refs and refs["k_ref.0"].shape[1:] else 0
    tensors = graphs.kv_tensors(net, count)
    _check_layout(path, refs, tensors)
    arrays, actual = {}, 0
    for name, ref in sorted(refs.items(), key=lambda item: item[1].offset):
        try:
            arrays[name] = map_weight(ref)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        actual = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, actual)
    if f"{actual:08x}" != checksum:
        raise _damaged(path, f"its checksum is {actual:08x}, expected {checksum}")
    return ReferenceSet(
        kv=session.upload_kv({spec.name: arrays[spec.name] for spec in tensors}),
        tensors=tensors,
        num_tokens=count,
        first_size=first_size,
        images=images,
        origin=origin,
        session=session,
    )


def _read_description(path: Path) -> tuple[KVOrigin, str, tuple[int, int], str]:
    """Origin, images digest, size of the first image and checksum, from the metadata."""
    try:
        metadata = read_metadata(path)
        if metadata.get("format") not in (_FORMAT, _OLDER_FORMAT):
            raise _damaged(path, f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
        height, width = metadata["first_size"].split("x")
        metadata.setdefault("adapters", "")  # of files from before there were any
        origin = KVOrigin(**{item.name: metadata[item.name] for item in fields(KVOrigin)})
        images, size, checksum = metadata["images"], (int(height), int(width)), metadata["crc32"]
    except (CheckpointError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    if metadata["format"] == _OLDER_FORMAT and origin.kv_dtype == KVFormat.FP8_PER_HEAD:
        raise RequestError(
            f"the references in {path} are float8 as an earlier klein-kv laid them out; encode the "
            "images again"
        )
    return origin, images, size, checksum


def _check_layout(path: Path, refs: dict[str, WeightRef], tensors: Sequence[TensorSpec]) -> None:
    expected = {spec.name: (spec.dtype, spec.shape) for spec in tensors}
    for name in [*expected, *refs]:
        want = expected.get(name)
        got = (refs[name].dtype, refs[name].shape) if name in refs else None
        if got != want:
            raise RequestError(
                f"the references in {path} have another layout: {name} is {got or 'not there'}, "
                f"expected {want or 'no such tensor'}; encode the images again"
            )


def _damaged(path: Path, reason: object) -> ArtifactError:
    return ArtifactError(
        f"{path} is no whole reference set ({reason}); encode the images again and save them"
    )
