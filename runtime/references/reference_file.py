"""A reference set as one safetensors file: keys and values, and in the metadata what they are.

The metadata names everything that the digest covers, so that a file is refused with a reason.
Format 1 had float8 values in another layout; its other files are read. A CRC-32 over all tensors,
in the order of the file, tells a damaged file; it is no protection against one that was forged.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

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
from klein_kv.runtime.outputs.whole_file import whole_file
from klein_kv.runtime.references.reference_set import KVOrigin, ReferenceSet
from klein_kv.runtime.session import Session

__all__ = ["load_references", "read_reference_digest", "save_references"]

_FORMAT = "klein-kv reference set 2"
_OLDER_FORMAT = "klein-kv reference set 1"
_NO_CHECKSUM = "00000000"


def save_references(references: ReferenceSet, path: Path) -> None:
    """Writes a set tensor by tensor, whole or not at all (`whole_file`).

    Raises:
        CapacityError: the disk is full.
        RequestError: the file cannot be written there.
    """
    with whole_file(path, references.nbytes) as file:
        file.write(_header(references, _NO_CHECKSUM))
        checksum = 0
        for spec in references.tensors:
            array = references.array(spec.name)
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        file.seek(0)
        file.write(_header(references, f"{checksum:08x}"))


def _header(references: ReferenceSet, checksum: str) -> bytes:
    height, width = references.first_size
    metadata = {
        "format": _FORMAT,
        **asdict(references.origin),
        "images": references.images,
        "first_size": f"{height}x{width}",
        "crc32": checksum,
    }
    tensors = {spec.name: (spec.dtype, spec.concrete({})) for spec in references.tensors}
    return safetensors_header(tensors, metadata)


def read_reference_digest(path: Path) -> str:
    """Digest of the set that a file says it holds.

    Raises:
        ArtifactError: the file is missing, damaged, or no saved reference set.
    """
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
