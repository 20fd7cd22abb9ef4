"""`klein-kv selftest`: on ONNX Runtime, and on stand-ins for TensorRT with planted faults."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klein_kv import selftest
from klein_kv.cli import main
from klein_kv.engines import build
from klein_kv.engines.manifest import EngineManifest
from klein_kv.errors import BackendError, BuildError, RequestError
from klein_kv.export import exporter
from klein_kv.manifest import MANIFEST, Manifest
from klein_kv.runtime import selftest as runtime_selftest
from klein_kv.runtime.backends.trt.backend import TrtBackend
from klein_kv.runtime.references import KVOrigin
from klein_kv.runtime.selftest_report import Report
from klein_kv.selftest import run_selftest
from klein_kv.signature import KV_FLOAT8
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_engines import make_engines
from tests.runtime.fake_trt import FakeTrt, array_at
from tests.runtime.kept_backends import Kept, keep_references

Tamper = Callable[..., None]

ALL_OF_A_MODEL = 30
"""At least so many checks pass of a KV model with engines."""


@pytest.fixture
def engines(tiny_artifacts: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "engines"
    folder.mkdir()
    return make_engines(tiny_artifacts, folder)


DECODES = (
    ": vae_decoder runs",
    ", small: text to image",
    ", small: first edit",
    ", small: stage times",
)
"""Checks that need the VAE decoder."""

STEPS = ("encode_references", "first_step", "cached_step")


@pytest.fixture(autouse=True)
def _kept_references(monkeypatch: pytest.MonkeyPatch, kept: Kept) -> None:
    keep_references(monkeypatch, kept)


@pytest.fixture(scope="module")
def kept() -> Kept:
    return {}


def check(
    artifacts: Path,
    engines: Path | None,
    tamper: Tamper = lambda *_: None,
    graphs: Sequence[str] | None = None,
) -> Report:
    """The self-test of a folder of fake engines, of some graphs or all, on a fake GPU."""
    if graphs is not None and engines is not None:
        change(engines, engines={x: EngineManifest.load(engines).engines[x] for x in graphs})

    def open_fake(artifacts: Path, manifest: Manifest, **options: Any) -> TrtBackend:
        cuda, graphs = FakeCuda(), options["graphs"]
        return TrtBackend(
            artifacts,
            manifest,
            engines=options["engines"],
            cuda=cuda.cuda,
            trt=FakeTrt(artifacts, cuda, graphs=graphs, tamper=tamper),
            graphs=graphs,
        )

    return run_selftest(artifacts, engines=engines, tiny=False, open_backend=open_fake)


def change(folder: Path, **fields: Any) -> None:
    """Makes `engine.json` say something else."""
    loaded = EngineManifest.load(folder)
    values = {name: getattr(loaded, name) for name in EngineManifest.__slots__}
    EngineManifest(**values | fields).save(folder)


def failures(report: Report) -> set[str]:
    return {check.name for check in report.failed}


def spoil(graph: str, name: str, edit: Callable[[np.ndarray], None]) -> Tamper:
    """Changes what one graph wrote, or read."""

    def tamper(run: str, addresses: dict[str, int], shapes: dict[str, Any]) -> None:
        if run == graph:
            edit(array_at(addresses[name], shapes[name], "float32"))

    return tamper


# --- nothing wrong ---


def test_whole_engines_pass(tiny_artifacts: Path, engines: Path) -> None:
    report = check(tiny_artifacts, engines)
    assert failures(report) == set(), report.to_text()
    assert report.ok
    passed = {check.name: check.measured for check in report.checks if check.status == "passed"}
    assert len(passed) > ALL_OF_A_MODEL
    reference = "onnxruntime on a CPU, float32"
    for graph in Manifest.load(tiny_artifacts).graphs.files:
        assert passed[f"engines: {graph} is the file that was built"]["bytes"] > len(graph)
        assert passed[f"model: {graph} runs"]["repeats_bitwise"]
        assert passed[f"model: {graph} against {reference}"]["norm"] < 1e-6
    times = passed["model, small: stage times"]["timings"]
    assert len(times["first"]) == len(times["repeated"]) == 3
    assert all(run["first_step"] > 0 for run in times["first"])
    assert all(
        run["first_step"] == 0 and len(run["cached_steps"]) == 4 for run in times["repeated"]
    )
    facts = report.to_dict()
    assert facts["engines"][0]["graphs"]["first_step"]["sha256"]
    assert facts["machine"]["packages"]
    assert "weights" not in facts["engines"][0]["graphs"]["first_step"]


def test_onnxruntime_from_the_command_line(
    tiny_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    argv = ["selftest", str(tiny_artifacts), "--backend", "onnxruntime", "--threads", "1"]
    assert main([*argv, "--no-tiny", "--json", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    value = json.loads(text)
    assert value == json.loads(out.read_text()) | {"date": value["date"]}
    assert value["ok"]
    names = {check["name"]: check for check in value["checks"]}
    compared = [name for name in names if name.endswith("against torch on a CPU, float32")]
    assert len(compared) == 6
    same = names["model: first_step and encode_references give the same keys and values"]
    assert same["measured"]["bitwise"]
    assert names["model, small: repeated edit equals the first"]["measured"]["limit_norm"] == 0
    assert str(tiny_artifacts) not in text
    assert "kite" not in text, "no prompt"


def test_other_artifacts_as_the_reference(tiny_fp16_artifacts: Path, tiny_artifacts: Path) -> None:
    report = run_selftest(
        tiny_fp16_artifacts,
        backend="onnxruntime",
        reference_artifacts=tiny_artifacts,
        threads=1,
        tiny=False,
    )
    assert report.ok, report.to_text()
    compared = [check for check in report.checks if "against" in check.name]
    assert len(compared) == 6
    assert all(1e-6 < check.measured["norm"] < 0.01 for check in compared)


def test_without_torch_there_is_no_reference_for_onnxruntime(
    tiny_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    report = run_selftest(tiny_artifacts, backend="onnxruntime", threads=1, tiny=False)
    assert report.ok
    (skipped,) = [check for check in report.checks if check.status == "skipped"]
    assert "torch is not installed" in skipped.message


def test_every_folder_of_engines_is_tested(tiny_artifacts: Path, tmp_path: Path) -> None:
    """As they lie: general ones, others whose keys and values are float8, and an unfit GPU's."""
    artifacts = shutil.copytree(tiny_artifacts, tmp_path / "artifacts")
    manifest = Manifest.load(artifacts)
    for name, graphs in (
        ("sm120-fp32", manifest.graphs),
        ("sm120-fp32-fp8-kv", manifest.graphs_with(KV_FLOAT8)),
        ("sm89-fp32", manifest.graphs),
    ):
        (artifacts / "engines" / name).mkdir(parents=True)
        make_engines(artifacts, artifacts / "engines" / name, graphs)
    change(artifacts / "engines/sm89-fp32", sm=89)
    (artifacts / "engines/sm120-fp32-fp8-kv/vae_decoder.engine").write_bytes(b"text_encoder")
    report = check(artifacts, None)
    statuses = {check.name: check.status for check in report.checks}
    assert failures(report) == {
        "engines sm120-fp32-fp8-kv: vae_decoder is the file that was built",
        *(f"model sm120-fp32-fp8-kv{name}" for name in DECODES),
    }, report.to_text()
    assert statuses["model sm89-fp32: backend opens"] == "skipped"
    assert statuses["model sm120-fp32, small: repeated edit equals the first"] == "passed"
    reference = "onnxruntime on a CPU, float32"
    packed = "model sm120-fp32-fp8-kv"
    assert statuses[f"{packed}: text_encoder against {reference}"] == "passed"
    assert statuses[f"{packed}: encode_references against {reference}"] == "passed"
    assert statuses[f"{packed}: cached_step against {reference}"] == "passed"
    assert (
        statuses[f"{packed}: cached_step on these keys and values repeats first_step"] == "passed"
    )
    assert len(report.facts["engines"]) == 3


def test_engines_for_other_gpus_alone_are_a_failure(tiny_artifacts: Path, tmp_path: Path) -> None:
    artifacts = shutil.copytree(tiny_artifacts, tmp_path / "artifacts")
    for sm in (86, 89):
        folder = artifacts / "engines" / f"sm{sm}"
        folder.mkdir(parents=True)
        change(make_engines(artifacts, folder), sm=sm)
    report = check(artifacts, None)
    assert failures(report) == {"model"}
    assert "no engines here run on this machine" in report.failed[0].message


def test_plain_weights(plain_artifacts: Path) -> None:
    report = run_selftest(plain_artifacts, backend="onnxruntime", threads=1, tiny=False)
    assert report.ok, report.to_text()
    names = [check.name for check in report.checks]
    assert "model: plain_step runs" in names
    assert not [name for name in names if "keys and values" in name or "repeated" in name]


# --- planted faults ---


def test_a_wrong_output_is_found(tiny_artifacts: Path, engines: Path) -> None:
    """Values of one block's V, as a kernel might get them wrong at one place of many."""

    def edit(array: np.ndarray) -> None:
        array[0, 3, 1, :4] += 2

    report = check(tiny_artifacts, engines, spoil("first_step", "v_ref.1", edit), STEPS)
    assert failures(report) == {
        "model: first_step against onnxruntime on a CPU, float32",
        "model: first_step and encode_references give the same keys and values",
        "model: cached_step on these keys and values repeats first_step",
    }, report.to_text()
    assert "v_ref.1" in report.failed[0].message
    assert len([check for check in report.checks if check.status == "passed"]) > 8


def test_a_wrong_cached_step_is_found(tiny_artifacts: Path, engines: Path) -> None:
    def edit(array: np.ndarray) -> None:
        array *= np.float32(1.01)

    report = check(tiny_artifacts, engines, spoil("cached_step", "noise_pred", edit), STEPS)
    assert failures(report) == {
        "model: cached_step against onnxruntime on a CPU, float32",
        "model: cached_step on these keys and values repeats first_step",
    }


def test_a_wrong_image_of_a_hit_is_found(tiny_artifacts: Path, engines: Path) -> None:
    """Latents that are right in a first step and shifted in a cached one."""

    def edit(array: np.ndarray) -> None:
        array += np.float32(0.05)

    report = check(tiny_artifacts, engines, spoil("cached_step", "latents", edit))
    assert "model, small: repeated edit equals the first" in failures(report)


@pytest.mark.parametrize(
    ("graph", "output", "found"),
    [
        ("text_encoder", "encoder_hidden_states", "model, small: prompt to embeddings"),
        ("cached_step", "latents", "model, small: latents are finite"),
        ("vae_decoder", "sample", "model, small: text to image"),
    ],
)
def test_not_finite_values_are_found(
    graph: str, output: str, found: str, tiny_artifacts: Path, engines: Path
) -> None:
    def edit(array: np.ndarray) -> None:
        array.reshape(-1)[:5] = np.nan

    report = check(tiny_artifacts, engines, spoil(graph, output, edit))
    assert {f"model: {graph} runs", found} <= failures(report)
    message = next(c.message for c in report.failed if c.name == f"model: {graph} runs")
    assert message == f"1 outputs hold values that are not finite, {output} 5 of them"
    others = {"text_encoder", "vae_decoder", "first_step"} - {graph}
    assert not {f"model: {other} runs" for other in others} & failures(report)


def test_flat_images_are_found(tiny_artifacts: Path, engines: Path) -> None:
    """float16 that overflows ends in images of one colour."""

    def edit(array: np.ndarray) -> None:
        array[:] = 0

    report = check(tiny_artifacts, engines, spoil("vae_decoder", "sample", edit))
    messages = {c.name: c.message for c in report.failed}
    assert "every value of sample is the same" in messages["model: vae_decoder runs"]
    assert "the image is flat" in messages["model, small: first edit"]


def test_an_engine_that_writes_into_its_inputs_is_found(
    tiny_artifacts: Path, engines: Path
) -> None:
    def edit(array: np.ndarray) -> None:
        array[..., 0] += np.float32(1e-6)

    report = check(tiny_artifacts, engines, spoil("cached_step", "k_ref.2", edit), STEPS)
    assert "model: cached_step leaves the keys and values as they were" in failures(report)


def test_an_engine_that_does_not_repeat_itself_is_found(
    tiny_artifacts: Path, engines: Path
) -> None:
    rng = np.random.default_rng(0)

    def edit(array: np.ndarray) -> None:
        array += rng.standard_normal(array.shape, np.float32)

    report = check(tiny_artifacts, engines, spoil("encode_references", "k_ref.0", edit), STEPS)
    failed = {check.name: check.message for check in report.failed}
    assert "the second run differs" in failed["model: encode_references runs"]


def test_references_that_are_never_reused_are_found(
    tiny_artifacts: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(10**6))
    monkeypatch.setattr(KVOrigin, "digest", lambda origin, images: f"{next(count)}")
    report = check(tiny_artifacts, engines)
    (failed,) = report.failed
    assert failed.name == "model, small: repeated edit equals the first"
    assert "encoded again" in failed.message


def test_a_tampered_engine_is_found_and_the_others_are_tested(
    tiny_artifacts: Path, engines: Path
) -> None:
    (engines / "encode_references.engine").write_bytes(b"first_step")
    report = check(tiny_artifacts, engines, graphs=STEPS)
    assert failures(report) == {
        "engines: encode_references is the file that was built",
        "model: encode_references runs",
        "model: first_step and encode_references give the same keys and values",
    }
    assert all("not the engine" in check.message for check in report.failed)


def test_engines_of_another_version(tiny_artifacts: Path, engines: Path) -> None:
    change(engines, version="9.9")
    report = check(tiny_artifacts, engines)
    assert failures(report) == {"model: backend opens"}
    assert "9.9" in report.failed[0].message


def test_engines_that_were_not_all_built(tiny_artifacts: Path, engines: Path) -> None:
    report = check(tiny_artifacts, engines, graphs=("cached_step", "vae_decoder"))
    assert report.ok, report.to_text()
    skipped = {check.name: check.message for check in report.checks if check.status == "skipped"}
    assert skipped["model: first_step"] == "it was not built"
    assert "text_encoder" in skipped["model: loop"]


@pytest.mark.parametrize(
    "error",
    [
        BackendError("cuda-python is not installed; install it with pip install 'klein-kv[rtx]'"),
        BuildError("fake_trt refuses first_step"),
        MemoryError("no room"),
    ],
)
def test_a_backend_that_does_not_open(
    error: Exception, tiny_artifacts: Path, engines: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    report = run_selftest(tiny_artifacts, engines=engines, tiny=False, open_backend=refuse)
    assert failures(report) == {"model: backend opens"}
    assert str(error) in report.failed[0].message


# --- a backend that breaks between the checks, with errors that are not ours ---


def check_breaking(
    artifacts: Path, engines: Path | None, break_it: Callable[[TrtBackend], None]
) -> Report:
    """The self-test on fake engines, of which `break_it` gets the backend once it is open."""

    def open_fake(artifacts: Path, manifest: Manifest, **options: Any) -> TrtBackend:
        cuda, graphs = FakeCuda(), options["graphs"]
        backend = TrtBackend(
            artifacts,
            manifest,
            engines=options["engines"],
            cuda=cuda.cuda,
            trt=FakeTrt(artifacts, cuda, graphs=graphs),
            graphs=graphs,
        )
        break_it(backend)
        return backend

    return run_selftest(artifacts, engines=engines, tiny=False, open_backend=open_fake)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA driver is gone")


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def test_a_backend_whose_release_breaks(tiny_artifacts: Path, engines: Path) -> None:
    def break_it(backend: TrtBackend) -> None:
        backend.release = broken  # type: ignore[method-assign]

    report = check_breaking(tiny_artifacts, engines, break_it)
    graphs = Manifest.load(tiny_artifacts).graphs.files
    assert failures(report) == {
        "model: text_encoder is released",
        *(f"model, small: {graph} is released" for graph in graphs),
        "model: backend closes",
    }, report.to_text()
    assert all("RuntimeError: CUDA driver is gone" in check.message for check in report.failed)


def test_a_graph_whose_opening_breaks(tiny_artifacts: Path, engines: Path) -> None:
    change(engines, engines={x: EngineManifest.load(engines).engines[x] for x in STEPS})

    def break_it(backend: TrtBackend) -> None:
        load = backend._runtime.deserialize_cuda_engine
        backend._runtime.deserialize_cuda_engine = lambda blob: (
            broken() if b'"first_step"' in blob else load(blob)
        )

    report = check_breaking(tiny_artifacts, engines, break_it)
    found = statuses(report)
    assert found["model: first_step runs"] == "failed"
    assert found["model: cached_step against onnxruntime on a CPU, float32"] == "passed"
    assert found["model: backend closes"] == "passed"
    assert all("CUDA driver is gone" in check.message for check in report.failed)


def test_a_gpu_that_is_gone_ends_neither_the_test_nor_that_of_other_engines(
    tiny_artifacts: Path, tmp_path: Path
) -> None:
    """After the first graph every call fails, closing included, as a sticky CUDA error does."""
    artifacts = shutil.copytree(tiny_artifacts, tmp_path / "artifacts")
    for name in ("a", "b"):
        folder = artifacts / "engines" / name
        folder.mkdir(parents=True)
        loaded = EngineManifest.load(make_engines(artifacts, folder))
        change(folder, engines={x: loaded.engines[x] for x in STEPS})
    opened: list[TrtBackend] = []

    def break_it(backend: TrtBackend) -> None:
        opened.append(backend)
        if len(opened) > 1:
            return
        run = backend.run

        def last_run(graph: str, inputs: Any) -> Any:
            out = run(graph, inputs)
            for name in ("run", "upload", "download", "release", "close"):
                setattr(backend, name, broken)
            return out

        backend.run = last_run  # type: ignore[method-assign]

    report = check_breaking(artifacts, None, break_it)
    found = statuses(report)
    assert {check.name for check in report.failed} == {
        *(f"model a: {graph} runs" for graph in STEPS),
        "model a: first_step and encode_references give the same keys and values",
        "model a: cached_step on these keys and values repeats first_step",
        "model a: cached_step leaves the keys and values as they were",
        "model a: backend closes",
    }, report.to_text()
    assert found["model b: cached_step leaves the keys and values as they were"] == "passed"
    assert found["model b: backend closes"] == "passed"


@pytest.mark.parametrize("place", ["find_reference", "engine_sizes"])
def test_what_breaks_around_the_checks_is_noted(
    place: str, tiny_artifacts: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(engines, engines={x: EngineManifest.load(engines).engines[x] for x in STEPS})
    monkeypatch.setattr(runtime_selftest, place, broken)
    report = check_breaking(tiny_artifacts, engines, lambda backend: None)
    assert "RuntimeError: CUDA driver is gone" in report.failed[0].message
    assert statuses(report)["model: backend closes"] == "passed"
    if place == "find_reference":
        assert statuses(report)["model: first_step runs"] == "passed"


def test_a_machine_that_cannot_be_examined_is_noted(
    tiny_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "examine_machine", broken)
    monkeypatch.setattr(selftest, "_check_tiny", broken)
    opened: list[object] = []

    def refuse(*_: Any, **__: Any) -> Any:
        opened.append(1)
        raise BackendError("not here")

    report = run_selftest(tiny_artifacts, backend="onnxruntime", open_backend=refuse)
    assert [check.name for check in report.failed] == [
        "the machine is examined",
        "tiny: checks go on",
        "model: backend opens",
    ]
    assert opened


def test_a_changed_file_fails_and_tells_no_path(
    tiny_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_artifacts, tmp_path / "secret film" / "artifacts")
    with (folder / "vae/decoder.onnx").open("ab") as file:
        file.write(b"\0")
    out = tmp_path / "report.json"
    argv = ["selftest", str(folder), "--backend", "onnxruntime", "--no-tiny", "--out", str(out)]
    assert main(argv) == 1
    captured = capsys.readouterr()
    value = json.loads(out.read_text())
    assert value["failed"] == ["artifacts: manifest and digests"]
    assert "ARTIFACTS/vae/decoder.onnx is not the file" in value["checks"][0]["message"]
    assert "secret" not in out.read_text()
    assert "1 failed" in captured.out
    assert captured.out.rstrip().endswith(f"report: {out}")


def test_reference_artifacts_of_another_model(
    tiny_artifacts: Path, engines: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_artifacts, tmp_path / "other")
    value = json.loads((other / MANIFEST).read_text())
    value["config"]["transformer"]["rope_theta"] = 3000.0
    (other / MANIFEST).write_text(json.dumps(value))
    report = run_selftest(
        tiny_artifacts,
        backend="onnxruntime",
        reference_artifacts=other,
        threads=1,
        tiny=False,
    )
    assert failures(report) == {"model: reference artifacts"}
    assert "another model" in report.failed[0].message


def test_an_unknown_backend_is_an_error(tiny_artifacts: Path) -> None:
    with pytest.raises(RequestError, match="abacus"):
        run_selftest(tiny_artifacts, backend="abacus", tiny=False)


# --- the tiny model ---


def test_the_tiny_model_is_tested_beside_the_real_one(
    tiny_artifacts: Path, tiny_fp16_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"float32": tiny_artifacts, "float16": tiny_fp16_artifacts}

    def export(_scratch: Path, dtype: str, found: dict[str, Path]) -> dict[str, Any]:
        found |= {name: made[name] for name in ("float32", dtype)}
        return {}

    monkeypatch.setattr(selftest, "_export_tiny", export)
    report = run_selftest(tiny_fp16_artifacts, backend="onnxruntime", threads=1)
    assert report.ok, report.to_text()
    names = [check.name for check in report.checks]
    assert sum(name.startswith("tiny: ") and "against" in name for name in names) == 6
    assert "tiny, small: repeated edit equals the first" in names
    assert "model, small: repeated edit equals the first" in names


def test_without_the_exporter_the_tiny_model_is_left_out(
    tiny_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    report = run_selftest(tiny_artifacts, backend="onnxruntime", threads=1)
    assert report.ok
    (skipped,) = [check for check in report.checks if check.name == "tiny"]
    assert "klein-kv[export]" in skipped.message


def test_broken_artifacts_do_not_keep_the_tiny_model_from_being_tested(
    tmp_path: Path, tiny_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        selftest,
        "_export_tiny",
        lambda _scratch, _dtype, found: found.update(float32=tiny_artifacts),
    )
    report = run_selftest(tmp_path, backend="onnxruntime", threads=1)
    assert failures(report) == {"artifacts: manifest and digests"}
    assert {check.name: check.status for check in report.checks}["model"] == "skipped"
    assert len([check for check in report.checks if check.status == "passed"]) > 10


def test_the_tiny_model_is_exported(
    tmp_path: Path, tiny_vae_graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "vae_graph", tiny_vae_graph)
    made: dict[str, Path] = {}
    selftest._export_tiny(tmp_path, "float16", made)
    assert {name: Manifest.load(made[name]).dtype for name in made} == {
        "float32": "float32",
        "float16": "float16",
    }
    assert len({Manifest.load(path).config.transformer for path in made.values()}) == 1


def test_the_tiny_model_is_built_for_the_same_gpu(
    tmp_path: Path, tiny_bf16_artifacts: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real builder, which needs no GPU; of one graph, for time's sake."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(build, "chosen_graphs", lambda *_: ["encode_references"])
    artifacts = shutil.copytree(tiny_bf16_artifacts, tmp_path / "bf16")
    change(engines, module="tensorrt_rtx", sm=89)
    found: list[tuple[Path, EngineManifest]] = []
    selftest._build_tiny(artifacts, EngineManifest.load(engines), found)
    ((folder, built),) = found
    assert (built.sm, list(built.engines)) == (89, ["encode_references"])
    assert EngineManifest.load(folder) == built
