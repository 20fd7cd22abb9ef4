"""Prompts to text embeddings, kept for prompts that come again."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klein_kv.config import DEFAULT_TEXT_LAYERS, TextEncoderConfig
from klein_kv.errors import RequestError
from klein_kv.runtime.backend import Backend
from klein_kv.runtime.byte_cache import ByteCache
from klein_kv.runtime.prompts import PromptTokenizer
from klein_kv.signature import MAX_POSITION

__all__ = ["PromptEncoder"]


class PromptEncoder:
    """Tokenizer, text encoder and cache of one pipeline.

    Args:
        backend: where the text encoder runs.
        tokenizer: the artifacts' own.
        config: the text encoder's configuration.
        model_digest: the weights that embeddings belong to.
        cache: embeddings seen before.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: PromptTokenizer,
        config: TextEncoderConfig,
        model_digest: str,
        cache: ByteCache[NDArray[Any]],
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.config = config
        self.model_digest = model_digest
        self.cache = cache

    def tokenize(self, prompts: list[str], length: int) -> dict[str, NDArray[np.int64]]:
        """Inputs of the text encoder, [B, length] each.

        Raises:
            RequestError: not texts, or an impossible length.
        """
        if isinstance(length, int) and length > MAX_POSITION:
            raise RequestError(f"max_sequence_length is {length}, expected at most {MAX_POSITION}")
        input_ids, attention_mask = self.tokenizer(prompts, length)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def layers_at(self, layers: tuple[int, ...]) -> list[int]:
        """Where the wanted hidden states stand among the exported ones.

        Raises:
            RequestError: some were not exported.
        """
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
        state = hashlib.sha256(self.model_digest.encode())
        for name, array in tokens.items():
            state.update(f"{name} {array.dtype} {array.shape}".encode())
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def encode(self, tokens: dict[str, NDArray[np.int64]], at: list[int]) -> NDArray[Any]:
        """Embeddings [B, T, D]: an array of the caller's own."""
        with self.cache.claim(self._key(tokens)) as claim:
            embeds = claim.value
            if embeds is None:
                buffers = {name: self.backend.upload(array) for name, array in tokens.items()}
                outputs = self.backend.run("text_encoder", buffers)
                embeds = claim.publish(self.backend.download(outputs["encoder_hidden_states"]))
        if at == list(range(len(at))):
            return embeds.copy()
        width = self.config.hidden_size
        return np.concatenate([embeds[..., i * width : (i + 1) * width] for i in at], axis=-1)
