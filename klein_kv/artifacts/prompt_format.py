"""The text around a prompt, and how its tokens fill a fixed length: `prompt` in `klein.json`."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from klein_kv.errors import CheckpointError

__all__ = ["PromptFormat", "Side"]

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What a tokenizer's chat template and configuration say about one prompt.

    `klein-kv export` writes it and has compared it with transformers; the runtime reads it and
    needs no template engine. The text that is tokenized is prefix + prompt + suffix. A
    `CheckpointError` tells of a value of another type, or of another side than left and right.
    """

    prefix: str  # chat text before the prompt
    suffix: str  # chat text after the prompt, up to where the model would answer
    pad_token: str  # the token that fills up to the fixed length
    pad_id: int
    padding_side: Side  # where padding goes
    truncation_side: Side  # where tokens beyond the fixed length are cut off
    # whether `<|im_end|>` and the like in the text are plain characters; klein's tokenizer takes
    # them for the special tokens
    split_special_tokens: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            value, sides = getattr(self, field.name), get_args(field.type)
            if value not in sides if sides else type(value) is not field.type:
                expected = " or ".join(map(repr, sides)) or getattr(field.type, "__name__", "")
                raise CheckpointError(f"prompt: {field.name} is {value!r}, expected {expected}")
            try:
                str(value).encode()
            except UnicodeEncodeError as error:  # half a surrogate pair, which JSON may hold
                raise CheckpointError(
                    f"prompt: {field.name} is {value!r}, expected valid Unicode"
                ) from error
