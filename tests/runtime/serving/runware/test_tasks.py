"""Fields of `imageInference`, one by one."""

from typing import Any

import pytest

from klein_kv.runtime.serving.api.fields import checked
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.runware.answers import failed
from klein_kv.runtime.serving.runware.tasks import MODEL, ImageTask

UUID = "50836053-a0ee-4cf5-b9d6-ae7c5d140ada"
LEAST: dict[str, Any] = {
    "taskType": "imageInference",
    "taskUUID": UUID,
    "model": MODEL,
    "positivePrompt": "a red kite",
}


def task(fields: dict[str, Any], unit: int = 16) -> ImageTask:
    made = checked(ImageTask, LEAST | fields)
    made.check(unit)
    return made


def test_defaults_are_those_of_the_models_page() -> None:
    least = task({"seed": None, "lora": None})  # null is not given
    assert (least.width, least.height, least.steps, least.number_results) == (None, None, 4, 1)
    assert (least.output_type, least.kind, least.output_quality) == ("URL", "jpeg", 95)
    assert (least.delivery_method, least.include_cost, least.ttl) == ("sync", False, None)
    assert (least.references, least.loras) == ([], ())
    assert 0 <= least.seed < 2**32
    assert least.seed != task({}).seed
    assert task({"inputs": {"referenceImages": ["x"]}}).references == ["x"]
    assert task({"referenceImages": ["x", "y"]}).references == ["x", "y"]


LORAS = [{"model": "style", "weight": -4}, {"model": "ink"}]
# What is taken, what is out of range, and what the model or the server cannot do.
FIELDS: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    "taskUUID": ([UUID.upper()], ["", "x", 1, UUID + "0", UUID + "\n", [UUID]], []),
    "model": (["test/klein"], ["", 3, "x" * 201], []),
    "positivePrompt": (["x", "ü" * 10_000], ["", "x" * 10_001, 3, ["x"], "\ud800"], []),
    "negativePrompt": (["", "blur"], [3], []),
    "inputs": ([{}], [[], "x"], []),
    "inputs.referenceImages": ([["a"] * 4], [[], ["a"] * 5, "a", [1], [""], [None], {"a": 1}], []),
    "referenceImages": ([["a"] * 4], [[], ["a"] * 5, [3]], []),
    "width": ([2048], [0, 112, 2064, 1000, 1024.0, "1024", True, 10**400, -16], []),
    "height": ([128], [127, 129, 4096], []),
    "seed": ([0, 2**63 - 1], [-1, 2**63, 1.5, True], []),
    "steps": ([1, 50], [0, 51], []),
    "numberResults": ([1, 20], [0, 21], []),
    "scheduler": (
        ["Default", "Euler", "FlowMatchEulerDiscreteScheduler"],
        [],
        ["DDIM", "LCM", "euler", 3],
    ),
    "CFGScale": (
        [0, 1, 1.0, 0.5],
        [-1, 51, "1", float("nan"), float("inf"), 10**400],
        [1.01, 3.5],
    ),
    "acceleration": (["none"], [], ["low", "high"]),
    "acceleratorOptions": ([], [], [{}, {"teaCache": True}]),
    "ultralytics": ([], [], [{}]),
    "advancedFeatures": ([{}], [], [{"layerDiffuse": True}]),
    "routing": ([], [], [{}]),
    "safety": (
        [{}, {"checkContent": False}, {"mode": "none", "checkContent": False}],
        ["none"],
        [{"mode": "fast"}, {"checkContent": True}],
    ),
    "checkNSFW": ([False], [], [True]),
    "lora": ([[], LORAS[:1], LORAS], ["style", [1], [{"model": "x"}] * 9], []),
    "lora.model": (["ink"], [3, ""], []),
    "lora.weight": ([4], [4.01, -5, "1", True], []),
    "outputType": (["URL", "base64Data", "dataURI"], ["url", "stream", []], []),
    "outputFormat": (["JPG", "PNG", "WEBP"], ["jpg", "GIF", {}], []),
    "outputQuality": ([20, 99], [19, 100], []),
    "deliveryMethod": (["sync", "async"], ["stream", 1], []),
    "includeCost": ([True, False], [1, "true"], []),
    "ttl": ([60, 86_400], [59, 60.5], []),
    "webhookURL": (["https://example.com"], [3, ""], []),
    "uploadEndpoint": (["https://example.com"], [3, "https://" + "a" * 5000], []),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_and_their_ranges(name: str) -> None:
    outer, _, inner = name.partition(".")
    taken, wrong, beyond = FIELDS[name]

    def ask(value: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {outer: value}
        if inner:
            fields[outer] = (
                [{"model": "style", inner: value}] if outer == "lora" else {inner: value}
            )
        return {"width": 512, "height": 512} | fields

    for value in taken:
        task(ask(value))
    for values, code in ((wrong, "invalid_value"), (beyond, "unsupported_parameter")):
        for value in values:
            with pytest.raises(ServiceError, match=name) as caught:
                task(ask(value))
            assert (caught.value.code, caught.value.param) == (code, name), value
            assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"taskUUID": None}, "missing_required_parameter", "taskUUID"),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"positivePrompt": None}, "missing_required_parameter", "positivePrompt"),
        ({"width": 512}, "missing_required_parameter", "height"),
        ({"height": 512}, "missing_required_parameter", "width"),
        ({"width": 528, "height": 512}, "invalid_value", "width"),  # of a unit of 32
        ({"lora": [{}]}, "missing_required_parameter", "lora.model"),
        ({"lora": [{"model": "style", "scale": 1}]}, "unknown_parameter", "lora.scale"),
        ({"lora": LORAS[:1] * 2}, "invalid_value", "lora.model"),
        ({"strength": 0.5}, "unknown_parameter", "strength"),
        ({"x" * 999: 1}, "unknown_parameter", "x" * 64),
        ({str(i): 1 for i in range(100_000)}, "invalid_value", None),
        ({"inputs": {"mask": 1}}, "unknown_parameter", "inputs.mask"),
        ({"ttl": 60, "outputType": "dataURI"}, "invalid_value", "ttl"),
        (
            {"inputs": {"referenceImages": ["a"]}, "referenceImages": ["a"]},
            "invalid_value",
            "referenceImages",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ServiceError) as caught:
        task(fields, unit=32)
    assert (caught.value.code, caught.value.param) == (code, param)
    told = failed(LEAST, caught.value).error
    assert told is not None
    assert told.get("parameter") == param
    assert (told["taskType"], told["taskUUID"]) == ("imageInference", UUID)
