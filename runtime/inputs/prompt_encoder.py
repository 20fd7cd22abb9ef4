"""Prompts to text embeddings, kept for prompts that come again."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.artifacts.config import DEFAULT_TEXT_LAYERS, TextEncoderConfig
from klein_kv.artifacts.signature import MAX_POSITION
from klein_kv.errors import RequestError
from klein_kv.runtime.backends.backend import Buffer
from klein_kv.runtime.inputs.prompts import PromptTokenizer
from klein_kv.runtime.references.byte_cache import ByteCache
from klein_kv.runtime.session import Session

__all__ = ["EncodedPrompt", "PromptEncoder"]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Embeddings [B, T, D] of prompts, on the device.

    `new` holds all exported hidden states where the cache does not yet, under `key`.
    """

    buffer: Buffer
    shape: tuple[int, ...]
    key: str = ""
    new: Buffer | None = None


class PromptEncoder:
    """Tokenizer, text encoder and cache of one pipeline."""

    def __init__(
        self,
        session: Session,
        tokenizer: PromptTokenizer,
        config: TextEncoderConfig,
        cache: ByteCache[NDArray[Any]],
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.config = config
        self.cache = cache

    def tokenize(self, prompts: list[str], length: int) -> dict[str, NDArray[np.int64]]:
        """Inputs of the text encoder, [B, length] each; see `PromptTokenizer`."""
        if isinstance(length, int) and length > MAX_POSITION:
            raise RequestError(f"max_sequence_length is {length}, expected at most {MAX_POSITION}")
        input_ids, attention_mask = self.tokenizer(prompts, length)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def layers_at(self, layers: tuple[int, ...]) -> list[int]:
        """Where the wanted hidden states stand among the exported ones."""
        exported = self.config.layers
        if layers in (exported, DEFAULT_TEXT_LAYERS):
            return list(range(len(exported)))
        if any(layer not in exported for layer in layers) or len(layers) != len(exported):
            raise RequestError(
                f"text_encoder_out_layers is {layers}, the artifacts hold {exported}; export again "
                "with --text-layers"
            )
        return [exported.index(layer) for layer in layers]

    def knows(self, tokens: dict[str, NDArray[np.int64]]) -> bool:
        """Whether the embeddings are at hand: `encode` will not run the text encoder."""
        return self._key(tokens) in self.cache

    def _key(self, tokens: dict[str, NDArray[np.int64]]) -> str:
        # The whole batch is one key: a text encoded beside others may round differently.
        state = hashlib.sha256()
        for name, array in tokens.items():
            state.update(f"{name} {array.dtype} {array.shape}".encode())
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def encode(
        self, tokens: dict[str, NDArray[np.int64]], at: list[int], *, look_up: bool = True
    ) -> EncodedPrompt:
        """Embeddings [B, T, D] on the device, of `tokenize`'s tokens and `layers_at`'s states."""
        batch, length = tokens["input_ids"].shape
        width, exported = self.config.hidden_size, len(self.config.layers)
        shape = (batch, length, exported * width)
        key = self._key(tokens)
        embeds = self.cache.get(key) if look_up else None
        in_order = at == list(range(exported))
        if embeds is None:
            buffers = {name: self.session.upload(array) for name, array in tokens.items()}
            output = self.session.run("text_encoder", buffers)["encoder_hidden_states"]
            # Memory of its own: a callback may encode another prompt meanwhile.
            whole = self.session.assemble(shape, [output])
            if in_order:
                return EncodedPrompt(whole, shape, key, whole)
            embeds = self.session.download(whole)
            self.cache.put(key, embeds)
        if not in_order:
            embeds = np.concatenate([embeds[..., i * width : (i + 1) * width] for i in at], axis=-1)
        return EncodedPrompt(self.session.upload(embeds), embeds.shape)

    def keep(self, prompt: EncodedPrompt) -> None:
        """Puts embeddings that were computed into the cache: waits for the device."""
        if prompt.new is not None:
            self.cache.put(prompt.key, self.session.download(prompt.new))
