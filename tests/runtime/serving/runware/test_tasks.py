"""Fields of `imageInference`, one by one."""

from typing import Any

import pytest

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.runware.answers import failed
from klein_kv.runtime.serving.runware.kept import Kept
from klein_kv.runtime.serving.runware.tasks import MODEL, ImageTask, image_task

UUID = "50836053-a0ee-4cf5-b9d6-ae7c5d140ada"
LEAST: dict[str, Any] = {
    "taskType": "imageInference",
    "taskUUID": UUID,
    "model": MODEL,
    "positivePrompt": "a red kite",
}


def task(**fields: Any) -> ImageTask:
    return image_task(LEAST | fields, (MODEL, "test/klein"), ("style", "ink"), 16)


def test_defaults_are_those_of_the_models_page() -> None:
    least = task()
    assert (least.width, least.height, least.steps, least.count) == (1024, 1024, 4, 1)
    assert (least.output, least.kind, least.quality) == ("URL", "jpeg", 95)
    assert (least.later, least.cost, least.ttl_s, least.loras) == (False, False, None, ())
    assert 0 <= least.seed < 2**32
    assert least.seed != task().seed
    sized_by_reference = task(inputs={"referenceImages": ["x"]})
    assert (sized_by_reference.width, sized_by_reference.references) == (None, ("x",))
    assert task(referenceImages=["x", "y"]).references == ("x", "y")
    assert task(seed=None, lora=None).loras == ()  # null is not given


GOOD = {
    "model": ["test/klein"],
    "positivePrompt": ["x", "ü" * 10_000],
    "negativePrompt": ["", "blur"],
    "inputs": [{}, {"referenceImages": ["a"] * 4}],
    "seed": [0, 2**63 - 1],
    "steps": [1, 50],
    "numberResults": [1, 20],
    "scheduler": ["Default", "Euler", "FlowMatchEulerDiscreteScheduler"],
    "CFGScale": [0, 1, 1.0, 0.5],
    "acceleration": ["none"],
    "safety": [{}, {"checkContent": False}, {"mode": "none", "checkContent": False}],
    "checkNSFW": [False],
    "lora": [[], [{"model": "style"}], [{"model": "style", "weight": -4}, {"model": "ink"}]],
    "outputType": ["URL", "base64Data", "dataURI"],
    "outputFormat": ["JPG", "PNG", "WEBP"],
    "outputQuality": [20, 99],
    "deliveryMethod": ["sync", "async"],
    "includeCost": [True, False],
    "ttl": [60, 86_400],
    "webhookURL": ["https://example.com"],
    "uploadEndpoint": ["https://example.com"],
}
WRONG = {
    "taskUUID": ["", "x", 1, UUID + "0", [UUID]],
    "positivePrompt": ["", "x" * 10_001, 3, ["x"], "\ud800"],
    "negativePrompt": [3],
    "inputs": [[], "x"],
    "inputs.referenceImages": [[], ["a"] * 5, "a", [1], [""], [None], {"a": 1}],
    "referenceImages": [[], ["a"] * 5, [3]],
    "width": [0, 112, 2064, 1000, 1024.0, "1024", True, 10**400, -16],
    "height": [127, 129, 4096, None],
    "seed": [-1, 2**63, 1.5, True],
    "steps": [0, 51],
    "numberResults": [0, 21],
    "CFGScale": [-1, 51, "1", float("nan"), float("inf"), 10**400],
    "lora": ["style", [1], [{"model": "style", "scale": 1}], [{"model": "other"}], [{}] * 9],
    "lora.model": [3, ""],
    "lora.weight": [4.01, -5, "1", True],
    "outputType": ["url", "stream", []],
    "outputFormat": ["jpg", "GIF", {}],
    "outputQuality": [19, 100],
    "deliveryMethod": ["stream", 1],
    "includeCost": [1, "true"],
    "ttl": [59, 60.5],
    "webhookURL": [3, ""],
    "uploadEndpoint": [3, "https://" + "a" * 5000],
    "safety": ["none"],
}
BEYOND = {
    "CFGScale": [1.01, 3.5],
    "scheduler": ["DDIM", "LCM", "euler", 3],
    "acceleration": ["low", "high"],
    "acceleratorOptions": [{}, {"teaCache": True}],
    "ultralytics": [{}],
    "advancedFeatures": [{"layerDiffuse": True}],
    "routing": [{}],
    "safety": [{"mode": "fast"}, {"checkContent": True}],
    "checkNSFW": [True],
}


def cases(table: dict[str, list[Any]]) -> Any:
    pairs = [(name, value) for name, values in table.items() for value in values]
    return pytest.mark.parametrize(
        ("name", "value"), pairs, ids=[f"{n}-{v!r:.30}" for n, v in pairs]
    )


def fields_of(name: str, value: Any) -> dict[str, Any]:
    if name == "inputs.referenceImages":
        return {"inputs": {"referenceImages": value}}
    if name.startswith("lora."):
        return {"lora": [{"model": "style", name[5:]: value}]}
    fields = {name: value}
    return {"width": 512, "height": 512} | fields if name in ("width", "height") else fields


@cases(GOOD)
def test_what_is_in_range_is_taken(name: str, value: Any) -> None:
    task(**fields_of(name, value))


@cases(WRONG)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ServiceError) as caught:
        task(**fields_of(name, value))
    error = caught.value
    if value is None:
        assert error.code == "missing_required_parameter"
    else:
        assert error.code == "invalid_value"
    assert error.param == name
    assert len(error.message) < 200
    told = failed(LEAST, error).error
    assert told is not None
    assert told["parameter"] == name
    assert (told["taskType"], told["taskUUID"]) == ("imageInference", UUID)


@cases(BEYOND)
def test_what_the_model_cannot_do_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ServiceError, match=name) as caught:
        task(**{name: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"taskUUID": None}, "missing_required_parameter", "taskUUID"),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"positivePrompt": None}, "missing_required_parameter", "positivePrompt"),
        ({"width": 512}, "missing_required_parameter", "height"),
        ({"height": 512}, "missing_required_parameter", "width"),
        ({"model": "runware:100@1"}, "model_not_found", "model"),
        ({"strength": 0.5}, "unknown_parameter", "strength"),
        ({"x" * 999: 1}, "unknown_parameter", "x" * 40),
        ({"inputs": {"mask": 1}}, "unknown_parameter", "inputs.mask"),
        ({"ttl": 60, "outputType": "dataURI"}, "invalid_value", "ttl"),
        ({"lora": [{"model": "ink"}, {"model": "ink"}]}, "invalid_value", "lora.model"),
        (
            {"inputs": {"referenceImages": ["a"]}, "referenceImages": ["a"]},
            "invalid_value",
            "referenceImages",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ServiceError) as caught:
        task(**fields)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_sides_are_multiples_of_the_models_unit() -> None:
    with pytest.raises(ServiceError, match="multiple of 32"):
        image_task(LEAST | {"width": 528, "height": 512}, (MODEL,), (), 32)


def test_what_is_kept_makes_room_and_ends() -> None:
    now = 0.0
    kept: Kept[str] = Kept(100, 5, 0.5, clock=lambda: now)

    def put(key: str, owner: str = "a", nbytes: int = 20, ttl_s: float = 60) -> None:
        kept.put(key, key, owner=owner, nbytes=nbytes, ttl_s=ttl_s)

    def held() -> str:
        return "".join(key for key in "abcdefgh" if kept.get(key))

    put("a")
    put("b")
    assert (held(), kept.nbytes) == ("ab", 40)
    put("c")  # an owner's third is more than half of five
    assert held() == "bc"
    put("d", "b")
    put("e", "c", ttl_s=10)
    put("f", "d", 40)  # of all: the oldest goes
    assert (held(), kept.nbytes) == ("cdef", 100)
    now = 10
    assert held() == "cdf"
    put("g", "e")  # and what is over goes before that
    assert (held(), kept.nbytes, len(kept)) == ("cdfg", 100, 4)
    now = 70
    put("h")
    assert (held(), kept.nbytes, len(kept)) == ("h", 20, 1)
    with pytest.raises(ServiceError) as caught:
        put("i", nbytes=51)
    assert caught.value.code == "payload_too_large"
