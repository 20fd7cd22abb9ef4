"""Adapters on engines, over the stand-ins: merged there, and only what changes is moved."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.artifacts.weights import WeightRef, graph_weights, split_part
from klein_kv.errors import CapacityError, RequestError
from klein_kv.networks import merge as merge_network
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.backends.backend import DeviceContent
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.lora import merge
from klein_kv.runtime.lora.lora_file import WeightedAdapter, read_adapter
from klein_kv.runtime.lora.merge import WeightMerger
from klein_kv.runtime.pipeline import KleinKVPipeline
from tests.conftest import load_ours
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines, random_inputs
from tests.runtime.backends.fake_trt import FakeTrt
from tests.runtime.lora.test_lora_pipeline import REQUEST, make_adapter

ONE = "transformer_blocks.0.ff.linear_in.weight"
RANK = 16  # that 4 is padded to


class Card:
    """The engines of one set of graphs on a stand-in device; the weights of a step are loaded."""

    def __init__(self, artifacts: Path, engines: Path, precision: str | None = None) -> None:
        self.artifacts, self.manifest = artifacts, Manifest.load(artifacts)
        self.graphs = self.manifest.choose_graphs(precision=precision)
        self.cuda = FakeCuda()
        self.trt = FakeTrt(artifacts, self.cuda, graphs=self.graphs)
        engines = make_engines(artifacts, engines, self.graphs)
        options: Any = {"engines": engines, "cuda": self.cuda.cuda, "trt": self.trt}
        self.backend = TrtBackend(artifacts, self.manifest, graphs=self.graphs, **options)
        self.shapes = transformer_parameters(self.manifest.config.transformer)
        inputs = random_inputs(self.graphs.signature("cached_step", self.manifest.config))
        self.backend.prepare("cached_step", {name: x.shape for name, x in inputs.items()})
        self.refs = graph_weights(artifacts, self.graphs.file("cached_step"))

    def adapters(self, size: float = 0.02) -> list[WeightedAdapter]:
        """Two of them, of many tensors."""
        tensors = [make_adapter(self.manifest, seed, size) for seed in (1, 2)]  # type: ignore[arg-type]
        first, second = (read_adapter(x, self.shapes) for x in tensors)
        return [(first, 0.7), (second, -1.5)]

    def one(self, rank: int = 4, size: float = 0.02) -> list[WeightedAdapter]:
        """One of a single tensor."""
        rows, columns = self.shapes[ONE]
        rng, base = np.random.default_rng(0), f"transformer.{ONE.removesuffix('.weight')}"
        up, down = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
        tensors = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": size * up / rank**0.5}
        return [(read_adapter(tensors, self.shapes), 1.0)]

    def merger(self, *, host: bool = False) -> WeightMerger:
        backend = None if host else self.backend
        return WeightMerger(self.artifacts, self.manifest, self.graphs, backend)

    def held(self) -> dict[str, NDArray[Any]]:
        """What lies where the engine reads."""
        weights = self.backend._weights
        return {name: self.backend.download(weights[ref]) for name, ref in self.refs.items()}

    def expected(self, adapters: list[WeightedAdapter]) -> dict[str, NDArray[Any]]:
        """The weights that these adapters change, merged by numpy."""
        contents = self.merger(host=True).contents(adapters)
        parts = {name: split_part(name) for name in self.refs}
        return {n: contents[x]()[rows] for n, (x, rows) in parts.items() if x in contents}

    def uploaded(self, work: Callable[[], object]) -> int:
        """Bytes that some work brings to the device."""
        self.cuda.copies.clear()
        work()
        return sum(nbytes for kind, nbytes in self.cuda.copies if kind == 1)


def steps_apart(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.int64]:
    """How many representable numbers lie between these and those."""
    bits = {1: np.int8, 2: np.int16}[one.itemsize]
    ordered = [x.view(bits).astype(np.int64) for x in (one, other)]
    low = np.iinfo(bits).min
    return np.abs(np.subtract(*(np.where(x < 0, low - x, x) for x in ordered)))


@pytest.mark.parametrize(
    ("folder", "precision", "pieces"),
    [
        ("tiny_bf16_artifacts", None, False),
        ("tiny_fp16_artifacts", None, True),
        ("quantized_artifacts", "fp8", True),
    ],
)
def test_engines_merge_as_the_host_does(
    folder: str,
    precision: str | None,
    pieces: bool,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums are made in another order: now and then the next number; never more."""
    if pieces:  # as of large weights
        monkeypatch.setattr(merge_network, "_MOST_NUMBERS", 1 << 13)
        monkeypatch.setattr(merge, "_READ_BYTES", 1 << 15)
    card = Card(request.getfixturevalue(folder), tmp_path, precision)
    before, adapters = card.held(), card.adapters()
    contents, expected = card.merger().contents(adapters), card.expected(adapters)
    assert {type(content) for content in contents.values()} == {DeviceContent}
    own = {x: ref for x, ref in card.merger()._own.items() if x in contents}
    numbers = sum(sum(ref.shape) for ref in own.values())
    scalars = sum(4 if x not in card.merger()._quantized else 8 for x in own)

    uploaded = card.uploaded(lambda: card.backend.replace_weights(contents))
    assert (len(card.trt.runs) > 2 * len(own)) == pieces
    assert uploaded == sum(x.nbytes for x in own.values()) + 4 * RANK * numbers + scalars
    steps = []
    for name, array in card.held().items():
        if name in expected:
            assert array.dtype == expected[name].dtype
            assert not np.array_equal(array, before[name])
            if array.dtype == np.float32:
                np.testing.assert_allclose(array, expected[name], atol=1e-6)
            else:
                steps.append(steps_apart(array, expected[name]).reshape(-1))
        else:
            np.testing.assert_array_equal(array, before[name])
    apart = np.concatenate(steps)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3

    with card.trt.counting() as counts:
        card.backend.replace_weights(card.merger().contents([(adapters[0][0], 2.0)]))
    assert counts["loads"] == 0
    assert {graph for graph, _ in card.trt.captures} <= {"merge_lora", "merge_lora_fp8"}

    touched = sum(x.nbytes for name, x in before.items() if split_part(name)[0] in contents)
    back = dict.fromkeys(contents)
    assert card.uploaded(lambda: card.backend.replace_weights(back)) == touched
    for name, array in card.held().items():
        np.testing.assert_array_equal(array, before[name])


def too_large(card: Card) -> list[WeightedAdapter]:
    return card.one(size=3.0)


def too_many_ranks(card: Card) -> list[WeightedAdapter]:
    return card.one(rank=513)


def no_memory(card: Card) -> list[WeightedAdapter]:
    def refuse(_ref: WeightRef) -> Any:
        raise CapacityError("out of GPU memory")

    card.backend.upload_weight = refuse  # type: ignore[method-assign]
    return card.one()


def no_engine(card: Card) -> list[WeightedAdapter]:
    """Engines that were built before there was this one."""
    folders = []
    for folder in card.backend._engines.folders:
        engines = {k: v for k, v in folder.manifest.engines.items() if "merge" not in k}
        folders.append(replace(folder, manifest=replace(folder.manifest, engines=engines)))
    card.backend._engines = replace(card.backend._engines, folders=tuple(folders))
    return card.one()


def broken_engine(card: Card) -> list[WeightedAdapter]:
    card.trt.refused["execute_async_v3"] = ["no kernel image"]
    return card.one()


@pytest.mark.parametrize(
    "prepare", [too_large, too_many_ranks, no_memory, no_engine, broken_engine]
)
def test_what_a_device_does_not_merge_the_host_does(
    prepare: Callable[[Card], list[WeightedAdapter]],
    quantized_artifacts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    card = Card(quantized_artifacts, tmp_path, "fp8")
    adapters = prepare(card)
    merger = card.merger()
    card.backend.replace_weights(merger.contents(adapters))
    held = card.held()
    for name, array in card.expected(adapters).items():
        np.testing.assert_array_equal(held[name], array)
    merger.warn()
    told = {too_large: [ONE], broken_engine: ["no kernel image"]}.get(prepare, [])
    records = [x for x in caplog.records if x.name.endswith("lora.merge")]
    warnings = [x.message for x in records if x.levelno >= logging.WARNING]
    assert len(warnings) == len(told)
    assert all(words in warning for words, warning in zip(told, warnings, strict=True))


@pytest.mark.parametrize("size", [1e6, 1e30])
def test_a_weight_that_its_type_cannot_hold_is_an_error(
    size: float, tiny_fp16_artifacts: Path, tmp_path: Path
) -> None:
    card = Card(tiny_fp16_artifacts, tmp_path)
    with pytest.raises(RequestError, match=f"{ONE} larger than float16"):
        card.backend.replace_weights(card.merger().contents(card.one(size=size)))


def edit(pipe: KleinKVPipeline) -> Any:
    noise = np.random.default_rng(3).standard_normal((1, 128, 4, 5)).astype(np.float32)
    result: Any = pipe("a kite", latents=noise, **REQUEST)
    return result.images


def test_a_switch_leaves_engines_and_captured_graphs_as_they_are(
    tiny_artifacts: Path, tmp_path: Path
) -> None:
    def open_pipe() -> KleinKVPipeline:
        card = Card(tiny_artifacts, tmp_path)
        pipe = KleinKVPipeline(tiny_artifacts, card.manifest, card.backend)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    pipe = open_pipe()
    trt = pipe.backend._trt  # type: ignore[attr-defined]
    base = edit(pipe)
    edit(pipe)
    engines, captures = dict(trt.engines), trt.captures.copy()
    adapter = make_adapter(pipe, 1)
    pipe.load_lora_weights(adapter)
    changed = edit(pipe)
    assert trt.runs.count("merge_lora") == len(adapter) // 2
    expected = load_ours(tiny_artifacts)
    expected.load_lora_weights(adapter)
    np.testing.assert_allclose(changed, edit(expected), atol=1e-5)

    pipe.unload_lora_weights()
    np.testing.assert_array_equal(edit(pipe), base)
    for graph, loaded in engines.items():
        assert trt.engines[graph] is loaded, "no engine was loaded anew"
    others = {key: n for key, n in trt.captures.items() if key[0] != "merge_lora"}
    assert others == captures, "no graph was captured anew"

    fresh = open_pipe()  # merges while it loads the step
    fresh.load_lora_weights(adapter)
    np.testing.assert_array_equal(edit(fresh), changed)


def test_graphs_of_quantized_sets_alone_have_float8(quantized_artifacts: Path) -> None:
    manifest = Manifest.load(quantized_artifacts)
    small = {x.precision: set(x.small_files) for x in (manifest.graphs, GraphSet("kv", "bfloat16"))}
    assert small == {None: {"blend", "merge_lora"}}
    fp8 = manifest.choose_graphs(precision="fp8")
    beside = set(manifest.held_graphs(fp8)) - set(fp8.files)
    assert beside == {"blend", "merge_lora", "merge_lora_fp8"}
