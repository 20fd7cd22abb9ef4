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


def _find(name: str) -> Kernel:
    kernels = _plan().kernels
    return next(kernel for kernel in kernels if name == kernel.kind or name in kernel.name)


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
    gemm = _find("gemm")
    x, weight = gemm.inputs
    assert x.dims == (4608, 4096)
    assert weight.name.startswith(f"{BLOCK}.attn.to_qkv_mlp_proj.weight[")
    assert (weight.dims, weight.strides) == ((4096, 4096), (1, 4096)), "as stored, not transposed"
    assert gemm.outputs[0].dims == (4608, 4096)
    assert {operand.dtype for operand in gemm.constants} == {"Float"}
    assert gemm.onnx_layers[0].startswith(f"{BLOCK}/Gemm_")


def test_other_lines() -> None:
    event = (
        "Name: __mye1310_myl0_3, LayerType: wait, Inputs: [], Constants: [], Outputs: [], "
        "TacticName: , StreamId: 1, EventId: 1, Metadata: "
    )
    assert parse_line(event).stream == 1
    assert len(_plan([*LINES, event]).kernels) == len(LINES), "events are no kernels"
    with pytest.raises(BuildError, match="cannot read the builder's kernel plan"):
        _plan(["Layer 0: gemm"])


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


FP8_X, FP8_W = (_operand(x, n, 4096, dtype="FP8") for x, n in (("x", 512), ("w", 4096)))
Y = _operand("y", 512, 4096)
FP8_GEMM = _kernel("g_myl0_1", [FP8_X, FP8_W], [Y], "gemm")
HEADS = [("q", 32, 4608, 128), ("k", 32, 128, 20992), ("v", 32, 20992, 128)]
FP8_ATTENTION = _kernel(
    "_gemm_mha_v2_myl0_45",
    [_operand(*operand, dtype="FP8") for operand in HEADS],
    [_operand("o", 32, 4608, 128)],
)
CONVOLUTION = _kernel(
    "node_conv2d_3_myl0_9",
    [_operand("x", 1, 32, 128, 64)],
    [_operand("y", 1, 512, 128, 64)],
    "correlation",
    constants=[_operand("w", 512, 32, 3, 3), _operand("b", 1, 512, 1, 1)],
)
FUSED = _operand("qkv_mlp", 4608, 36864)
SLICE = _kernel("__myl_Slic_myl0_3", [FUSED], [_operand("q", 4608, 4096)])
# silu(gate) * up beside the attention output: two slices of 12288, one operand of 4096.
SLICES = _kernel(
    "__myl_SlicSlicSiluMulTranReshConc_myl0_19",
    [FUSED, FUSED, _operand("attention", 1, 32, 4608, 128)],
    [_operand("hidden", 4608, 16384)],
)
WHOLE = _kernel("__myl_Mean_myl0_3", [FUSED], [_operand("m", 4608, 1)])  # no slice in its name
ATTENTION_FLOPS = 4 * 32 * 4608 * 20992 * 128  # scores and values, 32 heads of 128
NVFP4_BYTES = (4608 + 4096) * 16384 * 9 // 16 + 2 * 4608 * 4096  # scales are a byte per 16 numbers


@pytest.mark.parametrize(
    ("kernel", "flops", "nbytes", "peak"),
    [
        # 8 bytes are alpha and beta
        (_find("gemm"), 2 * 4608 * 4096 * 4096, 2 * (2 * 4608 + 4096) * 4096 + 8, 209.5e12),
        (_find("FcSiluMul"), 2 * 4608 * 4096 * 12288, None, 209.5e12),
        (_find("FcMulAdd"), 2 * 4608 * 16384 * 4096, None, 209.5e12),
        (_find("gemm_mha"), ATTENTION_FLOPS, None, 209.5e12),
        (FP8_ATTENTION, ATTENTION_FLOPS, None, 419e12),
        (FP8_GEMM, 2 * 512 * 4096 * 4096, None, 419e12),
        (_nvfp4_gemm(), 2 * 4608 * 16384 * 4096, NVFP4_BYTES, 1676e12),
        (CONVOLUTION, 2 * 512 * 128 * 64 * 32 * 9, None, 209.5e12),
        # every element read once and written once, 2 bytes
        (_find("ConcTranReshMove_myl0_305"), 0, 2 * 2 * 20992 * 4096, None),
        (SLICE, 0, 2 * 2 * 4608 * 4096, None),
        (SLICES, 0, 2 * 4608 * (2 * 12288 + 4096 + 16384), None),
        (WHOLE, 0, 2 * 4608 * (36864 + 1), None),
    ],
    ids=lambda value: value.name if isinstance(value, Kernel) else "",
)
def test_price_by_hand(kernel: Kernel, flops: int, nbytes: int | None, peak: float | None) -> None:
    cost = price_kernel(kernel, GPU)
    assert cost.flops == flops
    assert nbytes is None or cost.bytes == nbytes
    ideal = flops / peak if peak else 0
    assert cost.ideal_seconds == pytest.approx(ideal)
    assert cost.seconds == pytest.approx(max(ideal, cost.bytes / 1792e9))


def test_a_gpu_without_the_type_has_no_price() -> None:
    with pytest.raises(BuildError, match="no throughput of GeForce RTX 3090 for fp8"):
        price_kernel(FP8_GEMM, GPUS["rtx3090"])


def test_native_products_are_told_from_others() -> None:
    assert product_format(_nvfp4_gemm()) == "nvfp4"
    assert product_format(_nvfp4_gemm("BFloat16")) is None  # dequantized before it
    assert product_format(FP8_GEMM) == product_format(FP8_ATTENTION) == "fp8"
    mixed = _kernel("g_myl0_1", [FP8_X, _operand("w", 4096, 4096)], [Y], "gemm")
    assert product_format(mixed) is None
    assert product_format(_kernel("__myl_CastMul_myl0_1", [FP8_X, FP8_W], [Y])) is None
    assert {product_format(kernel) for kernel in _plan().kernels} == {None}


def test_a_product_that_falls_back_is_refused() -> None:
    layer = f"{BLOCK}/Gemm_1"

    def check(weight: str, kind: str) -> None:
        plan = KernelPlan("cached_step", "test", (_nvfp4_gemm(weight, (layer,)),), 0, ())
        check_applied(QuantizedNodes({layer: kind}, ()), plan)

    check("FP4E2M1", "nvfp4")
    empty = KernelPlan("cached_step", "test", (), 0, ())
    with pytest.raises(BuildError, match="1 of 1 quantized products"):
        check_applied(QuantizedNodes({layer: "fp8"}, ()), empty)
    for weight, kind in (("BFloat16", "nvfp4"), ("FP4E2M1", "fp8")):
        with pytest.raises(BuildError, match=f"1 of 1 quantized products .*: {layer}"):
            check(weight, kind)


def test_what_a_plan_wastes_is_found() -> None:
    name, layers = f"{TO_OUT}.block_scales", ("single_stream_modulation/Where_7",)
    weights = frozenset({TO_OUT, "embed", name})
    transpose = _kernel("Tran", [_operand(TO_OUT, 4096, 16384)], [_operand("t", 16384, 4096)])
    gather = _kernel("Gath", [_operand("embed", 151936, 4096)], [_operand("rows", 512, 4096)])
    move = _kernel("Move", [_operand(name, 1024, 4096)], [_operand("m", 1024, 4096)])
    blended = _kernel("Sele", [], [_operand("m", 1, 20992, 4096)], layers=layers)
    vector = _kernel("Add", [], [_operand("m", 1, 4096)], layers=layers)
    kernels = [transpose, gather, move, blended, vector, _nvfp4_gemm(), *_plan().kernels]
    assert [kernel for kernel in kernels if copies_weight(kernel, weights)] == [transpose]
    assert [kernel for kernel in kernels if moves_block_scales(kernel)] == [move]
    assert [kernel for kernel in kernels if blends_modulation(kernel)] == [blended]


def test_one_block_by_hand() -> None:
    cost = price_plan(_plan(LINES[1:15], scratch=10**9), GPU)
    linear = 2 * 4608 * 4096 * (3 * 4096 + 2 * 12288 + 16384)
    assert cost.flops == linear + 4 * 32 * 4608 * 20992 * 128
    assert cost.attention_kernels == 1
    assert cost.kernels == 14
    assert (cost.weight_copies, cost.blended_modulations) == ((), ())
    assert 1.035 < cost.ratio < 1.045
    assert cost.ratio == cost.seconds / cost.ideal_seconds


def test_nothing_is_multiplied() -> None:
    """As in `blend`: JSON has no infinite ratio."""
    cost = price_plan(_plan(LINES[3:4]), GPU)
    assert (cost.flops, cost.ratio) == (0, None)
    assert cost.seconds > 0


def test_plans_without_a_price() -> None:
    plan = _plan([LINES[1].replace("4608", "-1")])
    assert not plan.known
    with pytest.raises(BuildError, match="recipe of one shape, such as static-1024-4ref"):
        price_plan(plan, GPU)
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
