"""Prompts to token ids, from the tokenizer folder alone: no transformers.

A prompt becomes one user message in the folder's chat template, with an empty block of thoughts,
and is padded to a fixed length. Ids and mask equal those of transformers' tokenizer in diffusers'
klein pipelines. Tokens such as `<|im_end|>` in a prompt's text become the special token, as there.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer

from klein_kv.errors import ArtifactError, RequestError

__all__ = ["PromptTokenizer"]

logger = logging.getLogger(__name__)

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"

# Names under which a chat template may use them (transformers, `SPECIAL_TOKENS_ATTRIBUTES`).
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# What Qwen2's tokenizer class takes a token for when its configuration does not name one.
_QWEN2_DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")

_Side = Literal["left", "right"]


class PromptTokenizer:
    """Tokenizes prompts for the text encoder. Calls change nothing in it.

    Args:
        folder: A tokenizer as transformers saves it: tokenizer.json, tokenizer_config.json, and
            chat_template.jinja unless the configuration holds the template.

    Attributes:
        pad_token: The token that fills up to the fixed length.
        pad_id: Its id.

    Raises:
        ArtifactError: a file is missing, damaged, or contradicts another one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        config = _read_config(self.folder / _CONFIG_FILE)
        self._tokenizer = _read_tokenizer(self.folder / _TOKENIZER_FILE)
        special_tokens = _special_tokens(config, self._tokenizer)
        _add_tokens_of_config(self._tokenizer, config, self.folder)
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))

        padding, truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
        self._padding_side = _side(config, "padding_side", padding.get("direction"))
        self._truncation_side = _side(config, "truncation_side", truncation.get("direction"))
        # Both are done per call: the limit is an argument, and the tokenizer may be shared.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

        if "pad_token" not in special_tokens:
            raise ArtifactError(
                f"{self.folder / _CONFIG_FILE} names no pad_token; expected one, since prompts "
                "are padded to a fixed length"
            )
        self.pad_token = special_tokens["pad_token"]
        pad_id = self._tokenizer.token_to_id(self.pad_token)
        if pad_id is None:
            raise ArtifactError(
                f"pad_token {self.pad_token!r} is not in the vocabulary: {_CONFIG_FILE} and "
                f"{_TOKENIZER_FILE} in {self.folder} are not of the same tokenizer"
            )
        self.pad_id: int = pad_id
        self._special_tokens = special_tokens
        self._template = _compile(_read_template(self.folder, config), self.folder)

    def __call__(
        self, prompts: Sequence[str], max_length: int = 512
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokenizes prompts to a fixed length; longer ones are cut, with a warning.

        Source: diffusers, `Flux2KleinKVPipeline._get_qwen3_prompt_embeds`.

        Args:
            prompts: B texts; a text may be empty.
            max_length: L, tokens per prompt, chat template included.

        Returns:
            input_ids int64 [B, L] and attention_mask int64 [B, L] (1 for tokens, 0 for padding).

        Raises:
            RequestError: no prompts, one that is not a text, or a limit that leaves no room.
        """
        if isinstance(prompts, str) or not prompts:
            raise RequestError(f"prompts are {prompts!r}, expected a list of at least one text")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise RequestError(f"max_length is {max_length!r}, expected an integer of 1 or more")
        encoded = [self._encode(prompt, i, max_length) for i, prompt in enumerate(prompts)]
        return (
            np.array([encoding.ids for encoding in encoded], dtype=np.int64),
            np.array([encoding.attention_mask for encoding in encoded], dtype=np.int64),
        )

    def render(self, prompt: str) -> str:
        """The chat text of one prompt, as it is tokenized.

        Source: transformers, `PreTrainedTokenizerBase.apply_chat_template`.

        Raises:
            ArtifactError: the template refuses it.
        """
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[{"role": "user", "content": prompt}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ArtifactError(
                f"the chat template in {self.folder} fails on a single user message: {error}; "
                "expected the template of the checkpoint's Qwen3 tokenizer"
            ) from error

    def _encode(self, prompt: object, index: int, max_length: int) -> Encoding:
        if not isinstance(prompt, str):
            raise RequestError(f"prompt {index} is a {type(prompt).__name__}, expected a str")
        try:
            encoding = self._tokenizer.encode(self.render(prompt), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(
                f"prompt {index} is not valid Unicode text: {error}; a lone surrogate, from "
                "broken UTF-16 or from escaped bytes, has to be removed"
            ) from error
        # Tokens that the post-processor adds (none for Qwen) count, and survive truncation.
        added = self._tokenizer.num_special_tokens_to_add(False)
        if added >= max_length:
            raise RequestError(f"max_length is {max_length}, expected more than {added}")
        count = len(encoding) + added
        if count > max_length:
            encoding.truncate(max_length - added, direction=self._truncation_side)
            logger.warning(
                "prompt %d has %d tokens with its chat template, the limit is %d: %d tokens at "
                "its %s were dropped",
                index,
                count,
                max_length,
                count - max_length,
                "end" if self._truncation_side == "right" else "start",
            )
        encoding = self._tokenizer.post_process(encoding, None, True)
        encoding.pad(
            max_length, direction=self._padding_side, pad_id=self.pad_id, pad_token=self.pad_token
        )
        return encoding


# --- files -----------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"tokenizer file is missing: {path}; expected a tokenizer folder as transformers "
            "saves it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"tokenizer file cannot be read: {path}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"tokenizer configuration is not JSON: {path}: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"tokenizer configuration must be a JSON object: {path}")
    return config


def _read_tokenizer(path: Path) -> Tokenizer:
    text = _read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for every fault in the file
        raise ArtifactError(f"tokenizer cannot be read: {path}: {error}") from error


def _read_template(folder: Path, config: Mapping[str, Any]) -> str:
    """The default chat template: its own file, or else the configuration's."""
    if (folder / _TEMPLATE_FILE).is_file():
        return _read_text(folder / _TEMPLATE_FILE)
    template = config.get("chat_template")
    if isinstance(template, list):  # several: [{"name": ..., "template": ...}, ...]
        named = {entry.get("name"): entry.get("template") for entry in template if entry}
        template = named.get("default")
    if not isinstance(template, str):
        raise ArtifactError(
            f"no chat template in {folder}: neither {_TEMPLATE_FILE} nor chat_template in "
            f"{_CONFIG_FILE}; copy the file from the checkpoint's tokenizer folder"
        )
    return template


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Texts of the named special tokens; those that are null in the configuration are absent."""
    named: dict[str, Any] = {}
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") == "Qwen2Tokenizer":
        named.update(_QWEN2_DEFAULTS)
    if tokenizer.padding:
        named["pad_token"] = tokenizer.padding["pad_token"]
    named.update({name: _content(config[name]) for name in _SPECIAL_TOKENS if name in config})
    tokens = {name: token for name, token in named.items() if token is not None}
    for name, token in tokens.items():
        if not isinstance(token, str):
            raise ArtifactError(f"{_CONFIG_FILE}: {name} is {token!r}, expected a text or null")
    return tokens


def _add_tokens_of_config(tokenizer: Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Adds the tokens that only the configuration lists, as files of older releases have them."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        wanted = [
            (int(number), AddedToken(**entry) if isinstance(entry, dict) else AddedToken(entry))
            for number, entry in listed.items()
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder / _CONFIG_FILE}: added_tokens_decoder cannot be read: {error}"
        ) from error
    for number, token in sorted(wanted, key=lambda item: item[0]):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        if (got := tokenizer.token_to_id(token.content)) != number:
            raise ArtifactError(
                f"token {token.content!r} has id {got} by {_TOKENIZER_FILE} and {number} by "
                f"{_CONFIG_FILE} in {folder}: the two are not of the same tokenizer"
            )


def _side(config: Mapping[str, Any], key: str, default: str | None) -> _Side:
    side = config.get(key, default or "right")
    if side not in ("left", "right"):
        raise ArtifactError(f"{_CONFIG_FILE}: {key} is {side!r}, expected 'left' or 'right'")
    return "left" if side == "left" else "right"


# --- chat template ---------------------------------------------------------------------------


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: marks text for training; here it just passes."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _compile(source: str, folder: Path) -> Template:
    """Compiles a chat template in a sandbox, with the tools that transformers gives templates.

    Source: transformers, `utils/chat_template_utils.py` (`_compile_jinja_template`).
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ArtifactError(
            f"the chat template in {folder} has an error in line {error.lineno}: {error}"
        ) from error


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; the filter that comes with jinja escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
