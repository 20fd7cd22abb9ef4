"""Stand-in for comfy_api.latest: V3 nodes."""

from abc import ABC, abstractmethod

from comfy_api.latest import _io as io
from comfy_api.latest import _ui as ui

__all__ = ["ComfyExtension", "io", "ui"]


class ComfyExtension(ABC):
    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]: ...
