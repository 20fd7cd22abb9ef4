"""Files of every writer, against dense matrices in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klein_kv.networks.transformer import transformer_parameters
from klein_kv.runtime.lora.lora_file import Adapter, describe_lora, read_adapter
from klein_kv.runtime.lora.lora_keys import module_table
from tests.klein_configs import KLEIN_4B, KLEIN_9B
from tests.runtime.lora.lora_files import (
    ALPHA,
    RANK,
    SHAPES,
    WRITERS,
    State,
    lora,
    make,
    save,
    weights,
)

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def merged(adapter: Adapter, strength: float) -> State:
    state = weights()
    for name, changes in adapter.changes.items():
        for change in changes:
            state[name] = change.apply(state[name], strength)
            assert state[name].dtype == np.float32
    return state


def assert_near(got: Any, expected: Any, what: str) -> None:
    error = np.abs(np.float64(got) - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, f"{what}: {error:.3g}"


@pytest.mark.parametrize("name", WRITERS)
def test_weights_become_what_the_writer_means(name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    tensors, apply = make(writer)
    path = save(tmp_path / "x.safetensors", tensors, torch.bfloat16)
    adapter = read_adapter(path, SHAPES)
    described = describe_lora(path)
    assert (described["format"], described["keys"]) == (writer.format, len(tensors))
    assert set(described["ranks"]) <= {RANK}
    assert adapter.ignored == ()
    added = getattr(writer.algorithm, "func", writer.algorithm) is lora
    ranks = {change.rank for changes in adapter.changes.values() for change in changes}
    assert ranks == {RANK if added else None}, "of what a GPU may merge"
    base = writer.layout(weights())
    assert base.keys() >= apply.keys()
    for strength in (1.0, -0.5, 2.0):
        for module, weight in writer.layout(merged(adapter, strength)).items():
            expected = base[module]
            if module in apply:
                expected = apply[module](np.float64(expected), strength)
                assert np.abs(expected - base[module]).max() > 0.01
            assert_near(weight, expected, f"{module} at {strength}")
    for key, value in merged(adapter, 0.0).items():
        assert value.tobytes() == weights()[key].tobytes(), key
    held = {key: torch.from_numpy(value).bfloat16() for key, value in tensors.items()}
    for source in (tensors, held):
        assert read_adapter(source, SHAPES).digest == adapter.digest


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (1, 1)),
        ({"lora_alpha": 6}, (6 / RANK, 6 / RANK)),
        ({"lora_alpha": 6, "use_rslora": True}, (3, 3)),
        ({"lora_alpha": 6, "alpha_pattern": {"to_k": 2.0}}, (6 / RANK, 2 / RANK)),
        ({"alpha_pattern": {"^transformer_blocks.0.*to_k": 2}}, (1, 2 / RANK)),
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_metadata_of_peft_scales(
    config: dict[str, Any], scales: tuple[float, float], prefix: str, tmp_path: Path
) -> None:
    tensors, _ = make(WRITERS["diffusers"])
    text = json.dumps({prefix + key: value for key, value in config.items()})
    path = save(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=text)
    adapter = read_adapter(path, SHAPES)
    names = [f"transformer_blocks.0.attn.{x}.weight" for x in ("to_q", "to_k")]
    assert tuple(adapter.changes[x][0].scale for x in names) == pytest.approx(scales)
    assert (adapter.digest == read_adapter(tensors, SHAPES).digest) == (scales == (1, 1))


def test_digest_is_that_of_the_effect() -> None:
    tensors, _ = make(WRITERS["kohya"])
    digest = read_adapter(tensors, SHAPES).digest
    other_names, _ = make(WRITERS["comfyui"])
    assert read_adapter(other_names, SHAPES).digest == digest
    assert read_adapter(dict(reversed(tensors.items())), SHAPES).digest == digest
    for part in ("alpha", "lora_up.weight", "lora_down.weight"):
        changed = tensors | {f"{QKV}.{part}": 2 * tensors[f"{QKV}.{part}"]}
        assert read_adapter(changed, SHAPES).digest != digest
    fewer = {key: value for key, value in tensors.items() if not key.startswith(QKV)}
    assert read_adapter(fewer, SHAPES).digest != digest


@pytest.mark.parametrize("wrap", [np.copy, lambda x: torch.tensor(x).float()])
def test_training_further_changes_nothing(wrap: Callable[[Any], Any]) -> None:
    tensors = {key: wrap(value) for key, value in make(WRITERS["kohya"])[0].items()}
    adapter = read_adapter(tensors, SHAPES)
    before = merged(adapter, 1)
    for value in tensors.values():
        value *= 2
    for name, value in merged(adapter, 1).items():
        np.testing.assert_array_equal(value, before[name])


def test_factors_may_come_as_convolutions_and_alpha_as_an_integer() -> None:
    tensors, _ = make(WRITERS["kohya"])
    other: dict[str, Any] = {
        key: np.array([int(ALPHA)]) if key.endswith("alpha") else value[..., None, None]
        for key, value in tensors.items()
    }
    assert read_adapter(other, SHAPES).digest == read_adapter(tensors, SHAPES).digest


@pytest.mark.parametrize("config", [KLEIN_4B, KLEIN_9B])
def test_every_name_means_one_module(config: Any) -> None:
    shapes = transformer_parameters(config.transformer)
    table = module_table(shapes)
    dotted = {name for name in table if "." in name}
    assert len({name.replace(".", "_") for name in dotted}) == len(dotted)
    for name in dotted:
        assert table[name.replace(".", "_")] == table[name]
    for name, pieces in table.items():
        assert pieces[0].source[0] == 0 or name.startswith("final_layer")
        for tensor, (start, stop), (low, high) in pieces:
            assert stop - start == high - low <= shapes[tensor][0]
