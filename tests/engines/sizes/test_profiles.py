import pytest

from klein_kv.artifacts.engines.engine_record import ProfileRecord
from klein_kv.artifacts.signature import GRAPH_FILES, make_signature
from klein_kv.engines.sizes.profiles import engine_profiles
from klein_kv.engines.sizes.recipe import Recipe
from klein_kv.errors import BuildError
from tests.klein_configs import KLEIN_9B


def _profiles(graph: str, recipe: Recipe) -> list[ProfileRecord]:
    return engine_profiles(make_signature(graph, KLEIN_9B, "bfloat16"), recipe, KLEIN_9B)


def _recipe(*profiles: str) -> Recipe:
    text = "".join(f'[[profiles]]\nname = "{i}"\n{body}\n' for i, body in enumerate(profiles))
    return Recipe.from_toml(text, "test")


def test_default_recipe_in_tensor_shapes() -> None:
    (first,) = _profiles("first_step", Recipe.load("default"))
    assert first.shapes["hidden_states"] == ((1, 1024, 128), (1, 4096, 128), (1, 8100, 128))
    assert first.shapes["ref_ids"] == ((16, 4), (4096, 4), (16384, 4))
    assert first.shapes["txt_ids"] == ((512, 4),) * 3
    assert "timestep" not in first.shapes
    (cached,) = _profiles("cached_step", Recipe.load("default"))
    assert cached.shapes["k_ref.0"] == ((1, 0, 32, 128), (1, 4096, 32, 128), (1, 16384, 32, 128))
    (decoder,) = _profiles("vae_decoder", Recipe.load("default"))
    assert decoder.shapes["latents"] == ((1, 32, 32, 128), (1, 64, 64, 128), (1, 90, 90, 128))


@pytest.mark.parametrize("graph", list(GRAPH_FILES))
def test_static_recipe_is_one_shape(graph: str) -> None:
    (profile,) = _profiles(graph, Recipe.load("static-1024-4ref"))
    assert all(low == typical == high for low, typical, high in profile.shapes.values())


def test_encoder_profiles_cover_every_proportion_of_a_reference() -> None:
    boxes = _profiles("vae_encoder", Recipe.load("default"))
    for width in range(64, 2897, 16):
        for height in range(64, 2897, 16):
            if width * height > 1024 * 1024 or max(width, height) > 8 * min(width, height):
                continue
            assert any(
                low <= height <= high and low_w <= width <= high_w
                for (low, _, high), (low_w, _, high_w) in (
                    (box.symbols["height"], box.symbols["width"]) for box in boxes
                )
            ), f"{width}x{height}"
    areas = [box.symbols["height"].max * box.symbols["width"].max for box in boxes]
    assert max(areas) < 2.1e6, "scratch memory follows these bounds"


def test_equal_profiles_are_kept_once() -> None:
    two = _recipe('output = "512x512"\nreferences = 1', 'output = "1024x512"\nreferences = 1')
    assert len(_profiles("cached_step", two)) == 2
    assert len(_profiles("encode_references", two)) == 1
    assert len(_profiles("text_encoder", two)) == 1


def test_profile_without_references_has_no_first_step() -> None:
    none = _recipe('output = "512x512"\nreferences = 0')
    assert _profiles("cached_step", none)[0].shapes["k_ref.0"] == ((1, 0, 32, 128),) * 3
    for graph in ("first_step", "encode_references", "vae_encoder"):
        with pytest.raises(BuildError, match="has reference images"):
            _profiles(graph, none)


def test_sizes_must_be_whole_tokens() -> None:
    with pytest.raises(BuildError, match=r"output is 520x512, expected .* multiples of 16"):
        _profiles("cached_step", _recipe('output = "520x512"\nreferences = 1'))
