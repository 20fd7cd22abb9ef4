"""Reference sets: their digest, their file, and that using them again changes no bit."""

import errno
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import KVFormat, kv_names
from klein_kv.errors import ArtifactError, CapacityError, RequestError
from klein_kv.runtime.references.reference_set import KVOrigin, ReferenceSet, images_digest
from tests.conftest import load_ours
from tests.runtime.conftest import Picture, Watch

SIZES = [(100, 68), (75, 88), (65, 160), (64, 75)]
REQUEST: dict[str, Any] = {
    "prompt_embeds": np.random.default_rng(0).standard_normal((1, 16, 96), np.float32),
    "height": 128,
    "width": 144,
    "seed": 1,
    "output_type": "latent",
}


KEPT: dict[str, Any] = {"reference_cache_bytes": 1 << 28, "prompt_cache_bytes": 1 << 28}


@pytest.fixture(scope="module")
def pipe(tiny_artifacts: Path, backend: str) -> KleinKVPipeline:
    """A pipeline that keeps references, with each backend; every test brings its own pictures."""
    return load_ours(tiny_artifacts, backend, **KEPT)


@pytest.fixture(scope="module")
def fp8(tiny_artifacts: Path, backend: str) -> KleinKVPipeline:
    return load_ours(tiny_artifacts, backend, kv_dtype="fp8", **KEPT)


def arrays(references: ReferenceSet) -> dict[str, np.ndarray[Any, Any]]:
    return {name: references.array(name) for name in references.kv}


def assert_same_bits(one: Any, other: Any) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


# --- bit for bit ---


@pytest.mark.parametrize(("kv_dtype", "count"), [(None, 1), (None, 4), ("fp8", 1), ("fp8", 3)])
def test_every_way_to_the_same_references_gives_the_same_bits(
    kv_dtype: str | None,
    count: int,
    pipe: KleinKVPipeline,
    fp8: KleinKVPipeline,
    tiny_artifacts: Path,
    backend: str,
    picture: Picture,
    tmp_path: Path,
) -> None:
    pipe = pipe if kv_dtype is None else fp8
    images = [picture(*size, seed=10 * count + i) for i, size in enumerate(SIZES[:count])]
    keeps_nothing = load_ours(tiny_artifacts, backend, kv_dtype=kv_dtype)
    expected = keeps_nothing(image=images, **REQUEST).images  # `first_step`
    before = pipe.reference_store.stats
    for _ in range(2):  # a miss, then a hit
        assert_same_bits(pipe(image=images, **REQUEST).images, expected)
    after = pipe.reference_store.stats
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)

    kept = pipe.encode_references(images)  # what `first_step` gave out
    encoded = keeps_nothing.encode_references(images)  # what `encode_references` gives out
    for name, array in arrays(kept).items():
        assert_same_bits(array.view(np.uint8), arrays(encoded)[name].view(np.uint8))
    assert kept.digest == encoded.digest

    kept.save(tmp_path / "set.safetensors")
    restarted = load_ours(tiny_artifacts, backend, kv_dtype=kv_dtype, **KEPT)
    loaded = restarted.load_references(tmp_path / "set.safetensors")
    for fact in ("digest", "nbytes", "num_tokens", "first_size"):
        assert getattr(loaded, fact) == getattr(kept, fact)
    for references in (kept, encoded):
        assert_same_bits(pipe(references=references, **REQUEST).images, expected)
    assert_same_bits(restarted(references=loaded, **REQUEST).images, expected)
    # The loaded set serves requests that bring the images, too.
    assert_same_bits(restarted(image=images, **REQUEST).images, expected)
    assert restarted.reference_store.stats.misses == 1  # the load


def test_threads_of_the_backend_do_not_matter(
    tiny_ours: KleinKVPipeline, tiny_artifacts: Path, picture: Picture
) -> None:
    images = [picture(300, 200, seed=70), picture(160, 250, seed=71)]
    two = load_ours(tiny_artifacts, threads=2)
    one, other = arrays(tiny_ours.encode_references(images)), arrays(two.encode_references(images))
    for name in kv_names(3):
        assert_same_bits(one[name], other[name])


def test_batch_shares_one_set(pipe: KleinKVPipeline, picture: Picture) -> None:
    images = [picture(96, 96, seed=20)]
    before = pipe.reference_store.stats
    request = {"num_images_per_prompt": 4, "num_inference_steps": 1, "max_sequence_length": 64}
    out = pipe("kite", image=images, seed=0, **request)
    assert len(out.images) == 4
    stats = pipe.reference_store.stats
    assert stats.bytes - before.bytes == pipe.config.transformer.kv_bytes(36, "float32")
    references = pipe.encode_references(images)
    assert references.nbytes == stats.bytes - before.bytes
    assert all(array.shape[0] == 1 for array in arrays(references).values())


def test_encode_on_upload_leaves_cached_steps_alone(
    pipe: KleinKVPipeline, picture: Picture, watch: Watch
) -> None:
    image = picture(80, 80, seed=30)
    pipe.encode_references(image)
    runs = watch(pipe)
    pipe(image=image, **REQUEST)
    assert [run.graph for run in runs] == 4 * ["cached_step"]


def test_callback_may_ask_for_the_same_references(pipe: KleinKVPipeline, picture: Picture) -> None:
    image, inner = picture(80, 64, seed=31), []

    def callback(*_: Any) -> dict[str, Any]:
        if not inner:
            inner.append(pipe(image=image, **REQUEST).images)
        return {}

    outer = pipe(image=image, callback_on_step_end=callback, **REQUEST).images
    assert_same_bits(outer, inner[0])


def test_failed_request_leaves_the_store_usable(
    pipe: KleinKVPipeline, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, run = picture(64, 80, seed=32), pipe.backend.run

    def fail(graph: str, inputs: Any) -> Any:
        if graph == "first_step":
            raise KeyboardInterrupt
        return run(graph, inputs)

    monkeypatch.setattr(pipe.backend, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        pipe(image=image, **REQUEST)
    monkeypatch.undo()
    before = pipe.reference_store.stats
    pipe(image=image, **REQUEST)
    assert pipe.reference_store.stats.misses == before.misses + 1


def test_same_prompt_is_encoded_once(
    pipe: KleinKVPipeline, any_ours: KleinKVPipeline, watch: Watch
) -> None:
    expected = any_ours.encode_prompt(["a kite", "snow"], 64)
    runs = watch(pipe)
    for _ in range(2):
        embeds = pipe.encode_prompt(["a kite", "snow"], 64)
        assert_same_bits(embeds, expected)
        embeds[:] = 0  # the caller's own array
    pipe.encode_prompt(["snow", "a kite"], 64)
    pipe.encode_prompt(["a kite", "snow"], max_sequence_length=32)
    assert [run.graph for run in runs] == 3 * ["text_encoder"]


# --- what the digest covers ---


def test_digest_covers_what_keys_and_values_depend_on(
    pipe: KleinKVPipeline, picture: Picture
) -> None:
    one, two = picture(70, 64, seed=40), picture(64, 70, seed=41)
    changed = one.copy()
    changed.putpixel((20, 20), tuple(255 - x for x in one.getpixel((20, 20))))
    cropped_away = one.copy()
    cropped_away.putpixel((0, 0), (1, 2, 3))  # outside the 64 pixels that are used
    sets = [[one], [two], [one, two], [two, one], [one, one], [changed]]
    digests = [pipe.encoder.prepare(images).digest for images in sets]
    assert len(set(digests)) == len(sets)
    assert pipe.encoder.prepare([cropped_away]).digest == digests[0]
    assert pipe.encoder.prepare([one.convert("RGBA")]).digest == digests[0]

    origin = pipe.encoder.origin
    images = pipe.encoder.prepare([one]).images
    for name in KVOrigin.__annotations__:
        other = replace(origin, **{name: "other"})
        assert other.digest(images) != digests[0]
        with pytest.raises(RequestError, match="this cannot be used here"):
            origin.check(other, "this")
    origin.check(replace(origin), "this")


def test_images_digest_tells_shapes_apart() -> None:
    flat = np.zeros((1, 64, 128, 3), np.uint8)
    shapes = [(1, 64, 128, 3), (1, 128, 64, 3)]
    digests = {images_digest([flat.reshape(shape)]) for shape in shapes}
    halves = [flat[:, :, :64].copy(), flat[:, :, 64:].copy()]
    assert len(digests | {images_digest(halves)}) == 3


# --- float8 ---


def test_float8_is_a_quarter(
    fp8: KleinKVPipeline, any_ours: KleinKVPipeline, picture: Picture, tmp_path: Path
) -> None:
    images = [picture(*size, seed=50 + i) for i, size in enumerate(SIZES[:3])]
    exact, near = (x(image=images, **REQUEST).images for x in (any_ours, fp8))
    assert 1e-5 < np.abs(near - exact).max() < 0.1
    kept, whole = (x.encode_references(images) for x in (fp8, any_ours))
    for name, array in arrays(kept).items():
        assert array.dtype == ("float32" if "_scale." in name else "float8_e4m3fn")
    scales = 6 * 2 * 4
    assert kept.nbytes == sum(array.nbytes for array in arrays(kept).values())
    assert 4 * (kept.nbytes - scales) == whole.nbytes
    kept.save(tmp_path / "set.safetensors")
    with pytest.raises(RequestError, match=r"kept in another type \(got float8_e4m3fn"):
        any_ours.load_references(tmp_path / "set.safetensors")


def test_float8_without_references_is_text_to_image(
    fp8: KleinKVPipeline, any_ours: KleinKVPipeline
) -> None:
    assert_same_bits(fp8(**REQUEST).images, any_ours(**REQUEST).images)


def test_files_of_the_first_format(
    pipe: KleinKVPipeline, fp8: KleinKVPipeline, picture: Picture, tmp_path: Path
) -> None:
    """Theirs was the same layout, but for float8."""
    image = picture(64, 64, seed=56)
    for name, pipeline in (("whole", pipe), ("packed", fp8)):
        path = tmp_path / name
        references = pipeline.encode_references(image)
        references.save(path)
        rewrite(path, lambda h: h["__metadata__"].update(format="klein-kv reference set 1"))
        pipeline.reference_store.clear()
        del references
    loaded = pipe.load_references(tmp_path / "whole")
    assert_same_bits(pipe(references=loaded, **REQUEST).images, pipe(image=image, **REQUEST).images)
    with pytest.raises(RequestError, match="as an earlier klein-kv laid them out; encode"):
        fp8.load_references(tmp_path / "packed")


def test_folders_without_such_graphs_say_so(tiny_artifacts: Path) -> None:
    manifest = Manifest.load(tiny_artifacts)
    older = replace(manifest, files={k: v for k, v in manifest.files.items() if "fp8_kv" not in k})
    assert older.graph_sets == [older.graphs]
    with pytest.raises(
        ArtifactError, match=r"lists no transformer/.*_fp8_kv\.onnx; export the checkpoint again"
    ):
        older.choose_graphs(KVFormat.FP8_PER_HEAD)
    with pytest.raises(RequestError, match="plain model has no graphs with keys"):
        replace(manifest, variant="plain").choose_graphs(KVFormat.FP8_PER_HEAD)


def test_kv_dtype_is_the_graphs_or_fp8(tiny_artifacts: Path) -> None:
    assert load_ours(tiny_artifacts, kv_dtype="fp32").graphs == Manifest.load(tiny_artifacts).graphs
    with pytest.raises(RequestError, match=r"kv_dtype is 'bf16', .*expected 'fp32' or 'fp8'"):
        load_ours(tiny_artifacts, kv_dtype="bf16")


# --- the file ---


@pytest.fixture
def saved(pipe: KleinKVPipeline, picture: Picture, tmp_path: Path) -> Path:
    """A saved set that is in no store."""
    path = tmp_path / "set.safetensors"
    pipe.encode_references(picture(64, 64, seed=60)).save(path)
    pipe.reference_store.clear()
    return path


def test_file_is_plain_safetensors(
    pipe: KleinKVPipeline, fp8: KleinKVPipeline, picture: Picture, tmp_path: Path
) -> None:
    path = tmp_path / "set.safetensors"
    for pipeline, kv_format in ((pipe, None), (fp8, KVFormat.FP8_PER_HEAD)):
        references = pipeline.encode_references(picture(64, 64, seed=55))
        references.save(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        held = load_file(path)
        assert set(held) == set(kv_names(3, kv_format))
        for name, array in arrays(references).items():
            assert held[name].dtype == getattr(torch, array.dtype.name)
            assert_same_bits(held[name].float().numpy(), array.astype(np.float32))
        assert metadata["model_digest"] == pipeline.manifest.model_digest
        assert metadata["first_size"] == "64x64"


def test_load_does_not_make_a_second_copy(
    saved: Path, pipe: KleinKVPipeline, picture: Picture
) -> None:
    references = pipe.encode_references(picture(64, 64, seed=60))
    assert pipe.load_references(saved) is references


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def set_metadata(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda header: header["__metadata__"].update({key: value}))


def rename_tensor(path: Path) -> None:
    rewrite(path, lambda header: header.update({"k_ref.9": header.pop("k_ref.1")}))


def other_shape(path: Path) -> None:
    rewrite(path, lambda header: header["v_ref.1"].update({"shape": [1, 16, 4, 16]}))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # neither has a part in it
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), ArtifactError, "missing"),
        (lambda path: path.write_bytes(b""), ArtifactError, "whole safetensors file"),
        (lambda path: path.write_bytes(b"\x89PNG" * 100), ArtifactError, "whole safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), ArtifactError, "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), ArtifactError, "whole safeten"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), ArtifactError, "tensors end at"),
        (flip_a_bit, ArtifactError, "checksum"),
        (set_metadata("format", "pt"), ArtifactError, "format is 'pt'"),
        (set_metadata("first_size", "big"), ArtifactError, "not enough values"),
        (set_metadata("crc32", 7), ArtifactError, "metadata is no JSON object of texts"),
        (lambda p: rewrite(p, lambda h: h["__metadata__"].pop("images")), ArtifactError, "images"),
        (lambda p: rewrite(p, lambda h: h.pop("__metadata__")), ArtifactError, "format is None"),
        (set_metadata("model_digest", "0" * 64), RequestError, "belong to other weights"),
        (set_metadata("dtype", "float16"), RequestError, "computed in another type"),
        (set_metadata("backend", "tensorrt"), RequestError, "computed by another backend"),
        (rename_tensor, RequestError, "another layout: k_ref.1 is not there"),
        (other_shape, RequestError, r"another layout: v_ref.1 is .*\(1, 16, 4, 16\)"),
    ],
)
def test_what_cannot_be_loaded(
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
    saved: Path,
    pipe: KleinKVPipeline,
) -> None:
    damage(saved)
    before = pipe.reference_store.stats
    with pytest.raises(error, match=message) as caught:
        pipe.load_references(saved)
    assert str(saved) in str(caught.value)
    assert pipe.reference_store.stats.entries == before.entries


class FullDisk(io.FileIO):
    def write(self, content: Any) -> int:
        if self.tell() > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("there_before", [False, True])
def test_full_disk(
    there_before: bool,
    pipe: KleinKVPipeline,
    picture: Picture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    references = pipe.encode_references(picture(64, 64, seed=61))
    path = tmp_path / "set.safetensors"
    if there_before:
        path.write_bytes(b"older")
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
    with pytest.raises(CapacityError, match=r"No space left.*about 0\.0 MB"):
        references.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] * there_before
