"""Fields of a request, as JSON or as a form, checked before anything is decoded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, LiteralString, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from klein_kv.runtime.serving.errors import ServiceError
from klein_kv.runtime.serving.front import Front, Upload
from klein_kv.runtime.serving.security.limits import json_value
from klein_kv.runtime.serving.settings import ServeSettings

__all__ = [
    "EditFields",
    "ReferenceFields",
    "Sent",
    "body_schema",
    "checked",
    "described",
    "only",
    "read_fields",
]

M = TypeVar("M", bound=BaseModel)

MAX_FIELDS = 64
_LONGEST_NAME = 256
_QUOTED = 40  # characters of a text that was wrong
_LORA = re.compile(r"(?P<name>[^:,]+)(:(?P<weight>-?\d+(\.\d+)?))?")
_MOST_LORAS = 8
_LONGEST_LORA = 1000  # characters of all names and weights in one text
_SMALL = 65536


@dataclass(slots=True)
class Sent:
    """What a request holds: fields by name, reference images in order, and a mask."""

    values: dict[str, Any] = field(default_factory=dict)
    images: list[Upload] = field(default_factory=list)
    mask: Upload | None = None

    def add(self, name: str, value: Any) -> None:
        """Takes in one field of a form, or key of a JSON object; refuses it twice, or as a file."""
        base = re.sub(r"\[\d*\]$", "", name[:_LONGEST_NAME])
        if base in ("image", "url", "images"):
            self.images += [Upload(_content(x, base), base) for x in _listed(value)]
        elif base == "mask":
            self.mask = Upload(_content(value, base), base)
        elif isinstance(value, UploadedBytes):
            raise ServiceError("unknown_parameter", "a file in an unknown field", _short(name))
        elif base in ("references", "lora"):
            self.values.setdefault(base, []).extend(_listed(value))
        elif name in self.values:
            raise ServiceError("invalid_value", "a field is given twice", _short(name))
        else:
            self.values[name] = value


class UploadedBytes(bytes):
    """Of a form's file."""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _content(value: Any, param: str) -> bytes | str:
    """Of an image: a file, a text, or OpenAI's {"image_url": text or {"url": text}}."""
    if isinstance(value, dict) and value.keys() <= {"image_url", "detail", "type"}:
        value = value.get("image_url")
        if isinstance(value, dict):
            value = value.get("url")
    elif isinstance(value, dict) and "file_id" in value:
        raise ServiceError("unsupported_parameter", "files are not kept here: send images", param)
    if isinstance(value, str | bytes) and value:
        return value
    raise ServiceError("invalid_value", "expected a file, a data URI or a URL", param)


async def read_fields(request: Request, front: Front) -> Sent:
    """Reads a JSON object or a form; refuses what is neither with "invalid_body"."""
    sent = Sent()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        await _read_multipart(request, sent, front.settings)
    elif kind in ("application/json", ""):
        body = await request.body()
        small = len(body) < _SMALL
        values = _json_object(body) if small else await front.in_thread(_json_object, body)
        for name, value in values.items():
            if value is not None:
                sent.add(name, value)
    else:
        raise ServiceError("invalid_body", "expected application/json or multipart/form-data")
    return sent


def _json_object(body: bytes) -> dict[str, Any]:
    value = json_value(body)
    if not isinstance(value, dict) or len(value) > MAX_FIELDS:
        raise ServiceError(
            "invalid_body", f"the body is no JSON object of at most {MAX_FIELDS} fields"
        )
    return value


class _InMemory(MultiPartParser):
    """Files stay in memory, which the limits of a body bound: nothing is written to a disk."""

    spool_max_size = 1 << 62


async def _read_multipart(request: Request, sent: Sent, settings: ServeSettings) -> None:
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        # Starlette would decode by it, and some of Python's codecs take hours (punycode).
        raise ServiceError("invalid_body", "expected a form in UTF-8")
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=settings.max_references + 2,
        max_fields=MAX_FIELDS,
        max_part_size=settings.max_body_bytes,
    )
    try:
        form = await parser.parse()
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                sent.add(name, UploadedBytes(await value.read()))
            elif value or name == "prompt":
                sent.add(name, value)
    except (MultiPartException, FormParserError, KeyError, UnicodeError, AssertionError):
        raise ServiceError(
            "invalid_body",
            f"the form cannot be read, or has more than {settings.max_references} files or "
            f"{MAX_FIELDS} fields",
        ) from None
    finally:
        for file in parser._files_to_close_on_error:  # one that is cut short is in no form
            file.close()


def _size(value: Any) -> Any:
    """(width, height) of "WxH"; None of "auto"."""
    if value in (None, "auto"):
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected WIDTHxHEIGHT, or auto")
    return int(match[1]), int(match[2])


def _loras(value: Any) -> Any:
    """((name, weight), ...) of "NAME:WEIGHT,..." texts or of {"name", "weight"} objects."""
    found: list[Any] = []
    for entry in _listed(value)[: _MOST_LORAS + 1]:
        if isinstance(entry, dict):
            name = entry.get("name", entry.get("model"))
            found.append((name, entry.get("weight", 1.0)))
            continue
        if not isinstance(entry, str) or len(entry) > _LONGEST_LORA:
            raise ValueError(f"expected texts of at most {_LONGEST_LORA} characters")
        for part in entry.split(","):
            match = _LORA.fullmatch(part.strip())
            if match is None:
                raise ValueError("expected NAME or NAME:WEIGHT")
            found.append((match["name"], float(match["weight"] or 1)))
    return tuple(found)


def only(why: LiteralString, *allowed: object) -> BeforeValidator:
    """Takes what changes nothing, and refuses the rest as beyond this model or server."""

    def check(value: object) -> object:
        if value not in allowed:
            raise PydanticCustomError("unsupported_parameter", why)
        return value

    return BeforeValidator(check)


_NOT_KEPT = "images are not kept here: ask for b64_json"
_OPAQUE = "the model makes opaque images: expected auto or opaque"
_TEXT = {"type": "string"}
Size = Annotated[
    tuple[int, int] | None,
    BeforeValidator(_size),
    WithJsonSchema(_TEXT | {"pattern": r"^(auto|\d+x\d+)$"}),
]
Weight = Annotated[float, Field(ge=-4, le=4)]
Loras = Annotated[
    tuple[tuple[str, Weight], ...],
    BeforeValidator(_loras),
    Field(max_length=_MOST_LORAS),
    WithJsonSchema(_TEXT | {"pattern": r"^[^:,]+(:-?\d+(\.\d+)?)?$"}),
]


class ReferenceFields(BaseModel):
    """Of `POST /v1/references`, besides images."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, max_length=256)
    lora: Loras = ()
    timeout: float | None = Field(None, gt=0, description="seconds until the answer is of no use")
    user: str | None = None


class EditFields(ReferenceFields):
    """Of both image routes, besides images; OpenAI's names, and a few of our own.

    `quality`, `style`, `user`, `moderation` and `input_fidelity` have no effect here.
    """

    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1)
    size: Size = None
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    num_inference_steps: int = Field(4, ge=1, le=50)
    guidance_scale: float | None = None
    references: list[Annotated[str, Field(max_length=128)]] = Field([], max_length=4)
    strength: float | None = Field(None, gt=0, le=1)
    response_format: Annotated[Literal["b64_json"], only(_NOT_KEPT, "b64_json")] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    background: Annotated[Literal["auto", "opaque"], only(_OPAQUE, "auto", "opaque")] = "auto"
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    input_fidelity: str | None = None

    def check(self, settings: ServeSettings, unit: int) -> None:
        """Refuses what this service does not do, and what fields say against each other."""
        if self.n > settings.max_images:
            raise _bad("n", f"is {self.n}, expected at most {settings.max_images}")
        if len(self.prompt) > settings.max_prompt:
            raise _bad("prompt", f"is longer than {settings.max_prompt} characters")
        if self.size is not None:
            least = -(-128 // unit) * unit
            for side in self.size:
                if not least <= side <= settings.max_side or side % unit:
                    raise _bad(
                        "size",
                        f"has a side of {side}, expected a multiple of {unit} from {least} to "
                        f"{settings.max_side}",
                    )
        if self.partial_images and not self.stream:
            raise _bad("partial_images", "needs stream")
        if self.stream and self.n > 1:
            raise _bad("n", f"is {self.n}, expected 1 with stream")


def body_schema(model: type[BaseModel], *images: str) -> dict[str, Any]:
    """What OpenAPI says of a request: JSON, and a form where it may hold `images`."""
    schema = model.model_json_schema()
    if not images:
        return described({"application/json": schema})
    content = {}
    for kind, form in (("application/json", "uri-reference"), ("multipart/form-data", "binary")):
        more = {name: _TEXT | {"format": form} for name in images}
        content[kind] = schema | {"properties": schema["properties"] | more}
    return described(content)


def described(schemas: dict[str, Any]) -> dict[str, Any]:
    """A request's body for OpenAPI, by its content type."""
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def checked(model: type[M], values: Mapping[str, Any]) -> M:
    """An instance of `model`; refuses the first field that is wrong. None is not given."""
    try:
        return model.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        if error.error_count() > MAX_FIELDS:
            raise ServiceError("invalid_value", "too many fields are wrong") from None
        first = error.errors(include_url=False, include_context=False)[0]
    name = _short(".".join(part for part in first["loc"] if isinstance(part, str)))
    if first["type"] == "missing":
        raise ServiceError("missing_required_parameter", f"{name} is missing", name)
    if first["type"] == "extra_forbidden":
        raise ServiceError("unknown_parameter", f"{name} is not known here", name)
    code = "unsupported_parameter" if first["type"] == "unsupported_parameter" else "invalid_value"
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        text = "expected an object"
    text = text[:1].lower() + text[1:]
    raise ServiceError(code, f"{name}{_quoted(first['input'])}: {text}", name)


def _quoted(value: Any) -> str:
    """What was sent, where it is a text or a number; of a long text the beginning."""
    if isinstance(value, str) and len(value) > _QUOTED:
        return f" is {value[:_QUOTED] + '…'!r} ({len(value)} characters)"
    return f" is {value!r:.50}" if isinstance(value, int | float | str) else ""


def _bad(param: str, text: str) -> ServiceError:
    return ServiceError("invalid_value", f"{param} {text}", param)


def _short(name: str) -> str:
    """A field's name as a client sent it, for an answer."""
    return "".join(x if x.isprintable() else "?" for x in name[:64])
