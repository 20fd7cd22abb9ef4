"""Stand-in for comfy.model_patcher: what model_management asks of a model."""

from typing import Any

import torch


class ModelPatcher:
    def __init__(
        self,
        model: torch.nn.Module,
        load_device: torch.device,
        offload_device: torch.device,
        size: int,
    ) -> None:
        assert isinstance(model, torch.nn.Module)
        assert isinstance(load_device, torch.device)
        assert size > 0, "the real one would add up the module's tensors"
        self.size, self.model = size, model
        self.model_size()  # the real one asks here already
        self.load_device, self.offload_device = load_device, offload_device
        self.parent = None
        self.loaded = 0

    def model_size(self) -> int:
        return self.size

    def loaded_size(self) -> int:
        return self.loaded

    def is_clone(self, other: "ModelPatcher") -> bool:
        return self.model is other.model

    def model_patches_to(self, device: Any) -> None:
        pass

    def model_patches_models(self) -> list["ModelPatcher"]:
        return []

    def model_dtype(self) -> None:
        return None

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded else self.offload_device

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        self.loaded = self.size
        return self.size

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:
            self.loaded = 0
        return self.model

    def __del__(self) -> None:
        self.detach(unpatch_all=False)
