"""Artifact folders in ComfyUI's memory management: opened by it, told to it, closed by it.

ComfyUI knows of memory through `ModelPatcher`s alone. One stands here for each opened folder: its
size is what the pipeline holds, loading it opens the pipeline, and where another model needs the
room, or "unload models" is asked for, reference sets go first and then the pipeline is closed. The
next edit opens it again.

Source: ComfyUI, `comfy/model_management.py` (`LoadedModel`, `load_models_gpu`, `free_memory`).
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher

from klein_kv.artifacts.manifest import MANIFEST, Manifest
from klein_kv.errors import ArtifactError
from klein_kv.runtime.pipeline import KleinKVPipeline

__all__ = ["FOLDER", "PRECISIONS", "ModelChoice", "artifact_folders", "open_model"]

_log = logging.getLogger(__name__)

FOLDER = "klein_kv"
"""Folder of ComfyUI's `models`, and key of `extra_model_paths.yaml`."""

PRECISIONS = ("own", "fp8", "nvfp4", "fp8-weight-only")
"""What can be chosen; the first is what artifacts have without being quantized."""

_OWN = PRECISIONS[0]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What the model and LoRA nodes choose; opened by `open_model`."""

    folder: Path
    backend: str
    precision: str  # that of `RuntimeOptions`, or "own"
    adapters: tuple[tuple[Path, float], ...] = ()  # files and weights, in order


def artifact_folders() -> dict[str, Path]:
    """Artifact folders by name, below ComfyUI's folders for them."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths(FOLDER):
        for manifest in sorted(Path(root).glob(f"*/{MANIFEST}")):
            found.setdefault(manifest.parent.name, manifest.parent)
    return found


def open_model(choice: ModelChoice) -> KleinKVPipeline:
    """The pipeline of a choice, with its adapters active; ComfyUI's models leave where it opens.

    Raises:
        KleinKVError: see `KleinKVPipeline.from_pretrained` and `load_lora_weights`.
    """
    key = replace(choice, adapters=())
    if key not in _held:
        size = _weight_bytes(Manifest.load(key.folder, check_files=False), key.precision)
        _held[key] = _HeldModel(key, size)
    held = _held[key]
    model_management.load_models_gpu([held])
    if held.pipe is None:
        raise ArtifactError(f"{choice.folder} was closed while it was opened; run the prompt again")
    _activate(held.pipe, choice.adapters)
    return held.pipe


class KleinKV(torch.nn.Module):
    """Stands for the pipeline where ComfyUI expects a network; its name is in ComfyUI's log."""


class _HeldModel(ModelPatcher):
    """One artifact folder, open or not."""

    def __init__(self, choice: ModelChoice, size: int) -> None:
        device = model_management.get_torch_device()
        self._choice = choice
        self.pipe: KleinKVPipeline | None = None
        super().__init__(KleinKV(), device, torch.device("cpu"), size=size)

    def model_size(self) -> int:
        return max(int(self.size), self.loaded_size())

    def loaded_size(self) -> int:
        pipe = self.pipe
        return 0 if pipe is None else pipe.session.held_bytes + pipe.reference_store.nbytes

    def current_loaded_device(self) -> torch.device:
        device: torch.device = self.offload_device if self.pipe is None else self.load_device
        return device

    def partially_load(self, *_: object, **__: object) -> int:
        if self.pipe is not None:
            return 0
        model_management.free_memory(1e30, self.load_device)  # whatever else is there
        model_management.soft_empty_cache()
        choice = self._choice
        pipe = KleinKVPipeline.from_pretrained(
            choice.folder,
            backend=choice.backend,
            precision=None if choice.precision == _OWN else choice.precision,
            device=str(self.load_device),
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.session.make_room = self._make_room
        self.pipe = pipe
        return self.loaded_size()

    def partially_unload(self, _device: object, memory_to_free: float = 0, **_: object) -> int:
        return 0 if self.pipe is None else self.pipe.reference_store.free(int(memory_to_free))

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all and self.pipe is not None:
            _log.info("%s is closed", self._choice.folder)
            self.pipe.close()
            self.pipe = None
        return self.model

    def _make_room(self, missing: int) -> None:
        """Asks ComfyUI's models for bytes that a request lacks."""
        device = self.load_device
        own = [x for x in model_management.current_loaded_models if x.model is self]
        wanted = missing + model_management.get_free_memory(device)
        model_management.free_memory(wanted, device, keep_loaded=own)
        model_management.soft_empty_cache()


_held: dict[ModelChoice, _HeldModel] = {}


def _weight_bytes(manifest: Manifest, precision: str) -> int:
    """Bytes of the weights that are read, to within those that a precision leaves as they are."""
    names = {x for x in manifest.files if x.endswith(".safetensors")} - manifest.quantized_files
    if precision != _OWN:
        quantized = {x for x in manifest.precision_files(precision) if x.endswith(".safetensors")}
        parts = {x.split("/")[0] for x in quantized}
        names = {x for x in names if x.split("/")[0] not in parts} | quantized
    return sum(manifest.files[name].bytes for name in names)


def _activate(pipe: KleinKVPipeline, adapters: tuple[tuple[Path, float], ...]) -> None:
    """Loads the adapters that are not, forgets those that are not wanted, sets the weights."""
    wanted: dict[str, float] = {}
    files: dict[str, Path] = {}
    for path, weight in adapters:
        name = f"{path} of {path.stat().st_mtime_ns}"
        wanted[name] = wanted.get(name, 0.0) + weight
        files[name] = path
    loaded = pipe.get_list_adapters().get("transformer", [])
    for name in files.keys() - set(loaded):
        pipe.load_lora_weights(files[name], adapter_name=name)
    if gone := [name for name in loaded if name not in wanted]:
        pipe.delete_adapters(gone)
    pipe.set_adapters(list(wanted), list(wanted.values()))
