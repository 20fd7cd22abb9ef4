"""Fixtures that every test may use. What they return is shared: read it only."""

import functools
import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from tests.tolerances import MEASURED, TOLERANCES

if TYPE_CHECKING:
    from diffusers import Flux2KleinKVPipeline

    from klein_kv import KleinKVPipeline


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--measured", action="store_true", help="print the largest error of each tolerance entry"
    )
    parser.addoption("--kills", type=int, default=2, help="how often test_killed kills each verb")
    parser.addoption("--examples", type=int, default=20, help="damaged files of each kind")


def pytest_configure(config: pytest.Config) -> None:
    """Other examples in every run: hypothesis' own settings take the same ones where CI is set."""
    ours = settings(deadline=None, derandomize=False, database=None, print_blob=True)
    settings.register_profile("ours", ours)
    settings.register_profile("damaged", ours, max_examples=config.getoption("--examples"))
    settings.load_profile("ours")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.getoption("measured"):
        return
    terminalreporter.section("measured errors")
    for key, value in sorted(MEASURED.items()):
        graph, precision = key
        terminalreporter.write_line(
            f"{graph:32} {precision:10} {value:9.3g}  (allowed {TOLERANCES[key].bound:g}, "
            f"recorded {TOLERANCES[key].measured:g})"
        )


def pytest_collection_finish() -> None:
    """What is imported now stays: looking through it again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How often a verb is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are tiny: threads that wait for each other only suffer from what else runs."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder that a function fills, by name; one for all processes of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a process of several, each with its own folder
        root = root.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()  # fails if an attempt before failed
                make(folder)
                done.touch()
        return folder

    return get


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once: MadeOnce) -> Path:
    """A random checkpoint of size `tiny`, seed 0, float32."""
    from klein_kv.export.checkpoints.fixture import make_fixture

    return made_once("tiny", lambda folder: make_fixture(folder / "tiny", "tiny", seed=0)) / "tiny"


def _export(made_once: MadeOnce, checkpoint: Path, dtype: str, name: str = "tiny") -> Path:
    from klein_kv.export.exporter import export_checkpoint

    name = f"{name}-{dtype}"
    layers = {"text_layers": (1, 2, 3)} if name.startswith("short") else {}

    def make(folder: Path) -> None:
        export_checkpoint(checkpoint, folder / name, dtype=dtype, **layers)

    return made_once(name, make) / name


@pytest.fixture(scope="session")
def tiny_artifacts(made_once: MadeOnce, tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint, exported in float32."""
    return _export(made_once, tiny_checkpoint, "float32")


@pytest.fixture(scope="session")
def tiny_fp16_artifacts(made_once: MadeOnce, tiny_checkpoint: Path) -> Path:
    """The same in float16."""
    return _export(made_once, tiny_checkpoint, "float16")


@pytest.fixture(scope="session")
def tiny_bf16_artifacts(made_once: MadeOnce, tiny_checkpoint: Path) -> Path:
    """The same in bfloat16."""
    return _export(made_once, tiny_checkpoint, "bfloat16")


def _quantize(made_once: MadeOnce, artifacts: Path) -> Path:
    from klein_kv.artifacts.numbers import PRECISION_FORMATS
    from klein_kv.export.checks.samples import make_samples
    from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
    from klein_kv.export.quantization.quantize import quantize_artifacts

    def make(folder: Path) -> None:
        shutil.copytree(artifacts, folder / "artifacts")
        samples = make_samples(1, size=(128, 128))
        for name in PRECISION_FORMATS:
            recipe = QuantizationRecipe.load(name)
            quantize_artifacts(folder / "artifacts", recipe, samples, text_tokens=32)

    return made_once(f"quantized-{artifacts.name}", make) / "artifacts"


@pytest.fixture(scope="session")
def quantized_artifacts(made_once: MadeOnce, tiny_artifacts: Path) -> Path:
    """The tiny checkpoint in float32, and quantized in every way."""
    return _quantize(made_once, tiny_artifacts)


@pytest.fixture(scope="session")
def quantized_bf16_artifacts(made_once: MadeOnce, tiny_bf16_artifacts: Path) -> Path:
    """The tiny checkpoint in bfloat16, and quantized in every way."""
    return _quantize(made_once, tiny_bf16_artifacts)


@pytest.fixture(scope="session")
def short_artifacts(made_once: MadeOnce, tiny_checkpoint: Path) -> Path:
    """The same in float32 with 3 blocks of the text encoder instead of 27: made, run sooner."""
    return _export(made_once, tiny_checkpoint, "float32", "short")


@pytest.fixture(scope="session")
def short_bf16_artifacts(made_once: MadeOnce, tiny_checkpoint: Path) -> Path:
    """The same in bfloat16."""
    return _export(made_once, tiny_checkpoint, "bfloat16", "short")


@pytest.fixture(scope="session")
def quantized_short_artifacts(made_once: MadeOnce, short_bf16_artifacts: Path) -> Path:
    """The same, quantized in every way."""
    return _quantize(made_once, short_bf16_artifacts)


@pytest.fixture(scope="session")
def klein_export(made_once: MadeOnce) -> "KleinExport":
    """klein's real shapes in files with holes, exported in bfloat16."""
    from klein_kv.export import preview
    from klein_kv.export.checkpoints.fixture import make_fixture
    from klein_kv.export.exporter import export_checkpoint

    def make(folder: Path) -> None:
        checkpoint, artifacts = folder / "checkpoint", folder / "artifacts"
        make_fixture(checkpoint, "9b-shapes")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preview, "_PIXELS", 16)  # half of the time, for previews of zeros
            result = export_checkpoint(checkpoint, artifacts, allow_zeros=True)
        facts = {name: getattr(result, name) for name in ("dtype", "bytes_written", "nodes")}
        (folder / "result.json").write_text(json.dumps(facts))

    folder = made_once("klein-9b", make)
    facts = json.loads((folder / "result.json").read_text())
    return KleinExport(folder / "checkpoint", folder / "artifacts", **facts)


@pytest.fixture(scope="session")
def plain_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, saying that it is a distilled plain one."""
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def plain_artifacts(plain_checkpoint: Path) -> Path:
    """The plain checkpoint, exported in float32."""
    from klein_kv.export.exporter import export_checkpoint

    target = plain_checkpoint.with_name("artifacts")
    export_checkpoint(plain_checkpoint, target)
    return target


@pytest.fixture(scope="session", params=["onnxruntime", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that runs here; what asks for it is tested with each."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tiny_ours(tiny_artifacts: Path) -> "KleinKVPipeline":
    """Our pipeline on the tiny checkpoint, float32, ONNX Runtime."""
    return load_ours(tiny_artifacts)


@pytest.fixture(scope="session")
def any_ours(tiny_artifacts: Path, backend: str) -> "KleinKVPipeline":
    """The same with each backend."""
    return load_ours(tiny_artifacts, backend)


@pytest.fixture(scope="session")
def tiny_theirs(tiny_checkpoint: Path) -> "Flux2KleinKVPipeline":
    """diffusers' pipeline on the tiny checkpoint, float32."""
    from tests.checkpoints import load_diffusers

    return load_diffusers(tiny_checkpoint)


@dataclass(frozen=True, slots=True)
class KleinExport:
    """klein's real shapes in sparse files, and what `export_checkpoint` told of them."""

    checkpoint: Path
    artifacts: Path
    dtype: str
    bytes_written: int
    nodes: dict[str, int]


def load_ours(artifacts: Path, backend: str = "onnxruntime", **options: Any) -> "KleinKVPipeline":
    """Our pipeline, on one thread, without its progress bar, and computing everything anew."""
    from klein_kv import KleinKVPipeline

    usual = {"threads": 1, "reference_cache_bytes": 0, "prompt_cache_bytes": 0}
    pipeline = KleinKVPipeline.from_pretrained(
        artifacts, backend=backend, device="cpu", **usual | options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def saved_models(
    made_once: MadeOnce,
) -> Callable[[str], tuple[Path, Path, "Flux2KleinKVPipeline"]]:
    """Checkpoint, artifacts and diffusers' pipeline of `tests.checkpoints.MODELS`, by name."""
    from klein_kv.export.exporter import export_checkpoint
    from tests.checkpoints import MODELS, load_diffusers, save_checkpoint

    @functools.cache
    def get(name: str) -> tuple[Path, Path, "Flux2KleinKVPipeline"]:
        architecture = MODELS[name]

        def make(folder: Path) -> None:
            save_checkpoint(folder / "checkpoint", architecture, seed=sorted(MODELS).index(name))
            export_checkpoint(
                folder / "checkpoint", folder / "artifacts", text_layers=architecture.text_layers
            )

        folder = made_once(f"model-{name}", make)
        return folder / "checkpoint", folder / "artifacts", load_diffusers(folder / "checkpoint")

    return get


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """Makes a smooth random picture: `picture(width, height, seed)`."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        coarse: Any = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make
