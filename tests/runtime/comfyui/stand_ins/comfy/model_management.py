"""Stand-in for comfy.model_management: a device of `capacity` bytes, models that come and go."""

import weakref
from typing import Any

import torch

from comfy.model_patcher import ModelPatcher

capacity = 10**12  # of the stand-in alone
current_loaded_models: list["LoadedModel"] = []
interrupt_processing = False


class InterruptProcessingException(Exception):
    pass


class LoadedModel:
    def __init__(self, model: ModelPatcher) -> None:
        self._model = weakref.ref(model)
        self.device = model.load_device

    @property
    def model(self) -> Any:
        return self._model()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedModel) and self.model is other.model

    def __hash__(self) -> int:
        return id(self.model)

    def model_load(self) -> None:
        self.model.model_patches_to(self.device)
        self.model.model_patches_to(self.model.model_dtype())
        self.model.partially_load(self.device, 1e32, force_patch_weights=False)

    def model_unload(self, memory_to_free: float) -> bool:
        if memory_to_free < self.model.loaded_size():
            freed = self.model.partially_unload(self.model.offload_device, memory_to_free)
            if freed >= memory_to_free:
                return False
        self.model.detach(True)
        return True


def get_torch_device() -> torch.device:
    return torch.device("cpu")


def get_free_memory(dev: torch.device) -> int:
    return capacity - sum(x.model.loaded_size() for x in current_loaded_models)


def free_memory(
    memory_required: float, device: torch.device, keep_loaded: list[LoadedModel] = []
) -> list[LoadedModel]:
    gone = []
    for loaded in list(reversed(current_loaded_models)):
        if loaded.device != device or loaded in keep_loaded:
            continue
        free = get_free_memory(device)
        if free > memory_required:
            break
        if loaded.model_unload(memory_required - free):
            current_loaded_models.remove(loaded)
            gone.append(loaded)
    return gone


def load_models_gpu(models: list[ModelPatcher]) -> None:
    for model in models:
        assert not model.model_patches_models()
        for loaded in [x for x in current_loaded_models if model.is_clone(x.model)]:
            current_loaded_models.remove(loaded)
            loaded.model.detach(unpatch_all=False)
        there = model.current_loaded_device() == model.load_device
        missing = model.model_size() - (model.loaded_size() if there else 0)
        free_memory(missing * 1.1, model.load_device)
        loaded = LoadedModel(model)
        loaded.model_load()
        current_loaded_models.insert(0, loaded)


def unload_all_models() -> None:
    free_memory(1e30, get_torch_device())


def soft_empty_cache() -> None:
    pass


def interrupt_current_processing(value: bool = True) -> None:
    global interrupt_processing
    interrupt_processing = value


def throw_exception_if_processing_interrupted() -> None:
    if interrupt_processing:
        interrupt_current_processing(False)
        raise InterruptProcessingException
