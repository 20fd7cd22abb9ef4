"""Where the tensors of a LoRA come from: a safetensors file, the hub, or arrays of the caller's."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.weights import (
    NUMPY_DTYPES,
    WeightRef,
    map_weight,
    read_header,
    read_metadata,
)
from klein_kv.errors import MALFORMED, CheckpointError, RequestError

__all__ = ["LoraSource", "find_lora", "open_lora"]

_FLOATS = {dtype for name, dtype in NUMPY_DTYPES.items() if "float" in name}
_USUAL_NAME = "pytorch_lora_weights.safetensors"
_PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Regular expressions of a file are run: none that could take long.
_PATTERN = re.compile(r"(?:[\w.^$|()\\]|(?<=\.)\*){1,200}")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What diffusers writes of PEFT's `LoraConfig` into a file's metadata."""

    alpha: float | None = None
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    use_rslora: bool = False

    @classmethod
    def from_json(cls, text: str, where: str) -> "PeftConfig":
        """Reads `lora_adapter_metadata`; a `RequestError` if it is no such thing."""
        try:
            config = {k.removeprefix("transformer."): v for k, v in json.loads(text).items()}
            alphas = config.get("alpha_pattern") or {}
            if bad := [x for x in alphas if not _PATTERN.fullmatch(x) or x.count("*") > 3]:
                raise ValueError(f"alpha_pattern {bad[0]!r:.80} is too involved")
            # peft/utils/other.py: get_pattern_key
            patterns = tuple((re.compile(rf"(.*\.)?({x})$"), _finite(y)) for x, y in alphas.items())
            alpha = config.get("lora_alpha")
            return cls(
                None if alpha is None else _finite(alpha), patterns, bool(config.get("use_rslora"))
            )
        except (*MALFORMED, re.error) as error:
            raise RequestError(
                f"{where}: its lora_adapter_metadata cannot be read: {error}"
            ) from error

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's product."""
        own = (alpha for pattern, alpha in self.alpha_patterns if pattern.match(module))
        alpha = next(own, rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True, slots=True)
class LoraSource:
    """Tensors by key, and what PEFT says of them."""

    name: str
    tensors: Mapping[str, Any]
    peft: PeftConfig = PeftConfig()

    def array(self, key: str) -> NDArray[Any]:
        """A tensor as it is stored (a dictionary's: copied), without a convolution's axes of 1.

        A `RequestError` if it is not floating point, or not finite.
        """
        array = self._stored(key)
        if array.dtype not in _FLOATS:
            raise RequestError(
                f"{self.name}: {key} has dtype {array.dtype}, expected floating point"
            )
        if not np.isfinite(array).all():
            raise RequestError(f"{self.name}: {key} holds values that are not finite")
        if array.ndim > 2 and set(array.shape[2:]) == {1}:
            array = array.reshape(array.shape[:2])
        return array

    def number(self, key: str) -> float:
        """A tensor of one element; a `RequestError` if it is none, or not finite."""
        array = self._stored(key)
        if array.size == 1 and (array.dtype in _FLOATS or array.dtype.kind in "iu"):
            value = float(array.reshape(()))
            if math.isfinite(value):
                return value
        raise RequestError(f"{self.name}: {key} is {array!r:.80}, expected one finite number")

    def _stored(self, key: str) -> NDArray[Any]:
        value = self.tensors[key]
        if isinstance(value, WeightRef):
            return map_weight(value) if value.nbytes else np.empty(value.shape, np.float32)
        try:
            if hasattr(value, "detach"):
                value = value.detach().cpu().float().numpy()
            array = np.array(value)  # the caller may train it further
        except (TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"{self.name}: {key} is no array or tensor: {error}") from error
        if array.dtype != np.float64:
            return array
        with np.errstate(over="ignore"):
            return array.astype(np.float32)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no alpha")
    return number


def open_lora(source: Path | Mapping[str, Any]) -> LoraSource:
    """Reads names, and metadata where there is a file; what is no LoRA is a `RequestError`."""
    if isinstance(source, Mapping):
        if not source or not all(isinstance(key, str) for key in source):
            raise RequestError("the LoRA is an empty dictionary, or has keys that are no texts")
        return LoraSource("the LoRA", dict(source))
    path = Path(source)
    if not path.is_file():
        raise RequestError(f"{path} is no file; expected a LoRA in a .safetensors file")
    try:
        tensors = read_header(path, quantized=True)
        text = read_metadata(path).get("lora_adapter_metadata")
    except CheckpointError as error:
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix.lower() in _PICKLED or start.startswith(_PICKLE_STARTS):
            raise RequestError(
                f"{path} is a pickle, which may run any code; expected a .safetensors file"
            ) from error
        raise RequestError(str(error)) from error
    if not tensors:
        raise RequestError(f"{path} holds no tensors; expected a LoRA")
    return LoraSource(
        path.name, tensors, PeftConfig.from_json(text, path.name) if text else PeftConfig()
    )


def find_lora(source: str | Path, name: str | None) -> Path:
    """The file of an adapter: itself, one of a folder, or of a repository of the hub.

    Raises:
        RequestError: no such file, or more than one to choose from.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) if name is None else [path / name]
        files = [file for file in files if file.name == _USUAL_NAME] or files
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise RequestError(
                f"{path} holds {len(files)} .safetensors files ({names}); name one as weight_name"
            )
        return files[0]
    if path.exists() or path.suffix or str(source).count("/") != 1:
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise RequestError(
            f"{path} does not exist; to load it from the Hugging Face hub, pip install "
            "huggingface_hub"
        ) from error
    name = name or _USUAL_NAME
    try:
        return Path(hf_hub_download(str(source), name))
    except Exception as error:  # of the network, of the hub, of a name
        raise RequestError(
            f"{source} is no file here, and {name} cannot be had from the repository of that name "
            f"({type(error).__name__}: {error}); give the path of a .safetensors file, or "
            "weight_name"
        ) from error
