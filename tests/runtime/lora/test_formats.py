"""Files of every writer against dense matrices in float64, and of PEFT, diffusers, LyCORIS."""

import json
import warnings
from collections.abc import Callable, Iterator
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
    CONFIG,
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
MATRICES = [name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) == 2]


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


# --- files that their writers make, against the weights that these compute ---


@pytest.fixture
def model() -> Iterator[Any]:
    """diffusers' transformer with the weights of `lora_files`."""
    from diffusers import Flux2Transformer2DModel

    made = Flux2Transformer2DModel(**CONFIG).requires_grad_(False)
    made.load_state_dict({name: torch.from_numpy(value) for name, value in weights().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what third parties warn of
        yield made


def assert_merged(adapter: Adapter, theirs: dict[str, Any], strength: float = 1.0) -> None:
    """Every tensor as the judge has it."""
    for name, ours in merged(adapter, strength).items():
        error = np.abs(ours - theirs[name].detach().numpy()).max()
        assert error <= 1e-5 * np.abs(weights()[name]).max(), f"{name}: {error:.3g}"


def fused(model: Any, strength: float = 1.0) -> dict[str, Any]:
    model.fuse_lora(lora_scale=strength)
    state = model.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items()}


def randomized(module: Any) -> None:
    """No factor is zero, as at the start of training."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        if "lora_" in name or "lycoris" in name or "lokr" in name or "hada" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).abs() / 2)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"to_q": 2, "transformer_blocks.0.attn.to_k": 3},
            "alpha_pattern": {"to_q": 5, "^transformer_blocks.0.attn.to_k": 1},
        },
        {"r": 4, "lora_alpha": 6, "use_dora": True},
    ],
)
def test_peft(model: Any, config: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import Flux2KleinPipeline

    model.add_adapter(peft.LoraConfig(**{"lora_alpha": 4, "target_modules": MATRICES} | config))
    randomized(model)
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = read_adapter(path, SHAPES)
    assert len(adapter.changes) == len(MATRICES)
    assert describe_lora(path)["format"].startswith("PEFT (diffusers)")
    assert_merged(adapter, fused(model))


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("name", ["diffusers", "ai-toolkit", "fal", "kohya"])
def test_diffusers_loads_the_same(model: Any, name: str, strength: float, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from diffusers import Flux2KleinPipeline

    # What diffusers reads wrong: it does not swap these halves, and drops kohya's modulations.
    left_out = ("adaLN_modulation", "_img_lin.", "_txt_lin.", "modulation_lin.")
    tensors = {k: v for k, v in make(WRITERS[name])[0].items() if not any(x in k for x in left_out)}
    path = save(tmp_path / "x.safetensors", tensors)
    state, metadata = Flux2KleinPipeline.lora_state_dict(path, return_lora_metadata=True)
    Flux2KleinPipeline.load_lora_into_transformer(state, model, metadata=metadata)
    adapter = read_adapter(path, SHAPES)
    assert len(adapter.changes) > 15
    assert_merged(adapter, fused(model, strength), strength)


@pytest.mark.parametrize(
    "options",
    [
        {"algo": "lora"},
        {"algo": "lora", "dora_wd": True},
        {"algo": "lora", "rs_lora": True},
        {"algo": "loha"},
        {"algo": "loha", "dora_wd": True},
        {"algo": "lokr", "factor": 4},
        {"algo": "lokr", "factor": 4, "full_matrix": True},
        {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 2},
        {"algo": "lokr", "factor": 4, "dora_wd": True},
        {"algo": "full"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_lycoris(model: Any, options: dict[str, Any], tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    plain = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    network = lycoris.create_lycoris(model, **{"linear_dim": 3, "linear_alpha": 2} | options)
    network.apply_to()
    randomized(network)
    network.save_weights(tmp_path / "x.safetensors", torch.float32, {})
    adapter = read_adapter(tmp_path / "x.safetensors", SHAPES)
    assert len(adapter.changes) > 15
    theirs = {}
    for name, weight in weights().items():
        module = plain[name.removesuffix(".weight")]
        is_norm = weight.ndim == 1
        theirs[name] = torch.from_numpy(weight) if is_norm else module(torch.eye(weight.shape[1])).T
    assert_merged(adapter, theirs)
