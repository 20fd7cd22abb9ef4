"""Where the torch backend's weights come from, and how they reach a device."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.weights import WeightRef, whole_weights
from klein_kv.errors import ArtifactError, BackendError
from klein_kv.runtime.backends.pytorch import memory as torch_memory
from klein_kv.runtime.backends.pytorch.backend import TorchBackend
from klein_kv.runtime.backends.pytorch.weights import FolderWeights

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_artifacts):
    return Manifest.load(tiny_artifacts).config


def test_weights_are_mapped_and_those_of_the_checkpoint(tiny_artifacts, tiny_theirs):
    weights = FolderWeights(tiny_artifacts, Manifest.load(tiny_artifacts), device="cpu")
    for component in ("text_encoder", "vae", "transformer"):
        state = getattr(tiny_theirs, component).state_dict()
        tensors = weights.load(component)
        assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    assert tensors.keys() == tiny_theirs.transformer.state_dict().keys()
    files = {str(path) for path in (tiny_artifacts / "transformer").glob("*.safetensors")}
    address = tensors["x_embedder.weight"].data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split(maxsplit=5)[5] in files
            break
    else:
        pytest.fail("the weights lie in no mapping")


def test_tensors_of_files(tmp_path):
    """At any offset, as other libraries' headers have any length; and never written back."""
    values = np.arange(40, dtype=np.float32)
    path = tmp_path / "odd.bin"
    path.write_bytes(b"\0" * 8 + values.tobytes() + b"\0" + values.tobytes())
    for offset in (8, 169):
        ref = WeightRef(path, offset, 160, "float32", (4, 10))
        tensor = torch_memory.map_tensor(ref)
        np.testing.assert_array_equal(tensor.numpy(), values.reshape(4, 10))
        tensor.mul_(3)
    assert path.read_bytes()[8:168] == values.tobytes()
    missing = replace(ref, path=tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"gone cannot be mapped: .*export again"):
        torch_memory.map_tensor(missing)
    with pytest.raises(ArtifactError, match="holds float4_e2m1fn, expected one of float32"):
        torch_memory.map_tensor(replace(ref, dtype="float4_e2m1fn"))


class LateStream:
    """In place of a CUDA stream: a copy that is on its way happens when someone waits for it."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def synchronize(self) -> None:
        for target, source in self.pending:
            target.copy_(source)
        self.pending.clear()


@pytest.mark.parametrize("nbytes", [0, 8, 1000, 1008, 5000])
def test_pieces_of_an_upload(nbytes, monkeypatch):
    """The way to a GPU, onto the CPU: no buffer is filled again before its copy is done."""
    stream, empty, copy = LateStream(), torch.empty, torch.Tensor.copy_

    def copy_late(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        if not non_blocking:
            return copy(target, source)
        stream.pending.append((target, source))
        return target

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
        patch.setattr(torch.cuda, "current_stream", lambda _device: stream)
        patch.setattr(torch.Tensor, "copy_", copy_late)
        patch.setattr(torch_memory, "_STAGING_BYTES", 1000)
        staging = torch_memory.Staging(CPU)
        rng = np.random.default_rng(0)
        values = [torch.from_numpy(rng.standard_normal(nbytes // 8)) for _ in range(3)]
        copies = [staging.copy(x) for x in values]  # the buffers serve many tensors
        assert len(stream.pending) <= 1
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(copies, values, strict=True))


def test_row_ranges_are_joined():
    ref = WeightRef(Path("w"), 100, 240, "float32", (10, 6))
    table = {"x[4:10]": ref.rows(4, 10), "x[0:4]": ref.rows(0, 4), "y": ref}
    assert whole_weights(table) == {"x": ref, "y": ref}
    assert whole_weights(table | {"x": ref})["x"] == ref
    gap = {"x[0:4]": ref.rows(0, 4), "x[5:10]": ref.rows(5, 10)}
    with pytest.raises(ArtifactError, match="x: row 5 is at byte 220 of w, expected row 4 at byte"):
        whole_weights(gap)
    with pytest.raises(ArtifactError, match="row 4 is at byte 8 of w, expected row 4 at byte 196"):
        whole_weights(table | {"x[4:10]": replace(ref.rows(4, 10), offset=8)})
    with pytest.raises(ArtifactError, match=r"row 4 .* expected row 0"):
        whole_weights({"x[4:10]": ref.rows(4, 10)})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, r"tensor x_embedder.weight is missing, expected torch.float32 \(64, 128\) on cpu"),
        ([64, 64], r"x_embedder.weight is torch.float32 \(64, 64\) on cpu, expected"),
    ],
)
def test_folders_whose_weights_are_others(shape, message, tiny_artifacts, tmp_path):
    folder = Path(shutil.copytree(tiny_artifacts, tmp_path / "a", copy_function=shutil.copy))
    for path in (folder / "transformer").glob("*.weights.json"):
        table = json.loads(path.read_text())
        entry = table.pop("x_embedder.weight", None)
        if entry and shape:
            table["x_embedder.weight"] = [*entry[:2], 4 * 64 * 64, entry[3], shape]
        path.write_text(json.dumps(table))
    weights = FolderWeights(folder, Manifest.load(tiny_artifacts), device="cpu")
    with pytest.raises(ArtifactError, match=f"{message}.*export again"):
        weights.load("transformer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, r"transformer: tensor proj_out.weight is missing"),
        (lambda x: x.half(), r"is torch.float16 .*, expected torch.float32"),
        (lambda x: x[:1], r"\(1, 64\) on cpu, expected torch.float32 \(128, 64\)"),
        (lambda x: x.to("meta"), "on meta, expected"),
    ],
)
def test_from_tensors_checks(change, message, config, tiny_theirs):
    state = tiny_theirs.transformer.state_dict()
    state["proj_out.weight"] = change(state["proj_out.weight"])
    given = {name: x for name, x in state.items() if x is not None}
    with pytest.raises(BackendError, match=message):
        TorchBackend.from_tensors(config, "float32", device="cpu", transformer=given)


def test_from_tensors_without_a_part(config):
    empty = TorchBackend.from_tensors(config, "float32", device="cpu")
    for graph, part in (("cached_step", "transformer"), ("vae_decoder", "vae")):
        with pytest.raises(BackendError, match=f"without the {part}'s weights; .* from_tensors"):
            empty.run(graph, {})
