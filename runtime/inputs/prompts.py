"""Prompts to token ids, with the tokenizers library alone.

A prompt is put between the two texts that `klein-kv export` found in the tokenizer's chat template
(`PromptFormat`) and is padded to a fixed length. Ids and mask equal those of transformers'
tokenizer in diffusers' klein pipelines. Tokens such as `<|im_end|>` in a prompt's text become the
special token, as there.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from klein_kv.artifacts.prompt_format import PromptFormat
from klein_kv.errors import ArtifactError, RequestError

__all__ = ["PromptTokenizer", "read_prompts"]

_log = logging.getLogger(__name__)

# Characters of a prompt: 4096 tokens hold far fewer; the tokenizer takes 300 bytes for each.
_LONGEST = 1_000_000


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file in UTF-8, one per line; a RequestError if there are none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"prompts {path} cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"prompts {path} holds no text, expected one prompt per line")
    return lines


class PromptTokenizer:
    """Tokenizes prompts for the text encoder, from a folder with tokenizer.json.

    Raises:
        ArtifactError: tokenizer.json is missing, damaged, or of another tokenizer.
    """

    def __init__(self, folder: Path, prompt_format: PromptFormat) -> None:
        self.prompt_format = prompt_format
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every fault
            raise ArtifactError(
                f"tokenizer cannot be read: {path}: {error}; export the checkpoint again"
            ) from error
        pad_id = self._tokenizer.token_to_id(prompt_format.pad_token)
        if pad_id != prompt_format.pad_id:
            raise ArtifactError(
                f"pad token {prompt_format.pad_token!r} has id {pad_id} in {path}, expected "
                f"{prompt_format.pad_id} from klein.json; export the checkpoint again"
            )
        # Both are done per call: the limit is an argument, and the tokenizer may be shared.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = prompt_format.split_special_tokens

    def __call__(
        self, prompts: Sequence[str], max_length: int = 512
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and mask (0 for padding), int64 [B, max_length] each; longer ones are cut.

        Source: diffusers, `Flux2KleinKVPipeline._get_qwen3_prompt_embeds`. `max_length` counts the
        text around the prompt. A text that is not valid Unicode or far too long, or a limit below
        1, is a RequestError.
        """
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise RequestError(f"max_length is {max_length!r}, expected an integer of 1 or more")
        encodings = []
        for index, prompt in enumerate(prompts):
            if len(prompt) > _LONGEST:
                raise RequestError(
                    f"prompt {index} has {len(prompt)} characters, expected at most {_LONGEST}"
                )
            try:
                encoding, count = self.encode(prompt, max_length)
            except (TypeError, UnicodeEncodeError) as error:
                raise RequestError(
                    f"prompt {index} is not valid Unicode text: {error}; a lone surrogate, from "
                    "broken UTF-16 or from escaped bytes, has to be removed"
                ) from error
            if count > max_length:
                _log.warning(
                    "prompt %d has %d tokens with its chat template, the limit is %d: %d tokens "
                    "at its %s were dropped",
                    index,
                    count,
                    max_length,
                    count - max_length,
                    "end" if self.prompt_format.truncation_side == "right" else "start",
                )
            encodings.append(encoding)
        return (
            np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
        )

    def encode(self, prompt: str, max_length: int) -> tuple[Encoding, int]:
        """One prompt at a fixed length, and the number of tokens it has without that limit."""
        form = self.prompt_format
        encoding = self._tokenizer.encode(form.prefix + prompt + form.suffix)
        count = len(encoding)
        encoding.truncate(max_length, direction=form.truncation_side)
        encoding.pad(
            max_length, direction=form.padding_side, pad_id=form.pad_id, pad_token=form.pad_token
        )
        return encoding, count
