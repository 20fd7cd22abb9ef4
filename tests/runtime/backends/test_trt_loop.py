"""The pipeline over engines, as a GPU would see it: what replays, what waits, what is allocated.

The stand-ins are as strict as TensorRT-RTX and CUDA (`fake_trt`, `fake_cuda`); no GPU is needed.
"""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from klein_kv import KleinKVInpaintPipeline
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.runtime.backends.trt import engine
from tests.runtime.backends.fake_cuda import FakeCuda
from tests.runtime.backends.fake_engines import REQUEST, Machine, make_engines

NOTHING_NEW = {"captures": 0, "compilations": 0, "loads": 0, "waits": 0, "allocations": 0}


def sizes_of(count):
    """Sizes of all symbols of the tiny model for `REQUEST` with references of 96x128 pixels."""
    grid = {"grid_height": 8, "grid_width": 10, "image_tokens": 80, "ref_tokens": count * 6 * 8}
    common = {"batch": 1, "text_tokens": 64, "height": 128, "width": 160} | grid
    graphs = ("text_encoder", "vae_decoder", "first_step", "cached_step", "encode_references")
    return dict.fromkeys(graphs, common) | {"vae_encoder": common | {"height": 96, "width": 128}}


def assert_replays(counts, least):
    """Nothing was waited for, taken or made anew."""
    assert counts == NOTHING_NEW | {"replays": counts["replays"]}
    assert counts["replays"] >= least


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

    def make(image=None, **changes):
        return tiny_ours(**(REQUEST | {"image": image} | changes)).images

    return make


# --- replays ---


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_step_after_the_first_request_is_a_replay(
    count, tiny_artifacts, tmp_path, pictures, expected
):
    """Engines of one shape. Regression: buffers rotated, so that every step captured anew."""
    folder = make_engines(tiny_artifacts, tmp_path, sizes=sizes_of(count))
    machine = Machine(tiny_artifacts, folder)
    one, two, three = (pictures[i : i + count] or None for i in range(0, 6, 2))
    machine(one)
    for i, image in enumerate((one, two, three, two, one)):
        request = {"image": image, "prompt": f"a kite {i // 2}", "seed": i}
        made, counts = machine.quiet(**request)
        np.testing.assert_allclose(made, expected(**request), atol=1e-5)
        assert_replays(counts, least=5)
    assert set(machine.trt.captures.values()) == {1}


def test_shapes_in_turn_do_not_disturb_each_other(tiny_artifacts, engines, pictures, expected):
    """Engines for any shape: kernels are compiled at the first run and captured at the second.

    The larger shapes need more scratch, which must grow without moving.
    """

    def scratch(graph, shapes):
        return 256 * sum(int(np.prod(shape)) for shape in shapes.values())

    machine = Machine(tiny_artifacts, engines, scratch=scratch)
    requests = [
        {"image": pictures[:1], "height": 128, "width": 128},
        {"image": pictures[:3], "height": 192, "width": 128},
        {"image": None, "height": 256, "width": 256},
        {"image": [pictures[2], pictures[3].resize((96, 144))], "height": 128, "width": 128},
    ]
    images = [machine(**request) for request in requests]
    for request, image in zip(requests, images, strict=True):
        np.testing.assert_allclose(image, expected(**request), atol=1e-5)
    for request in requests:  # the second run of the first step, and of the encoders
        machine(**request, prompt="b")
        machine.pipe.reference_store.clear()
        machine(**request, prompt="c")
    for request, image in 2 * list(zip(requests, images, strict=True)):
        made, counts = machine.quiet(**request)
        np.testing.assert_array_equal(made, image)
        assert_replays(counts, least=5)
    assert max(machine.trt.captures.values()) == 1


def test_warming_up_compiles_for_the_shape_at_once(tiny_artifacts, engines, pictures):
    machine = Machine(tiny_artifacts, engines)
    machine.pipe.warm_up(128, 160, [(96, 128)] * 2, max_sequence_length=64)
    _, counts = machine.quiet(pictures[:2])
    assert_replays(counts, least=8)  # text, two references, four steps, and the image


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
        assert_replays(counts, least=10)  # text, the image, three steps, four mixtures, pixels


def test_engines_that_were_not_built_are_named_when_they_are_asked_for(
    tiny_artifacts, tmp_path, pictures, expected
):
    """Regression: the default budget for references asked for all of them."""
    folder = make_engines(tiny_artifacts, tmp_path / "old", sizes=sizes_of(0))
    pipe = KleinKVInpaintPipeline.from_pipe(Machine(tiny_artifacts, folder).pipe)
    with pytest.raises(ArtifactError, match=r"no engine of blend, only of .*klein-kv build"):
        pipe("a kite", image=pictures[0], strength=0.5)

    few = {graph: sizes_of(0)[graph] for graph in ("text_encoder", "cached_step", "vae_decoder")}
    machine = Machine(tiny_artifacts, make_engines(tiny_artifacts, tmp_path / "few", sizes=few))
    np.testing.assert_allclose(machine(), expected(), atol=1e-5)
    with pytest.raises(ArtifactError, match=r"no engine of first_step, only of .*klein-kv build"):
        machine(pictures[:1])


def test_batches_and_repeated_prompts_stay_on_the_device(
    tiny_artifacts, engines, pictures, expected
):
    """Regression: text and tokens went to the host and back to be repeated or put together."""
    machine = Machine(tiny_artifacts, engines)
    machine(pictures[:2], prompt=["a kite", "snow"], num_images_per_prompt=2)
    copies = len(machine.cuda.copies)
    request = {"image": pictures[2:4], "prompt": ["sun", "rain"], "num_images_per_prompt": 2}
    made, counts = machine.quiet(**request)
    to_host = [nbytes for kind, nbytes in machine.cuda.copies[copies:] if kind == 2]
    assert counts["waits"] == 0
    # The images as floats, and the text for its cache, both when all is done.
    assert to_host == [4 * made.size, 4 * 2 * 64 * 3 * 32]
    np.testing.assert_allclose(made, expected(**request), atol=1e-5)


def test_a_callback_may_use_the_pipeline(tiny_artifacts, engines, pictures, expected):
    """Engines write to the same buffers at every run: what the outer call needs must be kept."""
    machine = Machine(tiny_artifacts, engines)

    def other(pipe, step, *_):
        pipe.encode_prompt("another")
        pipe("another", image=pictures[step], **{k: REQUEST[k] for k in ("height", "width")})
        return {}

    made = machine(pictures[4:6], callback_on_step_end=other)
    np.testing.assert_allclose(made, expected(pictures[4:6]), atol=1e-5)


def test_what_a_step_foresees_comes_from_engines_too(tiny_artifacts, engines, pictures, expected):
    seen = []
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
from tests.runtime.backends.fake_engines import Machine
machine = Machine(Path(sys.argv[1]), Path(sys.argv[2]))
machine()
print("compiled", machine.trt.compilations)
"""


def test_compiled_kernels_are_kept(tiny_artifacts, tmp_path):
    """Regression: kernels were saved by `close`, which nothing called."""
    make_engines(tiny_artifacts, tmp_path)
    command = [sys.executable, "-c", PROCESS, str(tiny_artifacts), str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "compiled 3"
    again = Machine(tiny_artifacts, tmp_path)
    again()
    assert again.trt.compilations == 0
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_kernels_are_saved_after_the_first_run(tiny_artifacts, tmp_path):
    """A process that is killed later loses nothing."""
    Machine(tiny_artifacts, make_engines(tiny_artifacts, tmp_path))()
    again = Machine(tiny_artifacts, tmp_path)
    again()
    assert again.trt.compilations == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.runtime.cache")}
    again()
    again.pipe.close()
    assert {path: path.stat().st_mtime_ns for path in written} == written, "written again"


def test_kernels_that_cannot_be_saved_are_told_once(tiny_artifacts, tmp_path, caplog, monkeypatch):
    machine = Machine(tiny_artifacts, make_engines(tiny_artifacts, tmp_path))

    def refuse(*_):
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
    made, touched = {0: [], 1: []}, {}

    def work(i):
        for turn in range(2):
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
