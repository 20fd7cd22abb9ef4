"""Runware's `imageInference` as it comes, checked field by field.

The fields and their ranges are those of the model's page (`runware:400@6`). What the distilled
model cannot do is refused by name: who sends it would take the result for something else.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from klein_kv.runtime.serving.errors import ServiceError

__all__ = ["MODEL", "ImageTask", "image_task", "is_uuid", "task_uuid"]

MODEL = "runware:400@6"
"""FLUX.2 [klein] 9B-KV in Runware's catalogue."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_SHOWN = 40  # characters of a wrong value

Check = Callable[[object, str], Any]
"""Takes a value and its field's name, and returns the value or raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask:
    """One `imageInference`, every field in its range.

    Attributes:
        uuid: the client's name for it.
        references: images as UUID, URL, data URI or base64.
        seed: of the first result; result i uses `seed + i`.
        loras: names and weights.
        kind: of the file, as `encode_image` has it.
        quality: of JPEG and WebP.
        output: how results are handed over.
        later: answered at once, asked for with `getResponse`.
        ttl_s: seconds that a URL is good for; None for the server's own time.
        upload, webhook: where results and answers are sent to as well.
    """

    uuid: str
    prompt: str
    references: tuple[str, ...] = ()
    width: int | None = None
    height: int | None = None
    seed: int
    steps: int = 4
    count: int = 1
    loras: tuple[tuple[str, float], ...] = ()
    kind: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int = 95
    output: Literal["URL", "base64Data", "dataURI"] = "URL"
    later: bool = False
    cost: bool = False
    ttl_s: int | None = None
    upload: str | None = None
    webhook: str | None = None


def is_uuid(text: str) -> bool:
    """Whether a text has a UUID's form."""
    return _UUID.fullmatch(text) is not None


def task_uuid(task: Mapping[str, Any]) -> str:
    """The client's name of a task.

    Raises:
        ServiceError: there is none, or it is no UUID.
    """
    value = task.get("taskUUID")
    if value is None:
        raise ServiceError(
            "missing_required_parameter", "taskUUID is missing, expected a UUID", "taskUUID"
        )
    if not (isinstance(value, str) and is_uuid(value)):
        raise _wrong("taskUUID", value, "a UUID")
    return value.lower()


def image_task(
    task: Mapping[str, Any], models: tuple[str, ...], loras: tuple[str, ...], unit: int
) -> ImageTask:
    """Checks an `imageInference`.

    Args:
        task: as it came.
        models: names of the model.
        loras: names that are registered.
        unit: sides of images are multiples of it.

    Raises:
        ServiceError: the first field that is wrong, unknown, missing, or beyond the model; its
            `param` names it.
    """
    uuid = task_uuid(task)
    unknown = task.keys() - _FIELDS.keys()
    if unknown:
        name = min(unknown)[:_SHOWN]
        raise ServiceError("unknown_parameter", f"there is no parameter {name!r}", name)
    given = {name: _FIELDS[name](value, name) for name, value in task.items() if value is not None}
    for name in ("model", "positivePrompt"):
        if name not in given:
            raise ServiceError("missing_required_parameter", f"{name} is missing", name)
    if given["model"] not in models:
        raise ServiceError(
            "model_not_found", f"this server has the model {models[0]} alone", "model"
        )
    both = "width" in given, "height" in given
    for name in ("width", "height"):
        if given.get(name, 0) % unit:
            raise _wrong(name, given[name], f"a multiple of {unit}, as this model needs")
    if any(both) and not all(both):
        name = "height" if both[0] else "width"
        raise ServiceError("missing_required_parameter", f"{name} is missing", name)
    if "inputs" in given and "referenceImages" in given:
        raise ServiceError(
            "invalid_value", "references are given twice; expected inputs alone", "referenceImages"
        )
    for name, _ in given.get("lora", ()):
        if name not in loras:
            known = ", ".join(loras) or "none"
            raise ServiceError(
                "invalid_value", f"no LoRA of this name is registered; there are: {known}", "lora"
            )
    output = given.get("outputType", "URL")
    if "ttl" in given and output != "URL":
        raise ServiceError("invalid_value", f"ttl is for URLs, and outputType is {output}", "ttl")
    sized = bool(given.get("inputs") or given.get("referenceImages")) or any(both)
    return ImageTask(
        uuid=uuid,
        prompt=given["positivePrompt"],
        references=given.get("inputs") or given.get("referenceImages") or (),
        width=given.get("width", None if sized else 1024),
        height=given.get("height", None if sized else 1024),
        seed=given["seed"] if "seed" in given else secrets.randbits(32),
        steps=given.get("steps", 4),
        count=given.get("numberResults", 1),
        loras=given.get("lora", ()),
        kind=_KINDS[given.get("outputFormat", "JPG")],
        quality=given.get("outputQuality", 95),
        output=output,
        later=given.get("deliveryMethod") == "async",
        cost=given.get("includeCost", False),
        ttl_s=given.get("ttl"),
        upload=given.get("uploadEndpoint"),
        webhook=given.get("webhookURL"),
    )


def _wrong(name: str, value: object, expected: str) -> ServiceError:
    if isinstance(value, str):
        shown = repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…")
    elif isinstance(value, bool | int | float):
        shown = f"{value!r:.{_SHOWN}}"
    else:
        shown = "a list" if isinstance(value, list) else "an object"
    return ServiceError("invalid_value", f"{name} is {shown}, expected {expected}", name)


def _text(low: int, high: int) -> Check:
    def check(value: object, name: str) -> str:
        expected = f"a text of {low} to {high} characters"
        if not isinstance(value, str):
            raise _wrong(name, value, expected)
        if not low <= len(value) <= high:
            raise ServiceError(
                "invalid_value", f"{name} has {len(value)} characters, expected {expected}", name
            )
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ServiceError("invalid_value", f"{name} holds half a character", name)
        return value

    return check


def _whole(low: int, high: int, step: int = 1) -> Check:
    def check(value: object, name: str) -> int:
        steps = f" in steps of {step}" if step > 1 else ""
        expected = f"a whole number from {low} to {high}{steps}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(name, value, expected)
        if not low <= value <= high or value % step:
            raise _wrong(name, value, expected)
        return value

    return check


def _number(value: object, name: str, low: float, high: float) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not low <= value <= high:  # type: ignore[operator]
        raise _wrong(name, value, f"a number from {low:g} to {high:g}")
    return float(value)  # type: ignore[arg-type]


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _choice(*allowed: str) -> Check:
    def check(value: object, name: str) -> str:
        if not (isinstance(value, str) and value in allowed):
            raise _wrong(name, value, "one of " + ", ".join(allowed))
        return value

    return check


def _only(why: str, *allowed: object) -> Check:
    """Takes what changes nothing, and refuses the rest as beyond this model or server."""

    def check(value: object, name: str) -> object:
        if value not in allowed:
            raise ServiceError("unsupported_parameter", f"{name}: {why}", name)
        return value

    return check


def _guidance(value: object, name: str) -> float:
    scale = _number(value, name, 0, 50)
    if scale > 1:
        raise ServiceError(
            "unsupported_parameter",
            f"{name} is {scale:g}: the model is distilled and has no guidance, expected at most 1",
            name,
        )
    return scale


def _safety(value: object, name: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    if value.get("mode", "none") != "none" or value.get("checkContent", False) is not False:
        _only(_NO_FILTER)(value, name)


def _references(value: object, name: str) -> tuple[str, ...]:
    expected = "a list of 1 to 4 images, each a UUID, URL, data URI or base64"
    if not isinstance(value, list) or not 1 <= len(value) <= 4:
        raise _wrong(name, value, expected)
    for image in value:
        if not isinstance(image, str) or not image:
            raise _wrong(name, value, expected)
    return tuple(value)


def _inputs(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object with referenceImages")
    for other in value.keys() - {"referenceImages"}:
        raise ServiceError(
            "unknown_parameter", "inputs takes referenceImages alone", f"inputs.{other[:_SHOWN]}"
        )
    if "referenceImages" not in value:
        return ()
    return _references(value["referenceImages"], "inputs.referenceImages")


def _loras(value: object, name: str) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, list) or len(value) > 8:
        raise _wrong(name, value, "a list of at most 8 objects {model, weight}")
    found: dict[str, float] = {}
    for entry in value:
        if not isinstance(entry, dict) or not entry.keys() <= {"model", "weight"}:
            raise _wrong(name, entry, "objects {model, weight}")
        model = _text(1, 200)(entry.get("model", ""), f"{name}.model")
        if model in found:
            raise ServiceError("invalid_value", "a LoRA is named twice", f"{name}.model")
        found[model] = _number(entry.get("weight", 1.0), f"{name}.weight", -4, 4)
    return tuple(found.items())


_KINDS: dict[str, Literal["jpeg", "png", "webp"]] = {"JPG": "jpeg", "PNG": "png", "WEBP": "webp"}
_EULER = "the distilled model has the flow-matching Euler steps alone; expected Default or Euler"
_NO_FILTER = "this server has no content filter; expected none"
_FIELDS: dict[str, Check] = {
    "taskType": _text(1, 100),
    "taskUUID": _text(1, 100),
    "model": _text(1, 200),
    "positivePrompt": _text(1, 10_000),
    "negativePrompt": _text(0, 10_000),  # Runware's page: without guidance it has no effect
    "inputs": _inputs,
    "referenceImages": _references,  # where it was before `inputs`
    "width": _whole(128, 2048, 16),
    "height": _whole(128, 2048, 16),
    "seed": _whole(0, 2**63 - 1),
    "steps": _whole(1, 50),
    "numberResults": _whole(1, 20),
    "scheduler": _only(_EULER, "Default", "Euler", "FlowMatchEulerDiscreteScheduler"),
    "CFGScale": _guidance,
    "acceleration": _only("this server skips no computation; expected none", "none"),
    "acceleratorOptions": _only("this server skips no computation; leave it out"),
    "ultralytics": _only("this server has no detection models; leave it out"),
    "advancedFeatures": _only("this model has none; leave it out", {}),
    "routing": _only("there is one place where this server computes; leave it out"),
    "safety": _safety,
    "checkNSFW": _only(_NO_FILTER, False),
    "lora": _loras,
    "outputType": _choice("URL", "base64Data", "dataURI"),
    "outputFormat": _choice("JPG", "PNG", "WEBP"),
    "outputQuality": _whole(20, 99),
    "deliveryMethod": _choice("sync", "async"),
    "includeCost": _flag,
    "ttl": _whole(60, 2**31),
    "webhookURL": _text(1, 4096),
    "uploadEndpoint": _text(1, 4096),
}
