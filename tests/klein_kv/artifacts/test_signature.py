"""Names, types and shapes of the graphs' tensors: what the design promises, in one place."""

import pytest

from klein_kv.artifacts.signature import (
    GRAPH_FILES,
    SMALL_GRAPH_FILES,
    KVFormat,
    is_kv,
    kv_names,
    kv_tensors,
    make_signature,
    quantized_graph_sets,
)
from klein_kv.errors import RequestError
from tests.klein_configs import KLEIN_9B

STEP_INPUTS = {
    "hidden_states": ("bfloat16", ("batch", "image_tokens", 128)),
    "encoder_hidden_states": ("bfloat16", ("batch", "text_tokens", 12288)),
    "timestep": ("float32", (1,)),
    "sigma_step": ("float32", (1,)),
    "img_ids": ("int64", ("image_tokens", 4)),
    "txt_ids": ("int64", ("text_tokens", 4)),
}
REFERENCE_INPUTS = {
    "ref_hidden_states": ("bfloat16", (1, "ref_tokens", 128)),
    "ref_ids": ("int64", ("ref_tokens", 4)),
}
KV = dict.fromkeys(kv_names(32), ("bfloat16", (1, "ref_tokens", 32, 128)))
STEP_OUTPUTS = dict.fromkeys(
    ("noise_pred", "latents"), ("bfloat16", ("batch", "image_tokens", 128))
)
PROMPT = ("int64", ("batch", "text_tokens"))
NUMBER = ("float32", (1,))
MERGE = {
    "weight": ("bfloat16", ("rows", "columns")),
    "up": ("float32", ("rows", "rank")),
    "down": ("float32", ("rank", "columns")),
    "largest_before": NUMBER,
}
EXPECTED = {
    "first_step": (STEP_INPUTS | REFERENCE_INPUTS, STEP_OUTPUTS | KV),
    "cached_step": (STEP_INPUTS | KV, STEP_OUTPUTS),
    "encode_references": (REFERENCE_INPUTS, KV),
    "text_encoder": (
        {"input_ids": PROMPT, "attention_mask": PROMPT},
        {"encoder_hidden_states": ("bfloat16", ("batch", "text_tokens", 12288))},
    ),
    "vae_encoder": (
        {"image": ("uint8", (1, "height", "width", 3))},
        {"ref_hidden_states": ("bfloat16", (1, "grid_height", "grid_width", 128))},
    ),
    "vae_decoder": (
        {"latents": ("bfloat16", ("batch", "grid_height", "grid_width", 128))},
        {
            "image": ("uint8", ("batch", "height", "width", 3)),
            "sample": ("bfloat16", ("batch", 3, "height", "width")),
        },
    ),
    "blend": (
        {
            "hidden_states": ("bfloat16", ("batch", "image_tokens", 128)),
            "image_latents": ("bfloat16", (1, "image_tokens", 128)),
            "noise": ("bfloat16", ("batch", "image_tokens", 128)),
            "mask": ("bfloat16", ("batch", "image_tokens", 1)),
            "sigma": NUMBER,
        },
        {"latents": ("bfloat16", ("batch", "image_tokens", 128))},
    ),
    "merge_lora": (MERGE, {"merged": ("bfloat16", ("rows", "columns")), "largest": NUMBER}),
    "merge_lora_fp8": (
        MERGE | {"scale": NUMBER},
        {"merged": ("float8_e4m3fn", ("rows", "columns")), "largest": NUMBER},
    ),
}


@pytest.mark.parametrize("graph", [*GRAPH_FILES, *SMALL_GRAPH_FILES])
def test_tensors(graph: str) -> None:
    signature = make_signature(graph, KLEIN_9B, "bfloat16")
    assert signature.graph == graph
    for specs, expected in zip((signature.inputs, signature.outputs), EXPECTED[graph], strict=True):
        assert [(x.name, (x.dtype, x.shape)) for x in specs] == list(expected.items())
        assert all(x == signature.input(x.name) for x in specs if specs is signature.inputs)
        assert all(x == signature.output(x.name) for x in specs if specs is signature.outputs)


@pytest.mark.parametrize("graph", ["first_step", "cached_step"])
def test_keys_and_values_in_eight_bits(graph: str) -> None:
    whole = make_signature(graph, KLEIN_9B, "bfloat16")
    assert make_signature(graph, KLEIN_9B, "bfloat16", "bfloat16") == whole
    packed = make_signature(graph, KLEIN_9B, "bfloat16", KVFormat.FP8_PER_HEAD)
    for ours, theirs in ((packed.inputs, whole.inputs), (packed.outputs, whole.outputs)):
        expected = {}
        for spec in theirs:
            expected[spec.name] = (spec.dtype, spec.shape)
            if spec.name[1:].startswith("_ref."):
                name, _, block = spec.name.partition(".")
                expected[spec.name] = ("float8_e4m3fn", spec.shape)
                expected[f"{name}_scale.{block}"] = ("float32", (1, 1, 32, 1))
        assert [(x.name, (x.dtype, x.shape)) for x in ours] == list(expected.items())


def test_float8_with_constant_scales_hands_on_numbers_alone() -> None:
    packed = make_signature("cached_step", KLEIN_9B, "bfloat16", KVFormat.FP8_CONSTANT)
    assert [spec.name for spec in packed.inputs] == [*STEP_INPUTS, *kv_names(32)]
    assert {spec.dtype for spec in packed.inputs if is_kv(spec.name)} == {"float8_e4m3fn"}


def test_graphs_of_quantized_precisions() -> None:
    networks = {"transformer": "nvfp4", "text_encoder": "fp8"}
    own, packed, attention = quantized_graph_sets("kv", "bfloat16", networks)
    assert (own.kv_dtype, own.attention, own.precision) == (None, None, "nvfp4")
    assert (packed.kv_dtype, packed.attention) == (KVFormat.FP8_CONSTANT, None)
    assert (attention.kv_dtype, attention.attention) == (KVFormat.FP8_CONSTANT, "fp8")
    assert (own.kv_numbers, packed.kv_numbers) == ("bfloat16", "float8_e4m3fn")
    assert own.files == GRAPH_FILES | {
        "text_encoder": "text_encoder/fp8.model.onnx",
        "encode_references": "transformer/nvfp4.encode_references.onnx",
        "first_step": "transformer/nvfp4.first_step.onnx",
        "cached_step": "transformer/nvfp4.cached_step.onnx",
    }
    assert packed.files["cached_step"] == "transformer/nvfp4.cached_step_static_fp8_kv.onnx"
    assert attention.files["cached_step"] == "transformer/nvfp4.cached_step_fp8_attention.onnx"
    # What keys and values do not reach is one file for all.
    assert len({x.files["text_encoder"] for x in (own, packed, attention)}) == 1
    net = KLEIN_9B.transformer
    sizes = [
        sum(spec.nbytes({"ref_tokens": 16384}) for spec in kv_tensors(net, x.dtype, x.kv_dtype))
        for x in (own, packed)
    ]
    assert sizes == [2**33, 2**32]
    assert len(quantized_graph_sets("plain", "bfloat16", networks)) == 1
    kept = {"transformer": "fp8-weight-only", "text_encoder": "fp8-weight-only"}
    assert len(quantized_graph_sets("kv", "bfloat16", kept)) == 1
    only_transformer = quantized_graph_sets("kv", "bfloat16", {"transformer": "fp8"})[0]
    assert only_transformer.files["text_encoder"] == GRAPH_FILES["text_encoder"]


def test_keys_and_values_in_another_type() -> None:
    with pytest.raises(RequestError, match="kv_dtype is 'float16', expected 'bfloat16', 'float8"):
        make_signature("first_step", KLEIN_9B, "bfloat16", "float16")


def test_symbols_and_sizes() -> None:
    signature = make_signature("cached_step", KLEIN_9B, "bfloat16")
    assert signature.symbols == ("batch", "image_tokens", "text_tokens", "ref_tokens")
    spec = signature.input("k_ref.7")
    assert spec.concrete({"ref_tokens": 0}) == (1, 0, 32, 128)
    assert spec.nbytes({"ref_tokens": 16384}) == 128 << 20
    with pytest.raises(KeyError):
        spec.concrete({"batch": 1})
