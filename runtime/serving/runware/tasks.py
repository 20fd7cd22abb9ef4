"""Runware's tasks as they come, checked field by field.

The fields of `imageInference` and their ranges are those of the model's page (`runware:400@6`).
What the distilled model cannot do is refused by name: who sends it would take the result for
something else.
"""

import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from klein_kv.runtime.serving.api.fields import only
from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.outputs import OutputFormat

__all__ = ["MODEL", "ImageTask", "MediaTask", "Task", "UploadTask", "is_uuid"]

MODEL = "runware:400@6"
"""FLUX.2 [klein] 9B-KV in Runware's catalogue."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_KINDS: dict[str, OutputFormat] = {"JPG": "jpeg", "PNG": "png", "WEBP": "webp"}
_EULER = "the distilled model has the flow-matching Euler steps alone; expected Default or Euler"
_NO_FILTER = "this server has no content filter; expected none"
_NOT_SKIPPED = "this server skips no computation; expected none"


def is_uuid(text: str) -> bool:
    """Whether a text has a UUID's form."""
    return _UUID.fullmatch(text) is not None


def _uuid(text: str) -> str:
    if not is_uuid(text):
        raise ValueError("expected a UUID")
    return text.lower()


def _without_guidance(scale: float) -> float:
    if scale > 1:
        raise PydanticCustomError(
            "unsupported_parameter",
            "the model is distilled and has no guidance, expected at most 1",
        )
    return scale


def _without_filter(safety: dict[str, Any]) -> dict[str, Any]:
    if safety.get("mode", "none") != "none" or safety.get("checkContent", False) is not False:
        raise PydanticCustomError("unsupported_parameter", _NO_FILTER)
    return {}  # a task may wait for long, and this may be large


def _content(value: Any) -> str:
    try:
        if isinstance(value, str) and value.encode():
            return value
    except UnicodeEncodeError:
        pass  # half a character
    raise ValueError("expected an image: a UUID, URL, data URI or base64")


Name = Annotated[str, Field(min_length=1, max_length=200)]
Url = Annotated[str, Field(min_length=1, max_length=4096)]
Content = Annotated[str, BeforeValidator(_content)]
References = Annotated[list[Content], Field(min_length=1, max_length=4)]
Side = Annotated[int, Field(ge=128, le=2048, multiple_of=16)]


class _Sent(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", strict=True, allow_inf_nan=False
    )


class Task(_Sent):
    """What every task has; `task_uuid` is the client's name for it."""

    model_config = ConfigDict(extra="ignore")

    task_type: Any = None
    task_uuid: Annotated[str, AfterValidator(_uuid)] = Field(alias="taskUUID")


class UploadTask(Task):
    """An `imageUpload`."""

    model_config = ConfigDict(extra="forbid")

    content: Content = Field(alias="image")
    operation: Literal["upload"] = "upload"
    delivery_method: Any = None


class MediaTask(Task):
    """A `mediaStorage`; what is deleted is named by its UUID."""

    model_config = ConfigDict(extra="forbid")

    content: Content = Field(alias="media")
    operation: Literal["upload", "delete"] = "upload"
    delivery_method: Any = None


class Lora(_Sent):
    """An adapter, by the name under which the operator registered it."""

    model: Name
    weight: float = Field(1.0, ge=-4, le=4)


class Inputs(_Sent):
    """What an image is made from."""

    reference_images: References = Field(default_factory=list)


class ImageTask(Task):
    """One `imageInference`: seed is that of the first result; result i uses `seed + i`."""

    model_config = ConfigDict(extra="forbid")

    model: Name
    positive_prompt: str = Field(min_length=1, max_length=10_000)
    negative_prompt: str = Field("", max_length=10_000)  # without guidance it has no effect
    inputs: Inputs = Field(default_factory=Inputs)
    reference_images: References = Field(default_factory=list)  # where it was before `inputs`
    width: Side | None = None
    height: Side | None = None
    seed: int = Field(default_factory=lambda: secrets.randbits(32), ge=0, le=2**63 - 1)
    steps: int = Field(4, ge=1, le=50)
    number_results: int = Field(1, ge=1, le=20)
    scheduler: Annotated[
        Any, only(_EULER, "Default", "Euler", "FlowMatchEulerDiscreteScheduler")
    ] = None
    cfg_scale: Annotated[float, AfterValidator(_without_guidance)] = Field(
        0.0, alias="CFGScale", ge=0, le=50
    )
    acceleration: Annotated[Any, only(_NOT_SKIPPED, "none")] = None
    accelerator_options: Annotated[Any, only(_NOT_SKIPPED)] = None
    ultralytics: Annotated[Any, only("this server has no detection models; leave it out")] = None
    advanced_features: Annotated[Any, only("this model has none; leave it out", {})] = None
    routing: Annotated[Any, only("this server alone computes; leave it out")] = None
    safety: Annotated[dict[str, Any], AfterValidator(_without_filter)] = Field(default_factory=dict)
    check_nsfw: Annotated[Any, only(_NO_FILTER, False)] = Field(None, alias="checkNSFW")
    lora: list[Lora] = Field(default_factory=list, max_length=8)
    output_type: Literal["URL", "base64Data", "dataURI"] = "URL"
    output_format: Literal["JPG", "PNG", "WEBP"] = "JPG"
    output_quality: int = Field(95, ge=20, le=99)
    delivery_method: Literal["sync", "async"] = "sync"
    include_cost: bool = False
    ttl: int | None = Field(None, ge=60, le=2**31)
    webhook_url: Url | None = Field(None, alias="webhookURL")
    upload_endpoint: Url | None = None

    @property
    def references(self) -> list[str]:
        """Images as they came; emptied when they are pixels."""
        return self.inputs.reference_images or self.reference_images

    @property
    def loras(self) -> tuple[tuple[str, float], ...]:
        """Names and weights."""
        return tuple((lora.model, lora.weight) for lora in self.lora)

    @property
    def kind(self) -> OutputFormat:
        """Of the file."""
        return _KINDS[self.output_format]

    def check(self, unit: int) -> None:
        """Refuses what fields say against each other, and sides that are no multiples of `unit`."""
        for name, side, other in (
            ("width", self.width, self.height),
            ("height", self.height, self.width),
        ):
            if side is None and other is not None:
                raise ServiceError("missing_required_parameter", f"{name} is missing", name)
            if side is not None and side % unit:
                raise ServiceError(
                    "invalid_value",
                    f"{name} is {side}, expected a multiple of {unit}, as this model needs",
                    name,
                )
        if {"inputs", "reference_images"} <= self.model_fields_set:
            raise ServiceError(
                "invalid_value",
                "references are given twice; expected inputs alone",
                "referenceImages",
            )
        if len({name for name, _ in self.loras}) < len(self.lora):
            raise ServiceError("invalid_value", "a LoRA is named twice", "lora.model")
        if self.ttl is not None and self.output_type != "URL":
            raise ServiceError(
                "invalid_value", f"ttl is for URLs, and outputType is {self.output_type}", "ttl"
            )
