"""Stand-in for comfy.utils: progress, with the checks that the server makes of it."""

from typing import Any

from PIL import Image

from comfy import model_management

shown: list[tuple[int, int, Image.Image | None]] = []
"""What was shown. Of the stand-in alone."""


class ProgressBar:
    def __init__(self, total: int, node_id: Any = None) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = total or self.total
        model_management.throw_exception_if_processing_interrupted()  # the server's hook does
        assert 0 < value <= self.total
        picture = None
        if preview is not None:
            form, picture, longest = preview
            assert form in ("JPEG", "PNG")
            assert picture.mode == "RGB"
            assert longest is None or longest > 0
        shown.append((value, self.total, picture))
