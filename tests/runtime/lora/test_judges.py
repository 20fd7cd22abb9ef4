"""Files made by PEFT, diffusers and LyCORIS themselves, against the weights that they compute."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klein_kv.runtime.lora.lora_file import Adapter, describe_lora, read_adapter
from tests.runtime.lora.lora_files import CONFIG, SHAPES, WRITERS, make, save, weights

MATRICES = [name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) == 2]


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
    for name, weight in weights().items():
        ours = weight
        for change in adapter.changes.get(name, ()):
            ours = change.apply(ours, strength)
        error = np.abs(ours - theirs[name].detach().numpy()).max() / np.abs(weight).max()
        assert error <= 1e-5, f"{name}: {error:.3g}"


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
