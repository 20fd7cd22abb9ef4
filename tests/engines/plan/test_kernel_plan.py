"""The parser and the price, on lines that TensorRT-RTX 1.7.1 wrote for one single block of the 9B.

`single_block_lines.txt`: `cached_step`, bf16, 1024x1024 (4,096 tokens), 512 text tokens, four
references (16,384 tokens), SM120, weights as inputs; then a kernel of several blocks' RoPE tables.
"""

import json
import math
from pathlib import Path

import pytest

from klein_kv.artifacts.engines.targets import GPUS
from klein_kv.engines.plan.applied import check_applied, product_format
from klein_kv.engines.plan.kernel_plan import Kernel, KernelPlan, Operand, parse_line
from klein_kv.engines.plan.kernel_price import (
    blends_modulation,
    copies_weight,
    moves_block_scales,
    price_kernel,
    price_plan,
)
from klein_kv.engines.rewrite.graph_quantization import QuantizedNodes
from klein_kv.errors import ArtifactError, BuildError

LINES = (Path(__file__).parent / "single_block_lines.txt").read_text().splitlines()
GPU = GPUS["rtx5090"]
BLOCK = "single_transformer_blocks.5"
TO_OUT = f"{BLOCK}.attn.to_out.weight"


def _plan(lines: list[str] = LINES, scratch: int = 0) -> KernelPlan:
    weights = (
        TO_OUT,
        f"{BLOCK}.attn.to_qkv_mlp_proj.weight[0:4096]",
        f"{BLOCK}.attn.norm_q.weight",
    )
    return KernelPlan.from_lines("cached_step", "test", lines, scratch, weights)


def _find(operation: str) -> Kernel:
    return next(kernel for kernel in _plan().kernels if operation in kernel.name)


def _operand(name: str, *dims: int, dtype: str = "BFloat16") -> Operand:
    return Operand(name, dims, (1,) * len(dims), dtype)


def _kernel(
    name: str,
    inputs: list[Operand],
    outputs: list[Operand],
    kind: str = "kgen",
    layers: tuple[str, ...] = (),
    constants: list[Operand] | None = None,
) -> Kernel:
    return Kernel(name, kind, tuple(inputs), tuple(constants or ()), tuple(outputs), layers, 0)


def test_a_line_of_a_gemm() -> None:
    gemm = next(kernel for kernel in _plan().kernels if kernel.kind == "gemm")
    x, weight = gemm.inputs
    assert x.dims == (4608, 4096)
    assert weight.name.startswith(f"{BLOCK}.attn.to_qkv_mlp_proj.weight[")
    assert (weight.dims, weight.strides) == ((4096, 4096), (1, 4096)), "as stored, not transposed"
    assert gemm.outputs[0].dims == (4608, 4096)
    assert {operand.dtype for operand in gemm.constants} == {"Float"}
    assert gemm.onnx_layers[0].startswith(f"{BLOCK}/Gemm_")


def test_events_are_no_kernels() -> None:
    event = (
        "Name: __mye1310_myl0_3, LayerType: wait, Inputs: [], Constants: [], Outputs: [], "
        "TacticName: , StreamId: 1, EventId: 1, Metadata: "
    )
    assert parse_line(event).stream == 1
    assert len(_plan([*LINES, event]).kernels) == len(LINES)


def test_lines_of_another_form_are_refused() -> None:
    with pytest.raises(BuildError, match="cannot read the builder's kernel plan"):
        _plan(["Layer 0: gemm"])


def test_price_of_a_gemm_by_hand() -> None:
    gemm = next(kernel for kernel in _plan().kernels if kernel.kind == "gemm")
    cost = price_kernel(gemm, GPU)
    assert cost.flops == 2 * 4608 * 4096 * 4096
    assert cost.bytes == 2 * (4608 * 4096 + 4096 * 4096 + 4608 * 4096) + 8  # alpha, beta
    assert cost.seconds == pytest.approx(154_618_822_656 / 209.5e12)
    assert cost.seconds == cost.ideal_seconds


def test_price_of_fused_products_by_hand() -> None:
    up = price_kernel(_find("FcSiluMul"), GPU)
    assert up.flops == 2 * 4608 * 4096 * 12288
    out = price_kernel(_find("FcMulAdd"), GPU)
    assert out.flops == 2 * 4608 * 16384 * 4096


def test_price_of_attention_by_hand() -> None:
    kernel = _find("gemm_mha")
    assert kernel.is_attention
    cost = price_kernel(kernel, GPU)
    assert cost.flops == 4 * 32 * 4608 * 20992 * 128  # scores and values, 32 heads of 128
    assert cost.seconds == pytest.approx(cost.flops / 209.5e12)


def test_price_of_a_concatenation_by_hand() -> None:
    cost = price_kernel(_find("ConcTranReshMove_myl0_305"), GPU)
    assert cost.flops == 0
    assert cost.bytes == 2 * 2 * 20992 * 4096  # every element read once and written once, 2 bytes
    assert cost.seconds == pytest.approx(343_932_928 / 1792e9)


def test_price_of_a_convolution_by_hand() -> None:
    kernel = _kernel(
        "node_conv2d_3_myl0_9",
        [_operand("x", 1, 32, 128, 64)],
        [_operand("y", 1, 512, 128, 64)],
        "correlation",
        constants=[_operand("w", 512, 32, 3, 3), _operand("b", 1, 512, 1, 1)],
    )
    assert price_kernel(kernel, GPU).flops == 2 * 512 * 128 * 64 * 32 * 9


def test_a_slice_counts_what_is_read_of_it() -> None:
    fused = _operand("qkv_mlp", 4608, 36864)
    out = _operand("q", 4608, 4096)
    half = price_kernel(_kernel("__myl_Slic_myl0_3", [fused], [out]), GPU)
    assert half.bytes == 2 * 2 * 4608 * 4096
    # silu(gate) * up beside the attention output: two slices of 12288, one operand of 4096.
    both = _kernel(
        "__myl_SlicSlicSiluMulTranReshConc_myl0_19",
        [fused, fused, _operand("attention", 1, 32, 4608, 128)],
        [_operand("hidden", 4608, 16384)],
    )
    assert price_kernel(both, GPU).bytes == 2 * 4608 * (2 * 12288 + 4096 + 16384)
    # Without a slice in its name a kernel reads all.
    whole = _kernel("__myl_Mean_myl0_3", [fused], [_operand("m", 4608, 1)])
    assert price_kernel(whole, GPU).bytes == 2 * 4608 * (36864 + 1)


def test_narrow_types_have_their_own_peak() -> None:
    operands = [_operand("x", 512, 4096, dtype="FP8"), _operand("w", 4096, 4096, dtype="FP8")]
    gemm = _kernel("g_myl0_1", operands, [_operand("y", 512, 4096)], "gemm")
    assert price_kernel(gemm, GPU).ideal_seconds == 2 * 512 * 4096 * 4096 / 419e12
    with pytest.raises(BuildError, match="no throughput of GeForce RTX 3090 for fp8"):
        price_kernel(gemm, GPUS["rtx3090"])


def _nvfp4_gemm(weight: str = "FP4E2M1", layers: tuple[str, ...] = ()) -> Kernel:
    """As TensorRT-RTX 1.7.1 names the operands: numbers, then block scales in tiles."""
    return _kernel(
        "single_transformer_blocks.5/Gemm_1954_U2199_myl0_739",
        [
            _operand("x", 4608, 16384, dtype="FP4E2M1"),
            _operand(TO_OUT, 16384, 4096, dtype=weight),
            _operand("x_scales", 36, 4, 32, 256, 4, dtype="FP8"),
            _operand("w_scales", 256, 4, 32, 4, 32, dtype="FP8"),
        ],
        [_operand("y", 4608, 4096)],
        "gemm",
        layers,
    )


def test_price_of_an_nvfp4_product_by_hand() -> None:
    cost = price_kernel(_nvfp4_gemm(), GPU)
    assert cost.flops == 2 * 4608 * 16384 * 4096
    assert cost.ideal_seconds == cost.flops / 1676e12
    numbers = (4608 + 4096) * 16384
    assert cost.bytes == numbers // 2 + numbers // 16 + 2 * 4608 * 4096


def test_price_of_attention_in_float8_by_hand() -> None:
    shapes = [(32, 4608, 128), (32, 128, 20992), (32, 20992, 128)]
    operands = [_operand(name, *s, dtype="FP8") for name, s in zip("qkv", shapes, strict=True)]
    kernel = _kernel("_gemm_mha_v2_myl0_45", operands, [_operand("o", 32, 4608, 128)])
    assert price_kernel(kernel, GPU).ideal_seconds == 4 * 32 * 4608 * 20992 * 128 / 419e12
    assert product_format(kernel) == "fp8"


def test_native_products_are_told_from_others() -> None:
    assert product_format(_nvfp4_gemm()) == "nvfp4"
    assert product_format(_nvfp4_gemm("BFloat16")) is None  # dequantized before it
    fp8 = [_operand("x", 512, 4096, dtype="FP8"), _operand("w", 4096, 4096, dtype="FP8")]
    out = [_operand("y", 512, 4096)]
    assert product_format(_kernel("g_myl0_1", fp8, out, "gemm")) == "fp8"
    assert (
        product_format(_kernel("g_myl0_1", [fp8[0], _operand("w", 4096, 4096)], out, "gemm"))
        is None
    )
    assert product_format(_kernel("__myl_CastMul_myl0_1", fp8, out)) is None
    assert {product_format(kernel) for kernel in _plan().kernels} == {None}


def test_a_product_that_falls_back_is_refused() -> None:
    layer = f"{BLOCK}/Gemm_1"

    def check(weight: str, kind: str) -> None:
        plan = KernelPlan("cached_step", "test", (_nvfp4_gemm(weight, (layer,)),), 0, ())
        check_applied("cached_step", "test", QuantizedNodes({layer: kind}, ()), plan)

    check("FP4E2M1", "nvfp4")
    for weight, kind in (("BFloat16", "nvfp4"), ("FP4E2M1", "fp8")):
        with pytest.raises(BuildError, match=f"1 of 1 quantized products .*: {layer}"):
            check(weight, kind)


def test_moves_of_block_scales_are_no_weight_copies() -> None:
    name = f"{TO_OUT}.block_scales"
    move = _kernel(
        "__myl_Move_myl0_7",
        [_operand(name, 1024, 4096, dtype="FP8")],
        [_operand("m", 1024, 4096, dtype="FP8")],
    )
    assert moves_block_scales(move)
    assert not copies_weight(move, frozenset({name}))
    assert not moves_block_scales(_nvfp4_gemm())


def test_weight_transposes_are_found_and_gathers_are_not() -> None:
    weights = frozenset({TO_OUT, "embed"})
    weight = _operand(TO_OUT, 4096, 16384)
    transpose = _kernel("__myl_Tran_myl0_1", [weight], [_operand("t", 16384, 4096)])
    assert copies_weight(transpose, weights)
    table = _operand("embed", 151936, 4096)
    gather = _kernel("__myl_Gath_myl0_1", [table], [_operand("rows", 512, 4096)])
    assert not copies_weight(gather, weights)
    assert not any(copies_weight(kernel, weights) for kernel in _plan().kernels)


def test_blended_modulations_are_found_and_vectors_are_not() -> None:
    layers = ("single_stream_modulation/Where_7",)
    blended = _kernel("__myl_Sele_myl0_1", [], [_operand("m", 1, 20992, 4096)], layers=layers)
    assert blends_modulation(blended)
    vector = _kernel("__myl_Add_myl0_1", [], [_operand("m", 1, 4096)], layers=layers)
    assert not blends_modulation(vector)


def test_one_block_by_hand() -> None:
    cost = price_plan(_plan(LINES[1:15], scratch=10**9), GPU)
    linear = 2 * 4608 * 4096 * (3 * 4096 + 2 * 12288 + 16384)
    assert cost.flops == linear + 4 * 32 * 4608 * 20992 * 128
    assert cost.attention_kernels == 1
    assert cost.kernels == 14
    assert (cost.weight_copies, cost.blended_modulations) == ((), ())
    assert 1.035 < cost.ratio < 1.045
    assert cost.ratio == cost.seconds / cost.ideal_seconds


def test_plan_of_dynamic_shapes_has_no_price() -> None:
    plan = _plan([LINES[1].replace("4608", "-1")])
    assert not plan.known
    with pytest.raises(BuildError, match="recipe of one shape, such as static-1024-4ref"):
        price_plan(plan, GPU)


def test_plan_without_kernels_has_no_price() -> None:
    with pytest.raises(BuildError, match="there is no kernel plan of cached_step"):
        price_plan(_plan([]), GPU)


def test_saved_plan_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "x.layers.json"
    path.write_text(_plan(scratch=7).to_json())
    assert KernelPlan.load(path) == _plan(scratch=7)


def changed_plan(**changes: object) -> str:
    return json.dumps(json.loads(_plan(LINES[:1]).to_json()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", json.dumps({"format": "other"}), "[" * 100_000),
        *(changed_plan(weights=[[1]]), changed_plan(scratch_bytes=math.inf), changed_plan(graph=1)),
        changed_plan(kernels=[json.loads(changed_plan())["kernels"][0] | {"name": None}]),
    ],
)
def test_other_files_are_no_plans(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.layers.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="build again"):
        KernelPlan.load(path)
    with pytest.raises(ArtifactError, match="build again"):
        KernelPlan.load(tmp_path / "absent.json")
