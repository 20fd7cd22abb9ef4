"""The saved tokenizer against transformers, and which chat templates are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from klein_kv.artifacts.prompt_format import PromptFormat
from klein_kv.errors import CheckpointError
from klein_kv.export.checkpoints.tokenizer import save_tokenizer
from klein_kv.runtime.inputs.prompts import PromptTokenizer
from tests.chat_tokenizer import (
    PROMPTS,
    TEMPLATE,
    diffusers_ids,
    edit_config,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("trained") / "tokenizer")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """The tokenizer folder of a checkpoint, to change."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoint/tokenizer"))


def saved(folder: Path) -> PromptTokenizer:
    artifacts = folder.parent.with_name("artifacts")
    shutil.rmtree(artifacts, ignore_errors=True)
    prompt_format = save_tokenizer(folder.parent, artifacts)
    return PromptTokenizer(artifacts / "tokenizer", prompt_format)


def assert_same(folder: Path, prompts: list[str]) -> PromptTokenizer:
    """Ours from the artifacts, diffusers' from the checkpoint."""
    tokenizer = saved(folder)
    for max_length in (1, 8, 77, 512):
        ids, mask = tokenizer(prompts, max_length)
        expected_ids, expected_mask = diffusers_ids(folder, prompts, max_length)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(mask, expected_mask)
    return tokenizer


def test_prompt_format(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert saved(folder).prompt_format == PromptFormat(
        prefix="<|im_start|>user\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        pad_token="<|endoftext|>",
        pad_id=Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|endoftext|>"),
        padding_side="right",
        truncation_side="right",
        split_special_tokens=False,
    )
    assert not caplog.records  # the long prompts of the comparison warn nobody


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("truncation_side", ["right", "left"])
def test_equals_diffusers(folder: Path, padding_side: str, truncation_side: str) -> None:
    edit_config(folder, padding_side=padding_side, truncation_side=truncation_side)
    assert_same(folder, PROMPTS)


@pytest.mark.parametrize("template", [TEMPLATE, [{"name": "default", "template": TEMPLATE}]])
def test_template_in_the_configuration(folder: Path, template: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    edit_config(folder, chat_template=template)
    assert_same(folder, PROMPTS[:4])


@pytest.mark.parametrize("older", [False, True])
def test_configuration_as_transformers_4_saves_it(folder: Path, older: bool) -> None:
    """Class name with Fast, tokens as objects, a list of all added tokens; older vocabularies."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    listed = {str(token.pop("id")): token for token in whole["added_tokens"]}
    pad = next(token for token in listed.values() if token["content"] == "<|endoftext|>")
    edit_config(
        folder,
        tokenizer_class="Qwen2TokenizerFast",
        added_tokens_decoder=listed,
        pad_token={**pad, "__type": "AddedToken"},
        bos_token=None,
        model_max_length=131072,
        extra_special_tokens=...,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if older:
        model = whole["model"]
        merges = [" ".join(pair) for pair in model["merges"]]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        (folder / "tokenizer.json").unlink()
    assert_same(folder, PROMPTS)


def test_added_tokens_that_only_the_configuration_has(folder: Path) -> None:
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    listed = {str(token.pop("id")): token for token in tokens}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    listed[str(size)] = {"content": "<extra>", **flags}
    edit_config(folder, added_tokens_decoder=listed)
    tokenizer = assert_same(folder, [*PROMPTS, "an <extra> one"])
    assert size in tokenizer(["an <extra> one"])[0]


def test_pad_token_of_the_class_and_split_special_tokens(folder: Path) -> None:
    edit_config(folder, pad_token=..., tokenizer_class="Qwen2Tokenizer", split_special_tokens=True)
    prompt_format = assert_same(folder, PROMPTS[:12]).prompt_format
    assert prompt_format.pad_token == "<|endoftext|>"
    assert prompt_format.split_special_tokens


def test_truncation_and_padding_inside_tokenizer_json(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(5, direction="left")
    tokenizer.enable_padding(direction="left", length=9, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.save(str(path))
    edit_config(folder, padding_side=..., truncation_side=...)
    assert_same(folder, PROMPTS)


def test_tokenizer_that_adds_tokens_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    end = tokenizer.token_to_id("<|im_end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    tokenizer.save(str(path))
    with pytest.raises(CheckpointError, match="add no tokens of their own"):
        saved(folder)


USER = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "fails on a single user message"),
        ("{{ raise_exception('not for you') }}", "not for you"),
        ("{{ ''.__class__.__mro__ }}", "fails on a single user message"),
        ("{{ range(10 ** 9) }}", "fails on a single user message"),
        ("no prompt", "writes the prompt 0 times, expected once"),
        (USER + USER, "writes the prompt 2 times, expected once"),
        (USER + "{{ strftime_now('%Y') }}", "reads the date"),
        ("{{ messages[0].content | trim }}", "makes 'spaces before and after' of the prompt"),
        ("{{ messages[0].content }}{{ messages[0].content | length }}", "makes '0' of the prompt"),
        ("{{ messages[0].content | replace('<think>', '') }}", "makes 'deep</think>"),
        (
            "{% if '<tool_response>' in messages[0].content %}tool {% endif %}" + USER,
            "makes 'tool <",
        ),
    ],
)
def test_template_that_does_more_than_wrap(template: str, message: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=message):
        saved(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token": None}, "names no pad_token"),
        ({"padding_side": "top"}, "cannot be loaded"),
        ({"added_tokens_decoder": {"x": {}}}, "cannot be loaded"),
    ],
)
def test_configuration_that_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        saved(folder)


@pytest.mark.parametrize(
    "changes", [{"pad_id": "0"}, {"pad_id": True}, {"prefix": None}, {"padding_side": "top"}]
)
def test_prompt_format_of_other_values(changes: dict[str, Any], folder: Path) -> None:
    (name,) = changes
    with pytest.raises(CheckpointError, match=f"prompt: {name} is .*, expected "):
        replace(saved(folder).prompt_format, **changes)
