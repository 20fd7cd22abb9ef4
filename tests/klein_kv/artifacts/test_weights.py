"""The safetensors parser: what the safetensors library accepts, and nothing that it refuses."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from klein_kv.artifacts.config import ITEM_SIZE
from klein_kv.artifacts.weights import (
    NUMPY_DTYPES,
    graph_weights,
    map_weight,
    read_header,
    read_metadata,
    safetensors_header,
    save_graph_weights,
)
from klein_kv.errors import ArtifactError, CheckpointError


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def save(content: bytes, name: str = "model.safetensors") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return save


# --- whole files ---


TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[3.0], [-1e30]], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    refs = read_header(path)
    assert refs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        ref = refs[name]
        assert (ref.path, ref.shape) == (path, tuple(tensor.shape))
        assert ref.dtype == str(tensor.dtype).removeprefix("torch.")
        assert ref.nbytes == tensor.numel() * ITEM_SIZE[ref.dtype]
        mapped = map_weight(ref)
        assert mapped.dtype == NUMPY_DTYPES[ref.dtype]
        if tensor.dtype == torch.bfloat16:  # numpy() does not take it
            mapped, tensor = mapped.view(np.uint16), tensor.view(torch.uint16)
        np.testing.assert_array_equal(mapped, tensor.numpy())
        assert not mapped.flags.writeable


def test_the_library_reads_our_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = safetensors_header({"a": ("float32", (2, 3)), "b": ("bfloat16", (4,))})
    assert len(header) % 8 == 0
    path.write_bytes(header + bytes(24) + np.array([0x3F80] * 4, np.uint16).tobytes())
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").shape == (2, 3)
        assert file.get_tensor("b").tolist() == [1.0] * 4


def test_rows_are_a_range_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(20.0).reshape(5, 4)}, path)
    part = read_header(path)["w"].rows(1, 3)
    assert part.shape == (2, 4)
    np.testing.assert_array_equal(map_weight(part), np.arange(4.0, 12.0).reshape(2, 4))


# --- damaged files ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x08\0\0", "not a whole safetensors file"),
        (b"<!DOCTYPE html><html>", "is a web page, not the file"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "Git LFS pointer, .* 12 bytes"),
        (file_of(b"", length=0), "not a safetensors file"),
        (file_of({}, length=1 << 62), "claims 4611686018427387904 bytes"),
        (file_of({}, length=3), "claims 3 bytes"),
        (file_of(b"\xff\xfe{}"), "not a safetensors file"),
        (file_of(b"[" * 100_000), "not a safetensors file"),
        (file_of([1, 2]), "no JSON object"),
        (file_of({"a": {}}), "header entry of a is malformed"),
        (file_of({"a": entry(shape=5)}, bytes(8)), "malformed"),
        (file_of({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "malformed"),
        (file_of({"a": entry(shape=[True, 2])}, bytes(8)), "expected integers"),
        (file_of({"a": entry(shape=[-1, -2])}, bytes(8)), "expected integers"),
        (file_of({"a": entry(offsets=[float("nan"), 8])}, bytes(8)), "expected integers"),
        (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), "should take 8 bytes"),
        (file_of({"a": entry(shape=[2**70])}, bytes(8)), "should take"),
        (file_of({"a": entry("F64")}, bytes(8)), "dtype F64, expected one of F32, F16, BF16"),
        (file_of({"a": entry("F8_E4M3")}, bytes(8)), "dtype F8_E4M3"),
        (file_of({"a": entry(["F32"])}, bytes(8)), "dtype"),
        (file_of({"a": entry()}, bytes(7)), "truncated or has a tail"),
        (file_of({"a": entry()}, bytes(9)), "its tensors end at"),
        (file_of({"a": entry(offsets=[4, 12])}, bytes(12)), "follows a gap"),
        (
            file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
            "b starts at byte .* overlaps the tensor before it",
        ),
    ],
)
def test_damage_is_refused(content: bytes, message: str, write: Callable[..., Path]) -> None:
    path = write(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if not message.startswith("dtype F"):  # of the types that klein-kv does not read
        with pytest.raises(SafetensorError):
            safe_open(path, "np")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weight file is missing: .*download the whole"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(tmp_path)


def test_pickle_is_refused_unopened(write: Callable[..., Path]) -> None:
    path = write(b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix")
    with pytest.raises(CheckpointError, match="only safetensors is read"):
        read_header(path)


@pytest.mark.parametrize("metadata", [[], "x", {"a": 1}, {"a": None}, {"a": "\ud800"}])
def test_metadata_that_is_no_texts(metadata: Any, write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="the metadata is no JSON object of texts"):
        read_metadata(write(file_of({"__metadata__": metadata})))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8"]) | VALUES,
        "shape": st.lists(st.integers(0, 5), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | VALUES,
    }
)
HEADERS = st.dictionaries(st.text(max_size=3), ENTRIES | VALUES, max_size=3)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=HEADERS | VALUES, size=st.integers(0, 80))
def test_any_header(header: Any, size: int, write: Callable[..., Path]) -> None:
    """Nothing but `CheckpointError`; what is accepted lies inside the file, and can be mapped."""
    path = write(file_of(header, bytes(size)))
    try:
        refs = read_header(path)
    except CheckpointError:
        return
    for ref in refs.values():
        assert 8 <= ref.offset <= ref.offset + ref.nbytes <= path.stat().st_size
        assert map_weight(ref).shape == ref.shape
    ranges = sorted((ref.offset, ref.offset + ref.nbytes) for ref in refs.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))


# --- weight tables ---


def test_table_is_written_and_read(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 2), "v": torch.zeros(3)}, tmp_path / "x.safetensors")
    refs = read_header(tmp_path / "x.safetensors")
    table = {"w[1:3]": refs["w"].rows(1, 3), "v": refs["v"]}
    save_graph_weights(tmp_path / "x.weights.json", table)
    assert graph_weights(tmp_path, "x.onnx") == table


PLACE = ["x.safetensors", 8, 32, "float32", [4, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "../outside"}, "leaves the folder"),
        ({0: "link"}, "outside the folder"),
        ({0: "none.safetensors"}, "cannot be read"),
        ({0: "nul\0"}, "cannot be read"),
        ({1: -1}, "is said to take bytes"),
        ({1: 9}, "is said to take bytes 9 to 41 of x.safetensors, which has 40"),
        ({1: 1.5}, "cannot be read"),
        ({2: 1 << 60, 4: [1 << 58]}, "is said to take bytes"),
        ({3: "float64"}, "cannot be read"),
        ({4: [4, 1]}, "is said to take bytes"),
        ({4: [-4, -2]}, "is said to take bytes"),
        ({4: [4.0, 2]}, "cannot be read"),
        ({4: 8}, "cannot be read"),
    ],
)
def test_bad_weight_table(change: dict[int, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(bytes(40))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(bytes(40))
    (folder / "link").symlink_to(tmp_path / "outside")
    place = [change.get(column, value) for column, value in enumerate(PLACE)]
    (folder / "x.weights.json").write_text(json.dumps({"w": place}))
    with pytest.raises(ArtifactError, match=message):
        graph_weights(folder, "x.onnx")


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [1]}', "[" * 100_000])
def test_unreadable_weight_table(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.weights.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"x\.weights\.json cannot be read"):
        graph_weights(tmp_path, "x.onnx")
