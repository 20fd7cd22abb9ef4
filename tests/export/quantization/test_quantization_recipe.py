"""Recipes: what they assign, and what they refuse."""

import logging
from pathlib import Path

import pytest

from klein_kv.errors import RequestError
from klein_kv.export.checks.artifact_weights import component_parameters
from klein_kv.export.quantization.quantization_recipe import QuantizationRecipe
from tests.klein_configs import KLEIN_9B

SHAPES = component_parameters(KLEIN_9B, "transformer")
TEXT_SHAPES = component_parameters(KLEIN_9B, "text_encoder")


def test_the_packaged_recipes_make_what_they_are_named_after() -> None:
    for name in ("fp8", "fp8-weight-only", "nvfp4"):
        recipe = QuantizationRecipe.load(name)
        assert recipe.component_precision("transformer") == name
        formats = recipe.assign("transformer", SHAPES)
        # 8 double blocks of 12 linears, 24 single blocks of 2.
        assert len(formats) == 144
        assert set(formats.values()) == {"nvfp4" if name == "nvfp4" else "fp8"}
        text = recipe.assign("text_encoder", TEXT_SHAPES)
        assert len(text) == 27 * 7
        assert set(text.values()) == {"fp8"}
    assert QuantizationRecipe.load("nvfp4").component_precision("text_encoder") == "fp8"


@pytest.mark.parametrize("name", ["x_embedder", "context_embedder", "proj_out", "norm_out.linear"])
def test_what_is_outside_the_blocks_stays(name: str) -> None:
    recipe = QuantizationRecipe("all", "nvfp4", overrides=(("*", "nvfp4"),))
    assert f"{name}.weight" in SHAPES
    assert f"{name}.weight" not in recipe.assign("transformer", SHAPES)


def test_overrides_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'transformer = "nvfp4"\n[overrides]\n"transformer_blocks.0.*" = "bf16"\n'
        '"*.ff.linear_out.weight" = "fp8"\n'
    )
    recipe = QuantizationRecipe.load(path)
    assert (recipe.name, recipe.transformer, recipe.text_encoder) == ("mine", "nvfp4", "bf16")
    formats = recipe.assign("transformer", SHAPES)
    assert "transformer_blocks.0.attn.to_q.weight" not in formats
    assert formats["transformer_blocks.0.ff.linear_out.weight"] == "fp8"
    assert formats["transformer_blocks.1.ff.linear_out.weight"] == "fp8"
    assert formats["transformer_blocks.1.attn.to_q.weight"] == "nvfp4"
    assert recipe.assign("text_encoder", TEXT_SHAPES) == {}
    recipe.check_overrides(list(SHAPES))


def test_nvfp4_needs_whole_blocks(caplog: pytest.LogCaptureFixture) -> None:
    shapes = {"transformer_blocks.0.a.weight": (64, 72), "transformer_blocks.0.b.weight": (64, 80)}
    with caplog.at_level(logging.WARNING):
        formats = QuantizationRecipe("r", "nvfp4").assign("transformer", shapes)
    assert formats == {"transformer_blocks.0.b.weight": "nvfp4"}
    assert "72 input features are no multiple of 16" in caplog.text
    assert len(QuantizationRecipe("r", "fp8").assign("transformer", shapes)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transformer = ", "not TOML"),
        ('text_encoder = "fp8"', "transformer is missing"),
        ('transformer = "int8"', "transformer is 'int8', expected one of fp8, nvfp4"),
        ('transformer = "bf16"', "transformer is 'bf16'"),
        ('transformer = "fp8"\npercentile = 12', "percentile is 12"),
        ('transformer = "fp8"\npercentile = "all"', "a number as percentile"),
        ('transformer = "fp8"\nscale = 1', "unknown key scale"),
        ('transformer = "fp8"\nactivations = "dynamic"', "activations is 'dynamic'"),
        ('transformer = "nvfp4"\nactivations = "kept"', "only fp8"),
        ('transformer = "fp8"\n[overrides]\n"*" = "fp4"', "is 'fp4'"),
        ('transformer = "fp8"\noverrides = "x"', "table"),
    ],
)
def test_refuses_what_it_cannot_mean(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        QuantizationRecipe.load(path)


def test_refuses_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown recipe 'fp4'; expected one of fp8"):
        QuantizationRecipe.load("fp4")
    with pytest.raises(RequestError, match="cannot be read"):
        QuantizationRecipe.load(tmp_path / "none.toml")
