"""Tokenization at runtime against transformers' AutoTokenizer in diffusers' own call sequence."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from klein_kv.artifacts.manifest import Manifest
from klein_kv.artifacts.prompt_format import PromptFormat
from klein_kv.errors import ArtifactError, RequestError
from klein_kv.export.checkpoints.tokenizer import save_tokenizer
from klein_kv.runtime.inputs.prompts import PromptTokenizer
from tests.chat_tokenizer import PROMPTS, diffusers_ids, train_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PromptFormat]:
    """The folder and what the manifest would say about it."""
    root = tmp_path_factory.mktemp("prompts")
    train_tokenizer(root / "checkpoint/tokenizer")
    prompt_format = save_tokenizer(root / "checkpoint", root / "artifacts")
    return root / "artifacts/tokenizer", prompt_format


@pytest.fixture(scope="module")
def tokenizer(exported: tuple[Path, PromptFormat]) -> PromptTokenizer:
    return PromptTokenizer(*exported)


@pytest.fixture(scope="module")
def theirs(exported: tuple[Path, PromptFormat]) -> Any:
    return AutoTokenizer.from_pretrained(exported[0])


@settings(max_examples=60)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_equals_diffusers(tokenizer: PromptTokenizer, theirs: Any, prompt: str) -> None:
    text = theirs.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    ids, mask = tokenizer([prompt], 64)
    expected = theirs(
        text, return_tensors="np", padding="max_length", truncation=True, max_length=64
    )
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])


def test_fixture_checkpoint(tiny_checkpoint: Path, tiny_artifacts: Path) -> None:
    tokenizer = PromptTokenizer(
        tiny_artifacts / "tokenizer", Manifest.load(tiny_artifacts, check_files=False).prompt
    )
    ids, mask = tokenizer(PROMPTS)
    expected_ids, expected_mask = diffusers_ids(tiny_checkpoint / "tokenizer", PROMPTS)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(PROMPTS), 512)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(mask, expected_mask)


def test_special_text_becomes_special_tokens(
    tokenizer: PromptTokenizer, exported: tuple[Path, PromptFormat]
) -> None:
    end = Tokenizer.from_file(str(exported[0] / "tokenizer.json")).token_to_id("<|im_end|>")
    assert (tokenizer(["<|im_end|>"])[0] == end).sum() == 2


@pytest.mark.parametrize(("side", "end"), [("right", "end"), ("left", "start")])
def test_warns_of_truncation_with_counts(
    side: Any, end: str, exported: tuple[Path, PromptFormat], caplog: pytest.LogCaptureFixture
) -> None:
    folder, prompt_format = exported
    tokenizer = PromptTokenizer(folder, replace(prompt_format, truncation_side=side))
    with caplog.at_level(logging.WARNING):
        _, mask = tokenizer([""], 64)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        tokenizer(["short", "<|im_end|>" * 100], 64)
    total = 100 + int(mask.sum())
    (record,) = caplog.records
    assert record.getMessage() == (
        f"prompt 1 has {total} tokens with its chat template, the limit is 64: "
        f"{total - 64} tokens at its {end} were dropped"
    )


def test_exactly_the_limit_is_not_truncated(
    tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    ids, mask = tokenizer(["short"])
    length = int(mask.sum())
    np.testing.assert_array_equal(tokenizer(["short"], length)[0], ids[:, :length])
    assert not caplog.records


@pytest.mark.parametrize(
    ("prompt", "max_length", "message"),
    [
        ("\ud800", 64, "prompt 1 is not valid Unicode"),
        # At 200 million characters it ended the process.
        ("x" * 1_000_001, 64, "prompt 1 has 1000001 characters, expected at most"),
        ("a", 0, "max_length is 0"),
        ("a", -1, "max_length is -1"),
        ("a", 2.0, r"max_length is 2\.0"),
        ("a", True, "max_length is True"),
    ],
)
def test_bad_prompts(
    prompt: str, max_length: Any, message: str, tokenizer: PromptTokenizer
) -> None:
    with pytest.raises(RequestError, match=message):
        tokenizer(["ok", prompt], max_length)


def test_very_long_prompts_are_cut(tokenizer: PromptTokenizer) -> None:
    assert tokenizer(["<|im_end|>" * 100_000], 16)[0].shape == (1, 16)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"a": 1}', b"\x00", b"\xff\xfe"])
def test_missing_and_damaged_file(
    exported: tuple[Path, PromptFormat], tmp_path: Path, content: bytes | None
) -> None:
    folder, prompt_format = exported
    copy = shutil.copytree(folder, tmp_path / "tokenizer")
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"cannot be read: .*tokenizer\.json"):
        PromptTokenizer(copy, prompt_format)


@pytest.mark.parametrize("change", [{"pad_token": "<nowhere>"}, {"pad_id": 3}])
def test_pad_token_of_another_tokenizer(
    exported: tuple[Path, PromptFormat], change: dict[str, Any]
) -> None:
    folder, prompt_format = exported
    with pytest.raises(ArtifactError, match=r"pad token .* has id"):
        PromptTokenizer(folder, replace(prompt_format, **change))
