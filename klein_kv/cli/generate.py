"""`klein-kv generate`: images as PNG files."""

import argparse
import logging
from pathlib import Path

from klein_kv.cli.arguments import AddVerb, Result, add_backend, add_lora
from klein_kv.errors import RequestError

__all__ = ["add_generate"]

_log = logging.getLogger(__name__)


def add_generate(add: AddVerb) -> None:
    """Adds `klein-kv generate`."""
    sub = add("generate", _generate, "Make an image from a prompt and reference images.")
    sub.add_argument("artifacts", type=Path, metavar="ARTIFACTS")
    sub.add_argument("-p", "--prompt", required=True)
    sub.add_argument("-r", "--reference", action="append", type=Path, default=[], metavar="IMAGE")
    sub.add_argument("-o", "--out", type=Path, default=Path("out.png"), metavar="OUT.png")
    sub.add_argument("--height", type=int, help="default: the first reference's, else 1024")
    sub.add_argument("--width", type=int)
    sub.add_argument("--steps", type=int, default=4)
    sub.add_argument("--seed", type=int, help="default: a new one, written into the image")
    sub.add_argument("--num-images", type=int, default=1)
    add_lora(sub, "an adapter to merge in")
    add_backend(sub)
    sub.add_argument("--precision", help="a quantized one: fp8, nvfp4 or fp8-weight-only")
    sub.add_argument("--kv-dtype", choices=("fp8",), help="reference K/V in fp8")
    sub.add_argument("--attention", choices=("fp8",), help="attention and reference K/V in fp8")
    sub.add_argument("--no-metadata", action="store_true", help="leave prompt and seed out")


def _generate(args: argparse.Namespace) -> Result:
    from klein_kv.artifacts.pixels import load_image
    from klein_kv.runtime.inputs.noise import random_seed
    from klein_kv.runtime.outputs.metadata import ImageParameters, save_png
    from klein_kv.runtime.pipeline import KleinKVPipeline

    if not args.prompt.strip():
        raise RequestError("the prompt is empty, expected a text after -p")
    if args.out.suffix.lower() != ".png":
        raise RequestError(f"output is {args.out}, expected a name that ends in .png")
    if args.out.is_dir():
        raise RequestError(f"output {args.out} is a folder, expected the name of a file")
    if not args.out.absolute().parent.is_dir():
        raise RequestError(f"folder {args.out.absolute().parent} does not exist; make it first")
    images = [load_image(path) for path in args.reference]
    seed = random_seed() if args.seed is None else args.seed
    pipe = KleinKVPipeline.from_pretrained(
        args.artifacts,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        kv_dtype=args.kv_dtype,
        precision=args.precision,
        attention=args.attention,
    )
    names = []
    for path, _ in args.lora:
        pipe.load_lora_weights(path)
        names += pipe.get_active_adapters()
    if names:
        pipe.set_adapters(names, [weight for _, weight in args.lora])
    result = pipe(
        prompt=args.prompt,
        image=images or None,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        num_images_per_prompt=args.num_images,
        seed=seed,
    )
    assert not isinstance(result, tuple)  # noqa: S101 - return_dict is True
    _log.info("%s", pipe.timings.to_text())
    paths = [args.out]
    if len(result.images) > 1:
        ends = range(1, len(result.images) + 1)
        paths = [args.out.with_name(f"{args.out.stem}-{i}{args.out.suffix}") for i in ends]
    for image, path in zip(result.images, paths, strict=True):
        parameters = ImageParameters(
            prompt=args.prompt,
            seed=seed,
            steps=args.steps,
            width=image.width,
            height=image.height,
            references=len(images),
            model=pipe.manifest.model_id,
            model_digest=pipe.manifest.graphs_digest(pipe.graphs),
        )
        save_png(image, path, None if args.no_metadata else parameters)
    value = {
        "images": [str(path) for path in paths],
        "seed": seed,
        "width": result.images[0].width,
        "height": result.images[0].height,
        "timings": pipe.timings.to_dict(),
    }
    return value, "\n".join(str(path) for path in paths), 0
