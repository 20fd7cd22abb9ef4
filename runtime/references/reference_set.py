"""Reference images as the transformer sees them: tokens, positions, and keys and values."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.signature import TensorSpec
from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.session import Session

__all__ = ["KVOrigin", "ReferenceSet", "images_digest"]


@dataclass(frozen=True, slots=True)
class KVOrigin:
    """Everything but the images that keys and values depend on.

    Attributes:
        model_digest: graphs and weights (`Manifest.graphs_digest`).
        dtype: type that the graphs compute in.
        kv_dtype: type that graphs hand keys and values on in, `dtype` or a `KVFormat`.
        backend: what computes them; another one rounds differently.
        adapters: which adapters the weights hold, and how much of each; "" without any.
    """

    model_digest: str
    dtype: str
    kv_dtype: str
    backend: str
    adapters: str = ""

    def digest(self, images: str) -> str:
        """Hex digest of keys and values of the images with this `images_digest`."""
        lines = "".join(f"{name} {value}\n" for name, value in asdict(self).items() if value)
        return hashlib.sha256(f"{lines}images {images}\n".encode()).hexdigest()

    def check(self, other: "KVOrigin", what: str) -> None:
        """Refuses sets of another origin.

        Raises:
            RequestError: with what keeps them (`what`) from being used here.
        """
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
        from klein_kv.runtime.references.reference_file import save_references

        save_references(self, Path(path))
