"""Stand-ins for a backend, for long sequences of requests: quick, and sensitive to every input."""

import math
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.signature import kv_names
from klein_kv.errors import CapacityError
from klein_kv.runtime.backends.backend import GraphMemory
from klein_kv.runtime.planning import memory

__all__ = ["TOKEN", "DeviceStub", "Stub"]

Array = NDArray[Any]
TOKEN = 1536  # bytes of keys and values per token of the tiny model


class Stub:
    """Stands in for a backend: arrays on the host, cheap functions of all inputs."""

    name = "onnxruntime"

    def __init__(self, manifest: Manifest) -> None:
        self.net = manifest.config.transformer
        self.graphs: list[str] = []
        self.changed: dict[str, float] = {}  # a number for each weight that is not the file's

    def replace_weights(self, changes: Mapping[str, Any]) -> None:
        for name, content in changes.items():
            self.changed.pop(name, None)
            if content is not None:
                self.changed[name] = float(content().sum(dtype=np.float64))

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.graphs.append(graph)
        if graph == "vae_encoder":
            pixels = inputs["image"][:, ::16, ::16].astype(np.float32)
            return {"ref_hidden_states": pixels.repeat(43, axis=3)[..., : self.net.in_channels]}
        if graph == "encode_references":
            return self._encode(inputs)
        kv = self._encode(inputs) if graph == "first_step" else {}
        held = kv or inputs
        seen = sum(float(held[name].sum(dtype=np.float64)) for name in kv_names(3))
        text = float(inputs["encoder_hidden_states"].sum())
        own = math.fsum(self.changed.values())
        latents = inputs["hidden_states"] * np.float32(0.9) + np.float32(seen * 1e-3 + text + own)
        return {"noise_pred": latents, "latents": latents, **kv}

    def _encode(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tokens, ids = inputs["ref_hidden_states"], inputs["ref_ids"]
        head = (self.net.num_attention_heads, self.net.attention_head_dim)
        mixed = tokens.mean(axis=1, keepdims=True) + tokens * (1 + ids.sum(axis=1)[None, :, None])
        mixed = mixed * np.float32(1 + math.fsum(self.changed.values()) * 1e-3)
        wide = mixed[..., : head[0] * head[1]].reshape(1, -1, *head).astype(np.float32)
        return {name: wide * np.float32(i + 1) for i, name in enumerate(kv_names(3))}

    def prepare(self, graph: str, shapes: Any, kv: Any = None, *, eager: bool = False) -> None:
        pass

    def upload(self, array: Array) -> Array:
        return np.array(array)

    def upload_kv(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: self.upload(array) for name, array in arrays.items()}

    def download(self, buffer: Array) -> Array:
        return buffer

    def view(self, buffer: Array, shape: tuple[int, ...], start: int = 0) -> Array:
        return buffer.reshape(-1)[start : start + math.prod(shape)].reshape(shape)

    def assemble(self, shape: tuple[int, ...], parts: Iterable[Array]) -> Array:
        return np.concatenate([part.reshape(-1) for part in parts]).reshape(shape)

    def release(self, graph: str) -> None:
        pass

    def scratch_bytes(self, graph: str, shapes: Any) -> int | None:
        return None

    mark = staticmethod(time.perf_counter)

    def elapsed(self, start: float, end: float) -> float:
        return end - start

    def close(self) -> None:
        pass

    def available_memory(self) -> int:
        return memory.available_memory()

    def graph_memory(self, graph: str) -> GraphMemory:
        return GraphMemory()


class DeviceStub(Stub):
    """The same with "device memory": buffers that are not the host's, and copies of them there.

    Attributes:
        resident: keys of the first block that are on the device.
        host: memory for copies, once it was asked for.
    """

    name = "device"

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.resident: list[weakref.ref[Array]] = []
        self.host: HostStoreStub | None = None

    def _encode(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.note(super()._encode(inputs))

    def upload_kv(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return self.note(super().upload_kv(arrays))

    def note(self, kv: dict[str, Array]) -> dict[str, Array]:
        self.resident = [array for array in self.resident if array() is not None]
        self.resident.append(weakref.ref(kv["k_ref.0"]))
        return kv

    def contents(self) -> list[bytes]:
        """Of keys that are on the device; empty ones left out."""
        held = [array() for array in self.resident]
        return [array.tobytes() for array in held if array is not None and array.size]

    def host_store(self, budget: int) -> "HostStoreStub":
        self.host = HostStoreStub(self, budget)
        return self.host


class HostCopyStub:
    """Arrays of a set."""

    def __init__(self, kv: dict[str, Array], nbytes: int) -> None:
        self.kv = kv
        self.nbytes = nbytes

    def array(self, name: str) -> Array:
        return self.kv[name]


class HostStoreStub:
    """Host memory in pages, which refuses to hold more than its budget."""

    PAGE = 1000

    def __init__(self, device: DeviceStub, budget: int) -> None:
        self.device = device
        self.budget = budget
        self.copies: list[weakref.ref[HostCopyStub]] = []

    @property
    def bytes(self) -> int:
        return sum(copy.nbytes for ref in self.copies if (copy := ref()) is not None)

    def size(self, nbytes: int) -> int:
        return -(-nbytes // self.PAGE) * self.PAGE

    def keep(self, buffers: Mapping[str, Array]) -> HostCopyStub:
        size = self.size(sum(buffer.nbytes for buffer in buffers.values()))
        if self.bytes + size > self.budget:
            raise CapacityError("no pages are left")
        copy = HostCopyStub({name: array.copy() for name, array in buffers.items()}, size)
        self.copies.append(weakref.ref(copy))
        return copy

    def restore(self, copy: HostCopyStub) -> dict[str, Array]:
        return self.device.note({name: array.copy() for name, array in copy.kv.items()})
