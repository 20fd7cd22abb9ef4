"""Files that are no LoRA for this model: one clear error each, whatever they hold."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_kv.errors import KleinKVError, RequestError
from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.lora.lora_file import read_adapter
from klein_kv.runtime.lora.lora_source import find_lora
from tests.klein_configs import KLEIN_4B, KLEIN_9B
from tests.runtime.lora.lora_files import SHAPES, WRITERS, State, make, save

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
DOWN, UP = f"{QKV}.lora_down.weight", f"{QKV}.lora_up.weight"
KOHYA = make(WRITERS["kohya"])[0]
OTHERS = {key: value for key, value in KOHYA.items() if not key.startswith(QKV)}
PROJ = "lora_unet_double_blocks_0_img_attn_proj"


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def pair(module: str, rows: int, columns: int, rank: int = 1) -> State:
    return {
        f"{module}.lora_down.weight": ones(rank, columns),
        f"{module}.lora_up.weight": ones(rows, rank),
    }


def loha(*rows: int) -> State:
    left = {f"{QKV}.hada_w{i}_a": ones(high, 1) for i, high in enumerate(rows, 1)}
    return left | {f"{QKV}.hada_w{i}_b": ones(1, 32) for i in (1, 2)}


BAD: dict[str, tuple[State, str]] = {
    "half a pair": ({key: value for key, value in KOHYA.items() if key != UP}, "lacks up"),
    "half a LoKr": (OTHERS | {f"{QKV}.lokr_w1": ones(4, 2)}, "lacks lokr_w2_a and lokr_w2_b"),
    "alpha alone": (OTHERS | {f"{QKV}.alpha": ones()}, f"1 of 61 keys match no .*: {QKV}.alpha"),
    "two names": (KOHYA | pair("transformer.transformer_blocks.0.attn.to_k", 32, 32), "twice"),
    "two spellings": (KOHYA | {f"{QKV}.lora_A.weight": ones(4, 32)}, "mean the same"),
    "two kinds": (KOHYA | {f"{QKV}.diff": ones(96, 32)}, "has diff beside LoRA"),
    "NaN": (KOHYA | {UP: np.full((96, 4), np.nan)}, f"{UP} holds values that are not finite"),
    "too large": (KOHYA | {UP: np.full((96, 4), 1e39)}, "not finite"),
    "alpha NaN": (KOHYA | {f"{QKV}.alpha": np.array(np.nan)}, "expected one finite number"),
    "alphas": (KOHYA | {f"{QKV}.alpha": ones(2)}, "expected one finite number"),
    "rank": (KOHYA | pair(QKV, 96, 32, 10_000), "has rank 10000, expected 1 to 4096"),
    "no rank": (KOHYA | pair(QKV, 96, 32, 0), "has rank 0"),
    "ranks": (KOHYA | {UP: ones(96, 5)}, r"shape \(96, 5\) and \(4, 32\)"),
    "flat": (KOHYA | {UP: ones(96)}, r"shape \(96,\) and"),
    "integers": (KOHYA | {UP: np.ones((96, 4), np.int64)}, "dtype int64"),
    "shape": (KOHYA | pair(QKV, 96, 48), r"shape of \(96, 48\), expected \(96, 32\) as of .*to_q"),
    "LoHa": (loha(96, 48), r"\(96, 32\) and \(48, 32\)"),
    "Tucker": (KOHYA | {f"{QKV}.lora_mid.weight": ones(4, 4, 1, 1)}, "lora_mid.* Tucker"),
    "Tucker LoKr": (OTHERS | {f"{QKV}.lokr_t2": ones(4, 4)}, "lokr_t2 .* Tucker"),
    "Tucker LoHa": (OTHERS | {f"{QKV}.hada_t1": ones(4, 4)}, "hada_t1 .* Tucker"),
    "reshape": (KOHYA | {f"{QKV}.reshape_weight": ones(2)}, "another shape"),
    "norms": (KOHYA | {f"{QKV}.dora_scale": ones(95, 1)}, r"shape \(95, 1\), expected \(96, 1\)"),
    "norms of joined columns": (KOHYA | {f"{QKV}.dora_scale": ones(1, 32)}, "reach over several"),
    "bias": (KOHYA | {f"{QKV}.diff_b": ones(96)}, "biases; klein's layers have none"),
    "text encoder": (KOHYA | pair("lora_te_layers_0_q_proj", 8, 8), "a text encoder's"),
    "text encoder alone": (pair("text_encoder.layers.0.q_proj", 8, 8), "nothing is left"),
    "strangers": (
        KOHYA | {f"x{i}.weight": ones(1) for i in range(5)},
        r"5 of 68 keys match .*: x0.weight, x1.weight, x2.weight, \.\.\.; strict=False",
    ),
    "FLUX.1": (pair("transformer.single_transformer_blocks.0.proj_mlp", 8, 8), "for FLUX.1"),
    "Stable Diffusion": (pair("lora_unet_down_blocks_1_attn_to_q", 8, 8), "Stable Diffusion"),
    "texts": ({UP: np.array("x")}, "lacks down"),
    "no array": ({UP: np.array("x"), DOWN: ones(4, 32)}, "expected floating point"),
    "empty": ({}, "empty dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_refused(name: str) -> None:
    tensors, message = BAD[name]
    with pytest.raises(RequestError, match=message):
        read_adapter(tensors, SHAPES)


def test_a_lora_of_another_size_says_so() -> None:
    small = transformer_parameters(KLEIN_4B.transformer)
    name = "transformer_blocks.0.ff.linear_in.weight"
    rows, columns = small[name]
    tensors = pair("lora_unet_double_blocks_0_img_mlp_0", rows, columns)
    assert list(read_adapter(tensors, small).changes) == [name]
    with pytest.raises(
        RequestError,
        match=rf"\(18432, 3072\), expected \(24576, 4096\) as of {name}; .* 4B or FLUX.1",
    ):
        read_adapter(tensors, transformer_parameters(KLEIN_9B.transformer))


def test_strict_is_a_choice(caplog: pytest.LogCaptureFixture) -> None:
    extra = pair("lora_te_layers_0_q_proj", 8, 8) | {f"{PROJ}x.alpha": ones()}
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(KOHYA | extra, SHAPES, strict=False)
    assert set(adapter.ignored) == set(extra)
    assert "3 of 66 keys match no tensor" in caplog.text
    assert adapter.digest == read_adapter(KOHYA, SHAPES).digest
    with pytest.raises(RequestError, match="nothing is left"):
        read_adapter(extra, SHAPES, strict=False)


def pickled(path: Path) -> None:
    torch.save({UP: torch.ones(2)}, path)  # noqa: TID251


def truncated(path: Path) -> None:
    path.write_bytes(save(path, KOHYA).read_bytes()[:-4])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.safetensors", lambda path: None, "is no file"),
        ("x", lambda path: path.mkdir(), "is no file"),
        ("x.safetensors", lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        ("x.safetensors", lambda path: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9c"), "a pickle"),
        ("x.safetensors", pickled, "a pickle"),
        ("x.safetensors", truncated, "truncated"),
        ("x.safetensors", lambda path: save(path, KOHYA, torch.int64), "dtype int64"),
        ("x.ckpt", lambda path: path.write_bytes(b"\0" * 20), "a pickle"),
        ("x.safetensors", lambda path: path.write_bytes(b"\2" + b"\0" * 7 + b"{}"), "no tensors"),
    ],
)
def test_other_files_are_refused(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(RequestError, match=message):
        read_adapter(path, SHAPES)


def test_where_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, usual = tmp_path / "a.safetensors", tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(RequestError, match=r"holds 0 \.safetensors files \(none\)"):
        find_lora(tmp_path, None)
    one.touch()
    assert find_lora(tmp_path, None) == find_lora(one, None) == one
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(RequestError, match=r"2 \.safetensors files .*; name one as weight_name"):
        find_lora(tmp_path, None)
    usual.touch()
    assert find_lora(str(tmp_path), None) == usual
    assert find_lora(tmp_path, "b.safetensors") == tmp_path / "b.safetensors"

    def download(repository: str, name: str) -> str:
        if name == "gone":
            raise OSError("404")
        return f"/cache/{repository}/{name}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_lora("me/style", None) == Path("/cache/me/style", usual.name)
    with pytest.raises(
        RequestError, match=r"gone cannot be had .* \(OSError: 404\); give the path"
    ):
        find_lora("me/style", "gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RequestError, match="pip install huggingface_hub"):
        find_lora("me/style", None)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        '{"transformer.lora_alpha": "x"}',
        '{"transformer.lora_alpha": NaN}',
        '{"lora_alpha": [1]}',
        json.dumps({"lora_alpha": 10**400}),
        '{"alpha_pattern": {"(": 1}}',
        '{"alpha_pattern": {"(a+)+": 1}}',
        '{"alpha_pattern": {"(.*)*": 1}}',
        '{"alpha_pattern": 3}',
    ],
)
def test_bad_metadata_is_refused(config: str, tmp_path: Path) -> None:
    tensors, _ = make(WRITERS["diffusers"])
    path = save(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=config)
    with pytest.raises(RequestError, match="lora_adapter_metadata cannot be read"):
        read_adapter(path, SHAPES)


PARTS = st.sampled_from(
    (
        *("lora_unet_", "diffusion_model.", "double_blocks", "_0_", ".0.", "img_attn", "qkv"),
        *("lora_A", "lora_B", "lokr_w1", "lokr_w2_a", "dora_scale", "diff", "alpha", ".", "_"),
    )
)
KEYS = st.one_of(st.sampled_from(sorted(KOHYA)), st.lists(PARTS, max_size=7).map("".join))
VALUES = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 4, 32, 96]), max_size=3).map(lambda shape: ones(*shape)),
    st.sampled_from(["x", None, 3, 2.5, [1, [2]], b"", np.array(None), torch.ones(4, 32)]),
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
@settings(max_examples=100)
def test_strange_keys_give_an_error_of_ours(tensors: dict[str, Any], strict: bool) -> None:
    try:
        read_adapter(tensors, SHAPES, strict=strict)
    except KleinKVError:
        return
    assert tensors
