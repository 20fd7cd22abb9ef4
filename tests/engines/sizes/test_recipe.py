import re
from pathlib import Path

import pytest

from klein_kv.engines.sizes.recipe import Range, Recipe, Size, recipe_names
from klein_kv.errors import BuildError

PROFILE = """
[[profiles]]
name = "p"
output = "256x256"
references = 1
"""

STATIC = ["static-1024-4ref", "static-2048-4ref"]


def test_recipes_of_the_package() -> None:
    assert recipe_names() == ["default", "large", *STATIC]
    recipes = {name: Recipe.load(name) for name in recipe_names()}
    assert [name for name, recipe in recipes.items() if recipe.fixed] == STATIC
    assert all(recipe.name == name for name, recipe in recipes.items())
    (everyday,) = recipes["default"].profiles
    assert everyday.output.min == Size(512, 512)
    assert everyday.output.max == Size(1440, 1440)
    assert everyday.references == Range(0, 1, 4)
    assert everyday.text_tokens == Range(512, 512, 512)


def test_defaults_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE)
    recipe = Recipe.load(path)
    assert (recipe.name, recipe.target, recipe.precision) == ("mine", "rtx5090", None)
    assert (recipe.weights, recipe.fixed) == ("shared", True)
    assert Recipe.load(str(path)) == recipe


def test_sizes_that_the_runtime_takes() -> None:
    for size in ("2560x1440", "4096x1024", "2896x352"):
        recipe = Recipe.from_toml(PROFILE.replace("256x256", size), "wide")
        assert "{}x{}".format(*recipe.profiles[0].output.max) == size


def test_quantized_precision_and_attention() -> None:
    recipe = Recipe.from_toml(f"precision = 'nvfp4'\nattention = 'fp8'\n{PROFILE}", "fast")
    assert (recipe.precision, recipe.attention) == ("nvfp4", "fp8")
    assert Recipe.from_toml(f"attention = 'bf16'\n{PROFILE}", "plain").attention is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"precision = 'int4'\n{PROFILE}", "expected one of fp32, fp16, bf16, fp8, nvfp4"),
        (f"attention = 'fp4'\n{PROFILE}", "attention is 'fp4', expected 'fp8' or 'bf16'"),
        (
            "attention = 'fp8'\n" + PROFILE.replace("references = 1", "references = [0, 1, 4]"),
            "fixed number of keys only",
        ),
        ("nonsense", "is not TOML"),
        ("target = 'rtx5090'", "profiles is missing"),
        ("profiles = 3", "must be [[profiles]] tables"),
        (PROFILE + PROFILE, "no name twice"),
        ("taget = 'rtx5090'\n" + PROFILE, "unknown key taget; expected only target"),
        (PROFILE + "sise = 3", "profile p: unknown key sise"),
        (PROFILE.replace('name = "p"', ""), "name is None, expected a text"),
        (PROFILE.replace("references = 1", ""), "references is missing"),
        (PROFILE + "batch = 0", "batch is [0, 0, 0], expected 1 <= min <= opt <= max"),
        (PROFILE + "batch = [1, 2]", "a list [min, opt, max]"),
        (PROFILE + "batch = true", "expected whole numbers"),
        (PROFILE + "batch = 1.5", "expected whole numbers"),
        (PROFILE.replace("references = 1", "references = -1"), "expected 0 <= min"),
        (PROFILE.replace("256x256", "-16x256"), "expected 'WIDTHxHEIGHT'"),
        (PROFILE.replace("256x256", "4096x2048"), "expected at most the area of 2048x2048"),
        (PROFILE + 'reference_size = "2048x1024"', "at most the area of 1024x1024"),
        ("weights = 'both'\n" + PROFILE, "expected one of shared, embedded"),
    ],
)
def test_bad_recipe_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(BuildError, match=re.escape(message)):
        Recipe.from_toml(text, "test")


def test_unknown_recipe_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match="one of default, large, static-1024-4ref, static-2048-4ref"
    ):
        Recipe.load("fast")
    with pytest.raises(BuildError, match="cannot be read"):
        Recipe.load(tmp_path / "absent.toml")
