"""`klein-kv generate`: images as PNG, JPEG or WebP files."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_kv.cli.arguments import AddVerb, Result, add_lora, add_pipeline, pipeline_options
from klein_kv.errors import RequestError

if TYPE_CHECKING:
    from klein_kv.runtime.pipeline import KleinKVPipeline

__all__ = ["add_generate"]

_log = logging.getLogger(__name__)

_STANDARD_OUTPUT = Path("-")


def add_generate(add: AddVerb) -> None:
    """Adds `klein-kv generate`."""
    sub = add("generate", _generate, "Make images from prompts and reference images.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    texts = sub.add_mutually_exclusive_group(required=True)
    texts.add_argument("-p", "--prompt")
    texts.add_argument("--prompts", type=Path, metavar="FILE", help="one per line, an image each")
    sub.add_argument("-r", "--reference", action="append", type=Path, default=[], metavar="IMAGE")
    sub.add_argument("--init", type=Path, metavar="IMAGE", help="the image to change")
    sub.add_argument("--mask", type=Path, metavar="IMAGE", help="white where --init changes")
    sub.add_argument("--strength", type=float, help="how much of --init is made anew, to 1 (0.8)")
    sub.add_argument(
        "--padding-mask-crop",
        type=int,
        metavar="PIXELS",
        help="work on the region of --mask alone, and so many pixels around it",
    )
    sub.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("out.png"),
        help="a name in .png, .jpg or .webp; - for standard output, in PNG (out.png)",
    )
    sub.add_argument("--quality", type=int, default=95, help="of .jpg and .webp, 20 to 99 (95)")
    sub.add_argument("--height", type=int, help="default: --init's, a reference's, or 1024")
    sub.add_argument("--width", type=int)
    sub.add_argument("--steps", type=int, default=4)
    sub.add_argument("--seed", type=int, help="default: a new one, written into the image")
    sub.add_argument("--num-images", type=int, default=1, help="of each prompt")
    sub.add_argument(
        "--max-megapixels", type=int, metavar="N", help="of a reference's file (default 178)"
    )
    add_lora(sub, "an adapter to merge in")
    add_pipeline(sub)
    sub.add_argument("--no-metadata", action="store_true", help="leave prompt and seed out")


def _generate(args: argparse.Namespace) -> Result:
    from PIL import Image
    from tqdm import tqdm

    from klein_kv.artifacts.pixels import load_image
    from klein_kv.runtime.inpaint_pipeline import KleinKVInpaintPipeline
    from klein_kv.runtime.inputs.noise import random_seed
    from klein_kv.runtime.inputs.prompts import read_prompts
    from klein_kv.runtime.outputs.metadata import ImageParameters, save_image, write_image

    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    if not prompts[0].strip():
        raise RequestError("the prompt is empty, expected a text after -p")
    paths = _paths(args, len(prompts) * args.num_images)
    if args.max_megapixels is not None:
        Image.MAX_IMAGE_PIXELS = args.max_megapixels * 500_000  # PIL refuses twice as many
    images = [load_image(path, args.matte) for path in args.reference]
    change = _change(args)
    seed = random_seed() if args.seed is None else args.seed
    pipe = _open(args)
    request: dict[str, Any] = {"image": images or None}
    if change:
        pipe = KleinKVInpaintPipeline.from_pipe(pipe)
        request = {"image_reference": images or None, **change}
    several = len(prompts) > 1
    if several:  # one bar over all of them in place of one each
        pipe.set_progress_bar_config(disable=True)
    loras = [f"{path.name}:{weight:g}" for path, weight in args.lora]
    left = iter(paths)
    for prompt in tqdm(prompts, unit="prompt", disable=not several):
        result = pipe(
            prompt=prompt,
            **request,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            num_images_per_prompt=args.num_images,
            seed=seed,
        )
        assert not isinstance(result, tuple)  # noqa: S101 - return_dict is True
        if not several:
            _log.info("%s", pipe.timings.to_text())
        for image in result.images:
            parameters = ImageParameters(
                prompt=prompt,
                seed=seed,
                steps=args.steps,
                width=image.width,
                height=image.height,
                references=len(images) + bool(change),
                strength=change.get("strength"),
                model=" + ".join([pipe.manifest.model_id, *loras]),
                model_digest=pipe.manifest.graphs_digest(pipe.graphs),
            )
            known = None if args.no_metadata else parameters
            if args.out == _STANDARD_OUTPUT:
                write_image(image, sys.stdout.buffer, parameters=known)
                return {}, "", 0
            save_image(image, next(left), known, args.quality)
    value = {
        "images": [str(path) for path in paths],
        "seed": seed,
        "width": image.width,
        "height": image.height,
        "timings": pipe.timings.to_dict(),
    }
    return value, "\n".join(str(path) for path in paths), 0


def _change(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of an edit that starts from an image; none without one."""
    from klein_kv.artifacts.pixels import load_image

    if args.init is None:
        for name in ("mask", "strength", "padding_mask_crop"):
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                raise RequestError(f"{option} belongs to --init, the image that is to be changed")
        return {}
    return {
        "image": load_image(args.init, args.matte),
        "mask_image": None if args.mask is None else load_image(args.mask, "black"),
        "strength": 0.8 if args.strength is None else args.strength,
        "padding_mask_crop": args.padding_mask_crop,
        "overlay": True,
    }


def _paths(args: argparse.Namespace, count: int) -> list[Path]:
    """Where so many images go: numbered, if there are several."""
    from klein_kv.runtime.outputs.metadata import check_quality, image_format

    out: Path = args.out
    if out == _STANDARD_OUTPUT:
        if count > 1:
            raise RequestError(f"standard output takes one image, got {count}; name a file")
        if args.json:
            raise RequestError("--json goes to standard output too; name a file for the image")
        if sys.stdout.isatty():
            raise RequestError("standard output is a terminal, which shows no image; name a file")
        return []
    image_format(out, max(args.height or 0, args.width or 0))
    check_quality(args.quality)
    if out.is_dir():
        raise RequestError(f"output {out} is a folder, expected the name of a file")
    if not out.absolute().parent.is_dir():
        raise RequestError(f"folder {out.absolute().parent} does not exist; make it first")
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, count + 1)]


def _open(args: argparse.Namespace) -> "KleinKVPipeline":
    from klein_kv.runtime.pipeline import KleinKVPipeline

    pipe = KleinKVPipeline.from_pretrained(args.artifacts, **pipeline_options(args))
    for path, _ in args.lora:
        pipe.load_lora_weights(path)
    pipe.set_adapters(pipe.get_list_adapters().get("transformer", []), [x for _, x in args.lora])
    return pipe
