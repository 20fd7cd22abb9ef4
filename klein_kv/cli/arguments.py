"""What the verbs share: what one gives, and arguments that several take."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "AddVerb",
    "Result",
    "add_backend",
    "add_checkpoint",
    "add_lora",
    "add_pipeline",
    "add_samples",
    "gigabytes",
    "layers",
    "pipeline_options",
    "size",
]

Result = tuple[dict[str, Any], str, int]
"""What a verb gives: the JSON document, the text, the exit code."""

AddVerb = Callable[[str, Callable[[argparse.Namespace], Result], str], argparse.ArgumentParser]
"""Adds a verb to the command line by name, function and description; gives its parser."""


def add_checkpoint(sub: argparse.ArgumentParser) -> None:
    """Adds what is exported, and where to."""
    sub.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder in diffusers layout, .safetensors file, or Hugging Face repository",
    )
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("--variant", choices=("kv", "plain"), help="default: what CHECKPOINT says")
    sub.add_argument("--base", metavar="FOLDER|REPOSITORY", help="single file: the other parts")
    sub.add_argument(
        "--allow-zeros", action="store_true", help="take weights that hold nothing but zeros"
    )


def add_backend(sub: argparse.ArgumentParser) -> None:
    """Adds what runs artifacts."""
    sub.add_argument("--backend", default="auto", help="auto, onnxruntime, tensorrt or torch")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the backend's own)")
    sub.add_argument("--threads", type=int, help="CPU threads")


def add_pipeline(sub: argparse.ArgumentParser) -> None:
    """Adds what a pipeline is opened with; see `pipeline_options`."""
    sub.add_argument(
        "--matte",
        type=_matte,
        default="white",
        metavar="COLOUR",
        help="under transparent references; or none",
    )
    add_backend(sub)
    sub.add_argument("--precision", help="a quantized one: fp8, nvfp4 or fp8-weight-only")
    sub.add_argument("--kv-dtype", choices=("fp8",), help="reference K/V in fp8")
    sub.add_argument("--attention", choices=("fp8",), help="attention and reference K/V in fp8")


def pipeline_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `KleinKVPipeline.from_pretrained` that `add_pipeline` added."""
    names = ("backend", "device", "threads", "precision", "kv_dtype", "attention", "matte")
    return {name: getattr(args, name) for name in names}


def add_lora(sub: argparse.ArgumentParser, what: str) -> None:
    """Adds `--lora`; what is done with the adapters."""
    sub.add_argument(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help=f"{what}; again for more, weight -4 to 4 (1)",
    )


def add_samples(sub: argparse.ArgumentParser, count: int) -> None:
    """Adds the options of `klein_kv.export.checks.samples`, with a default number of requests."""
    sub.add_argument("--samples", type=int, default=count, help=f"requests to run ({count})")
    sub.add_argument("--images", type=Path, metavar="DIR", help="their references")
    sub.add_argument("--prompts", type=Path, metavar="FILE", help="their prompts, one per line")
    sub.add_argument("--size", type=size, metavar="WxH", help="their output (512x512)")


def layers(text: str) -> tuple[int, ...]:
    """Hidden states to read: I,J,..."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of layers, expected for example 9,18,27"
        ) from None


def size(text: str) -> tuple[int, int]:
    """WxH in pixels."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected for example 1024x1024")
    return int(width), int(height)


def gigabytes(text: str) -> int:
    """GB, as bytes."""
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of gigabytes, expected for example 24"
        ) from None


def _matte(text: str) -> str | None:
    """A colour, or none."""
    return None if text == "none" else text


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT."""
    file, colon, weight = text.rpartition(":")
    if not colon or "." not in file:  # no weight; or a drive's letter
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not -4 <= number <= 4:
        raise argparse.ArgumentTypeError(
            f"the weight of {file} is {weight!r}, expected a number of -4 to 4"
        )
    return Path(file), number
