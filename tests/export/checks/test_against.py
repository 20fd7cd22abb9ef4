"""`klein-kv verify --against`: what passes, and which checks find faults planted into engines.

Engines run on stand-ins for TensorRT and CUDA, which compute with ONNX Runtime.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from klein_kv.artifacts.engines.engine_manifest import EngineManifest
from klein_kv.artifacts.engines.engine_record import ProfileRecord
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.quantized_weights import load_quantized
from klein_kv.artifacts.signature import KVFormat
from klein_kv.cli import main
from klein_kv.engines.sizes.profiles import engine_profiles
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.errors import BackendError
from klein_kv.export.checks.against import verify_against
from klein_kv.export.checks.artifact_weights import component_weights
from klein_kv.export.checks.graph_runs import Sizes, smallest_sizes
from klein_kv.export.checks.report import Report
from klein_kv.export.graphs.graph_files import save_quantized_graphs
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.pipeline import KleinKVPipeline
from klein_kv.runtime.references.reference_set import KVOrigin
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines
from tests.runtime.backends.fake_trt import FakeTrt, array_at

Tamper = Callable[..., None]

GRAPHS = (
    "text_encoder",
    "vae_encoder",
    "vae_decoder",
    "encode_references",
    "first_step",
    "cached_step",
)
SAME_KV = "first_step and encode_references give the same K/V"
REPEATS = "cached_step on this K/V repeats first_step"
UNTOUCHED = "cached_step leaves K/V as it was"
HIT = "a hit equals a miss"
MERGED = "a LoRA is merged as on the host"
VALUES = "transformer_blocks.0.attn.to_v.weight"


def float32(graph: str) -> str:
    return f"{graph} computes what float32 does"


def failures(report: Report) -> dict[str, str]:
    return {check.name: check.message for check in report.checks if check.status != "passed"}


def measured(report: Report, name: str) -> dict[str, dict[str, Any]]:
    (check,) = (check for check in report.checks if check.name == name)
    return {row["name"]: row for row in check.measured["rows"]}


@pytest.fixture(scope="module")
def folder(tiny_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts with engines, and with engines whose keys and values are float8."""
    folder = tmp_path_factory.mktemp("against") / "artifacts"
    shutil.copytree(tiny_artifacts, folder, copy_function=os.link)
    for graphs in Manifest.load(folder).graph_sets:
        engines = folder / "engines" / f"sm120-{graphs.kv_dtype}"
        engines.mkdir(parents=True)
        make_engines(folder, engines, graphs)
    return folder


@pytest.fixture
def check(tiny_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Checks engines on stand-ins; `computed` holds the graphs that they were made of."""

    def run(
        folder: Path,
        tamper: Tamper = lambda *_: None,
        computed: Path | None = None,
        out: Path | None = None,
        **options: Any,
    ) -> Report:
        def opened(artifacts: Path, *, prompt_cache_bytes: int, **given: Any) -> KleinKVPipeline:
            manifest, cuda = Manifest.load(artifacts), FakeCuda()
            chosen = {name: given.get(name) for name in ("kv_dtype", "precision", "attention")}
            packed = KVFormat.FP8_PER_HEAD if chosen["kv_dtype"] else None
            graphs = manifest.choose_graphs(packed, chosen["precision"], chosen["attention"])
            trt = FakeTrt(computed or artifacts, cuda, graphs=graphs, tamper=tamper)
            backend = TrtBackend(artifacts, manifest, cuda=cuda.cuda, trt=trt, graphs=graphs)
            return KleinKVPipeline(
                artifacts, manifest, backend, prompt_cache_bytes=prompt_cache_bytes, **chosen
            )

        monkeypatch.setattr(KleinKVPipeline, "from_pretrained", opened)
        return verify_against(folder, tiny_artifacts, out=out, **options)

    return run


Edit = Callable[[np.ndarray], Any]


def spoil(*faults: tuple[str, str, Edit]) -> Tamper:
    """Changes what graphs wrote, or read: graph, tensor, how."""

    def tamper(run: str, addresses: dict[str, int], shapes: dict[str, Any]) -> None:
        for graph, name, edit in faults:
            if run == graph:
                edit(array_at(addresses[name], shapes[name], "float32"))

    return tamper


def scaled(factor: float) -> Edit:
    return lambda array: np.multiply(array, np.float32(factor), out=array)


def moved(by: float) -> Edit:
    return lambda array: np.add(array, np.float32(by), out=array)


# --- nothing wrong ---


def test_engines_pass(check: Callable[..., Report], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    report = check(folder, out=out)
    assert report.ok, report.to_text()
    assert {float32(graph) for graph in GRAPHS} | {SAME_KV, REPEATS, UNTOUCHED, HIT, MERGED} <= {
        one.name for one in report.checks
    }
    for graph in GRAPHS:
        assert all(row["relative"] < 1e-6 for row in measured(report, float32(graph)).values())
    assert measured(report, HIT)["image"]["max_abs"] == 0
    value = json.loads(out.read_text())
    assert value == json.loads(json.dumps(report.to_dict()))
    assert value["machine"]["packages"]
    records = [engines["engines"] for engines in value["engines"]]
    assert len(records) == 2
    assert all(len(record["first_step"]["sha256"]) == 64 for record in records)
    assert "weights" not in records[0]["first_step"]


def test_float8_keys_and_values_are_compared_by_what_they_stand_for(
    check: Callable[..., Report], folder: Path
) -> None:
    report = check(folder, kv_dtype="fp8")
    assert report.ok, report.to_text()
    (kv,) = measured(report, float32("encode_references")).values()
    assert 0.01 < kv["relative"] < kv["tolerance"] < 0.1


def test_onnxruntime_from_the_command_line(
    tiny_fp16_artifacts: Path, tiny_artifacts: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "report.json"
    argv = ["verify", tiny_fp16_artifacts, "--against", tiny_artifacts, "--out", out, "--json"]
    argv += ["--backend", "onnxruntime", "--threads", "1"]
    assert main([str(x) for x in argv]) == 0
    text = capsys.readouterr().out
    value = json.loads(text)
    assert value == json.loads(out.read_text())
    assert value["ok"]
    rows = {one["name"]: one["measured"].get("rows") for one in value["checks"]}
    assert all(1e-6 < row["relative"] < 0.01 for g in GRAPHS for row in rows[float32(g)])
    for name in (SAME_KV, REPEATS, UNTOUCHED, HIT):
        assert all((row["relative"], row["tolerance"]) == (0, 0) for row in rows[name])
    for private in (str(tiny_artifacts), str(tiny_fp16_artifacts), str(Path.home()), "kite"):
        assert private not in text


def test_plain_weights(plain_artifacts: Path) -> None:
    report = verify_against(plain_artifacts, plain_artifacts, backend="onnxruntime", threads=1)
    assert report.ok, report.to_text()
    names = [one.name for one in report.checks]
    assert float32("plain_step") in names
    assert HIT in names
    assert SAME_KV not in names


def test_bfloat16_by_torch(tiny_bf16_artifacts: Path, tiny_artifacts: Path) -> None:
    report = verify_against(tiny_bf16_artifacts, tiny_artifacts, backend="torch", device="cpu")
    assert report.ok, report.to_text()
    assert measured(report, float32("first_step"))["first_step, noise_pred"]["relative"] > 1e-3


# --- planted faults ---


def patch_of_values(array: np.ndarray) -> None:
    array[0, 3, 1, :4] += 2


@pytest.mark.parametrize(
    ("faults", "found"),
    [
        pytest.param(
            [
                ("first_step", "v_ref.1", patch_of_values),
                ("blend", "latents", scaled(1.05)),
                ("merge_lora", "merged", scaled(1.01)),
            ],
            {
                float32("first_step"): "v_ref.1 is off by",
                SAME_KV: "v_ref.1 is off by",
                float32("blend"): "latents is off by 0.05 ",
                MERGED: "is off by 0.01 ",
            },
            id="a few values of one block, a mixture, weights",
        ),
        pytest.param(
            [("encode_references", "k_ref.2", scaled(1.01))],
            {float32("encode_references"): "k_ref.2", SAME_KV: "k_ref.2", REPEATS: "noise_pred"},
            id="keys of one block",
        ),
        pytest.param(
            [("cached_step", "noise_pred", scaled(1.01)), ("cached_step", "latents", moved(0.05))],
            {
                float32("cached_step"): "noise_pred is off by 0.01 .*latents is off by",
                REPEATS: "noise_pred .*latents",
                HIT: "image",
            },
            id="a step that is off, and latents that go on wrong",
        ),
        pytest.param(
            [("cached_step", "k_ref.2", moved(1e-3))],
            {UNTOUCHED: "k_ref.2"},
            id="a step that writes into its inputs",
        ),
        pytest.param(
            [("text_encoder", "encoder_hidden_states", lambda x: x.fill(np.nan))],
            {"text_encoder runs": "not finite", "an edit": "", "the same edit again": ""},
            id="text that is not finite",
        ),
        pytest.param(
            [("vae_decoder", "sample", lambda x: x.fill(0))],
            {
                "vae_decoder runs": "all the same",
                "an edit": "standard deviation 0",
                "the same edit again": "standard deviation 0",
            },
            id="an image of one colour",
        ),
    ],
)
def test_planted_faults_are_found(
    check: Callable[..., Report], folder: Path, faults: Any, found: dict[str, str]
) -> None:
    report = check(folder, spoil(*faults))
    messages = failures(report)
    for name, words in found.items():
        assert re.search(words, messages.pop(name)), report.to_text()
    # What is computed from what is wrong may be wrong, but no graph that is right is blamed.
    assert set(messages) <= {HIT, "an edit", "the same edit again"}, report.to_text()


def test_references_that_are_encoded_again_are_found(
    check: Callable[..., Report], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(10**6))
    monkeypatch.setattr(KVOrigin, "digest", lambda origin, images: f"{next(count)}")
    messages = failures(check(folder))
    assert "expected 4 cached steps" in messages.pop(HIT)
    assert not messages


def test_a_broken_engine_is_told_and_the_others_are_checked(
    check: Callable[..., Report], folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "artifacts", copy_function=os.link)
    broken = copy / "engines/sm120-None/encode_references.engine"
    broken.unlink()
    broken.write_bytes(b"first_step")
    report = check(copy)
    (name,) = failures(report)
    assert name == "encode_references runs"
    message = failures(report)[name]
    assert "is not the engine that" in message
    assert str(copy) in message
    assert str(copy) not in json.dumps(report.to_dict())
    assert {float32("first_step"), float32("cached_step"), HIT} <= {
        one.name for one in report.checks if one.status == "passed"
    }


@pytest.mark.parametrize("other", ["tiny_bf16_artifacts", "plain_artifacts"])
def test_a_reference_that_does_not_fit(
    tiny_artifacts: Path, other: str, request: pytest.FixtureRequest
) -> None:
    """Nothing is compared with it, but the rest is checked."""
    reference: Path = request.getfixturevalue(other)
    report = verify_against(tiny_artifacts, reference, backend="onnxruntime", threads=1)
    ((name, message),) = failures(report).items()
    assert name == "float32 artifacts open"
    assert ("expected float32" in message) or ("another model" in message)
    assert HIT in [one.name for one in report.checks]


def test_artifacts_that_do_not_open(tiny_artifacts: Path, tmp_path: Path) -> None:
    report = verify_against(tmp_path, tiny_artifacts, out=tmp_path / "report.json")
    assert "is not a klein-kv" in failures(report)["artifacts and backend open"]
    assert not json.loads((tmp_path / "report.json").read_text())["ok"]


def test_the_report_is_there_while_a_check_runs(
    check: Callable[..., Report], folder: Path, tmp_path: Path
) -> None:
    """A library that ends the process leaves what was found, and what was under way."""
    out = tmp_path / "report.json"

    def tamper(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(folder, tamper, out=out)
    checks = json.loads(out.read_text())["checks"]
    assert (checks[-1]["name"], checks[-1]["status"]) == ("text_encoder runs", "running")
    assert checks[0]["status"] == "passed"


def test_errors_of_libraries_say_where_they_come_from(tmp_path: Path) -> None:
    report = Report(None, {"/data/x": "ARTIFACTS"})
    with report.check("one"):
        raise ValueError("/data/x/first_step.onnx of /home/jane/models")
    with report.check("two"):
        raise BackendError("no GPU; mend it")
    one, two = report.to_dict()["checks"]
    assert one["message"].startswith("ValueError: ARTIFACTS/first_step.onnx of ~/models (in test_")
    assert two["message"] == "no GPU; mend it"
    assert not report.ok


# --- quantized engines ---


@pytest.fixture(scope="module")
def fp8(quantized_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines in fp8, and in fp8 with float8 attention."""
    folder = tmp_path_factory.mktemp("fp8") / "artifacts"
    shutil.copytree(quantized_artifacts, folder, copy_function=os.link)
    for attention in (None, "fp8"):
        engines = folder / "engines" / f"sm120-fp8-{attention}"
        engines.mkdir(parents=True)
        graphs = Manifest.load(folder).choose_graphs(precision="fp8", attention=attention)
        make_engines(folder, engines, graphs)
    return folder


@pytest.fixture(scope="module")
def faulty(fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graphs, with one weight scale that is twice what it should be."""
    folder = tmp_path_factory.mktemp("faulty") / "artifacts"
    shutil.copytree(fp8, folder)
    manifest = Manifest.load(folder)
    right = load_quantized(folder, "transformer", "fp8")
    layer = right.linears[VALUES]
    linears = {**right.linears, VALUES: replace(layer, weight_scale=2 * layer.weight_scale)}
    weights = component_weights(folder, manifest, "transformer")
    wrong = replace(right, linears=linears)
    save_quantized_graphs(folder, manifest.config, manifest.graphs, "transformer", weights, wrong)
    return folder


@pytest.mark.parametrize("attention", [None, "fp8"])
def test_a_weight_scale_off_by_two_is_found(
    check: Callable[..., Report], fp8: Path, faulty: Path, attention: str | None
) -> None:
    """It is off in all graphs, so that they agree with each other: only float32 tells."""
    options = {"precision": "fp8", "attention": attention}
    report = check(fp8, **options)
    assert report.ok, report.to_text()
    rows = [row for graph in GRAPHS[3:] for row in measured(report, float32(graph)).values()]
    assert all(0.001 < row["relative"] < row["tolerance"] for row in rows)
    messages = failures(check(fp8, computed=faulty, **options))
    for graph in ("encode_references", "first_step"):
        assert "v_ref.0 is off by" in messages.pop(float32(graph))
    assert set(messages) <= {float32("cached_step")}


# --- sizes ---


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("default", Sizes((512, 512), ((64, 64),), 512)),
        ("static-1024-4ref", Sizes((1024, 1024), ((1024, 1024),) * 4, 512)),
    ],
)
def test_the_smallest_sizes_that_engines_serve(
    tiny_artifacts: Path, tmp_path: Path, recipe: str, sizes: Sizes
) -> None:
    """Of engines built by a recipe of the package."""
    folder = Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts", copy_function=os.link))
    manifest, engines = Manifest.load(folder), folder / "engines/sm120"
    engines.mkdir(parents=True)
    built = EngineManifest.load(make_engines(folder, engines))
    records = {}
    for graph, record in built.engines.items():
        signature = manifest.graphs.signature(graph, manifest.config)
        profiles = engine_profiles(signature, Recipe.load(recipe), manifest.config)
        records[graph] = replace(
            record,
            profiles=tuple(ProfileRecord(one.name, one.symbols, one.shapes) for one in profiles),
        )
    replace(built, engines=records).save(engines)
    pipe: Any = SimpleNamespace(
        artifacts=folder,
        manifest=manifest,
        config=manifest.config,
        graphs=manifest.graphs,
        backend=SimpleNamespace(name="tensorrt"),
    )
    assert smallest_sizes(pipe) == sizes
