"""The pipeline over engines, as a GPU would see it: what replays, what waits, what is allocated.

The stand-ins are as strict as TensorRT-RTX and CUDA (`fake_trt`, `fake_cuda`); no GPU is needed.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from klein_kv import KleinKVInpaintPipeline, KleinKVPipeline
from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import GraphSet
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.backends.trt import engine
from klein_kv.runtime.backends.trt.backend import TrtBackend
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import make_engines
from tests.runtime.backends.fake_trt import FakeTrt

STEPS = ("first_step", "cached_step", "encode_references")
REQUEST = {
    "prompt": "a kite",
    "height": 128,
    "width": 160,
    "seed": 3,
    "output_type": "np",
    "max_sequence_length": 64,
}
Shape = tuple[int, ...]


class Machine:
    """A pipeline on a GPU of its own."""

    def __init__(
        self,
        artifacts: Path,
        engines: Path,
        cuda: FakeCuda | None = None,
        device: int = 0,
        graphs: GraphSet | None = None,
        scratch: Callable[..., int] | None = None,
        **options: Any,
    ) -> None:
        self.cuda = cuda or FakeCuda()
        self.trt = FakeTrt(artifacts, self.cuda, graphs=graphs, scratch=scratch)
        manifest = Manifest.load(artifacts)
        self.backend = TrtBackend(
            artifacts,
            manifest,
            engines=engines,
            cuda=self.cuda.cuda,
            trt=self.trt,
            graphs=graphs,
            device=device,
        )
        self.pipe = KleinKVPipeline(artifacts, manifest, self.backend, **options)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, image: Any = None, **changes: Any) -> np.ndarray:
        out = self.pipe(**(REQUEST | {"image": image} | changes))  # type: ignore[arg-type]
        return np.asarray(out.images)  # type: ignore[union-attr]

    def quiet(self, image: Any = None, **changes: Any) -> tuple[np.ndarray, dict[str, int]]:
        """An image, and what was waited for and allocated from the first engine call until then."""
        marks: list[tuple[int, int]] = []
        run, download = self.backend.run, self.backend.download

        def watch(call: Callable[..., Any], most: int) -> Callable[..., Any]:
            def watched(*args: Any) -> Any:
                if len(marks) < most:
                    marks.append((self.cuda.waits, self.cuda.allocations))
                return call(*args)

            return watched

        with self.trt.counting() as counts, pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.backend, "run", watch(run, 1))
            patch.setattr(self.backend, "download", watch(download, 2))
            made = self(image, **changes)
        (waits, allocations), (last_waits, last_allocations) = marks
        counts |= {"waits": last_waits - waits, "allocations": last_allocations - allocations}
        return made, counts


def sizes_of(references: list[Shape], height: int = 128, width: int = 160) -> dict[str, dict]:
    """Sizes of all symbols of the tiny model, for engines of one shape."""
    rows, columns = height // 16, width // 16
    common = {"batch": 1, "text_tokens": 64, "image_tokens": rows * columns}
    common |= {"grid_height": rows, "grid_width": columns, "height": height, "width": width}
    common["ref_tokens"] = sum((h // 16) * (w // 16) for h, w in references)
    sizes = dict.fromkeys(("text_encoder", "vae_decoder", *STEPS), common)
    reference = dict(zip(("height", "width"), (*references, (128, 128))[0], strict=True))
    return sizes | {"vae_encoder": common | reference}


@pytest.fixture(scope="module")
def engines(tiny_artifacts, tmp_path_factory):
    """For any shape."""
    return make_engines(tiny_artifacts, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)) for _ in range(12)]


@pytest.fixture(scope="module")
def expected(tiny_ours):
    """ONNX Runtime's image."""

    def make(image: Any = None, **changes: Any) -> np.ndarray:
        out = tiny_ours(**(REQUEST | {"image": image} | changes))  # type: ignore[arg-type]
        return np.asarray(out.images)  # type: ignore[union-attr]

    return make


# --- replays ---


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_step_after_the_first_request_is_a_replay(
    count, tiny_artifacts, tmp_path, pictures, expected
):
    """Engines of one shape. Regression: buffers rotated, so that every step captured anew."""
    folder = make_engines(tiny_artifacts, tmp_path, sizes=sizes_of([(96, 128)] * count))
    machine = Machine(tiny_artifacts, folder)
    sets = [pictures[i : i + count] or None for i in range(0, 8, 2)]
    machine(sets[0])
    for i, image in enumerate([sets[0], *sets, sets[1], sets[3], sets[0]]):
        prompt = f"a kite {i // 2}"
        made, counts = machine.quiet(image, prompt=prompt, seed=i)
        np.testing.assert_allclose(made, expected(image, prompt=prompt, seed=i), atol=1e-5)
        assert counts["captures"] == counts["compilations"] == counts["loads"] == 0
        assert counts["waits"] == counts["allocations"] == 0
        assert counts["replays"] >= 5
    assert set(machine.trt.captures.values()) == {1}


def test_shapes_in_turn_do_not_disturb_each_other(tiny_artifacts, engines, pictures, expected):
    """Engines for any shape: kernels are compiled at the first run and captured at the second.

    The larger shapes need more scratch, which must grow without moving.
    """

    def scratch(graph: str, shapes: Mapping[str, Shape]) -> int:
        return 256 * sum(int(np.prod(shape)) for shape in shapes.values())

    machine = Machine(tiny_artifacts, engines, scratch=scratch)
    requests: list[tuple[Any, dict[str, int]]] = [
        (pictures[:1], {"height": 128, "width": 128}),
        (pictures[:3], {"height": 192, "width": 128}),
        (None, {"height": 256, "width": 256}),
        (pictures[2:4], {"height": 128, "width": 128}),
    ]
    images = [machine(image, **size) for image, size in requests]
    for image, size in requests:  # the second run of the first step, and of the encoders
        machine(image, prompt="b", **size)
        machine.pipe.reference_store.clear()
        machine(image, prompt="c", **size)
    before = machine.trt.captures.total()
    for i in range(8):
        image, size = requests[i % 4]
        made, counts = machine.quiet(image, **size)
        np.testing.assert_array_equal(made, images[i % 4])
        np.testing.assert_allclose(made, expected(image, **size), atol=1e-5)
        assert (counts["captures"], counts["waits"], counts["allocations"]) == (0, 0, 0)
    assert machine.trt.captures.total() == before
    assert max(machine.trt.captures.values()) == 1


def test_warming_up_compiles_for_the_shape_at_once(tiny_artifacts, engines, pictures):
    machine = Machine(tiny_artifacts, engines)
    machine.pipe.warm_up(128, 160, [(96, 128)] * 2, max_sequence_length=64)
    _, counts = machine.quiet(pictures[:2])
    assert counts["captures"] == counts["compilations"] == counts["loads"] == 0
    assert counts["replays"] == 8  # text, two references, four steps, and the image
    assert counts["waits"] == counts["allocations"] == 0


def test_an_edit_inside_a_mask_stays_on_the_device(tiny_artifacts, engines, pictures, tiny_ours):
    """Steps and what mixes them replay in turn; another mask waits for nothing either."""
    machine = Machine(tiny_artifacts, engines)
    machine.pipe = KleinKVInpaintPipeline.from_pipe(machine.pipe)
    theirs = KleinKVInpaintPipeline.from_pipe(tiny_ours)
    whole = {"height": None, "width": None, "strength": 0.75}
    machine.pipe.warm_up(96, 128, max_sequence_length=64)
    for i, split in enumerate((40, 70)):
        mask = Image.new("L", (128, 96))
        mask.paste(255, (split, 0, 128, 96))
        request = whole | {"mask_image": mask, "prompt": f"a kite {i}"}
        made, counts = machine.quiet(pictures[0], **request)
        expected = theirs(**(REQUEST | request | {"image": pictures[0]})).images
        np.testing.assert_allclose(made, expected, atol=1e-5)
        assert counts["captures"] == counts["compilations"] == counts["loads"] == 0
        assert counts["replays"] == 10, "text, the image, three steps, four mixtures, pixels"
        assert counts["waits"] == counts["allocations"] == 0


def test_engines_of_an_earlier_build_are_named(tiny_artifacts, tmp_path, pictures):
    machine = Machine(tiny_artifacts, make_engines(tiny_artifacts, tmp_path, sizes=sizes_of([])))
    pipe = KleinKVInpaintPipeline.from_pipe(machine.pipe)
    with pytest.raises(ArtifactError, match=r"no engine of blend, only of .*klein-kv build"):
        pipe("a kite", image=pictures[0], strength=0.5)


def test_batches_and_repeated_prompts_stay_on_the_device(
    tiny_artifacts, engines, pictures, expected
):
    """Regression: text and tokens went to the host and back to be repeated or put together."""
    machine = Machine(tiny_artifacts, engines)
    request: dict[str, Any] = {"prompt": ["a kite", "snow"], "num_images_per_prompt": 2}
    machine(pictures[:2], **request)
    copies = len(machine.cuda.copies)
    made, counts = machine.quiet(pictures[2:4], **(request | {"prompt": ["sun", "rain"]}))
    to_host = [nbytes for kind, nbytes in machine.cuda.copies[copies:] if kind == 2]
    assert counts["waits"] == 0
    # The images as floats, and the text for its cache, both when all is done.
    assert to_host == [4 * made.size, 4 * 2 * 64 * 3 * 32]
    expect = expected(pictures[2:4], **(request | {"prompt": ["sun", "rain"]}))
    np.testing.assert_allclose(made, expect, atol=1e-5)


def test_a_callback_may_use_the_pipeline(tiny_artifacts, engines, pictures, expected):
    """Engines write to the same buffers at every run: what the outer call needs must be kept."""
    machine = Machine(tiny_artifacts, engines)

    def other(pipe: KleinKVPipeline, step: int, *_: Any) -> dict[str, Any]:
        pipe.encode_prompt("another")
        pipe("another", image=pictures[step], **{k: REQUEST[k] for k in ("height", "width")})
        return {}

    made = machine(pictures[4:6], callback_on_step_end=other)
    np.testing.assert_allclose(made, expected(pictures[4:6]), atol=1e-5)


def test_what_a_step_foresees_comes_from_engines_too(tiny_artifacts, engines, pictures, expected):
    seen: list[np.ndarray] = []
    request = {
        "callback_on_step_end": lambda _pipe, _i, _t, tensors: seen.append(tensors["denoised"]),
        "callback_on_step_end_tensor_inputs": ["denoised"],
    }
    Machine(tiny_artifacts, engines)(pictures[6:7], **request)
    expected(pictures[6:7], **request)
    assert len(seen) == 8
    np.testing.assert_allclose(seen[: len(seen) // 2], seen[len(seen) // 2 :], atol=1e-4)


def test_an_engine_that_cannot_be_captured_is_told(tiny_artifacts, engines, caplog):
    machine = Machine(tiny_artifacts, engines)
    machine.trt.capturable = False
    machine()
    assert "cached_step: TensorRT cannot capture this engine" in caplog.text


# --- the next process ---

PROCESS = """
import sys
from pathlib import Path
from tests.runtime.backends.test_trt_loop import Machine
artifacts, engines, ending = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
machine = Machine(artifacts, engines)
if ending == "with":
    with machine.pipe:
        machine()
else:
    machine()
    if ending == "close":
        machine.pipe.close()
print("compiled", machine.trt.compilations)
"""


@pytest.mark.parametrize("ending", ["close", "with", "end"])
def test_a_second_process_finds_the_compiled_kernels(ending, tiny_artifacts, tmp_path):
    """Regression: kernels were saved by `close`, which nothing called."""
    make_engines(tiny_artifacts, tmp_path)

    def process() -> str:
        command = [sys.executable, "-c", PROCESS, str(tiny_artifacts), str(tmp_path), ending]
        root = Path(__file__).resolve().parents[3]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        return done.stdout.strip()

    assert process() == "compiled 3"
    assert process() == "compiled 0"
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_kernels_are_saved_after_the_first_run(tiny_artifacts, tmp_path):
    """A process that is killed later loses nothing."""
    machine = Machine(tiny_artifacts, make_engines(tiny_artifacts, tmp_path))
    machine()
    again = Machine(tiny_artifacts, tmp_path)
    again()
    assert again.trt.compilations == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.runtime.cache")}
    again()
    again.pipe.close()
    assert {path: path.stat().st_mtime_ns for path in written} == written, "written again"


def test_kernels_that_cannot_be_saved_are_told_once(tiny_artifacts, tmp_path, caplog, monkeypatch):
    machine = Machine(tiny_artifacts, make_engines(tiny_artifacts, tmp_path))

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(engine, "write_atomic", refuse)
    machine()
    machine()
    assert caplog.text.count("cached_step.runtime.cache (Read-only file system)") == 1


def test_a_closed_pipeline_says_so(tiny_artifacts, engines):
    with (machine := Machine(tiny_artifacts, engines)).pipe:
        machine()
    assert machine.cuda.used == 0
    with pytest.raises(RequestError, match="this pipeline is closed"):
        machine()


# --- threads and devices ---


@pytest.fixture
def two_devices(tiny_artifacts, engines):
    cuda = FakeCuda(devices=2)
    machines = [Machine(tiny_artifacts, engines, cuda, device=i) for i in range(2)]
    yield machines
    for machine in machines:
        machine.pipe.close()
    assert cuda.used == 0


def test_two_pipelines_on_two_devices_keep_to_their_own_memory(two_devices, pictures, expected):
    """Regression: the device was set once, in the thread that opened the backend."""
    cuda = two_devices[0].cuda
    made: dict[int, list[np.ndarray]] = {0: [], 1: []}
    touched: dict[int, set[int]] = {}

    def work(i: int) -> None:
        for turn in range(3):
            made[i].append(two_devices[i](pictures[turn : turn + 2], seed=i))
        touched[i] = cuda.touched[threading.get_ident()]
        assert cuda.device == 0, "the thread's own device is left as it was"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert touched == {0: {0}, 1: {1}}
    assert min(cuda.used_of(0), cuda.used_of(1)) > 1_000_000
    for i, images in made.items():
        for turn, image in enumerate(images):
            want = expected(pictures[turn : turn + 2], seed=i)
            np.testing.assert_allclose(image, want, atol=1e-5)


def test_threads_of_one_pipeline_wait_for_each_other(tiny_artifacts, engines, pictures, expected):
    machine = Machine(tiny_artifacts, engines)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: machine(pictures[i : i + 1], seed=i), range(4)))
    for i, image in enumerate(made):
        np.testing.assert_allclose(image, expected(pictures[i : i + 1], seed=i), atol=1e-5)
