"""Stand-in for what nodes show."""

from typing import Any


class PreviewText:
    def __init__(self, value: str, **kwargs: Any) -> None:
        assert isinstance(value, str)
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}
