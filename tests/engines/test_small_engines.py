"""Small graphs to engines at klein's own shapes: what their kernel plans are. No GPU is needed."""

from pathlib import Path

import pytest

from klein_kv.artifacts.engines.targets import find_target
from klein_kv.artifacts.engines.trt_module import load_module
from klein_kv.artifacts.signature import make_signature
from klein_kv.engines.builder import build_engine
from klein_kv.engines.plan.kernel_plan import ITEM_BITS, KernelPlan
from klein_kv.engines.rewrite.graph_rewrite import read_graph
from klein_kv.engines.sizes.profiles import engine_profiles
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.export.graphs.graph_files import save_graph
from klein_kv.export.graphs.small_graphs import small_graph
from klein_kv.networks.merge import MOST_ROWS
from tests.klein_configs import KLEIN_9B

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install 'klein-kv[rtx]'")


def test_blend_is_one_kernel(tmp_path: Path) -> None:
    """It reads latents, image, noise and mask once, and writes latents."""
    save_graph(small_graph("blend", KLEIN_9B, "bfloat16"), tmp_path / "blend.onnx")
    signature = make_signature("blend", KLEIN_9B, "bfloat16")
    profiles = engine_profiles(signature, Recipe.load("default"), KLEIN_9B)
    source = read_graph(tmp_path / "blend.onnx", signature, shared=True)
    module = load_module("tensorrt_rtx")
    built = build_engine(module, "blend", source, profiles, find_target("rtx5090"))
    assert set(built.scratch_bytes) == {0}
    plan = KernelPlan.from_lines("blend", "", built.layers[0], 0, ())
    (kernel,) = plan.kernels
    assert sorted(x.name for x in kernel.inputs) == sorted(x.name for x in signature.inputs)
    assert [x.name for x in kernel.outputs] == ["latents"]


@pytest.mark.parametrize(
    ("graph", "target", "traffic"),
    [
        ("merge_lora", "rtx5090", 24),
        ("merge_lora", "sm86", 24),
        ("merge_lora_fp8", "rtx4090", 27),
    ],
)
def test_merge_is_one_float32_product_and_few_passes(
    graph: str, target: str, traffic: int, tmp_path: Path
) -> None:
    """`traffic`: bytes that kernels read and write for one number of the weight."""
    save_graph(small_graph(graph, KLEIN_9B, "bfloat16"), tmp_path / "merge.onnx")
    signature = make_signature(graph, KLEIN_9B, "bfloat16")
    profiles = engine_profiles(signature, Recipe.load("default"), KLEIN_9B)
    (limits,) = (profile.shapes["weight"] for profile in profiles)
    assert limits == ((1, 128), (MOST_ROWS, 4096), (MOST_ROWS, 16384))
    source = read_graph(tmp_path / "merge.onnx", signature, shared=True)
    built = build_engine(load_module("tensorrt_rtx"), graph, source, profiles, find_target(target))
    assert [spec.name for spec in built.inputs] == [spec.name for spec in signature.inputs]
    assert {spec.name: spec.dtype for spec in built.outputs} == {
        spec.name: spec.dtype for spec in signature.outputs
    }
    assert built.scratch_bytes[0] < 200e6, "beside what the steps need anyway"
    plan = KernelPlan.from_lines(graph, "", built.layers[0], built.scratch_bytes[0], ())
    factors, passes = {"up", "down"}, 0
    for kernel in plan.kernels:
        operands = [x for x in (*kernel.inputs, *kernel.outputs) if x.dims == (-1, -1)]
        if kernel.inputs and kernel.inputs[0].name in factors:  # pads them
            factors.add(kernel.outputs[0].name)
            continue
        product = factors & {x.name for x in operands}
        assert not product or {x.dtype for x in operands} == {"Float"}
        passes += sum(ITEM_BITS[x.dtype] // 8 for x in operands if x.name not in factors)
    assert passes == traffic
