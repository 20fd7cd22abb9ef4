"""Whatever people's files and prompts hold: it works, or it is one clear error, and soon.

A few examples of each kind by default, other ones every time; the long run is
`pytest tests/test_damaged.py --examples 10000`.
"""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from klein_kv import KleinKVPipeline
from klein_kv.artifacts.attention_scales import attention_scales
from klein_kv.artifacts.config import DEFAULT_TEXT_LAYERS
from klein_kv.artifacts.digest import file_digest
from klein_kv.artifacts.engines.engine_manifest import (
    ENGINE_MANIFEST,
    EngineManifest,
    _self_digest,
)
from klein_kv.artifacts.engines.engine_set import open_engines
from klein_kv.artifacts.engines.targets import GPUS
from klein_kv.artifacts.manifest import MANIFEST, Manifest
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.weights import graph_weights
from klein_kv.cli.inspection import _inspect_engines
from klein_kv.engines.plan.kernel_plan import KernelPlan
from klein_kv.engines.plan.kernel_price import price_plan
from klein_kv.errors import MALFORMED
from klein_kv.export.checkpoints.sources import find_source
from klein_kv.export.checkpoints.stored_weights import read_rows
from klein_kv.export.checkpoints.weight_values import check_values
from klein_kv.export.exporter import _read_checkpoint
from klein_kv.runtime.inputs.prompts import read_prompts
from klein_kv.runtime.lora.changes import apply_changes
from klein_kv.runtime.lora.lora_file import describe_lora, read_adapter
from klein_kv.runtime.options import CallArguments, texts_of
from klein_kv.runtime.outputs.metadata import ImageParameters, write_image
from klein_kv.runtime.planning.edit_plan import PlanOptions, plan_artifacts
from klein_kv.runtime.planning.plan_text import text_from_plans
from tests.bfl_files import bfl_state, ldm_vae_state, quantize, save_single_file
from tests.damage import (
    damaged_bytes,
    damaged_json,
    damaged_safetensors,
    works_or_one_clear_error,
)
from tests.engines.plan.test_kernel_plan import LINES
from tests.runtime.backends.fake_engines import make_engines
from tests.runtime.lora.lora_files import SHAPES, WRITERS, make, save

few = settings(
    settings.get_profile("damaged"),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ENGINES = "engines/sm120-bf16"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
DATA = st.data()


@contextlib.contextmanager
def written(path: Path, content: bytes) -> Iterator[None]:
    """A file with another content for a while."""
    before = path.read_bytes()
    path.unlink()  # it may be a link to somebody else's
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink()
        path.write_bytes(before)


def damaged_text(data: st.DataObject, path: Path) -> bytes:
    """A JSON file with damage to its values or to its bytes."""
    content = path.read_bytes()
    if data.draw(st.integers(0, 3)) == 0:
        return damaged_bytes(data, content)
    return damaged_json(data, json.loads(content))


def make_small_image(pipe: KleinKVPipeline, **options: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    sizes: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 16, "seed": 0}
    return pipe(**sizes | {"prompt": "a kite", "num_inference_steps": 1} | options)


# --- checkpoints ---


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("damaged") / "tiny"))


@pytest.fixture(scope="module")
def single_files(checkpoint: Path) -> list[Path]:
    """The transformer as others write it: plain, fp8, nvfp4, and in a whole pipeline."""
    bfl = bfl_state(load_file(checkpoint / TRANSFORMER))
    fp8 = quantize(bfl, "fp8")
    kinds = {"bf16": bfl, "fp8": fp8, "nvfp4": quantize(bfl, "nvfp4")}
    kinds["comfy"] = {
        name.replace("weight_scale", "scale_weight").replace("input_scale", "scale_input"): x
        for name, x in fp8.items()
    } | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    kinds["whole"] = {f"model.diffusion_model.{name}": x for name, x in bfl.items()}
    vae = load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors")
    text = load_file(checkpoint / "text_encoder/model.safetensors")
    kinds["whole"] |= {f"vae.{name}": x for name, x in ldm_vae_state(vae).items()}
    kinds["whole"] |= {f"text_encoders.qwen3_8b.transformer.{name}": text[name] for name in text}
    layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in fp8}
    said = {"_quantization_metadata": json.dumps({"layers": layers})}
    more = {"fp8": ("", said)}
    return [
        save_single_file(checkpoint.parent / f"{kind}.safetensors", state, *more.get(kind, ()))
        for kind, state in kinds.items()
    ]


def read_checkpoint(*place: Path) -> None:
    """Everything that an export does with a checkpoint's files before it writes graphs."""
    with works_or_one_clear_error():
        whole = _read_checkpoint(find_source(*place), DEFAULT_TEXT_LAYERS)
        for part, names in whole.parameters.items():
            check_values(whole.weights[part], names)
            for name in names:
                weight = whole.weights[part][name]
                assert read_rows(weight, 0, 2).shape == (min(2, weight.shape[0]), *weight.shape[1:])


@few
@given(DATA)
def test_weights_of_checkpoints(
    checkpoint: Path, single_files: list[Path], data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([*single_files, checkpoint / TRANSFORMER]))
    with written(path, damaged_safetensors(data, path.read_bytes())):
        if path.parent == checkpoint.parent:
            read_checkpoint(path, checkpoint)
        else:
            read_checkpoint(checkpoint)


@few
@given(DATA)
def test_configurations_of_checkpoints(checkpoint: Path, data: st.DataObject) -> None:
    files = [p for p in sorted(checkpoint.rglob("*.json")) if p.parent.name != "tokenizer"]
    path = data.draw(st.sampled_from(files))
    with written(path, damaged_text(data, path)):
        read_checkpoint(checkpoint)


# --- artifact folders ---


@pytest.fixture(scope="module")
def artifacts(quantized_short_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifacts in bfloat16, in fp8 and nvfp4 too, with (pretended) engines."""
    folder = tmp_path_factory.mktemp("damaged") / "artifacts"
    shutil.copytree(quantized_short_artifacts, folder)
    (folder / ENGINES).mkdir(parents=True)
    engines = make_engines(folder, folder / ENGINES)
    plan = KernelPlan.from_lines("cached_step", "test", LINES[:5], 1 << 20, ("w",))
    manifest = EngineManifest.load(engines)
    few = {graph: manifest.engines[graph] for graph in ("cached_step", "vae_decoder")}
    replace(manifest, engines=few).save(engines)
    for graph in few:
        (engines / f"{graph}.layers.json").write_text(plan.to_json())
    return folder


@contextlib.contextmanager
def described(folder: Path, name: str, content: bytes) -> Iterator[None]:
    """A file with another content, which the manifest describes: made so, not damaged later."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    with written(folder / name, content):
        record = {"bytes": len(content), "digest": file_digest(folder / name)}
        manifest["files"][name] = record
        with written(folder / MANIFEST, json.dumps(manifest).encode()):
            yield


def use(folder: Path, backend: str = "torch", **options: Any) -> None:
    """Opens a folder and makes an image."""
    with (
        works_or_one_clear_error(),
        KleinKVPipeline.from_pretrained(
            folder, backend=backend, device="cpu", threads=1, **options
        ) as pipe,
    ):
        make_small_image(pipe)


def plan(folder: Path) -> None:
    with works_or_one_clear_error():
        wanted = PlanOptions(precisions=("bf16",), references=(1,), engines=folder / ENGINES)
        assert text_from_plans(plan_artifacts(folder, wanted))


@few
@given(DATA)
def test_manifests(artifacts: Path, data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from([None, None, "fp8"]))
    with written(artifacts / MANIFEST, damaged_text(data, artifacts / MANIFEST)):
        use(artifacts, precision=precision)
        plan(artifacts)


@few
@given(DATA)
def test_weight_tables(artifacts: Path, tiny_copy: Path, data: st.DataObject) -> None:
    """Which only one backend reads at a time; ONNX Runtime takes ten times as long."""
    folders = [(artifacts, "torch")] * 29 + [(tiny_copy, "onnxruntime")]
    folder, backend = data.draw(st.sampled_from(folders))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.weights.json")]
    name = data.draw(st.sampled_from(sorted(names)))
    with described(folder, name, damaged_text(data, folder / name)):
        use(folder, backend)
        plan(folder)


@pytest.fixture(scope="module")
def tiny_copy(short_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(short_artifacts, tmp_path_factory.mktemp("damaged") / "float32"))


@few
@given(DATA)
def test_quantized_weights(artifacts: Path, data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from(["fp8", "nvfp4"]))
    part = data.draw(st.sampled_from(["transformer", "text_encoder"]))
    part = "transformer" if precision == "nvfp4" else part
    path = artifacts / part / f"{precision}.{data.draw(st.sampled_from(['json', 'safetensors']))}"
    is_text = path.suffix == ".json"
    damage = damaged_text(data, path) if is_text else damaged_safetensors(data, path.read_bytes())
    with written(path, damage):
        with works_or_one_clear_error():
            quantized = load_quantized(artifacts, part, precision)
            for linear in quantized.linears.values():
                assert linear.dequantize().shape == linear.shape
            net = Manifest.load(artifacts, check_files=False).config.transformer
            weights = graph_weights(artifacts, "transformer/cached_step.onnx")
            assert len(attention_scales(net, quantized.attention, weights)) == net.num_blocks
        with works_or_one_clear_error():
            wanted = PlanOptions(precisions=(precision,), references=(1,))
            assert text_from_plans(plan_artifacts(artifacts, wanted))


@few
@given(DATA)
def test_engine_manifests(artifacts: Path, data: st.DataObject) -> None:
    """As damage, or as somebody wrote it on purpose, with the digest that it needs."""
    folder = artifacts / ENGINES
    content = damaged_text(data, folder / ENGINE_MANIFEST)
    with contextlib.suppress(*MALFORMED):
        value = json.loads(content)
        if data.draw(st.booleans()):
            content = json.dumps(value | {"digest": _self_digest(value)}).encode()
    with written(folder / ENGINE_MANIFEST, content):
        with works_or_one_clear_error():
            manifest = Manifest.load(artifacts, check_files=False)
            for one in open_engines(artifacts, manifest, manifest.graphs, folder).folders:
                for graph, record in one.manifest.engines.items():
                    one.manifest.read_engine(folder, graph)
                    record.weight_refs(artifacts)
                    record.scratch_for({"hidden_states": (1, 4, 128)})
        plan(artifacts)
        with works_or_one_clear_error():
            assert _inspect_engines(folder, "rtx5090")[1]


@few
@given(DATA)
def test_kernel_plans(artifacts: Path, data: st.DataObject) -> None:
    path = artifacts / ENGINES / "cached_step.layers.json"
    with written(path, damaged_text(data, path)), works_or_one_clear_error():
        assert math.isfinite(price_plan(KernelPlan.load(path), GPUS["rtx5090"]).seconds)


@pytest.fixture(scope="module", params=[None, "fp8"])
def saved_references(
    request: pytest.FixtureRequest, tiny_copy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[KleinKVPipeline, Path]]:
    with KleinKVPipeline.from_pretrained(
        tiny_copy, backend="torch", device="cpu", threads=1, kv_dtype=request.param
    ) as pipe:
        path = tmp_path_factory.mktemp("damaged") / "references.safetensors"
        pipe.encode_references(Image.effect_noise((64, 64), 50).convert("RGB")).save(path)
        yield pipe, path


@few
@given(DATA)
def test_saved_references(
    saved_references: tuple[KleinKVPipeline, Path], data: st.DataObject
) -> None:
    pipe, path = saved_references
    with written(path, damaged_safetensors(data, path.read_bytes())), works_or_one_clear_error():
        make_small_image(pipe, references=pipe.load_references(path))


# --- LoRA ---


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of every writer, some with all that diffusers says beside it."""
    folder, files = tmp_path_factory.mktemp("damaged"), []
    said = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"to_q": 1.5, "ff.*": 3}}
    said |= {"transformer.rank_pattern": {"to_q": 2}, "transformer.use_rslora": True}
    for number, (name, writer) in enumerate(WRITERS.items()):
        beside = {"lora_adapter_metadata": json.dumps(said)} if "diffusers" in name else {}
        files.append(save(folder / f"{number}.safetensors", make(writer)[0], **beside))
    return files


@few
@given(DATA)
def test_loras(loras: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(loras))
    content = damaged_safetensors(data, path.read_bytes())
    with written(path, content):
        with works_or_one_clear_error():
            assert describe_lora(path)["keys"]
        with works_or_one_clear_error():
            adapter = read_adapter(path, SHAPES, strict=data.draw(st.booleans()))
            for name, changes in adapter.changes.items():
                new = apply_changes(np.ones(SHAPES[name], np.float32), [(x, 0.5) for x in changes])
                assert (new.shape, new.dtype) == (SHAPES[name], np.float32)


# --- prompts ---

PIECES = st.sampled_from([
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<|im_", "assistant\n",
    "{{ messages }}", "{% raise %}", "%s", "{0}", "\0", "\x1b[31m", "\r\n", "\u2028", "\ufeff",
    "\ud800", "\udfff", "\u202e", "\u0301" * 50, "\U0001f468\u200d", "kite ", "9" * 40, "a" * 999,
])  # fmt: skip
TEXTS = st.text() | st.lists(PIECES | st.text(max_size=5), max_size=20).map("".join)
LONG = st.builds(lambda text, times: text * times, TEXTS, st.sampled_from([1, 1, 1, 100, 1000]))
ODD = st.sampled_from(
    [None, 0, 1.5, True, b"kite", float("nan"), {"a": 1}, (), ("kite",), object()]
)


@few
@given(
    prompt=LONG | ODD | st.lists(LONG | ODD, max_size=3),
    length=st.sampled_from([16, 16, 16, 1, 2, 512, 0, -1, 4096, 4097, 10**30, 2.0, None, "16"]),
    data=DATA,
)
def test_prompts(tiny_ours: KleinKVPipeline, prompt: Any, length: Any, data: st.DataObject) -> None:
    with works_or_one_clear_error(seconds=20):
        ask = CallArguments(prompt=prompt, max_sequence_length=length)
        tokens = tiny_ours.prompts.tokenize(texts_of(ask.prompt), length)
        shape = (len(texts_of(prompt)), length)
        assert tokens["input_ids"].shape == tokens["attention_mask"].shape == shape
    if data.draw(st.integers(0, 9)) == 0 and length in (1, 2, 16):
        with works_or_one_clear_error(seconds=20):
            make_small_image(tiny_ours, prompt=prompt, max_sequence_length=length)
    if isinstance(prompt, str):
        facts = ImageParameters(prompt, 4, 16, 16, 0, prompt[:50], "sha256:0")
        with works_or_one_clear_error(seconds=20):
            kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
            write_image(Image.new("RGB", (16, 16)), io.BytesIO(), kind, facts)


@few
@given(
    content=st.lists(LONG, max_size=5)
    .map("\n".join)
    .map(lambda x: x.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=200),
    codec=st.sampled_from(["", "", "utf-16", "utf-32", "latin-1"]),
    data=DATA,
)
def test_files_of_prompts(
    tiny_ours: KleinKVPipeline, tmp_path: Path, content: bytes, codec: str, data: st.DataObject
) -> None:
    path = tmp_path / "prompts.txt"
    if codec:
        content = content.decode("utf-8", "replace").encode(codec, "replace")
    path.write_bytes(damaged_bytes(data, content) if data.draw(st.booleans()) else content)
    with works_or_one_clear_error(seconds=20):
        prompts = read_prompts(path)
        assert all(x.strip() for x in prompts)
        tiny_ours.prompts.tokenize(prompts[:50], 16)
